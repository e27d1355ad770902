"""Families of loss changes that the coverage tests draw from."""


def rare_damage(rng, shape):
    """Most examples hardly change, 5 % get worse: mean 0.05, skewness about 7."""
    damaged = rng.random(shape) < 0.05
    return rng.normal(0, 0.02, shape) + damaged * rng.exponential(1.0, shape)


def both_tails(rng, shape):
    """A tenth of the examples change, for better or worse: mean 0, kurtosis about 40."""
    return rng.laplace(size=shape) * (rng.random(shape) < 0.1)


def heavy_right(rng, shape):
    """Like int4 changes: small noise and a lognormal tail that few samples catch; mean 0.0609."""
    damaged = rng.random(shape) < 0.03
    return rng.normal(0, 0.02, shape) + damaged * rng.lognormal(0.0, 1.2, shape)

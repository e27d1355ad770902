import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.numerics import (
    BITS,
    ESTIMATORS,
    HISTOGRAM_BINS,
    RangeStats,
    clip_factor,
    code_range,
    estimate_range,
    fake_quant,
    from_range,
    histogram,
)

SIZE = 20_000
FORMATS = [(bits, symmetric) for bits in BITS for symmetric in (True, False)]


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32)))


def sample(name):
    rng = np.random.default_rng(sum(name.encode()))
    normal = rng.normal(size=SIZE)
    outlier = normal.copy()
    outlier[0] = 40
    tensors = {
        "normal": normal,
        "laplace": rng.laplace(size=SIZE),
        "relu": np.maximum(normal, 0),
        "gelu": gelu(2 * normal),
        "shifted": normal + 3,
        "outlier": outlier,
        "uniform": rng.uniform(size=SIZE),
        "negative": -np.abs(normal),
        "huge": normal * 1e37,
        "small": normal * 1e-30,
    }
    return jnp.asarray(tensors[name], jnp.float32)


NAMES = ["normal", "laplace", "relu", "gelu", "shifted", "outlier", "uniform", "negative"]
NAMES += ["huge", "small"]


@jax.jit
def stats_of(x):
    return RangeStats(x.min(), x.max(), histogram(x, x.min(), x.max()))


def mean_square_error(x, qp):
    error = np.float64(fake_quant(x, qp)) - np.float64(x)
    return np.mean(np.square(error))


def ends(qp):
    qmin, qmax = code_range(qp.bits, qp.symmetric)
    zero_point = int(qp.zero_point)
    return float(qp.scale) * (qmin - zero_point), float(qp.scale) * (qmax - zero_point)


def test_histogram_against_numpy():
    x = np.random.default_rng(0).integers(0, 64, size=(20, 50)).astype(np.float32) + 0.5
    counts = jax.jit(histogram, static_argnums=3)(jnp.asarray(x), 0.0, 64.0, 64)
    expected, _ = np.histogram(x, bins=64, range=(0, 64))
    assert counts.dtype == jnp.float32
    np.testing.assert_array_equal(counts, expected)


def test_histogram_edge_cases():
    x = jnp.array([-9.0, 0.0, 1.0, 9.0], jnp.bfloat16)
    counts = histogram(x, jnp.float32(0), jnp.float32(1))
    assert counts.shape == (HISTOGRAM_BINS,)
    assert float(counts[0]) == 2 and float(counts[-1]) == 2
    constant = histogram(jnp.full(7, 3.0), jnp.float32(3), jnp.float32(3))
    assert float(constant[0]) == 7 == float(constant.sum())
    extreme = jnp.array([-3e38, 0.0, 3e38])
    np.testing.assert_array_equal(histogram(extreme, extreme[0], extreme[2], 3), [1, 1, 1])
    assert float(histogram(jnp.zeros((0,)), jnp.float32(0), jnp.float32(1)).sum()) == 0


@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_minmax_covers_everything(bits, symmetric):
    x = sample("gelu")
    expected = from_range(x.min(), x.max(), bits=bits, symmetric=symmetric)
    stats = RangeStats(x.min(), x.max(), None)
    qp = estimate_range(stats, estimator="minmax", bits=bits, symmetric=symmetric)
    np.testing.assert_array_equal(qp.scale, expected.scale)
    np.testing.assert_array_equal(qp.zero_point, expected.zero_point)


@pytest.mark.parametrize("bits, symmetric", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_mse_is_no_worse_than_minmax(name, bits, symmetric):
    x = sample(name)
    stats = stats_of(x)
    errors = {
        estimator: mean_square_error(
            x, estimate_range(stats, estimator=estimator, bits=bits, symmetric=symmetric)
        )
        for estimator in ("minmax", "mse")
    }
    # The histogram knows values to half a bin: a percent of what 8 bits lose.
    assert errors["mse"] <= 1.01 * errors["minmax"]
    if bits == 4 and name in ("normal", "laplace", "outlier", "gelu"):
        assert errors["mse"] < 0.8 * errors["minmax"]


@pytest.mark.parametrize("name", ["normal", "laplace", "outlier", "relu", "gelu"])
def test_mse_is_near_the_best_of_all_ranges(name):
    x = sample(name)
    qp = estimate_range(stats_of(x), estimator="mse", bits=4, symmetric=False)
    lo, hi = jnp.meshgrid(x.min() * jnp.linspace(0, 1, 40), x.max() * jnp.linspace(0.02, 1, 60))
    grids = from_range(lo.ravel(), hi.ravel(), bits=4, symmetric=False)
    every = jax.lax.map(lambda qp: jnp.mean(jnp.square(fake_quant(x, qp) - x)), grids)
    assert mean_square_error(x, qp) <= 1.05 * float(every.min())


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_against_numpy(percentile):
    x = sample("laplace")
    qp = estimate_range(
        stats_of(x), estimator="percentile", bits=8, symmetric=False, percentile=percentile
    )
    # One order statistic to either side, one bin, and half a step for the zero point.
    slack = float(x.max() - x.min()) / HISTOGRAM_BINS + float(qp.scale) / 2
    for end, rank in zip(ends(qp), (100 - percentile, percentile), strict=True):
        below, above = np.percentile(x, [rank - 100 / SIZE, rank + 100 / SIZE])
        assert below - slack <= end <= above + slack


def test_percentile_100_is_minmax():
    stats = stats_of(sample("normal"))
    options = {"bits": 8, "symmetric": False}
    full = estimate_range(stats, estimator="percentile", percentile=100, **options)
    minmax = estimate_range(stats, estimator="minmax", **options)
    np.testing.assert_array_equal(full.scale, minmax.scale)
    for percentile in (50, 100.1):
        with pytest.raises(ValueError, match="more than 50"):
            estimate_range(stats, estimator="percentile", percentile=percentile, **options)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("estimator, name", [("aciq_gauss", "normal"), ("aciq_laplace", "laplace")])
def test_aciq_two_sided(estimator, name, bits):
    x = sample(name)
    distribution = estimator.removeprefix("aciq_")
    alpha = clip_factor(distribution, bits)  # the samples have unit spread
    qp = estimate_range(stats_of(x), estimator=estimator, bits=bits, symmetric=True)
    expected = min(alpha, float(jnp.abs(x).max()))
    np.testing.assert_allclose(ends(qp)[1], expected, rtol=0.02)
    shifted = estimate_range(stats_of(x + 2), estimator=estimator, bits=bits, symmetric=False)
    lo, hi = max(2 - alpha, float(x.min()) + 2), min(2 + alpha, float(x.max()) + 2)
    slack = 0.02 * alpha + float(shifted.scale) / 2  # the zero point is rounded
    np.testing.assert_allclose(ends(shifted), (lo, hi), atol=slack)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("estimator, name", [("aciq_gauss", "normal"), ("aciq_laplace", "laplace")])
def test_aciq_one_sided_does_not_depend_on_sparsity(estimator, name, sparsity, symmetric):
    x = jnp.abs(sample(name))
    x = jnp.where(jnp.arange(SIZE) < int(sparsity * SIZE), jnp.float32(0), x)
    qp = estimate_range(stats_of(x), estimator=estimator, bits=4, symmetric=symmetric)
    alpha = clip_factor(estimator.removeprefix("aciq_"), 4 if symmetric else 5)
    np.testing.assert_allclose(ends(qp)[1], min(alpha, float(x.max())), rtol=0.03)
    assert symmetric or ends(qp)[0] == 0.0


@pytest.mark.parametrize("estimator, name", [("aciq_gauss", "normal"), ("aciq_laplace", "laplace")])
@pytest.mark.parametrize("one_sided", [True, False])
def test_aciq_is_near_the_least_error_for_its_density(estimator, name, one_sided):
    x = sample(name)
    x = jnp.maximum(x, jnp.float32(0)) if one_sided else x
    stats = stats_of(x)
    aciq = estimate_range(stats, estimator=estimator, bits=4, symmetric=False)
    best = estimate_range(stats, estimator="mse", bits=4, symmetric=False)
    assert mean_square_error(x, aciq) <= 1.15 * mean_square_error(x, best)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-40])
def test_constants_and_zeros(estimator, value):
    x = jnp.full(100, value, jnp.float32)
    for bits, symmetric in FORMATS:
        qp = estimate_range(stats_of(x), estimator=estimator, bits=bits, symmetric=symmetric)
        assert np.isfinite(float(qp.scale)) and float(qp.scale) > 0
        np.testing.assert_allclose(fake_quant(x, qp), x, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_histogram_falls_back_to_minmax(estimator):
    stats = RangeStats(jnp.float32(-1), jnp.float32(2), jnp.zeros(HISTOGRAM_BINS))
    qp = estimate_range(stats, estimator=estimator, bits=8, symmetric=False)
    np.testing.assert_allclose(qp.scale, 3 / 255, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_leading_axes_are_independent_tensors(estimator, symmetric):
    each = [stats_of(sample(name)) for name in ("normal", "relu", "gelu", "outlier")]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 2, *leaves[0].shape), *each)

    def estimate(stats):
        return estimate_range(stats, estimator=estimator, bits=4, symmetric=symmetric)

    alone = [estimate(stats) for stats in each]
    jitted = jax.jit(estimate)(stack)
    mapped = jax.vmap(jax.vmap(estimate))(stack)
    for together in (estimate(stack), jitted, mapped):
        assert together.scale.shape == (2, 2)
        scales = np.array([float(qp.scale) for qp in alone])
        np.testing.assert_allclose(together.scale.ravel(), scales, rtol=1e-5)
        zero_points = [int(qp.zero_point) for qp in alone]
        np.testing.assert_array_equal(together.zero_point.ravel(), zero_points)


def test_errors_say_what_to_do():
    stats = RangeStats(jnp.float32(-1), jnp.float32(2), None)
    for estimator in ESTIMATORS[1:]:
        with pytest.raises(ValueError, match="two passes"):
            estimate_range(stats, estimator=estimator, bits=8, symmetric=False)
    with pytest.raises(ValueError, match="expected one of minmax"):
        estimate_range(stats, estimator="kl", bits=8, symmetric=False)
    with pytest.raises(ValueError, match="8 or 4"):
        estimate_range(stats, estimator="minmax", bits=2, symmetric=False)

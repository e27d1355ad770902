import pytest
from scipy import integrate, optimize, stats

from jaxrmils.numerics import clip_factor

DENSITIES = {"gauss": stats.norm.pdf, "laplace": stats.laplace.pdf}


def mean_square_error(c, distribution, bits, one_sided=False):
    """Clipping by numeric integration, plus uniform noise step^2 / 12."""
    density = DENSITIES[distribution]
    tail, _ = integrate.quad(lambda x: (x - c) ** 2 * density(x), c, 60, epsabs=0, limit=200)
    step = (c if one_sided else 2 * c) / 2**bits
    # Given x > 0, the tail has the weight of both tails of the whole density.
    return 2 * tail + step**2 / 12


def best_clip(distribution, bits, one_sided=False):
    result = optimize.minimize_scalar(
        mean_square_error,
        bounds=(0.5, 15),
        args=(distribution, bits, one_sided),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return result.x


@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_factors_minimize_the_error(distribution, bits):
    assert clip_factor(distribution, bits) == pytest.approx(best_clip(distribution, bits), abs=2e-3)


@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [4, 8])
def test_half_a_density_is_one_more_bit(distribution, bits):
    half = best_clip(distribution, bits, one_sided=True)
    assert clip_factor(distribution, bits + 1) == pytest.approx(half, abs=2e-3)


@pytest.mark.parametrize(
    "distribution, published",
    [
        ("laplace", {2: 2.83, 3: 3.89, 4: 5.03, 8: 9.89}),
        ("gauss", {2: 1.71, 3: 2.15, 4: 2.55, 8: 3.92}),
    ],
)
def test_published_factors(distribution, published):
    # Published to two digits, some truncated, some from a looser minimization.
    for bits, factor in published.items():
        assert clip_factor(distribution, bits) == pytest.approx(factor, abs=0.0101)


def test_unknown_distribution():
    with pytest.raises(ValueError, match="'gauss' or 'laplace'"):
        clip_factor("uniform", 4)

"""From what calibration saw of an activation to its grid."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxrmils.numerics.aciq import Distribution, clip_factor
from jaxrmils.numerics.exact import divide_exactly
from jaxrmils.numerics.quant_params import QuantParams, fake_quant, from_range

HISTOGRAM_BINS = 2048

Estimator = Literal["minmax", "percentile", "mse", "aciq_gauss", "aciq_laplace"]
"""How a range is chosen: all that was seen, all but a share of it, the range of least square
error, or ACIQ's clipping value (arXiv:1810.05723) for a Gaussian or a Laplace density."""

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["minimum", "maximum", "histogram"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class RangeStats:
    """What calibration saw of a tensor, or of several (leading axes, one per layer of a stack).

    Attributes:
        minimum: float32 [...], the smallest value.
        maximum: float32 [...], the largest value.
        histogram: float32 [..., bins], counts over equal bins of [minimum, maximum], or None
            before the second calibration pass.

    Example:
        >>> import jax.numpy as jnp
        >>> RangeStats(jnp.float32(-1), jnp.float32(2), None).histogram is None
        True
    """

    minimum: Float32[Array, "..."]
    maximum: Float32[Array, "..."]
    histogram: Float32[Array, "... bins"] | None


def histogram(
    x: Float[Array, "..."],
    minimum: Float[Array, ""],
    maximum: Float[Array, ""],
    bins: int = HISTOGRAM_BINS,
) -> Float32[Array, "bins"]:
    """Counts the elements of `x` in equal bins of `[minimum, maximum]`; safe inside `jit`.

    Args:
        x: any shape, any float dtype, without NaN (its bin is unspecified).
        minimum: the low end.
        maximum: the high end. Values beyond the ends count in the first or the last bin; where
            both ends are equal, so does everything (the first).
        bins: how many bins.

    Returns:
        float32 counts, exact below 2^24 in a bin.

    Example:
        >>> import jax.numpy as jnp
        >>> print(histogram(jnp.array([0.0, 0.1, 0.9, 1.0]), jnp.float32(0), jnp.float32(1), 4))
        [2. 0. 0. 2.]
    """
    # Halves, since maximum - minimum may overflow.
    half, low, high = (jnp.asarray(v, jnp.float32) * 0.5 for v in (x, minimum, maximum))
    width = jnp.where(high > low, high - low, jnp.float32(1))
    position = jnp.floor(divide_exactly(half - low, width) * float(bins))
    index = jnp.clip(position, 0.0, float(bins - 1)).astype(jnp.int32)
    return jnp.bincount(index.ravel(), length=bins).astype(jnp.float32)


def estimate_range(
    stats: RangeStats,
    *,
    estimator: Estimator,
    bits: int,
    symmetric: bool,
    percentile: float = 99.99,
) -> QuantParams:
    """Chooses a range, and makes its grid.

    * "minmax": `[minimum, maximum]`.
    * "percentile": from the `100 - percentile` to the `percentile` quantile of the histogram.
    * "mse": the range of least mean square quantization error, clipping included, over the
      histogram; searched among ranges with shrunken ends on the grid that `from_range` makes.
    * "aciq_gauss", "aciq_laplace": `mean - alpha` to `mean + alpha` where `alpha` is ACIQ's
      `clip_factor` times the histogram's standard deviation, or mean absolute deviation. A
      one-sided tensor (`minimum >= 0`, after a ReLU) is taken as the positive half of a density
      about 0, and its range is `[0, alpha]`: see `_aciq_range`.

    No estimator goes beyond what was seen, except to include 0 as `from_range` does.

    Args:
        stats: what calibration saw; leading axes are independent tensors.
        estimator: one of `ESTIMATORS`.
        bits: 8 or 4.
        symmetric: whether the grid does without a zero point.
        percentile: in (50, 100]; only for "percentile".

    Returns:
        `QuantParams` whose leaves have the shape of `stats.minimum`: one grid per tensor.

    Raises:
        ValueError: unknown estimator, unusable percentile or bits, or no histogram where one is
            needed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.laplace(jax.random.key(0), (10_000,))
        >>> stats = RangeStats(x.min(), x.max(), histogram(x, x.min(), x.max()))
        >>> for estimator in ("minmax", "mse", "aciq_laplace"):
        ...     qp = estimate_range(stats, estimator=estimator, bits=4, symmetric=True)
        ...     print(estimator, f"{7 * qp.scale:.1f}")
        minmax 9.3
        mse 4.6
        aciq_laplace 5.1
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
    if estimator == "minmax":
        return from_range(stats.minimum, stats.maximum, bits=bits, symmetric=symmetric)
    counts = stats.histogram
    if counts is None:
        raise ValueError(
            f"estimator {estimator!r} needs a histogram and the statistics have none; calibrate "
            "with two passes, or use 'minmax'"
        )
    match estimator:
        case "percentile":
            lo, hi = _percentile_range(stats, counts, percentile)
        case "mse":
            lo, hi = _mse_range(stats, counts, bits, symmetric)
        case "aciq_gauss":
            lo, hi = _aciq_range(stats, counts, "gauss", bits, symmetric)
        case "aciq_laplace":
            lo, hi = _aciq_range(stats, counts, "laplace", bits, symmetric)
    return from_range(lo, hi, bits=bits, symmetric=symmetric)


def _between(minimum: Array, maximum: Array, position: Array) -> Array:
    """The point at `position` in [0, 1]; maximum - minimum, which may overflow, is not formed."""
    return minimum * (1.0 - position) + maximum * position


def _weighted_values(stats: RangeStats, counts: Array) -> tuple[Array, Array, Array]:
    """What the histogram stands for: weights [..., bins] that sum to 1, values [..., bins], unit.

    Values are the bins' centres, in units of the largest magnitude (`unit` [..., 1]) so that their
    squares neither overflow nor vanish. The bin that holds 0 stands for 0 itself: after a ReLU it
    is mostly exact zeros, which every grid represents without error.
    """
    bins = counts.shape[-1]
    minimum, maximum = stats.minimum[..., None], stats.maximum[..., None]
    unit = jnp.maximum(jnp.abs(minimum), jnp.abs(maximum))
    unit = jnp.where(unit >= jnp.finfo(jnp.float32).smallest_normal, unit, jnp.float32(1))
    edges = _between(minimum / unit, maximum / unit, jnp.linspace(0, 1, bins + 1))
    left, right = edges[..., :-1], edges[..., 1:]
    values = jnp.where((left <= 0) & (right >= 0), jnp.float32(0), (left + right) * 0.5)
    return _normalized(counts), values, unit


def _normalized(counts: Array) -> Array:
    total = jnp.sum(counts, axis=-1, keepdims=True)
    return counts / jnp.where(total > 0, total, jnp.float32(1))


def _percentile_range(stats: RangeStats, counts: Array, percentile: float) -> tuple[Array, Array]:
    """Both quantiles, each counted from its own end so that a small tail keeps its precision."""
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; expected more than 50, at most 100")
    tail = 1 - percentile / 100
    lo = _between(stats.minimum, stats.maximum, _tail_position(counts, tail))
    from_top = _tail_position(counts[..., ::-1], tail)
    return lo, _between(stats.maximum, stats.minimum, from_top)


def _tail_position(counts: Array, tail: float) -> Array:
    """Where in [0, 1] a share `tail` of the mass is passed, linear inside a bin."""
    passed = jnp.cumsum(counts, axis=-1)
    target = tail * passed[..., -1:]
    index = jnp.sum(passed < target, axis=-1, keepdims=True)
    mass = jnp.take_along_axis(counts, index, axis=-1)
    before = jnp.take_along_axis(passed, index, axis=-1) - mass
    inside = (target - before) / jnp.where(mass > 0, mass, jnp.float32(1))
    position = index.astype(jnp.float32) + jnp.clip(inside, 0.0, 1.0)
    return jnp.squeeze(position, axis=-1) / counts.shape[-1]


@functools.partial(jax.jit, static_argnames=("bits", "symmetric"))
def _mse_range(stats: RangeStats, counts: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Line searches over shrunken ends: both together, then, for an affine grid, each in turn.

    Only together, they would cut the dense short side of a GELU to spare its long side. The turns
    are taken twice: the first time, an end is still tied to where an outlier left the other. Each
    search holds the current range, so the error never grows from one to the next.
    """
    weights, values, unit = _weighted_values(stats, counts)
    # Equal ratios: 5 % apart, fine for an optimum as flat as this one; down to 1/30 of the range.
    shrink = jnp.asarray(np.geomspace(1, 1 / 30, 64), jnp.float32)

    def error(lo: Array, hi: Array) -> Array:
        ends = lo[..., None] / unit, hi[..., None] / unit
        grid = from_range(*ends, bits=bits, symmetric=symmetric)
        return jnp.sum(weights * jnp.square(fake_quant(values, grid) - values), axis=-1)

    def search(lo_shrink: Array, hi_shrink: Array) -> tuple[Array, Array]:
        """The best of candidates along axis 0."""
        candidates = jnp.broadcast_arrays(lo_shrink, hi_shrink)
        errors = jax.lax.map(
            lambda c: error(c[0] * stats.minimum, c[1] * stats.maximum), tuple(candidates)
        )
        index = jnp.argmin(errors, axis=0)[None]
        lo_best, hi_best = (jnp.take_along_axis(c, index, axis=0) for c in candidates)
        return lo_best, hi_best

    every = jnp.broadcast_to(
        shrink.reshape(-1, *(1 for _ in stats.minimum.shape)), (len(shrink), *stats.minimum.shape)
    )
    lo_shrink, hi_shrink = search(every, every)
    for _ in range(0 if symmetric else 2):
        lo_shrink, hi_shrink = search(every, hi_shrink)
        lo_shrink, hi_shrink = search(lo_shrink, every)
    return lo_shrink[0] * stats.minimum, hi_shrink[0] * stats.maximum


def _aciq_range(
    stats: RangeStats, counts: Array, distribution: Distribution, bits: int, symmetric: bool
) -> tuple[Array, Array]:
    """ACIQ's range (arXiv:1810.05723, section 3), within the observed one.

    Two-sided: mean -+ c(bits) * spread, spread about the mean.

    One-sided: the tensor is the positive half of a density about 0. Given x > 0, that half has the
    moments of the whole, E x^2 = sigma^2 and E x = b, however many elements the ReLU has set to 0;
    those carry no error and are left out, by counting in the first bin only as much as in the
    second. An affine grid spends 2^bits levels on [0, alpha], so c(bits + 1) applies; a symmetric
    one wastes half of them on negative numbers, so c(bits).
    """
    weights, values, unit = _weighted_values(stats, counts)

    def spread(weights: Array, deviation: Array) -> Array:
        if distribution == "gauss":
            return jnp.sqrt(jnp.sum(weights * jnp.square(deviation), axis=-1))
        return jnp.sum(weights * jnp.abs(deviation), axis=-1)

    mean = jnp.sum(weights * values, axis=-1)
    about_mean = spread(weights, values - mean[..., None])
    positive = counts.at[..., 0].set(jnp.minimum(counts[..., 0], counts[..., 1]))
    about_zero = spread(_normalized(positive), values)

    one_sided = stats.minimum >= 0
    levels = bits if symmetric else bits + 1
    alpha = jnp.where(
        one_sided,
        clip_factor(distribution, levels) * about_zero,
        clip_factor(distribution, bits) * about_mean,
    )
    centre = jnp.where(one_sided, jnp.float32(0), mean)
    lo = jnp.maximum(stats.minimum, (centre - alpha) * unit[..., 0])
    hi = jnp.minimum(stats.maximum, (centre + alpha) * unit[..., 0])
    # No spread (a constant, or an empty histogram): nothing to clip.
    return jnp.where(alpha > 0, lo, stats.minimum), jnp.where(alpha > 0, hi, stats.maximum)

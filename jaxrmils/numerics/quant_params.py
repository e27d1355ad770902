"""Scale and zero point, and the quantizer they define.

Real numbers and codes are tied by `x ~ scale * (code - zero_point)`; see `formats` for the
convention. Everything here is computed in float32, whatever the dtype of the tensor.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32, PRNGKeyArray

from jaxrmils.numerics.exact import divide_exactly
from jaxrmils.numerics.formats import ROUNDINGS, Rounding, code_range

# In steps. The quotient of a grid value is off by at most 255 * 2^-23 < 2^-14.
_ON_GRID = 2.0**-14


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point"],
    meta_fields=["bits", "symmetric"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantParams:
    """One integer grid, or several that share a format (one per channel or per layer).

    Attributes:
        scale: the step, float32; broadcasts against the tensor.
        zero_point: the code of 0, int32, same shape as `scale`; all zeros where symmetric.
        bits: 8 or 4 (static).
        symmetric: whether the format has no zero point (static).

    Example:
        >>> import jax.numpy as jnp
        >>> QuantParams(jnp.float32(0.5), jnp.int32(0), bits=8, symmetric=True).bits
        8
    """

    scale: Float32[Array, "..."]
    zero_point: Int32[Array, "..."]
    bits: int
    symmetric: bool


def from_range(
    lo: Float[Array, "..."], hi: Float[Array, "..."], *, bits: int, symmetric: bool
) -> QuantParams:
    """The grid that covers `[lo, hi]` with zero exactly on it.

    The range is first widened to hold 0. Symmetric: `scale = max(-lo, hi) / qmax`. Affine:
    `scale = (hi - lo) / (qmax - qmin)` and `zero_point = round(qmin - lo / scale)`.

    The scale is always a finite, normal float32. A range so small that its scale would be zero or
    subnormal (constant zeros, a dead channel), or a NaN, gets scale 1 and zero point 0: processors
    flush subnormals to zero, and 0 / 0 is NaN. Bounds beyond half of the largest float32 are
    taken as that half, so that no code dequantizes to infinity.

    Args:
        lo: low ends, any shape.
        hi: high ends, same shape.
        bits: 8 or 4.
        symmetric: whether to do without a zero point.

    Returns:
        `QuantParams` whose leaves have the shape of `lo`.

    Raises:
        ValueError: `bits` is not 8 or 4.

    Example:
        >>> import jax.numpy as jnp
        >>> qp = from_range(jnp.float32(-0.5), jnp.float32(1.0), bits=4, symmetric=False)
        >>> print(qp.scale, qp.zero_point)
        0.1 -3
        >>> print(from_range(jnp.float32(0), jnp.float32(0), bits=8, symmetric=True).scale)
        1.0
    """
    qmin, qmax = code_range(bits, symmetric)
    limit = float(jnp.finfo(jnp.float32).max) / 2
    lo = jnp.clip(jnp.asarray(lo, jnp.float32), -limit, 0.0)
    hi = jnp.clip(jnp.asarray(hi, jnp.float32), 0.0, limit)
    # The limit keeps hi - lo finite.
    span, steps = (jnp.maximum(-lo, hi), qmax) if symmetric else (hi - lo, qmax - qmin)
    scale = divide_exactly(span, jnp.float32(steps))
    usable = scale >= jnp.finfo(jnp.float32).smallest_normal  # False for NaN
    scale = jnp.where(usable, scale, jnp.float32(1))
    if symmetric:
        return QuantParams(scale, jnp.zeros(scale.shape, jnp.int32), bits, symmetric)
    zero_point = jnp.clip(jnp.round(float(qmin) - divide_exactly(lo, scale)), qmin, qmax)
    zero_point = jnp.where(usable, zero_point, jnp.float32(0)).astype(jnp.int32)
    return QuantParams(scale, zero_point, bits, symmetric)


def weight_params(
    w: Float[Array, "..."], *, bits: int, channel_axes: tuple[int, ...], group: int = 0
) -> QuantParams:
    """Symmetric grids by the largest magnitude of each channel, or of each group within it.

    Args:
        w: the weight, any float dtype.
        bits: 8 or 4.
        channel_axes: axes that keep a scale of their own (a dense kernel `[in, out]`: `(1,)`; a
            scanned stack `[layers, in, out]`: `(0, 2)`); `()` for one scale in all.
        group: how many neighbours along the last axis that is no channel share a scale; the last
            group is smaller where they do not divide it. All other axes keep scales of their own.
            0 for one scale per channel.

    Returns:
        `QuantParams` with `w.ndim` axes, of size 1 where the axis is not in `channel_axes`; with
        groups, of size ceil(length / group) along their axis and of the weight's elsewhere.
        All-zero channels have scale 1.

    Raises:
        ValueError: an axis does not exist or is named twice, groups without an axis to run along,
            or `bits` is not 8 or 4.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.array([[0.0, -1.27], [0.0, 0.5]])
        >>> print(weight_params(w, bits=8, channel_axes=(1,)).scale)
        [[1.   0.01]]
        >>> w = jnp.array([[1.27], [0.5], [-2.54]])
        >>> print(weight_params(w, bits=8, channel_axes=(1,), group=2).scale.T)
        [[0.01 0.02]]
    """
    kept = [axis + w.ndim if axis < 0 else axis for axis in channel_axes]
    if len(set(kept)) != len(kept) or not set(kept) <= set(range(w.ndim)):
        raise ValueError(
            f"channel_axes is {channel_axes} for a weight of shape {w.shape}; expected distinct "
            f"axes between {-w.ndim} and {w.ndim - 1}"
        )
    reduced = tuple(axis for axis in range(w.ndim) if axis not in kept)
    if group:
        absmax = _group_maxima(jnp.abs(w), reduced, group)
        return from_range(-absmax, absmax, bits=bits, symmetric=True)
    absmax = jnp.max(jnp.abs(w), axis=reduced, keepdims=True, initial=0)
    return from_range(-absmax, absmax, bits=bits, symmetric=True)


def _group_maxima(
    magnitudes: Float[Array, "..."], axes: tuple[int, ...], group: int
) -> Float[Array, "..."]:
    """The largest of every `group` neighbours along the last of some axes."""
    if group < 1 or not axes:
        raise ValueError(
            f"group is {group} for a weight of shape {magnitudes.shape} whose axes {axes} are no "
            "channels; expected at least 1, and an axis that groups can run along"
        )
    axis, shape = axes[-1], magnitudes.shape
    count = -(-shape[axis] // group)
    padding = [(0, count * group - n if d == axis else 0) for d, n in enumerate(shape)]
    parts = jnp.pad(magnitudes, padding).reshape(*shape[:axis], count, group, *shape[axis + 1 :])
    return jnp.max(parts, axis=axis + 1, initial=0)


def spread_groups(values: Array, shape: tuple[int, ...], group: int) -> Array:
    """Values of groups (scales), repeated for every element of a tensor of this shape.

    Args:
        values: as many axes as the tensor; one of them may be shorter than the tensor's, with a
            value for every `group` elements.
        shape: the tensor's.
        group: see `weight_params`.

    Returns:
        Values that broadcast against the tensor.

    Example:
        >>> import jax.numpy as jnp
        >>> print(spread_groups(jnp.array([1, 2]), (3,), 2))
        [1 1 2]
    """
    for axis, (count, length) in enumerate(zip(values.shape, shape, strict=True)):
        if count not in (1, length):
            values = jax.lax.slice_in_dim(
                jnp.repeat(values, group, axis=axis), 0, length, axis=axis
            )
    return values


def row_params(x: Float[Array, "..."], *, bits: int, axes: tuple[int, ...]) -> QuantParams:
    """Affine grids that cover every row from its smallest to its largest value.

    For a row r, with 0 always on the grid (see `from_range`):

        lo = min(0, min_k x[r, k])    hi = max(0, max_k x[r, k])

    Minima and maxima are exact, so a row has the same grid in every program.

    Args:
        x: the tensor, any float dtype.
        bits: 8 or 4.
        axes: those that a row runs along.

    Returns:
        `QuantParams` with `x.ndim` axes, of size 1 along `axes`.

    Raises:
        ValueError: `bits` is not 8 or 4.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.5, 2.55], [-1.0, 1.55]])
        >>> qp = row_params(x, bits=8, axes=(1,))
        >>> print(qp.scale.T, qp.zero_point.T)
        [[0.01 0.01]] [[-128  -28]]
    """
    x = jnp.asarray(x, jnp.float32)
    lo = jnp.min(x, axis=axes, keepdims=True, initial=0.0)
    hi = jnp.max(x, axis=axes, keepdims=True, initial=0.0)
    return from_range(lo, hi, bits=bits, symmetric=False)


def quantize(
    x: Float[Array, "..."],
    qp: QuantParams,
    rounding: Rounding = "nearest",
    key: PRNGKeyArray | None = None,
) -> Int8[Array, "..."]:
    """`clip(round(x / scale) + zero_point, qmin, qmax)`, in float32.

    Infinities saturate. The code of a NaN is unspecified: integers have none. A tensor that is on
    the grid already keeps its codes, under "floor" and "ceil" too: the float32 quotient
    `k * scale / scale` is not always `k`, so a value within 2^-14 steps of the grid is on it.

    Args:
        x: the tensor, any float dtype.
        qp: the grid; its leaves broadcast against `x`.
        rounding: "nearest" (half to even), "floor" or "ceil" of `x / scale`, or "stochastic" (up
            with the probability of the fractional part, so the mean is `x` inside the range).
        key: a PRNG key; needed by "stochastic", unused by the others.

    Returns:
        Codes in int8, for 4 bits too (see `packing` for two per byte).

    Raises:
        ValueError: `rounding` is unknown, or is "stochastic" without a key.

    Example:
        >>> import jax.numpy as jnp
        >>> qp = QuantParams(jnp.float32(0.5), jnp.int32(-3), bits=4, symmetric=False)
        >>> print(quantize(jnp.array([0.0, 0.7, 99.0]), qp), quantize(jnp.array([0.7]), qp, "ceil"))
        [-3 -2  7] [-1]
    """
    qmin, qmax = code_range(qp.bits, qp.symmetric)
    steps = divide_exactly(jnp.asarray(x, jnp.float32), qp.scale)
    codes = round_steps(steps, rounding, key)
    if not qp.symmetric:
        zero_point = lax.convert_element_type(qp.zero_point, jnp.float32)
        codes = lax.add(*jnp.broadcast_arrays(codes, zero_point))
    codes = lax.clamp(jnp.float32(qmin), codes, jnp.float32(qmax))
    return lax.convert_element_type(codes, jnp.int8)


def dequantize(
    codes: Int8[Array, "..."], qp: QuantParams, dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """`scale * (codes - zero_point)`, computed in float32 and cast to `dtype`.

    Args:
        codes: int8 codes.
        qp: the grid; its leaves broadcast against `codes`.
        dtype: the float dtype of the result.

    Returns:
        The real numbers that the codes stand for.

    Example:
        >>> import jax.numpy as jnp
        >>> qp = QuantParams(jnp.float32(0.5), jnp.int32(-3), bits=4, symmetric=False)
        >>> print(dequantize(jnp.array([-3, -2, 7], jnp.int8), qp))
        [0.  0.5 5. ]
    """
    steps = codes.astype(jnp.int32)
    if not qp.symmetric:
        steps = steps - qp.zero_point
    return (steps.astype(jnp.float32) * qp.scale).astype(dtype)


def fake_quant(
    x: Float[Array, "..."],
    qp: QuantParams,
    rounding: Rounding = "nearest",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """`dequantize(quantize(x))` in the dtype of `x`.

    Args:
        x: the tensor, any float dtype; computation is in float32.
        qp: the grid; its leaves broadcast against `x`.
        rounding: as for `quantize`.
        key: as for `quantize`.

    Returns:
        The tensor on the grid. In bfloat16 a grid value is itself rounded to bfloat16.

    Raises:
        ValueError: as `quantize`.

    Example:
        >>> import jax.numpy as jnp
        >>> qp = QuantParams(jnp.float32(0.5), jnp.int32(0), bits=8, symmetric=True)
        >>> fake_quant(jnp.array([0.7, -0.7], jnp.bfloat16), qp, "floor")
        Array([0.5, -1], dtype=bfloat16)
    """
    x = jnp.asarray(x)
    return dequantize(quantize(x, qp, rounding, key), qp, x.dtype)


def round_steps(
    steps: Float32[Array, "..."], rounding: Rounding, key: PRNGKeyArray | None = None
) -> Float32[Array, "..."]:
    """Quotients `x / scale` rounded to integers, still in float32; see `quantize`."""
    match rounding:
        case "nearest":
            return lax.round(steps, lax.RoundingMethod.TO_NEAREST_EVEN)
        case "floor":
            return jnp.floor(steps + _ON_GRID)
        case "ceil":
            return jnp.ceil(steps - _ON_GRID)
        case "stochastic":
            if key is None:
                raise ValueError("rounding is 'stochastic' and key is None; pass a PRNG key")
            # Comparing, not floor(steps + u): the sum would round 127 + u up to 128 now and then.
            down = jnp.floor(steps)
            up = jax.random.uniform(key, steps.shape) < steps - down
            return down + up.astype(jnp.float32)
    raise ValueError(f"rounding is {rounding!r}; expected one of {', '.join(ROUNDINGS)}")

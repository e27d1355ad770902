"""An integer product that waits for what follows it, so that one kernel can do both.

    y = (scale acc + offset) + residual, then clamped, then perhaps rounded to the codes of a grid

is what most layers do before the next one reads them: rescaling, batch normalization or a bias, a
shortcut, an activation, quantization. A smooth activation (`graph.functions`) may stand between
scale and offset and the codes. A product starts with its rescaling and takes along what the
interpreter offers it; whatever does not fit this form computes it.

Several products and sums by channel become one of each, so results differ in the last digits from
those of the operations one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxrmils.graph import compat
from jaxrmils.graph.functions import FUNCTIONS
from jaxrmils.graph.pending import Pending, settled
from jaxrmils.graph.reads import MAX_POOL
from jaxrmils.lowering.max_pool import can_shift, run_max_pool, shifted_max_pool
from jaxrmils.numerics import QuantParams, Rounding, dequantize, quantize
from jaxrmils.numerics.formats import code_range


class Coded(Pending):
    """A pending result that can be asked for its codes on a grid."""

    def codes(self, grid: QuantParams, rounding: Rounding) -> Array:
        """int8 codes of the result."""
        return quantize(self.value(), grid, rounding)


def codes_of(x: Any, grid: QuantParams, rounding: Rounding) -> Array:
    """The codes of an array or a pending result."""
    if isinstance(x, Coded):
        return x.codes(grid, rounding)
    return quantize(settled(x), grid, rounding)


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a product does with its sums.

    Attributes:
      scale: float32 [channels].
      offset: float32 [channels].
      residual: float32 of the result's shape, or int8 codes of it; None for none.
      residual_grid: of codes.
      low, high: the clamp, infinite for none.
      function: of `FUNCTIONS`, after scale and offset; then there is nothing else.
    """

    scale: Float32[Array, " channels"]
    offset: Float32[Array, " channels"]
    residual: Any = None
    residual_grid: QuantParams | None = None
    low: float = -math.inf
    high: float = math.inf
    function: str | None = None

    @property
    def is_linear(self) -> bool:
        """Nothing but a scale and an offset yet."""
        return self.residual is None and not self.is_clamped and self.function is None

    @property
    def is_clamped(self) -> bool:
        """Is there a clamp?"""
        return self.low > -math.inf or self.high < math.inf


class Emit(Protocol):
    """Runs a product with its tail."""

    def __call__(self, tail: Tail, grid: QuantParams | None) -> Any:
        """float32, or the codes of an affine int8 grid, to nearest."""
        ...


class Product(Coded):
    """A product and its tail so far.

    Args:
      emit: runs it.
      tail: what follows the sums.
      shape: of the result; channels are last.
    """

    def __init__(self, emit: Emit, tail: Tail, shape: tuple[int, ...]) -> None:
        self.emit, self.tail, self.shape = emit, tail, shape
        self._value: Any = None

    def value(self) -> Any:
        """float32 of its shape."""
        if self._value is None and self.tail.function is not None:
            # In float XLA's own; codes do not show the last digits of a kernel's.
            linear = self.emit(dataclasses.replace(self.tail, function=None), None)
            self._value = FUNCTIONS[self.tail.function](linear)
        elif self._value is None:
            self._value = self.emit(self.tail, None)
        return self._value

    def codes(self, grid: QuantParams, rounding: Rounding) -> Array:
        """int8 codes; computed with the product where it is to nearest on an affine int8 grid."""
        fits = grid.bits == 8 and not grid.symmetric and grid.scale.size == 1
        if fits and rounding == "nearest" and self._value is None:
            return self.emit(self.tail, grid)
        return quantize(self.value(), grid, rounding)

    def followed_by(self, eqn: compat.JaxprEqn, inputs: Sequence[Any], position: int) -> Any:
        """Itself with a longer tail, or the pooling of its codes; None if neither fits."""
        if eqn.primitive.name == MAX_POOL:
            return Pool(self, eqn) if can_shift(eqn) else None
        if eqn.primitive.name in _MOVES:
            return Moved(self, eqn)
        out = compat.abstract(eqn.outvars[0])
        if tuple(out.shape) != self.shape or out.dtype != jnp.float32:
            return None
        if self.tail.function is not None:
            return None
        if (bounds := clamp_of(eqn)) is not None:
            return self._with(_clamped(self.tail, bounds))
        if eqn.primitive.name not in _ARITHMETIC or len(inputs) != 2 or self.tail.is_clamped:
            return None
        other, atom = inputs[1 - position], eqn.invars[1 - position]
        if isinstance(atom, compat.Literal):
            other = compat.literal_value(atom)
        if other is self:
            return None
        by_channel = None if isinstance(other, Pending) else self._by_channel(other)
        if by_channel is not None:
            if not self.tail.is_linear:
                return None
            tail = _ARITHMETIC[eqn.primitive.name](self.tail, by_channel, position)
            return None if tail is None else self._with(tail)
        same = tuple(compat.abstract(atom).shape) == self.shape
        if eqn.primitive.name == "add" and self.tail.is_linear and same:
            return self._with(_with_residual(self.tail, other))
        return None

    def applied(self, name: str) -> Product | None:
        """Itself with a function behind scale and offset; None behind anything else."""
        if not self.tail.is_linear:
            return None
        return self._with(dataclasses.replace(self.tail, function=name))

    def _with(self, tail: Tail) -> Product:
        return Product(self.emit, tail, self.shape)

    def _by_channel(self, other: Any) -> Any:
        """A value for every channel, float32; None for anything else."""
        shape = np.shape(other)
        channels = self.shape[-1]
        if math.prod(shape) not in (1, channels) or (shape and shape[-1] != math.prod(shape)):
            return None
        if shape and len(shape) != len(self.shape):
            return None
        return jnp.broadcast_to(jnp.asarray(other, jnp.float32).reshape(-1), (channels,))


class Pool(Coded):
    """A max-pooling of a product."""

    def __init__(self, product: Product, eqn: compat.JaxprEqn) -> None:
        self.product, self.eqn = product, eqn

    def value(self) -> Any:
        """The maxima."""
        return run_max_pool(self.eqn, [self.product.value()])[0]

    def codes(self, grid: QuantParams, rounding: Rounding) -> Array:
        """Maxima of codes: a grid never decreases."""
        lowest = code_range(grid.bits, grid.symmetric)[0]
        return shifted_max_pool(self.product.codes(grid, rounding), self.eqn, lowest)

    def followed_by(self, eqn: compat.JaxprEqn, inputs: Sequence[Any], position: int) -> Any:
        """Nothing follows without being computed."""
        return None


class Moved(Coded):
    """A product in another shape or order of dims."""

    def __init__(self, product: Coded, eqn: compat.JaxprEqn) -> None:
        self.product, self.eqn = product, eqn

    def value(self) -> Any:
        """The values."""
        return self._moved(self.product.value())

    def codes(self, grid: QuantParams, rounding: Rounding) -> Array:
        """The product's codes."""
        return self._moved(self.product.codes(grid, rounding))

    def followed_by(self, eqn: compat.JaxprEqn, inputs: Sequence[Any], position: int) -> Any:
        """Another such move; nothing else follows without being computed."""
        return Moved(self, eqn) if eqn.primitive.name in _MOVES else None

    def _moved(self, x: Any) -> Any:
        if self.eqn.primitive.name == "transpose":
            return x.transpose(self.eqn.params["permutation"])
        return x.reshape(compat.abstract(self.eqn.outvars[0]).shape)


class Dequantized(Pending):
    """What codes stand for.

    Args:
      codes: int8.
      grid: theirs.
      dtype: of the values.
    """

    def __init__(self, codes: Any, grid: QuantParams, dtype: Any) -> None:
        self.codes, self.grid, self.dtype, self.shape = codes, grid, dtype, codes.shape

    def value(self) -> Any:
        """The values."""
        return dequantize(self.codes, self.grid, self.dtype)

    def followed_by(self, eqn: compat.JaxprEqn, inputs: Sequence[Any], position: int) -> Any:
        """Nothing follows without being computed; a product may take it along."""
        return None


def _with_residual(tail: Tail, other: Any) -> Tail:
    if isinstance(other, Dequantized) and not other.grid.symmetric and other.grid.scale.size == 1:
        return dataclasses.replace(tail, residual=other.codes, residual_grid=other.grid)
    return dataclasses.replace(tail, residual=settled(other))


def _plus(tail: Tail, other: Any, position: int) -> Tail:
    return dataclasses.replace(tail, offset=tail.offset + other)


def _minus(tail: Tail, other: Any, position: int) -> Tail:
    if position == 0:
        return dataclasses.replace(tail, offset=tail.offset - other)
    return dataclasses.replace(tail, scale=-tail.scale, offset=other - tail.offset)


def _times(tail: Tail, other: Any, position: int) -> Tail:
    return dataclasses.replace(tail, scale=tail.scale * other, offset=tail.offset * other)


def _over(tail: Tail, other: Any, position: int) -> Tail | None:
    if position == 1:
        return None
    return dataclasses.replace(tail, scale=tail.scale / other, offset=tail.offset / other)


_ARITHMETIC: dict[str, Callable[[Tail, Any, int], Tail | None]] = {
    "add": _plus,
    "sub": _minus,
    "mul": _times,
    "div": _over,
}


def _clamped(tail: Tail, bounds: tuple[float, float]) -> Tail:
    """The tail with a further clamp, min(max(x, low), high), behind the one it has."""
    low, high = bounds
    return dataclasses.replace(
        tail,
        low=min(max(tail.low, low), high),
        high=min(max(tail.high, low), high),
    )


def clamp_of(eqn: compat.JaxprEqn) -> tuple[float, float] | None:
    """The bounds of an equation that does min(max(x, low), high) for scalars; None for any other.

    It may be a function of such operations, as `jax.nn.relu6` and `jnp.clip` are.
    """
    return _clamp(eqn, {})


def _clamp(eqn: compat.JaxprEqn, scalars: dict[Any, float]) -> tuple[float, float] | None:
    """The bounds, where the scalars among the operands may be variables."""
    name, known = eqn.primitive.name, [_scalar(var, scalars) for var in eqn.invars]
    if known.count(None) != 1:
        return None
    given = [value for value in known if value is not None]
    if name == "clamp" and known[1] is None:
        return given[0], given[1]
    if name in ("max", "min") and len(given) == 1:
        return (given[0], math.inf) if name == "max" else (-math.inf, given[0])
    inner = [jaxpr for _, jaxpr in compat.inner_jaxprs(eqn)]
    if name not in _CALLS or len(inner) != 1 or inner[0].constvars:
        return None
    (jaxpr,) = inner
    own = {v: s for v, s in zip(jaxpr.invars, known, strict=True) if s is not None}
    bounds, current = (-math.inf, math.inf), jaxpr.invars[known.index(None)]
    for each in jaxpr.eqns:
        values = [_scalar(var, own) for var in each.invars]
        if each.primitive.name == "convert_element_type" and values[0] is not None:
            own[each.outvars[0]] = values[0]
            continue
        found = _clamp(each, own)
        if found is None or each.invars[values.index(None)] is not current:
            return None
        low, high = found
        bounds = (min(max(bounds[0], low), high), min(max(bounds[1], low), high))
        current = each.outvars[0]
    return bounds if list(jaxpr.outvars) == [current] else None


def _scalar(var: Any, known: dict[Any, float]) -> float | None:
    """The value of a literal or a variable that is a known scalar."""
    if isinstance(var, compat.Literal):
        value = compat.literal_value(var)
        return float(value) if value.size == 1 else None
    return known.get(var)


_MOVES = ("reshape", "transpose")
# `jit` is named "pjit" before jax 0.7.
_CALLS = ("custom_jvp_call", "jit", "pjit")

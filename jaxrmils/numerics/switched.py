"""Fake quantization whose format is data: one compiled program for every plan.

Written with selections and not with branches. A branch for every format at every site would make
the program of a deep network several times as large, and nothing is fused across it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.numerics.exact import divide_exactly
from jaxrmils.numerics.formats import Rounding, code_range
from jaxrmils.numerics.quant_params import QuantParams, round_steps

_MODES: tuple[Rounding, ...] = ("nearest", "floor", "ceil")


def switched_quant(
    x: Any, grids: Sequence[QuantParams], roundings: Sequence[Rounding], switch: Any
) -> Any:
    """`fake_quant` with a grid and a rounding that are chosen at run time.

    Args:
      x: the tensor, any float dtype.
      grids: K grids, each for the whole tensor, or one for each of its rows (see `row_params`).
      roundings: K directions: "nearest", "floor" or "ceil".
      switch: int32 scalar; 0 leaves x alone, k + 1 takes grid k and rounding k.

    Returns:
      `fake_quant(x, grids[switch - 1], roundings[switch - 1])`, or x, in the dtype of x. A NaN
      stays NaN.

    Raises:
      ValueError: a rounding that is none of the three.

    >>> grids = [QuantParams(jnp.float32(s), jnp.int32(0), bits=8, symmetric=True) for s in (1, 2)]
    >>> [float(switched_quant(jnp.float32(2.6), grids, ("floor", "ceil"), k)) for k in range(3)]
    [2.5999999046325684, 2.0, 4.0]
    """
    for rounding in roundings:
        if rounding not in _MODES:
            raise ValueError(f"rounding is {rounding!r}; expected one of {', '.join(_MODES)}")
    switch = jnp.asarray(switch, jnp.int32)
    chosen = jnp.maximum(switch - 1, 0)

    def pick(values: Sequence[Any], dtype: Any) -> Any:
        return jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(v, dtype) for v in values)))[chosen]

    limits = [code_range(g.bits, g.symmetric) for g in grids]
    scale = pick([g.scale for g in grids], jnp.float32)
    zero = pick([0 if g.symmetric else g.zero_point for g in grids], jnp.float32)
    steps = divide_exactly(x.astype(jnp.float32), scale)
    mode = pick([_MODES.index(rounding) for rounding in roundings], jnp.int32)
    codes = jax.lax.select_n(mode, *(round_steps(steps, rounding) for rounding in _MODES)) + zero
    low, high = (pick([limit[i] for limit in limits], jnp.float32) for i in (0, 1))
    value = (jnp.clip(codes, low, high) - zero) * scale
    return jnp.where(switch > 0, value.astype(x.dtype), x)

"""Max-pooling as maxima of shifted slices, in float or on int8 codes.

XLA's windowed reduction on CPU reads every window element by element. Maxima of slices are plain
vector code, and of int8 codes a quarter of the bytes. Quantization to one grid never decreases, so
the codes of the largest value are the largest code: Q(max x) = max Q(x), exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxrmils.graph import compat

_LARGEST_WINDOW = 9
"""Along one axis; with more slices the program grows for nothing."""


def can_shift(eqn: compat.JaxprEqn) -> bool:
    """Whether `shifted_max_pool` takes a `reduce_window_max` equation."""
    params, operand = eqn.params, compat.abstract(eqn.invars[0])
    return (
        max(params["window_dimensions"]) <= _LARGEST_WINDOW
        and set(params["base_dilation"]) == {1}
        and math.prod(compat.abstract(eqn.outvars[0]).shape) > 0
        and operand.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)  # which have an infinity
    )


def shifted_max_pool(operand: Any, eqn: compat.JaxprEqn, lowest: Any) -> Any:
    """The equation's maxima, of values that need not have its dtype.

    Args:
      operand: float or integer array of the shape of the equation's operand.
      eqn: a `reduce_window_max` that `can_shift` accepts.
      lowest: what padding counts as.

    Returns:
      The maxima, in the dtype of the operand.
    """
    params = eqn.params
    edges = [(low, high, 0) for low, high in params["padding"]]
    padded = lax.pad(operand, jnp.asarray(lowest, operand.dtype), edges)
    for axis, window in enumerate(params["window_dimensions"]):
        stride, dilation = params["window_strides"][axis], params["window_dilation"][axis]
        if window == stride == 1:
            continue
        last = padded.shape[axis] - dilation * (window - 1)
        parts = [
            lax.slice_in_dim(padded, start, start + last, stride, axis)
            for start in range(0, dilation * window, dilation)
        ]
        padded = functools.reduce(jnp.maximum, parts)
    return padded


def run_max_pool(eqn: compat.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Runs a `reduce_window_max` equation: shifted where it can be, as it is elsewhere."""
    if not can_shift(eqn):
        return compat.bind(eqn, inputs)
    return [shifted_max_pool(inputs[0], eqn, -jnp.inf)]

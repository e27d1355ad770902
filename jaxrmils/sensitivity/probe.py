"""Probes: identities whose backward pass contracts the gradient with quantization noise.

An activation probe returns its input h. Its cotangent g = dl/dh is contracted with the noise
Q_k(h) - h of every candidate k, and the numbers leave the backward pass as the cotangent of a
dummy input, the slot. A weight probe sits on an operation's output y = h (*) w: by linearity
the contribution of weight noise delta is <g_y, h (*) delta>. Both hold for one example; `jax.vmap`
gives a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.numerics import QuantParams
from jaxrmils.sensitivity.candidates import Candidate
from jaxrmils.sensitivity.contraction import GRADIENT_STATISTICS as GRADIENT_STATISTICS
from jaxrmils.sensitivity.contraction import contract
from jaxrmils.sensitivity.contraction import noise as noise
from jaxrmils.sensitivity.weight_contraction import contract_weight


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activation_probe(
    candidates: tuple[Candidate, ...],
    h: Any,
    slot: Any,
    grids: Mapping[int, QuantParams],
    rows: Mapping[int, QuantParams] | None = None,
) -> Any:
    """The identity in h.

    Args:
      candidates: K formats.
      h: activation, any float dtype.
      slot: float32 [K + 2]; its cotangent is <g, Q_k(h) - h> for every candidate, then the sum
        and the sum of squares of g.
      grids: the activation's grid for every width.
      rows: the grids of its rows, as in `contract`.
    """
    return h


def _activation_forward(
    candidates: tuple[Candidate, ...],
    h: Any,
    slot: Any,
    grids: Mapping[int, QuantParams],
    rows: Mapping[int, QuantParams] | None = None,
) -> tuple[Any, Any]:
    return h, (h, grids, rows)


def _activation_backward(candidates: tuple[Candidate, ...], residual: Any, g: Any) -> Any:
    h, grids, rows = residual
    return g, contract(candidates, g, h, grids, rows), None, None


activation_probe.defvjp(_activation_forward, _activation_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weight_probe(
    operation: Callable[[Any, Any], Any],
    summed: int,
    y: Any,
    slot: Any,
    h: Any,
    d: Any,
) -> Any:
    """The identity in y.

    Args:
      operation: `operation(h, delta)`, the site's operation in float32.
      summed: of a product of matrices, the dims that it sums over, as in `contract_weight`; or 0.
      y: the operation's output.
      slot: float32 [K]; its cotangent is <g_y, operation(h, delta_k)>.
      h: the other operand (activation or indices).
      d: the K weight noises, in the operand's layout.
    """
    return y


def _weight_forward(
    operation: Callable[[Any, Any], Any], summed: int, y: Any, slot: Any, h: Any, d: Any
) -> tuple[Any, Any]:
    return y, (h, d)


def _weight_backward(
    operation: Callable[[Any, Any], Any], summed: int, residual: Any, g: Any
) -> Any:
    h, deltas = residual
    slot = contract_weight(operation, summed, g.astype(jnp.float32), h, deltas)
    return g, slot, None, None


weight_probe.defvjp(_weight_forward, _weight_backward)

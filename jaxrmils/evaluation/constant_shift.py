"""The float model with every planned input moved by a constant: what a bias would do as well.

Rounding down or up moves a layer's input by half a step on average. If that mean is all that helps,
a float model with the same shift gains as much.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.evaluation.simulate import EvaluationError
from jaxrmils.graph import Graph, SiteCall, interpret
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import spread_exactly, to_host, with_params
from jaxrmils.policies import Plan, formats_of
from jaxrmils.sensitivity import Candidate, CandidateSet, Formats, weight_noise
from jaxrmils.sensitivity.contraction import grid_of, noise

Shifts = Mapping[str, tuple[Any, ...]]


def mean_noise(
    graph: Graph,
    params: Any,
    plan: Plan,
    batches: Sequence[tuple[Any, Any]],
    ranges: Ranges,
    sharding: NamedSharding | None = None,
) -> Shifts:
    """The mean of Q(z) - z over the elements of every planned operand, in the quantized network.

    Args:
      graph: from `trace`.
      params: the float parameters.
      plan: what is quantized.
      batches: `(inputs, targets)` batches.
      ranges: the ranges that the plan was made with.
      sharding: how the examples' axis is split over a mesh, as in `score`.

    Returns:
      Per site, one float32 array per activation operand: shape (), or one number for every layer of
      a scanned stack.

    Raises:
      EvaluationError: no data.
    """
    formats, grids = formats_of(graph, plan), to_host(ranges.grids)
    known = CandidateSet().holding(weights=formats.weights.values()).weights
    handler = functools.partial(_record, formats, known)

    @jax.jit
    def step(params: Any, noise: Any, inputs: Any) -> Any:
        leaves = jax.tree.leaves(params)
        return interpret(graph, handler, leaves, inputs, weights=noise, state=grids)[1]

    params = with_params(params, sharding)
    deltas = jax.jit(lambda p: weight_noise(graph, p, known))(params)
    total: Any = None
    for inputs, _ in spread_exactly((inputs for inputs, _ in batches), sharding):
        found = jax.tree.map(
            lambda x: np.asarray(x, np.float64), jax.device_get(step(params, deltas, inputs))
        )
        total = found if total is None else jax.tree.map(np.add, total, found)
    if total is None:
        raise EvaluationError("the data holds no batches")
    return {site: tuple(_mean(graph, site, *sums) for sums in each) for site, each in total.items()}


def _record(formats: Formats, known: tuple[Candidate, ...], call: SiteCall) -> tuple[Any, Any]:
    """The quantized network; records the sum and the number of every operand's noise."""
    site, operands = call.site, list(call.operands())
    record = []
    for position, candidate in enumerate(formats.activations.get(site.name, ())):
        index = site.activations[position]
        x = operands[index]
        eps = noise(x, grid_of(call, index, x, call.state[position], candidate), candidate)
        record.append((jnp.sum(eps), jnp.float32(eps.size)))
        operands[index] = (x.astype(jnp.float32) + eps).astype(x.dtype)
    if site.weight is not None and site.weight.name in formats.weights:
        index = site.weight.operand
        candidate = formats.weights[site.weight.name]
        delta = call.view(call.weight[known.index(candidate)])
        w = operands[index]
        operands[index] = (w.astype(jnp.float32) + delta).astype(w.dtype)
    return call.bind_highest(*operands), record or None


def _mean(graph: Graph, site: str, total: np.ndarray, count: np.ndarray) -> Any:
    """The mean over a recurrence's steps, and one for every layer of a stack."""
    steps = tuple(i for i, loop in enumerate(graph.site[site].loops) if not loop.stacked)
    total, count = total.sum(axis=steps), count.sum(axis=steps)
    return jnp.asarray(total / np.maximum(count, 1), jnp.float32)


def shifted_apply(graph: Graph, params: Any, shifts: Shifts, inputs: Any) -> Any:
    """The float model's outputs with a constant added to its operands.

    Args:
      graph: from `trace`.
      params: the float parameters.
      shifts: per site, a constant for every activation operand, as from `mean_noise`.
      inputs: a batch.

    >>> import jaxrmils as jr
    >>> graph = jr.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 1))}, jnp.zeros((2, 3)))
    >>> shifts = {"w": (jnp.float32(0.5),)}
    >>> print(shifted_apply(graph, {"w": jnp.ones((3, 1))}, shifts, jnp.zeros((1, 3))))
    [[1.5]]
    """
    handler = functools.partial(_shift, shifts)
    return interpret(graph, handler, jax.tree.leaves(params), inputs, state=shifts)[0]


def _shift(shifts: Shifts, call: SiteCall) -> tuple[Any, Any]:
    site, operands = call.site, list(call.operands())
    if site.name in shifts:
        for index, constant in zip(site.activations, call.state, strict=True):
            x = operands[index]
            operands[index] = (x.astype(jnp.float32) + constant).astype(x.dtype)
    return call.bind_highest(*operands), None

"""The tangent: first-order contributions of all sites and candidates in one backward pass.

For example n, site i and candidate k (Eq. 3 of the total differential)

    c[n, i, k] = <dl_n/dh_i, Q_k(h_i) - h_i>     activations
    c[n, i, k] = <dl_n/dy_i, h_i (*) delta_k>    weights

The forward pass is the float model's; nothing is added to it. Examples are handled by
`jax.vmap` over a single-example forward, so no batch axis can be lost on the way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, SiteCall, compat, group_axis, interpret
from jaxrmils.numerics import quantize_weight
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.sensitivity.candidates import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    Candidate,
)
from jaxrmils.sensitivity.contraction import row_grids
from jaxrmils.sensitivity.probe import GRADIENT_STATISTICS, activation_probe, weight_probe

Loss = Callable[[Any, Any], Any]
"""`loss(outputs, targets) -> [batch]`, one value for every example."""


class ScoreError(ValueError):
    """A loss, labels or data from which no scores can be computed."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "activations", "weights", "gradient_sum", "gradient_square"],
    meta_fields=["activation_candidates", "weight_candidates"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Contributions:
    """Per-example first-order contributions to the loss, in the loss's unit (nats).

    Attributes:
      loss: float32 [batch], the float model's loss.
      activations: per site, float32 [batch, operands, candidates]: <p, Q(h) - h>.
      weights: per site with a weight, float32 [batch, weight candidates].
      gradient_sum: per site, float32 [batch, operands]: p . 1.
      gradient_square: per site, float32 [batch, operands]: |p|^2.
      activation_candidates: the formats along the last axis of `activations` (static).
      weight_candidates: those of `weights` (static).
    """

    loss: Any
    activations: Mapping[str, Any]
    weights: Mapping[str, Any]
    gradient_sum: Mapping[str, Any]
    gradient_square: Mapping[str, Any]
    activation_candidates: tuple[Candidate, ...]
    weight_candidates: tuple[Candidate, ...]


def weight_noise(
    graph: Graph, params: Any, candidates: Sequence[Candidate] = WEIGHT_CANDIDATES
) -> dict[str, tuple[Any, ...]]:
    """Quantization noise of every weight, one float32 array per candidate.

    Args:
      graph: from `trace`.
      params: the parameters.
      candidates: widths, roundings and groups.

    Returns:
      Per weight name, Q_k(w) - w in the weight's own layout, stacked loops leading.
    """

    def one(name: str, value: Any, candidate: Candidate) -> Any:
        q = quantize_weight(
            value,
            bits=candidate.bits,
            channel_axes=graph.weights[name].channel_axes,
            rounding=candidate.rounding,
            pack=False,
            group=candidate.group if group_axis(graph, name) is not None else 0,
        )
        return q.dequantize() - value.astype(jnp.float32)

    values = graph.weight_values(params)
    return {name: tuple(one(name, v, c) for c in candidates) for name, v in values.items()}


def contributions(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    *,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> Contributions:
    """First-order contributions of every site and candidate, for every example of a batch.

    A pure function: jit it, or call it inside your own jitted step.

    Args:
      graph: from `trace`.
      params: the parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      activation_candidates: formats to score for activations.
      weight_candidates: formats to score for weights; empty to leave weights out.
      noise: `weight_noise(graph, params, weight_candidates)` if it is already known, so that a
        loop over batches computes it once.

    Returns:
      The contributions.

    Raises:
      ScoreError: the loss does not return one value per example, or the ranges are another model's.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> c = contributions(
    ...     graph, params, x, jnp.zeros((4, 2)), squares, calibrate(graph, params, [x])
    ... )
    >>> c.activations["w"].shape, c.weights["w"].shape
    ((4, 1, 6), (4, 2))
    """
    check_ranges(graph, ranges)
    activation_candidates = tuple(activation_candidates)
    weight_candidates = tuple(weight_candidates)
    if noise is None:
        noise = weight_noise(graph, params, weight_candidates)
    slots = _slots(graph, ranges, activation_candidates, weight_candidates)
    leaves = jax.tree.leaves(params)
    handler = functools.partial(_handler, activation_candidates)

    def example_loss(slots: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        value = per_example(
            graph,
            functools.partial(handler, slots),
            loss,
            leaves,
            inputs,
            targets,
            weights=noise if weight_candidates else {},
            state=ranges.grids,
        )
        return value, value

    gradient = jax.vmap(jax.grad(example_loss, has_aux=True), in_axes=(None, 0, 0))
    slot_values, losses = gradient(slots, inputs, targets)
    activations = slot_values["activations"]
    k = len(activation_candidates)
    return Contributions(
        loss=losses,
        activations={site: v[..., :k] for site, v in activations.items()},
        weights=slot_values["weights"],
        gradient_sum={site: v[..., k] for site, v in activations.items()},
        gradient_square={site: v[..., k + 1] for site, v in activations.items()},
        activation_candidates=activation_candidates,
        weight_candidates=weight_candidates,
    )


def check_ranges(graph: Graph, ranges: Ranges) -> None:
    """Raises ScoreError unless the ranges were calibrated on this graph."""
    if ranges.fingerprint != graph.fingerprint:
        raise ScoreError("ranges were calibrated on another model; calibrate this one")


def per_example(
    graph: Graph,
    handler: Callable[[SiteCall], tuple[Any, Any]],
    loss: Loss,
    leaves: list[Any],
    inputs: Any,
    targets: Any,
    **values: Any,
) -> Any:
    """The float32 loss of a single example (no batch axis) with a handler at the sites."""
    batch_of_one = jax.tree.map(lambda x: jnp.asarray(x)[None], (inputs, targets))
    outputs, _ = interpret(graph, handler, leaves, batch_of_one[0], **values)
    result = loss(outputs, batch_of_one[1])
    if jnp.shape(result) != (1,):
        raise ScoreError(
            f"loss returned shape {jnp.shape(result)} for one example; (1,) was expected: one "
            "value per example, not their mean"
        )
    return result[0].astype(jnp.float32)


def _slots(
    graph: Graph,
    ranges: Ranges,
    activation_candidates: tuple[Candidate, ...],
    weight_candidates: tuple[Candidate, ...],
) -> dict[str, dict[str, Any]]:
    size = len(activation_candidates) + GRADIENT_STATISTICS
    return {
        "activations": {
            site: jnp.zeros((len(stats), size), jnp.float32)
            for site, stats in ranges.stats.items()
            if stats
        },
        "weights": {
            site.name: jnp.zeros(len(weight_candidates), jnp.float32)
            for site in graph.sites
            if site.weight and weight_candidates
        },
    }


def _handler(
    candidates: tuple[Candidate, ...], slots: Mapping[str, Mapping[str, Any]], call: SiteCall
) -> tuple[Any, Any]:
    site = call.site
    operands = list(call.operands())
    if site.name in slots["activations"]:
        for position, index in enumerate(site.activations):
            slot = slots["activations"][site.name][position]
            x, grids = operands[index], call.state[position]
            rows = row_grids(call, index, jax.lax.stop_gradient(x), candidates)
            operands[index] = activation_probe(candidates, x, slot, grids, rows)
    result = call.bind_highest(*operands)
    if site.name in slots["weights"]:
        assert site.weight is not None
        deltas = tuple(call.view(delta) for delta in call.weight)
        index = site.weight.operand
        result = weight_probe(
            float32_operation(call),
            matrix_dims(call),
            result,
            slots["weights"][site.name],
            jax.lax.stop_gradient(operands[1 - index]),
            deltas,
        )
    return result, None


def matrix_dims(call: SiteCall) -> int:
    """How many dims a site sums over if it is a product of matrices; see `contract_weight`."""
    if call.site.kind != "dot" or call.site.weight is None or call.site.weight.operand != 1:
        return 0
    summed, (batch, _) = call.eqn.params["dimension_numbers"]
    count, ndim = len(summed[0]), compat.abstract(call.eqn.invars[0]).ndim
    in_order = sorted(zip(*summed, strict=True)) == [(ndim - count + i, i) for i in range(count)]
    return count if in_order and not batch else 0


def float32_operation(call: SiteCall) -> Callable[[Any, Any], Any]:
    """The site's operation as `f(other operand, weight)`, in float32."""
    assert call.site.weight is not None
    weight_first = call.site.weight.operand == 0

    def operation(other: Any, weight: Any) -> Any:
        if jnp.issubdtype(other.dtype, jnp.floating):
            other = other.astype(jnp.float32)
        return (
            call.bind_float32(weight, other) if weight_first else call.bind_float32(other, weight)
        )

    return operation

"""A model whose quantization noise can be switched on site by site, compiled once.

The expensive reference: measuring a candidate needs a forward pass of its own. Which noise is on
is an input, so all of them run through one compiled function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, SiteCall, interpret
from jaxrmils.numerics import switched_quant
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.sensitivity.candidates import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    Candidate,
)
from jaxrmils.sensitivity.contraction import grid_of
from jaxrmils.sensitivity.divergence import with_slope
from jaxrmils.sensitivity.tangent import Loss, ScoreError, check_ranges, weight_noise

FLOAT = 0  # a switch in this position leaves its operand alone; k + 1 is candidate k


def perturbed_losses(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    activation_switches: Mapping[str, Any],
    weight_switches: Mapping[str, Any],
    *,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> Any:
    """Per-example losses with simulated quantization wherever a switch says so.

    Args:
      graph: from `trace`.
      params: the parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      activation_switches: per site, int32 [operands]; 0 is float, k + 1 is candidate k.
      weight_switches: per weight name, int32 scalar, likewise.
      activation_candidates: what the activation switches mean.
      weight_candidates: what the weight switches mean.
      noise: `weight_noise(graph, params, weight_candidates)` if already known.

    Returns:
      float32 [batch].

    Raises:
      ScoreError: the ranges are another model's, or the loss is not per example.
    """
    outputs = perturbed_outputs(
        graph,
        params,
        inputs,
        ranges,
        activation_switches,
        weight_switches,
        activation_candidates=activation_candidates,
        weight_candidates=weight_candidates,
        noise=noise,
    )
    losses = loss(outputs, targets)
    _check_per_example(losses, inputs)
    return losses.astype(jnp.float32)


def perturbed_slopes(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    activation_switches: Mapping[str, Any],
    weight_switches: Mapping[str, Any],
    *,
    float_outputs: Any = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """The losses of `perturbed_losses`, and what their slope at the float outputs says of them.

    Args:
      graph, params, inputs, targets, loss, ranges, activation_switches, weight_switches: as for
        `perturbed_losses`.
      float_outputs: the outputs of `float_network`, if they are already known; otherwise they take
        a forward pass of their own.
      **settings: the other arguments of `perturbed_losses`.

    Returns:
      `(losses, slopes)`, float32 [batch]: l(y_q) and <grad l(y), y_q - y>, as in
      `jaxrmils.sensitivity.divergence`.

    Raises:
      ScoreError: as `perturbed_losses`.

    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> ranges, outputs = calibrate(graph, params, [x]), float_network(graph, params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> off, int8 = all_off(graph, ranges), ({"w": jnp.array([1])}, {"w": jnp.int32(1)})
    >>> for switches in (off, int8):
    ...     losses, slopes = perturbed_slopes(
    ...         graph, params, x, outputs + 1, squares, ranges, *switches, float_outputs=outputs
    ...     )
    ...     print(bool((slopes == 0).all()), bool(jnp.abs(losses - 2 - slopes).max() < 0.01))
    True True
    False True
    """
    outputs = perturbed_outputs(
        graph, params, inputs, ranges, activation_switches, weight_switches, **settings
    )
    if float_outputs is None:
        float_outputs = float_network(graph, params, inputs)
    losses, _, slopes = with_slope(loss, float_outputs)(outputs, targets)
    _check_per_example(losses, inputs)
    return losses, slopes


def _check_per_example(losses: Any, inputs: Any) -> None:
    """ScoreError unless there is a loss for every example."""
    count = jax.tree.leaves(inputs)[0].shape[0]
    if jnp.shape(losses) != (count,):
        raise ScoreError(
            f"loss returned shape {jnp.shape(losses)} for {count} examples; one value for every "
            f"example was expected, shape ({count},). Do not average over the batch."
        )


def float_network(graph: Graph, params: Any, inputs: Any) -> Any:
    """The outputs that `perturbed_outputs` gives with everything off."""
    return interpret(graph, run_float, jax.tree.leaves(params), inputs)[0]


def run_float(call: SiteCall) -> tuple[Any, None]:
    """A handler: the site without noise, computed as those with noise are."""
    return call.bind_wide(*call.operands()), None


def perturbed_outputs(
    graph: Graph,
    params: Any,
    inputs: Any,
    ranges: Ranges,
    activation_switches: Mapping[str, Any],
    weight_switches: Mapping[str, Any],
    *,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> Any:
    """The model's outputs with simulated quantization; arguments as in `perturbed_losses`."""
    check_ranges(graph, ranges)
    if noise is None:
        noise = weight_noise(graph, params, weight_candidates)

    def handler(call: SiteCall) -> tuple[Any, Any]:
        site, operands = call.site, list(call.operands())
        for position, index in enumerate(site.activations):
            if site.name in activation_switches:
                x, grids = operands[index].astype(jnp.float32), call.state[position]
                operands[index] = switched_quant(
                    x,
                    [grid_of(call, index, x, grids, c) for c in activation_candidates],
                    [c.rounding for c in activation_candidates],
                    activation_switches[site.name][position],
                )
        if site.weight is not None and site.weight.name in weight_switches:
            index = site.weight.operand
            switch = weight_switches[site.weight.name]
            delta = switched_noise([call.view(delta) for delta in call.weight], switch)
            operands[index] = operands[index].astype(jnp.float32) + delta
        return call.bind_wide(*operands), None

    leaves = jax.tree.leaves(params)
    outputs, _ = interpret(graph, handler, leaves, inputs, weights=noise, state=ranges.grids)
    return outputs


def switched_noise(deltas: Sequence[Any], switch: Any) -> Any:
    """The weight noise that a switch chooses: zeros for 0, `deltas[k]` for k + 1."""
    return jax.lax.select_n(switch, jnp.zeros_like(deltas[0]), *deltas)


def all_off(graph: Graph, ranges: Ranges) -> tuple[dict[str, Any], dict[str, Any]]:
    """Switches that leave everything in float.

    Returns:
      `(activation_switches, weight_switches)` for `perturbed_losses`.
    """
    activations = {
        site: jnp.zeros(len(stats), jnp.int32) for site, stats in ranges.stats.items() if stats
    }
    return activations, {name: jnp.int32(FLOAT) for name in graph.weights}

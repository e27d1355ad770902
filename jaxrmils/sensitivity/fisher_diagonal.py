"""The diagonal of the empirical Fisher information times the noise's squares.

For example n, with g the gradient of its loss,

    sum_j (dl_n/dw_j)^2 delta_j^2     weights
    sum_j (dl_n/dh_j)^2 eps_j^2       activations

Half of its mean over the examples is the second-order loss change that remains if the Hessian is
replaced by the empirical Fisher information E[g g'] and that by its diagonal. `fisher` in
`directions.py` keeps the whole matrix, 1/2 (g . eps)^2, which weighs noise that acts together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, SiteCall
from jaxrmils.numerics import fake_quant
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.sensitivity.output_noise import NEAREST, WIDTHS
from jaxrmils.sensitivity.tangent import Loss, check_ranges, per_example, weight_noise


@jax.custom_vjp
def _square_probe(h: Any, slot: Any, grids: Any) -> Any:
    """The identity in h; the cotangent of slot [widths] is sum(g^2 (Q(h) - h)^2)."""
    return h


def _forward(h: Any, slot: Any, grids: Any) -> tuple[Any, Any]:
    return h, (h, grids)


def _backward(residual: Any, g: Any) -> Any:
    g32, (h, grids) = jax.lax.optimization_barrier((g.astype(jnp.float32), residual))
    h = h.astype(jnp.float32)
    terms = [jnp.sum(jnp.square(g32 * (fake_quant(h, grids[bits]) - h))) for bits in WIDTHS]
    return g, jnp.stack(terms), None


_square_probe.defvjp(_forward, _backward)


def fisher_diagonal(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    *,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """sum_j g_j^2 noise_j^2 of every weight and activation operand, example by example.

    A pure function: jit it. One backward pass with weight gradients of every example, which take
    the memory of a batch of copies of the largest weight, or of all weights in the worst case:
    make batches smaller if that is too much. A weight's gradient is summed over all its uses
    before it is squared; an operand inside a loop is another one in every iteration.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      noise: `weight_noise(graph, params, NEAREST)` if already known.

    Returns:
      Per weight, float32 [batch, widths], and per site with a range, float32 [batch, operands,
      widths], for 8 and 4 bits, in squared units of the loss.

    Raises:
      ScoreError: the ranges are another model's, or a loss that is not one value per example.

    References:
      Kunstner, F., Balles, L., Hennig, P. (2019). Limitations of the empirical Fisher
      approximation for natural gradient descent. arXiv 1905.12558.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> weights, activations = fisher_diagonal(
    ...     graph, params, x, jnp.zeros((4, 2)), squares, calibrate(graph, params, [x])
    ... )
    >>> weights["w"].shape, activations["w"].shape
    ((4, 2), (4, 1, 2))
    """
    check_ranges(graph, ranges)
    if noise is None:
        noise = weight_noise(graph, params, NEAREST)
    leaves = jax.tree.leaves(params)
    zeros = {name: jnp.zeros(w.shape, jnp.float32) for name, w in graph.weights.items()}
    slots = {
        site: jnp.zeros((len(stats), len(WIDTHS)), jnp.float32)
        for site, stats in ranges.stats.items()
        if stats
    }

    def handler(slots: Mapping[str, Any], call: SiteCall) -> tuple[Any, None]:
        operands = list(call.operands())
        if call.site.name in slots:
            for position, index in enumerate(call.site.activations):
                slot = slots[call.site.name][position]
                operands[index] = _square_probe(operands[index], slot, call.state[position])
        return call.bind_wide(*with_added_weight(call, operands)), None

    def example_loss(zeros: Any, slots: Any, inputs: Any, targets: Any) -> Any:
        with_slots = functools.partial(handler, slots)
        return per_example(
            graph, with_slots, loss, leaves, inputs, targets, weights=zeros, state=ranges.grids
        )

    def one(inputs: Any, targets: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        gradient = jax.grad(example_loss, argnums=(0, 1))
        weights, activations = gradient(zeros, slots, inputs, targets)
        contracted = {
            name: jnp.stack([jnp.sum(jnp.square(g * delta)) for delta in noise[name]])
            for name, g in weights.items()
        }
        return contracted, activations

    return jax.vmap(one)(inputs, targets)


def with_added_weight(call: SiteCall, operands: list[Any]) -> list[Any]:
    """The operands with `call.weight`, in the weight's layout, added to the weight in float32."""
    if call.site.weight is None or call.weight is None:
        return operands
    index = call.site.weight.operand
    operands[index] = operands[index].astype(jnp.float32) + call.view(call.weight)
    return operands

"""What quantizing a layer alone does to its own output.

For site i with output Y_i and a format f, Y_i,f is the output of the same operation on quantized
operands, everything before it being the float model. Two numbers are made of the difference:

    sum_j (dl/dY_j)^2 (Y_f - Y)_j^2     `squared_output`
    |Y_f - Y|^2 and |Y|^2               `output_power`

The first is the score of `auto_quantize(method="gradient")` in NVIDIA's ModelOpt
(`_get_auto_quantize_score` in modelopt/torch/quantization/algorithms.py): a Taylor expansion in
the layer's output, its Hessian replaced by the diagonal of the empirical Fisher information. The
gradients of all sites come from one backward pass; every format costs one more forward of the
operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, Site, SiteCall, interpret
from jaxrmils.numerics import fake_quant
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.sensitivity.candidates import Candidate
from jaxrmils.sensitivity.streaming import over_recurrence
from jaxrmils.sensitivity.tangent import Loss, check_ranges, per_example, weight_noise

Bits = tuple[int, int]
"""Weight and activation bits of a format; 32 is float."""

WIDTHS = (8, 4)
FLOAT = 32

# `weight_noise(graph, params, NEAREST)` is the `noise` that functions of this file take.
NEAREST = tuple(Candidate(bits) for bits in WIDTHS)


def fitted(site: Site, formats: Sequence[Bits], *, has_range: bool) -> tuple[Bits, ...]:
    """The formats as a site can have them: float where it has no weight, activation or range."""
    return tuple(
        (
            weight if site.weight is not None else FLOAT,
            activation if site.activations and has_range else FLOAT,
        )
        for weight, activation in formats
    )


def output_changes(
    call: SiteCall, formats: Sequence[Bits], operands: Sequence[Any], deltas: Any, grids: Any
) -> list[Any]:
    """Y_f - Y of a site in every format, float32.

    Args:
      call: the site's; its operation and layout are used, its values are not.
      formats: (weight bits, activation bits).
      operands: the float operands.
      deltas: the weight's noise at 8 and 4 bits, or None.
      grids: for every activation operand a grid by width, or None where it has no range.

    Returns:
      For every format an array like the output.
    """
    site = call.site
    wide = [x.astype(jnp.float32) if _is_float(x) else x for x in operands]
    float_output = call.bind_float32(*wide)

    def change(weight_bits: int, activation_bits: int) -> Any:
        quantized = list(wide)
        if activation_bits < FLOAT:
            for position, index in enumerate(site.activations):
                quantized[index] = fake_quant(wide[index], grids[position][activation_bits])
        if weight_bits < FLOAT:
            assert site.weight is not None
            delta = call.view(deltas[WIDTHS.index(weight_bits)])
            quantized[site.weight.operand] = wide[site.weight.operand] + delta
        return call.bind_float32(*quantized) - float_output

    own = fitted(site, formats, has_range=grids is not None)
    distinct = {
        bits: jnp.zeros_like(float_output) if bits == (FLOAT, FLOAT) else change(*bits)
        for bits in dict.fromkeys(own)
    }
    return [distinct[bits] for bits in own]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def output_probe(changes: Callable[..., list[Any]], y: Any, slot: Any, values: Any) -> Any:
    """The identity in y.

    Args:
      changes: `changes(*values)`, K arrays like y.
      y: an operation's output.
      slot: float32 [K]; its cotangent is sum(g^2 change_k^2), g being that of y.
      values: what `changes` reads.
    """
    return y


def _forward(changes: Callable[..., list[Any]], y: Any, slot: Any, values: Any) -> tuple[Any, Any]:
    return y, values


def _backward(changes: Callable[..., list[Any]], values: Any, g: Any) -> Any:
    # The changes do not depend on g; without the barrier all sites' could be made in the forward
    # pass and be kept until their g arrives.
    g32, values = jax.lax.optimization_barrier((g.astype(jnp.float32), values))
    return g, jnp.stack([jnp.sum(jnp.square(g32 * c)) for c in changes(*values)]), None


output_probe.defvjp(_forward, _backward)


def squared_output(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    formats: tuple[Bits, ...],
    *,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, Any]:
    """sum_j (dl/dY_j)^2 (Y_f - Y)_j^2 of every site and format, for every example of a batch.

    A pure function: jit it. The sum runs over all elements of the output and all iterations of
    the loops around it. Rounding is to nearest.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      formats: (weight bits, activation bits), 32 for float. What a site does not have stays float:
        weight-only for a lookup, activations alone for a product of two activations. So do the
        activations of a site that no calibration example reached.
      noise: `weight_noise(graph, params, NEAREST)` if already known.

    Returns:
      Per site, float32 [batch, formats], in squared units of the loss.

    Raises:
      ScoreError: the ranges are another model's, or a loss that is not one value per example.

    References:
      NVIDIA ModelOpt, `AutoQuantizeGradientSearcher`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> ranges = calibrate(graph, params, [x])
    >>> formats = ((8, 8), (4, 4))
    >>> squared_output(graph, params, x, jnp.zeros((4, 2)), squares, ranges, formats)["w"].shape
    (4, 2)
    """
    check_ranges(graph, ranges)
    if noise is None:
        noise = weight_noise(graph, params, NEAREST)
    leaves = jax.tree.leaves(params)
    slots = {site.name: jnp.zeros(len(formats), jnp.float32) for site in graph.sites}

    def handler(slots: Mapping[str, Any], call: SiteCall) -> tuple[Any, None]:
        operands = call.operands()
        result = call.bind_highest(*operands)
        changes = functools.partial(output_changes, call, formats)
        values = jax.lax.stop_gradient((operands, call.weight, call.state))
        return output_probe(changes, result, slots[call.site.name], values), None

    def example_loss(slots: Any, inputs: Any, targets: Any) -> Any:
        with_slots = functools.partial(handler, slots)
        return per_example(
            graph, with_slots, loss, leaves, inputs, targets, weights=noise, state=ranges.grids
        )

    return jax.vmap(jax.grad(example_loss), in_axes=(None, 0, 0))(slots, inputs, targets)


def output_power(
    graph: Graph,
    params: Any,
    inputs: Any,
    ranges: Ranges,
    formats: tuple[Bits, ...],
    *,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, tuple[Any, Any]]:
    """|Y_f - Y|^2 of every site and format and |Y|^2, for every example of a batch. No labels.

    A pure function: jit it. Sums run over all elements and over the steps of a recurrence.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      ranges: from `calibrate`.
      formats: as for `squared_output`.
      noise: `weight_noise(graph, params, NEAREST)` if already known.

    Returns:
      Per site, the noise's power, float32 [batch, stacked loops, formats], and the signal's,
      float32 [batch, stacked loops].

    Raises:
      ScoreError: the ranges are another model's.
    """
    check_ranges(graph, ranges)
    if noise is None:
        noise = weight_noise(graph, params, NEAREST)

    def handler(call: SiteCall) -> tuple[Any, Any]:
        operands = call.operands()
        result = call.bind_highest(*operands)
        changes = output_changes(call, formats, operands, call.weight, call.state)
        power = jnp.stack([jnp.sum(jnp.square(change)) for change in changes])
        return result, (power, jnp.sum(jnp.square(result.astype(jnp.float32))))

    return records_of_examples(graph, handler, params, inputs, weights=noise, state=ranges.grids)


def operand_power(graph: Graph, params: Any, inputs: Any, ranges: Ranges) -> dict[str, Any]:
    """|Q(h) - h|^2 of every activation operand at 8 and 4 bits, for every example of a batch.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      ranges: from `calibrate`.

    Returns:
      Per site with a range, float32 [batch, stacked loops, operands, widths]; a recurrence's steps
      are summed.

    Raises:
      ScoreError: the ranges are another model's.
    """
    check_ranges(graph, ranges)

    def handler(call: SiteCall) -> tuple[Any, Any]:
        operands = call.operands()
        powers = []
        for index, grids in zip(call.site.activations, call.state or (), strict=False):
            h = operands[index].astype(jnp.float32)
            noise = [fake_quant(h, grids[bits]) - h for bits in WIDTHS]
            powers.append(jnp.stack([jnp.sum(jnp.square(eps)) for eps in noise]))
        return call.bind_highest(*operands), jnp.stack(powers) if powers else None

    return records_of_examples(graph, handler, params, inputs, state=ranges.grids)


def records_of_examples(
    graph: Graph,
    handler: Callable[[SiteCall], tuple[Any, Any]],
    params: Any,
    inputs: Any,
    **values: Any,
) -> dict[str, Any]:
    """A handler's records [batch, stacked loops, ...], every example run alone."""
    leaves = jax.tree.leaves(params)

    def one(example: Any) -> dict[str, Any]:
        batch_of_one = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
        records = interpret(graph, handler, leaves, batch_of_one, **values)[1]
        return {
            name: jax.tree.map(functools.partial(over_recurrence, graph.site[name]), record)
            for name, record in records.items()
        }

    return jax.vmap(one)(inputs)

"""How many examples fit into memory at once."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph
from jaxrmils.sensitivity.tangent import Loss, ScoreError

SIZES = (250, 200, 160, 125, 100, 80, 64, 50, 40, 32, 25, 20, 16, 12, 10, 8, 6, 5, 4, 3, 2, 1)
# See `example_bytes`: above all measured networks but a small one, for which the cap comes first.
SAFETY = 3.0


def fitting_batch_size(
    graph: Graph,
    params: Any,
    loss: Loss,
    inputs: Any,
    targets: Any,
    *,
    memory_bytes: int = 2 * 10**9,
    weight_gradients: bool = False,
) -> int:
    """A batch size whose forward and backward passes fit into memory.

    From shapes alone, with a safety factor: nothing is computed or compiled. `batch_size_for` asks
    the compiler.

    Args:
      graph: from `trace`.
      params: the parameters, or their shapes.
      loss: `loss(outputs, targets) -> [batch]`.
      inputs: examples, or their shapes; how many does not matter.
      targets: likewise.
      memory_bytes: what a batch may take, in bytes, parameters not counted.
      weight_gradients: count the weights' gradient of every example, too, as the empirical Fisher
        information holds it.

    Returns:
      The largest round number of examples that fits, at most 250 and at least 1, even where a
      single example takes more.

    Raises:
      ScoreError: `memory_bytes` is not positive.

    >>> import jaxrmils as jr
    >>> params, x = {"w": jnp.ones((1000, 1000))}, jnp.ones((1, 1000))
    >>> graph = jr.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> fitting_batch_size(graph, params, squares, x, x, memory_bytes=10**6)
    20
    """
    if memory_bytes <= 0:
        raise ScoreError(f"memory_bytes is {memory_bytes}; a positive number was expected")
    example = SAFETY * example_bytes(graph, params, loss, inputs, targets)
    if weight_gradients:
        example += 4 * sum(math.prod(weight.shape) for weight in graph.weights.values())
    return next((size for size in SIZES if size * example <= memory_bytes), 1)


def example_bytes(graph: Graph, params: Any, loss: Loss, inputs: Any, targets: Any) -> int:
    """Bytes that each example adds to what a forward pass keeps for the backward pass.

    Arguments as for `fitting_batch_size`. XLA's temporary memory, bytes of each further example as
    a multiple of this number, on CPU (`python experiments/batch_memory.py`): to score 1.2
    (ResNet-20, 32 pixels), 2.0 (MobileNetV2, 64 pixels), 1.5 (BERT, 2 layers, 128 tokens) and 3.9
    (`MnistCNN`); to attribute with two points 1.6, 1.7, 2.7 and 6.9; to simulate 0.2 to 0.3.
    """
    leaves, structure = jax.tree.flatten(params)
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def residuals(leaves: list[Any], inputs: Any, targets: Any) -> Any:
        def total(parts: list[Any]) -> Any:
            merged = list(leaves)
            for index, part in zip(floats, parts, strict=True):
                merged[index] = part
            outputs = graph.apply(jax.tree.unflatten(structure, merged), inputs)
            return jnp.sum(loss(outputs, targets))

        return jax.vjp(total, [leaves[i] for i in floats])[1]

    def size(batch: int) -> int:
        def struct(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype)

        kept = jax.eval_shape(residuals, leaves, *jax.tree.map(struct, (inputs, targets)))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept))

    # Of two batch sizes, so that what all examples share, such as parameters, does not count.
    return size(2) - size(1)

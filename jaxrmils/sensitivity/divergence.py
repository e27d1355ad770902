"""A loss without its slope at the float model's outputs.

With y the float model's outputs, y_q the quantized model's and l the loss of an example,

    l(y_q) - l(y) = <grad l(y), y_q - y> + d(y_q, y)

The first part is all that an example's label has to say, for the losses of exponential families:
of cross-entropy on logits d is KL(softmax(y) || softmax(y_q)) and of squared error |y_q - y|^2,
whatever the label. d is a Bregman divergence (Bregman 1967): never negative where the loss is
convex in the outputs, and of far less sampling noise than the change. The slope's mean over new
examples is 0 where the model's outputs are right on average, and what a sample shows of it is
mostly luck of its labels.

Of a loss that is linear in the outputs, such as the negative log likelihood of outputs that are
log probabilities already, d is 0 and the slope is everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.sensitivity.tangent import Loss


def divergence(loss: Loss, float_outputs: Any, slope: Any = 0.0) -> Loss:
    """What a loss adds to its slope at the float outputs: d(y_q, y) of the module.

    Args:
      loss: `loss(outputs, targets) -> [batch]`.
      float_outputs: y, the float model's outputs, a pytree; leaves that are not floating have no
        slope.
      slope: how much of the slope is added to it, a float scalar that may be traced: with 1 it is
        the change of the loss.

    Returns:
      `measured(outputs, targets) -> float32 [batch]`, 0 at the float outputs.

    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> outputs, quantized = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.5]])
    >>> for target in (0.0, 7.0):
    ...     print(divergence(squares, outputs)(quantized, jnp.full((1, 2), target)))
    [0.25]
    [0.25]
    """
    apart = with_slope(loss, float_outputs)

    def measured(outputs: Any, targets: Any) -> Any:
        after, before, along = apart(outputs, targets)
        return after - before - (1 - jnp.float32(slope)) * along

    return measured


def with_slope(loss: Loss, float_outputs: Any) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
    """A loss, and its slope at the float outputs.

    Args:
      loss, float_outputs: as for `divergence`.

    Returns:
      `measured(outputs, targets) -> (losses, float losses, slopes)`, all float32 [batch]: l(y_q),
      l(y) and <grad l(y), y_q - y>.
    """
    leaves, structure = jax.tree.flatten(float_outputs)
    sloped = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    origin = [leaves[i] for i in sloped]

    def measured(outputs: Any, targets: Any) -> tuple[Any, Any, Any]:
        def at(values: list[Any]) -> Any:
            filled = dict(zip(sloped, values, strict=True))
            full = [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
            return loss(jax.tree.unflatten(structure, full), targets).astype(jnp.float32)

        reached = jax.tree.leaves(outputs)
        moves = [reached[i] - y for i, y in zip(sloped, origin, strict=True)]
        before, along = jax.jvp(at, (origin,), (moves,))
        return loss(outputs, targets).astype(jnp.float32), before, along

    return measured

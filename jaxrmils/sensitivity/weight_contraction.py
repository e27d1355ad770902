"""The sums behind a weight probe: a site's gradient with the noise of its weight in every format.

For the gradient g = dl/dy of one example at a site's output y = h (*) w

    c_k = <g, h (*) delta_k> = <G, delta_k>,    G = dl/dw of this example alone

The first form is a product like the forward pass for every format, and G is never formed. The
second is one such product, however many formats there are, and a sum over the weight for each. It
pays where many rows of h meet every weight, in dots on CPU: G is made block by block, so that it
stays in cache and needs little memory. On accelerators products are cheap and memory is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Elements of G per example in a block: 200 KB. At least so many rows of the weight at once.
BLOCK = 50_000
BLOCK_ROWS = 8


def contract_weight(
    operation: Callable[[Any, Any], Any], summed: int, g: Any, h: Any, deltas: Sequence[Any]
) -> Any:
    """Contracts a gradient with what every noise of a weight does to the output.

    Args:
      operation: `operation(h, delta)`, linear in the noise, float32.
      summed: for a product of matrices, how many last dims of h it sums over, which are the first
        ones of delta, with the others of both following each other in the output; 0 for any other
        operation.
      g: float32, the gradient of the output.
      h: the other operand.
      deltas: K noises of the weight, of one shape.

    Returns:
      float32 [K]: <g, operation(h, delta_k)>.

    >>> h, g = jnp.ones((64, 3)), jnp.ones((64, 2))
    >>> print(contract_weight(jnp.matmul, 1, g, h, [jnp.ones((3, 2)), jnp.eye(3, 2)]))
    [384. 128.]
    """
    width = math.prod(deltas[0].shape[:summed])
    rows = h.size // max(width, 1)
    if not summed or not deltas[0].size or not gradient_pays(rows, len(deltas)):
        return by_products(operation, g, h, *deltas)

    def on_cpu(g: Any, h: Any, *deltas: Any) -> Any:
        # As matrices: a batch of one example would be another dim, and g copied for every block.
        matrices = [delta.reshape(width, -1) for delta in deltas]
        return by_gradient(g.reshape(-1, matrices[0].shape[1]), h.reshape(-1, width), *matrices)

    def elsewhere(g: Any, h: Any, *deltas: Any) -> Any:
        return by_products(operation, g, h, *deltas)

    return jax.lax.platform_dependent(g, h, *deltas, cpu=on_cpu, default=elsewhere)


def gradient_pays(rows: int, formats: int) -> bool:
    """Is it faster to form G, on CPU?

    Measured with XLA:CPU on dots 384 to 1,536 wide, on two cores (`benchmarks/weight_formats.py`):
    with 32 rows two formats cost the same in both forms, five about half.
    """
    return rows * (formats - 1) >= 16 * formats


def by_products(operation: Callable[[Any, Any], Any], g: Any, h: Any, *deltas: Any) -> Any:
    """Without G."""
    return jnp.stack([jnp.sum(g * operation(h, delta)) for delta in deltas])


# Under jit, sites of one shape are traced once.
@jax.jit
def by_gradient(g: Any, h: Any, *deltas: Any) -> Any:
    """Of y = h @ w, by blocks of G's rows.

    Args:
      g: float32 [rows, out].
      h: [rows, in].
      deltas: K of [in, out].
    """
    size, out = deltas[0].shape
    width = min(size, max(BLOCK_ROWS, BLOCK // max(out, 1)))
    # Equal blocks where that is possible without much smaller ones: a rest is another program.
    width = next((w for w in range(width, width // 2, -1) if size % w == 0), width)

    # Turned once: XLA:CPU runs a product that sums over first dims on one core.
    columns = jax.lax.optimization_barrier(h.astype(jnp.float32).T)

    def part(start: Any, width: int) -> Any:
        own, some = list(deltas), columns
        if width < size:
            own = [jax.lax.dynamic_slice_in_dim(delta, start, width, 0) for delta in deltas]
            some = jax.lax.dynamic_slice_in_dim(columns, start, width, 0)
        gradient = jnp.matmul(some, g, precision=jax.lax.Precision.HIGHEST)
        return jnp.matmul(
            jnp.stack([delta.reshape(-1) for delta in own]),
            gradient.reshape(-1),
            precision=jax.lax.Precision.HIGHEST,
        )

    if width == size:
        return part(0, size)
    blocks = size // width
    rest = size - blocks * width
    sums = part(blocks * width, rest) if rest else jnp.zeros(len(deltas), jnp.float32)
    return jax.lax.fori_loop(0, blocks, lambda i, sums: sums + part(i * width, width), sums)

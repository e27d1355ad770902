"""A batch in parts, one after another, so that temporaries stay below what the allocator keeps.

glibc maps allocations above 32 MiB anew in every call, and each of their pages costs a fault when
it is first written. XLA allocates all temporaries of a call at once, so that a large batch pays for
all of them, every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TEMPORARY_BYTES = 32_000_000
"""Of one call; a little below glibc's largest threshold on 64-bit machines, 32 MiB."""

_SIZES = (2, 4)  # Of the batches that are measured; one alone can have forms of its own.


def examples_at_once(
    apply: Callable[[Any, Any], Any], params: Any, example: Any, limit: int | None = None
) -> int | None:
    """How many examples' temporaries fit into a limit, by the memory analysis of two batches.

    Args:
      apply: of parameters and inputs.
      params: arrays or shapes.
      example: pytree of shapes with a leading batch axis.
      limit: bytes; `TEMPORARY_BYTES` by default.

    Returns:
      A number of examples, at least 1; None where parts are of no use: temporaries do not grow with
      the batch or are above the limit without it, or an output has no batch axis.

    >>> x = jax.ShapeDtypeStruct((1, 1000), jnp.float32)
    >>> examples_at_once(lambda p, x: x @ p @ p, jnp.ones((1000, 1000)), x, limit=10_000)
    2
    >>> examples_at_once(lambda p, x: x.sum(), None, x) is None
    True
    """
    limit = TEMPORARY_BYTES if limit is None else limit
    found = []
    for size in _SIZES:
        inputs = jax.tree.map(
            lambda leaf, n=size: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), example
        )
        lowered = jax.jit(apply).lower(params, inputs)
        if any(leaf.shape[:1] != (size,) for leaf in jax.tree.leaves(lowered.out_info)):
            return None
        # What is allocated does not depend on how instructions are generated; seconds do.
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
        analysis = compiled.memory_analysis()
        if analysis is None:
            return None
        found.append(analysis.temp_size_in_bytes)
    each = (found[1] - found[0]) / (_SIZES[1] - _SIZES[0])
    free = limit - (found[0] - _SIZES[0] * each)
    if each <= 0 or free <= 0:
        return None
    return max(1, int(free // each))


def in_parts(run: Callable[[Any], Any], inputs: Any, at_once: int | None) -> Any:
    """The outputs for a batch, computed in a loop over parts of it.

    Args:
      run: of inputs; all its outputs have a leading batch axis, and examples do not mix.
      inputs: pytree of arrays with a leading batch axis.
      at_once: examples in a part at most; None for the whole batch.

    Returns:
      What `run(inputs)` returns.

    >>> in_parts(lambda x: 2 * x, jnp.arange(7), 3)
    Array([ 0,  2,  4,  6,  8, 10, 12], dtype=int32)
    """
    batch = jax.tree.leaves(inputs)[0].shape[0]
    if at_once is None or not isinstance(batch, int) or batch <= at_once:
        return run(inputs)
    size = part_size(batch, at_once)
    count, rest = divmod(batch, size)
    inputs = jax.tree.map(jnp.asarray, inputs)
    parts = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), inputs)
    outputs = jax.tree.map(lambda y: y.reshape(count * size, *y.shape[2:]), jax.lax.map(run, parts))
    if not rest:
        return outputs
    last = run(jax.tree.map(lambda x: x[count * size :], inputs))
    return jax.tree.map(lambda *each: jnp.concatenate(each), outputs, last)


def part_size(batch: int, at_once: int) -> int:
    """Examples in a part: the same in all parts where that takes less than twice as many parts.

    >>> [part_size(batch, 12) for batch in (24, 32, 30, 13, 26)]
    [12, 8, 10, 7, 9]
    """
    even = next(size for size in range(at_once, 0, -1) if batch % size == 0)
    if 2 * even > at_once:
        return even
    return -(-batch // -(-batch // at_once))

"""What kernels do under `vmap` where more than their inputs has a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array


def one_by_one(run: Callable[..., Array], operands: Any, batched: Any) -> Array:
    """`run(*operands)` for every element of a batch, in a loop.

    Args:
        run: of operands.
        operands: pytrees of arrays; those of the batch lead with it.
        batched: a bool for every array, whether it does.
    """
    leaves, structure = jax.tree.flatten(operands)
    mapped = jax.tree.leaves(batched)

    def one(chosen: Sequence[Array]) -> Array:
        rest = iter(chosen)
        values = [next(rest) if m else x for x, m in zip(leaves, mapped, strict=True)]
        return run(*structure.unflatten(values))

    return jax.lax.map(one, [x for x, m in zip(leaves, mapped, strict=True) if m])

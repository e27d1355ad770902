"""The sums behind an activation probe, in one pass over the gradient and the activation.

For the gradient g = dl/dh and the activation h of one example

    c_k = sum_j g_j (Q_k(h_j) - h_j)     for every candidate k,

with sum_j g_j and sum_j g_j^2. Written down plainly, XLA makes a reduction of each, and since
Q_k(h) does not depend on g it computes quotients and codes ahead, in the forward pass, and keeps
them until g arrives: several times the memory of h, written once and read once. Two things avoid
that:

* all sums are one reduction of several operands, so that g and h are read once, and candidates of
  the same width share their division;
* on CPU, a loop over blocks that stay in cache. A loop's body is compiled apart, so nothing is
  computed ahead of it, and a sum of block sums is also more accurate than one long sum.

A grid for every row (dynamic candidates) does not fit into blocks of a flat array: their sums are
plain reductions beside the others.

Codes are those of `numerics.quantize`, called as it is. A sum is that of a float32 reduction: the
order of the additions differs from `jnp.sum`'s, and XLA may fuse the product code * scale with the
subtraction of h, which leaves out one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import SiteCall
from jaxrmils.numerics import QuantParams, dequantize, quantize, row_params
from jaxrmils.sensitivity.candidates import Candidate

GRADIENT_STATISTICS = 2  # p . 1 and |p|^2, behind the candidates

# Elements per example and step. A block of g and of h takes 16 KB, half of a small L1 cache.
BLOCK = 2048


def noise(x: Any, grid: QuantParams, candidate: Candidate) -> Any:
    """Q(x) - x in float32, whatever the dtype of x."""
    x = x.astype(jnp.float32)
    return dequantize(quantize(x, grid, candidate.rounding), grid) - x


def grid_of(
    call: SiteCall, index: int, x: Any, grids: Mapping[int, QuantParams], candidate: Candidate
) -> QuantParams:
    """The grid of an operand under a candidate.

    Args:
      call: the site's.
      index: of the operand.
      x: its value.
      grids: its calibrated grids by width.
      candidate: a format; a dynamic one gets the grids of the rows of x, if the site is a dot.
    """
    rows = row_grids(call, index, x, (candidate,))
    return rows[candidate.bits] if rows else grids[candidate.bits]


def row_grids(
    call: SiteCall, index: int, x: Any, candidates: Sequence[Candidate]
) -> dict[int, QuantParams]:
    """The grids of an operand's rows by width: those that dynamic candidates need of a dot."""
    if call.site.kind != "dot":
        return {}
    axes = call.contracted(index)
    widths = dict.fromkeys(c.bits for c in candidates if c.dynamic)
    return {bits: row_params(x, bits=bits, axes=axes) for bits in widths}


# Under jit, sites of one shape are traced once.
@partial(jax.jit, static_argnums=0)
def contract(
    candidates: tuple[Candidate, ...],
    g: Any,
    h: Any,
    grids: Mapping[int, QuantParams],
    rows: Mapping[int, QuantParams] | None = None,
) -> Any:
    """Contracts a gradient with every candidate's noise.

    Args:
      candidates: K formats; rounding is deterministic.
      g: the gradient, any shape and float dtype.
      h: the activation, the same shape.
      grids: one grid for the whole activation, for every width.
      rows: the grids of its rows, for the widths of dynamic candidates; without, they are taken
        for static ones.

    Returns:
      float32 [K + 2]: <g, Q_k(h) - h> for every candidate, the sum of g, and |g|^2.

    >>> import jax.numpy as jnp
    >>> grid = QuantParams(jnp.float32(0.5), jnp.int32(0), bits=8, symmetric=True)
    >>> g, h = jnp.array([1.0, 2.0]), jnp.array([0.75, -0.25])
    >>> print(contract((Candidate(8, "floor"), Candidate(8, "ceil")), g, h, {8: grid}))
    [-0.75  0.75  3.    5.  ]
    """
    rows = rows or {}
    if rows and any(c.dynamic for c in candidates):
        rest = tuple(c for c in candidates if not c.dynamic)
        flat = contract(rest, g, h, grids)
        sums = [
            jnp.sum(g.astype(jnp.float32) * noise(h, rows[c.bits], c))
            if c.dynamic
            else flat[rest.index(c)]
            for c in candidates
        ]
        return jnp.concatenate([jnp.stack(sums), flat[len(rest) :]])
    # The loop is for CPU: an accelerator runs the plain reduction in one kernel, and would launch
    # several for every step of a loop.
    return jax.lax.platform_dependent(
        g.reshape(-1),
        h.reshape(-1),
        dict(grids),
        cpu=lambda *operands: _blockwise(candidates, *operands),
        default=lambda *operands: _at_once(candidates, *operands),
    )


def _blockwise(
    candidates: tuple[Candidate, ...], g: Any, h: Any, grids: Mapping[int, QuantParams]
) -> Any:
    whole = g.size // BLOCK

    def step(i: Any, total: Any) -> Any:
        # Sliced from the flat array: as the loop's own inputs, blocks would be transposed by vmap
        # to stand before the examples, which copies everything.
        g_block = jax.lax.dynamic_slice(g, (i * BLOCK,), (BLOCK,))
        h_block = jax.lax.dynamic_slice(h, (i * BLOCK,), (BLOCK,))
        return total + _at_once(candidates, g_block, h_block, grids)

    rest = _at_once(candidates, g[whole * BLOCK :], h[whole * BLOCK :], grids)
    return jax.lax.fori_loop(0, whole, step, rest) if whole else rest


def _at_once(
    candidates: tuple[Candidate, ...], g: Any, h: Any, grids: Mapping[int, QuantParams]
) -> Any:
    g = g.astype(jnp.float32)
    terms = [g * noise(h, grids[c.bits], c) for c in candidates]
    terms += [g, g * g]
    zeros = (jnp.zeros((), jnp.float32),) * len(terms)
    sums = jax.lax.reduce(tuple(terms), zeros, _add, (0,))
    return jnp.stack(sums)


def _add(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))

"""Facts about single equations: what they are, what they cost, which results are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxrmils.graph import compat
from jaxrmils.graph.expression import Expression, leaf_indices
from jaxrmils.graph.sites import Kind

OPS = ("dot_general", "conv_general_dilated")
UNSUPPORTED_OPS = ("ragged_dot_general", "ragged_dot", "scaled_matmul_wrapper")
SITE_PRIMITIVES = (*OPS, *UNSUPPORTED_OPS, "gather")
INLINED_JITS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
INLINED_CUSTOM_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
REMATS = ("checkpoint", "remat", "remat2")

_FLOATS = ("float32", "bfloat16", "float16")
_RANDOM = ("random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32")


def read_results(
    jaxpr: compat.Jaxpr, outputs_read: Sequence[bool] | None = None
) -> list[tuple[bool, ...] | None]:
    """For every equation which of its results are read; None if it need not run at all.

    Args:
      jaxpr: where the equations are.
      outputs_read: which of the jaxpr's outputs are read; None for all of them.
    """
    mask = outputs_read or [True] * len(jaxpr.outvars)
    wanted = [var for var, is_read in zip(jaxpr.outvars, mask, strict=True) if is_read]
    needed = {var for var in wanted if not isinstance(var, compat.Literal)}
    found: list[tuple[bool, ...] | None] = []
    for eqn in reversed(jaxpr.eqns):
        read = tuple(not compat.is_dropped(v) and v in needed for v in eqn.outvars)
        is_live = any(read) or bool(eqn.effects)
        found.append(read if is_live else None)
        if is_live:
            needed.update(v for v in eqn.invars if not isinstance(v, compat.Literal))
    return found[::-1]


def holds(eqn: compat.JaxprEqn, names: Sequence[str]) -> bool:
    """True if a jaxpr inside the equation has one of these primitives, at any depth."""
    return any(
        inner.primitive.name in names or holds(inner, names)
        for _, jaxpr in compat.inner_jaxprs(eqn)
        for inner in jaxpr.eqns
    )


def random_primitive(eqn: compat.JaxprEqn) -> str | None:
    """The primitive with which an equation draws random numbers, None if it draws none."""
    if eqn.primitive.name in _RANDOM:
        return eqn.primitive.name
    return next((name for name in _RANDOM if holds(eqn, (name,))), None)


def gives_known_results(eqn: compat.JaxprEqn, is_known: Sequence[bool]) -> bool:
    """True if a result of a `jit` depends on its known inputs alone."""
    closed = compat.close(eqn.params[INLINED_JITS[eqn.primitive.name]])
    jaxpr = closed.jaxpr
    known = {*jaxpr.constvars}
    known.update(v for v, k in zip(jaxpr.invars, is_known, strict=True) if k)
    for inner in jaxpr.eqns:
        if all(isinstance(v, compat.Literal) or v in known for v in inner.invars):
            known.update(inner.outvars)
    return any(isinstance(v, compat.Literal) or v in known for v in jaxpr.outvars)


def why_not_entered(name: str) -> str:
    """Why the operations inside a call of this primitive stay float."""
    if name == "while":
        return "inside a while loop, whose number of iterations is not known"
    return f"inside {name}, which is not entered"


def why_not_quantizable(eqn: compat.JaxprEqn, values: Sequence[Expression | None]) -> str:
    """Why a dot or convolution stays float; '' if it need not.

    Args:
      eqn: the operation.
      values: for every operand its expression, None where it depends on the inputs.
    """
    dtypes = [str(compat.aval(v).dtype) for v in eqn.invars]
    if any(d not in _FLOATS for d in dtypes):
        return f"operands are {' and '.join(dtypes)}, not float32, bfloat16 or float16"
    for value in values:
        if value is not None and not leaf_indices(value):
            return "multiplies by a constant that apply closed over; pass it in params"
    if eqn.primitive.name == "dot_general":
        (lhs, _), _ = eqn.params["dimension_numbers"]
        return "" if lhs else "no contracting axis (an outer product)"
    if values[1] is None:
        return "its kernel depends on the inputs"
    return ""


def is_lookup(eqn: compat.JaxprEqn, table: Expression | None) -> bool:
    """True for `table[ids]` and `jnp.take(table, ids, axis=0)` on a float parameter."""
    if table is None or not leaf_indices(table):
        return False
    numbers, shape = eqn.params["dimension_numbers"], compat.aval(eqn.invars[0]).shape
    return (
        len(shape) >= 2
        and str(compat.aval(eqn.invars[0]).dtype) in _FLOATS
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
    )


def multiply_accumulates(kind: Kind, eqn: compat.JaxprEqn) -> int:
    """Multiply-accumulates of one run of an operation."""
    out = math.prod(compat.aval(eqn.outvars[0]).shape)
    if kind == "gather":
        return 0
    if kind == "dot":
        (lhs, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(compat.aval(eqn.invars[0]).shape[a] for a in lhs)
    kernel = compat.aval(eqn.invars[1]).shape
    return out * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]


def uncontracted_axes(kind: Kind, eqn: compat.JaxprEqn, operand: int) -> set[int]:
    """The axes of an operand that can have scales of their own: what is not summed over."""
    if kind == "gather":
        return {0}
    if kind == "conv":
        return {eqn.params["dimension_numbers"].rhs_spec[0]}
    contracting: Any = eqn.params["dimension_numbers"][0][operand]
    return set(range(len(compat.aval(eqn.invars[operand]).shape))) - set(contracting)

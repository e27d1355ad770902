"""Functions of one value that programs write as several operations.

`jax.nn.gelu` reads its input twice, so that nothing that waits (see `pending`) could take it along
operation by operation. Here its operations are found again and become one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import compat, equations

FUNCTIONS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "silu": lambda x: x * jax.nn.sigmoid(x),
    }
)
"""By name; each takes one array."""

MOST_EQUATIONS = 16
"""No function has more."""


@dataclass(frozen=True, eq=False)
class Function:
    """Equations that together are a function of one value.

    Attributes:
      name: of `FUNCTIONS`.
      eqns: as they are in the program.
      operand: what they read, besides each other's results and constants.
      result: what the last one gives; nothing else of theirs is read elsewhere.
    """

    name: str
    eqns: tuple[compat.JaxprEqn, ...]
    operand: Any
    result: Any


class _Pattern(NamedTuple):
    name: str
    jaxpr: compat.Jaxpr


def find_function(eqns: Sequence[compat.JaxprEqn | None]) -> Function | None:
    """The function that the first equations are, the longest that fits; None for no function.

    Whether the results in between are read elsewhere is for the caller to see.

    Args:
      eqns: what a program does from some place on; None for what is no plain equation.
    """
    if not eqns or eqns[0] is None or len(eqns[0].outvars) != 1:
        return None
    first = eqns[0]
    whole = _body(first)
    for name, jaxpr in _patterns(compat.abstract(first.outvars[0]).dtype):
        if whole is not None and _same(jaxpr, whole.eqns, whole.invars[0], whole.outvars[0]):
            return Function(name, (first,), first.invars[0], first.outvars[0])
        own = eqns[: len(jaxpr.eqns)]
        if len(own) < len(jaxpr.eqns) or any(eqn is None for eqn in own):
            continue
        given = tuple(eqn for eqn in own if eqn is not None)
        if any(len(eqn.outvars) != 1 for eqn in given):
            continue
        for operand in first.invars:
            if _same(jaxpr, given, operand, given[-1].outvars[0]):
                return Function(name, given, operand, given[-1].outvars[0])
    return None


def _body(eqn: compat.JaxprEqn) -> compat.Jaxpr | None:
    """What a `jit` of one value does."""
    if eqn.primitive.name not in equations.INLINED_JITS or len(eqn.invars) != 1:
        return None
    inner = [jaxpr for _, jaxpr in compat.inner_jaxprs(eqn)]
    return inner[0] if len(inner) == 1 and not inner[0].constvars else None


@functools.cache
def _patterns(dtype: Any) -> tuple[_Pattern, ...]:
    """What the functions do, the longest first."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return ()
    x = jax.ShapeDtypeStruct((2, 3), dtype)
    found = [_Pattern(n, jax.make_jaxpr(call)(x).jaxpr) for n, call in FUNCTIONS.items()]
    return tuple(sorted(found, key=lambda pattern: -len(pattern.jaxpr.eqns)))


def _same(
    pattern: compat.Jaxpr, eqns: Sequence[compat.JaxprEqn], operand: Any, result: Any
) -> bool:
    """Do equations do to an operand what a pattern does to its input?"""
    if len(eqns) != len(pattern.eqns) or isinstance(operand, compat.Literal):
        return False
    names: dict[Any, Any] = {pattern.invars[0]: operand}
    for wanted, eqn in zip(pattern.eqns, eqns, strict=True):
        if eqn.primitive is not wanted.primitive or eqn.params != wanted.params or eqn.effects:
            return False
        if not all(map(functools.partial(_agree, names), wanted.invars, eqn.invars)):
            return False
        names[wanted.outvars[0]] = eqn.outvars[0]
    return names.get(pattern.outvars[0]) is result


def _agree(names: Mapping[Any, Any], wanted: Any, found: Any) -> bool:
    """Are two operands the same number, or what stands for the same value?"""
    if isinstance(wanted, compat.Literal) and isinstance(found, compat.Literal):
        return np.array_equal(compat.literal_value(wanted), compat.literal_value(found))
    if isinstance(wanted, compat.Literal) or isinstance(found, compat.Literal):
        return False
    return names.get(wanted) is found

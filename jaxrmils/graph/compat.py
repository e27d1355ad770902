"""The one place that knows how jaxpr equations differ between jax versions.

Everything else in the package reads equations through these functions, so a change of
jax's internals is mended here. The public route is used wherever there is one: types and
`jaxpr_as_fun` come from `jax.extend.core`; name stacks are read defensively, since they
only make names prettier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core

Var = jex_core.Var
Literal = jex_core.Literal
Jaxpr = jex_core.Jaxpr
ClosedJaxpr = jex_core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]
JaxprEqn = jex_core.JaxprEqn


def bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Runs one equation on values, with its own derivative rules.

    A one-equation jaxpr is evaluated with `jaxpr_as_fun`: `Primitive.bind` needs
    `get_bind_params`, whose result changed between jax 0.10 and 0.12.
    """
    variables, values, seen = [], [], set()
    for var, value in zip(eqn.invars, inputs, strict=True):
        if not isinstance(var, Literal) and var not in seen:
            seen.add(var)
            variables.append(var)
            values.append(value)
    jaxpr = Jaxpr(
        constvars=(),
        invars=variables,
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=_debug_info(len(variables), len(eqn.outvars)),
    )
    return jex_core.jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*values)


def _debug_info(num_inputs: int, num_outputs: int) -> jex_core.DebugInfo:
    return jex_core.DebugInfo("jaxrmils", "equation", ("",) * num_inputs, ("",) * num_outputs)


def scan_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """The numbers of constants and of carried values of a `scan` equation."""
    if "num_consts" in eqn.params:  # jax < 0.12
        return eqn.params["num_consts"], eqn.params["num_carry"]
    constants, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(constants)), len(list(carry))


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[tuple[str, Jaxpr]]:
    """Every jaxpr held directly in the parameters of an equation, with its parameter's name."""
    for key, value in eqn.params.items():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield key, item.jaxpr
            elif isinstance(item, Jaxpr):
                yield key, item


def name_stack(eqn: JaxprEqn) -> str:
    """The scope in which an equation was traced (`Block/MultiHeadAttention_0`), or ''."""
    return str(getattr(eqn.source_info, "name_stack", ""))


def literal_value(literal: Literal) -> Any:
    """A literal's value as an array of its dtype; `literal.val` may be a Python number."""
    return np.asarray(literal.val, aval(literal).dtype)


def aval(atom: Var | Literal) -> Any:
    """What is known of a variable before it runs; an array's has `shape` and `dtype`."""
    return atom.aval


def is_dropped(var: Any) -> bool:
    """True for the `_` output of an equation, which nothing reads."""
    return isinstance(var, jex_core.DropVar)


def close(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """A closed jaxpr from a closed or an open one without constants."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def abstract(value: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of an array, a variable's aval or a Python scalar.

    NumPy's float64 and int64 become what jax computes in.
    """
    if hasattr(value, "aval"):
        value = value.aval
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        value = jax.numpy.asarray(value)
    weak_type = getattr(value, "weak_type", False)
    dtype = value.dtype
    if not jax.numpy.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(value.shape, dtype, weak_type=weak_type)

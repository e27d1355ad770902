"""Values that depend on parameters (and constants) alone, kept as expressions.

Whether an operand of a dot is a *weight* is decided by partial evaluation: every equation
whose inputs are all known from the parameters is kept as a node here instead of being run.
A node is evaluated when somebody asks for it, so the float weights of a quantized site are
never needed once their integer codes exist.

Inside a scanned stack of layers a weight is one slice of a stacked array. A `Slice` node
stands for it: in the running program it is the slice of the current iteration; evaluated
from outside (`evaluate`) it is the whole stack, with the loop as a leading axis.

Expressions share nodes and may be long chains, so everything here visits a node once and
without recursion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrmils.graph import compat


@dataclass(frozen=True, eq=False)
class Leaf:
    """One leaf of the parameter tree, by its position in the flattened tree."""

    index: int


@dataclass(frozen=True, eq=False)
class Constant:
    """A literal or an array that the function closed over."""

    value: Any


@dataclass(frozen=True, eq=False)
class Apply:
    """One equation applied to expressions; its results are `Output` nodes."""

    eqn: compat.JaxprEqn
    inputs: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Output:
    """Result number `index` of an equation."""

    node: Apply
    index: int


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a stacked expression that iteration `i` of loop `loop` sees."""

    source: Expression
    loop: int


Expression = Leaf | Constant | Output | Slice
Node = Expression | Apply


def children(node: Node) -> tuple[Node, ...]:
    """What a node reads."""
    match node:
        case Apply():
            return node.inputs
        case Output():
            return (node.node,)
        case Slice():
            return (node.source,)
        case _:
            return ()


def ordered(
    expression: Expression, children: Callable[[Node], tuple[Node, ...]] = children
) -> list[Node]:
    """The nodes of an expression, each once and after what it reads."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(expression, False)]
    while stack:
        node, is_complete = stack.pop()
        if is_complete:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in children(node))
    return order


def leaf_indices(expression: Expression) -> frozenset[int]:
    """The parameter leaves that an expression reads; empty for a constant."""
    return frozenset(node.index for node in ordered(expression) if isinstance(node, Leaf))


def loops_of(expression: Expression) -> tuple[int, ...]:
    """The loops along which an expression is sliced, outermost first."""
    return tuple(sorted({node.loop for node in ordered(expression) if isinstance(node, Slice)}))


def peel(expression: Expression) -> tuple[Expression, tuple[int, ...] | None]:
    """Takes transposes and float casts off the outside of an expression.

    Two uses of one array that differ only by these (an embedding table read by `gather`,
    and its transpose in the output dot) then have the same root, so they share one
    quantized tensor.

    Returns:
      The root and the permutation that leads from the root's axes to the expression's
      (`transpose(root, permutation)`), or None where that is the identity.
    """
    permutation: tuple[int, ...] | None = None
    while isinstance(expression, Output):
        eqn = expression.node.eqn
        name = eqn.primitive.name
        if name == "transpose":
            inner = tuple(int(axis) for axis in eqn.params["permutation"])
            permutation = inner if permutation is None else tuple(inner[a] for a in permutation)
        elif not (name == "convert_element_type" and _keeps_float(eqn)) and name != "copy":
            break
        expression = expression.node.inputs[0]
    if permutation == tuple(range(len(permutation or ()))):
        permutation = None
    return expression, permutation


def _keeps_float(eqn: compat.JaxprEqn) -> bool:
    floating = jax.numpy.floating
    return all(
        jax.numpy.issubdtype(compat.aval(var).dtype, floating)
        for var in (eqn.invars[0], eqn.outvars[0])
    )


def signature(expression: Expression) -> str:
    """A digest that is equal for expressions that compute the same value."""
    digests: dict[Node, str] = {}
    for node in ordered(expression):
        match node:
            case Leaf():
                parts = ["leaf", str(node.index)]
            case Constant():
                parts = ["constant", _constant_text(node.value)]
            case Slice():
                # Without the loop's number: two scans over one stack read the same weight.
                parts = ["slice", digests[node.source]]
            case Output():
                parts = ["output", str(node.index), digests[node.node]]
            case Apply():
                params = sorted((k, _param_text(v)) for k, v in node.eqn.params.items())
                parts = [node.eqn.primitive.name, str(params), *(digests[e] for e in node.inputs)]
        digests[node] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return digests[expression]


def _constant_text(value: Any) -> str:
    if isinstance(value, compat.Tracer):
        return f"tracer {id(value)}"
    if hasattr(value, "dtype") and jax.numpy.issubdtype(value.dtype, jax.dtypes.extended):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def _param_text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return str([_param_text(v) for v in value])
    if isinstance(value, compat.ClosedJaxpr):
        return f"{value.jaxpr}{[_constant_text(c) for c in value.consts]}"
    if callable(value) and not isinstance(value, type):
        return ""  # Derivative rules and policies, whose text is an address in memory.
    return str(value)


def evaluate(expression: Expression, leaves: Sequence[Any]) -> Any:
    """Computes an expression from the flattened parameters.

    Args:
      expression: what to compute.
      leaves: the parameter leaves, in the order of `jax.tree_util.tree_leaves`.

    Returns:
      The array; a leading axis for every loop of `loops_of(expression)`, outermost first.
    """
    values: dict[Node, Any] = {}
    loops: dict[Node, tuple[int, ...]] = {}
    for node in ordered(expression):
        match node:
            case Leaf():
                values[node], loops[node] = leaves[node.index], ()
            case Constant():
                values[node], loops[node] = node.value, ()
            case Slice():
                values[node] = values[node.source]
                loops[node] = (*loops[node.source], node.loop)
            case Output():
                values[node] = values[node.node][node.index]
                loops[node] = loops[node.node]
            case Apply():
                own = [loops[e] for e in node.inputs]
                loops[node] = tuple(sorted({loop for each in own for loop in each}))
                inputs = [values[e] for e in node.inputs]
                values[node] = _apply_stacked(node.eqn, inputs, own, loops[node])
    return values[expression]


def _apply_stacked(
    eqn: compat.JaxprEqn,
    inputs: list[Any],
    input_loops: list[tuple[int, ...]],
    loops: tuple[int, ...],
) -> list[Any]:
    def function(*values: Any) -> list[Any]:
        return compat.bind(eqn, values)

    for loop in reversed(loops):
        axes = tuple(0 if loop in own else None for own in input_loops)
        function = jax.vmap(function, in_axes=axes)
    return function(*inputs)

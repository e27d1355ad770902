"""Parameters that are read together alone, so that what is made of them can stand for them.

A batch normalization reads its scale and variance only as scale / sqrt(variance + eps). That vector
is as long as one of them, does not depend on the inputs, and is all that a network needs to hold.

Found are elementwise expressions of parameters (`expression`) that take fewer bytes than the leaves
that nothing else reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxrmils.graph import compat
from jaxrmils.graph.expression import (
    Apply,
    Constant,
    Expression,
    Leaf,
    Output,
    leaf_indices,
    ordered,
    signature,
)

_SHAPING = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze"})
_ELEMENTWISE = _SHAPING | {
    "add",
    "convert_element_type",
    "div",
    "exp",
    "integer_pow",
    "log",
    "max",
    "min",
    "mul",
    "neg",
    "rsqrt",
    "sqrt",
    "square",
    "sub",
}


@dataclass(frozen=True, eq=False)
class Fold:
    """An expression that stands for leaves.

    Attributes:
      expressions: elementwise, of parameters alone; all with the same value.
      leaves: those that nothing else reads.
    """

    expressions: tuple[Output, ...]
    leaves: frozenset[int]


def folds(
    reads: Sequence[Expression],
    weights: Iterable[Expression],
    structs: Sequence[jax.ShapeDtypeStruct],
) -> dict[str, Fold]:
    """What can stand for leaves, by signature.

    Args:
      reads: all expressions that a program reads in float.
      weights: those of the weights, which keep their leaves.
      structs: shapes and dtypes of the leaves.
    """
    taken = {leaf for weight in weights for leaf in leaf_indices(weight)}
    readers: dict[int, set[str]] = {}
    cores: dict[str, list[Output]] = {}
    for core in dict.fromkeys(_core(read) for read in reads):
        key = signature(core)
        if isinstance(core, Output) and _is_elementwise(core):
            cores.setdefault(key, []).append(core)
        for leaf in leaf_indices(core):
            readers.setdefault(leaf, set()).add(key)
    found = {}
    for key, same in cores.items():
        own = {i for i in leaf_indices(same[0]) if readers[i] == {key} and i not in taken}
        if sum(_bytes(structs[i]) for i in own) > _bytes(_result(same[0])):
            found[key] = Fold(tuple(same), frozenset(own))
    return found


def _core(expression: Expression) -> Expression:
    """An expression without what only gives it another shape, from the outside."""
    while isinstance(expression, Output) and expression.node.eqn.primitive.name in _SHAPING:
        expression = expression.node.inputs[0]
    return expression


def _is_elementwise(core: Output) -> bool:
    """Is every part a scalar or of the result's size, and does no part mix elements?"""
    size = math.prod(_result(core).shape)
    for node in ordered(core):
        if isinstance(node, Output):
            if math.prod(_result(node).shape) not in (1, size):
                return False
        elif isinstance(node, Apply):
            eqn = node.eqn
            if eqn.primitive.name not in _ELEMENTWISE or len(eqn.outvars) != 1:
                return False
        elif isinstance(node, Constant):
            if math.prod(getattr(node.value, "shape", ())) != 1:
                return False
        elif not isinstance(node, Leaf):
            return False
    return True


def _result(output: Output) -> Any:
    return compat.abstract(output.node.eqn.outvars[output.index])


def _bytes(struct: Any) -> int:
    return math.prod(struct.shape) * struct.dtype.itemsize

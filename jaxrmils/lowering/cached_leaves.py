"""Parameters that jax takes apart once, not in every call.

A jitted function flattens its arguments whenever it is called. For hundreds of arrays in nested
mappings that takes longer than handing them over, so a set of parameters keeps its leaves. They
can't go stale: fields are frozen, mappings in them read-only, and jax's arrays too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
from flax.core import FrozenDict
from jax.tree_util import GetAttrKey, keystr, register_pytree_with_keys

T = TypeVar("T", bound="CachedLeaves")


@dataclasses.dataclass(frozen=True, eq=False)
class ReadOnlyMappings:
    """A frozen dataclass whose mappings are read-only: copies, as `flax.core.FrozenDict`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping) and not isinstance(value, FrozenDict):
                object.__setattr__(self, field.name, FrozenDict(value))


class CachedLeaves(ReadOnlyMappings):
    """A frozen dataclass as one pytree node, with all its leaves as children.

    Subclasses are registered with `register`. A leaf's key is its path: `.weights['w'].scale`.

    >>> import jax.numpy as jnp
    >>> @register
    ... @dataclasses.dataclass(frozen=True, eq=False)
    ... class Layer(CachedLeaves):
    ...     arrays: Mapping[str, Any]
    >>> layer = Layer({"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))})
    >>> jax.tree.map(jnp.shape, layer).arrays["kernel"]
    (3, 2)
    >>> [keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(layer)]
    [".arrays['bias']", ".arrays['kernel']"]
    """

    @functools.cached_property
    def _flat(self) -> tuple[tuple[Any, ...], _Structure]:
        leaves, structure = jax.tree.flatten(list(_fields(self).values()))
        return tuple(leaves), _Structure(structure)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which can't store the structure of leaves."""
        return _fields(self)


class _Structure:
    """A tree's structure, hashed once."""

    __slots__ = ("_hash", "tree")

    def __init__(self, tree: Any) -> None:
        self.tree, self._hash = tree, hash(tree)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)

    def __repr__(self) -> str:
        return repr(self.tree)


def register(cls: type[T]) -> type[T]:
    """Makes a pytree node of a subclass of `CachedLeaves`; use it as a decorator."""

    def unflatten(structure: _Structure, children: Iterable[Any]) -> T:
        made, flat = object.__new__(cls), tuple(children)
        names = (field.name for field in dataclasses.fields(cls))
        made.__dict__.update(zip(names, structure.tree.unflatten(flat), strict=True))
        # What came in stays the children, whatever it is: a None has no leaves of its own.
        made.__dict__["_flat"] = flat, structure
        return made

    register_pytree_with_keys(cls, _with_keys, unflatten, lambda node: node._flat)
    return cls


def _fields(node: CachedLeaves) -> dict[str, Any]:
    return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}


def _with_keys(node: CachedLeaves) -> tuple[list[tuple[Any, Any]], _Structure]:
    children, structure = node._flat
    numbered = structure.tree.unflatten(range(len(children)))
    fields, keys = list(_fields(node)), []
    for (field, *path), _ in jax.tree_util.tree_leaves_with_path(numbered):
        keys.append(GetAttrKey(fields[field.idx] + keystr(tuple(path))))
    return list(zip(keys, children, strict=True)), structure

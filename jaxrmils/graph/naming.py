"""Names that a user recognises from their params tree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from jax.tree_util import GetAttrKey, tree_flatten_with_path

# Flax collections and wrappers that say nothing about which layer is meant.
_SILENT_FIRST = ("params",)
_SILENT_LAST = ("value", "raw_value", "get_value")


def leaf_names(params: Any) -> tuple[str, ...]:
    """The slash-separated path of every leaf, in flattening order.

    The `params` collection of Linen and the value attribute of NNX variables are left out.

    >>> leaf_names({"params": {"Dense_0": {"kernel": 1.0, "bias": 0.0}}})
    ('Dense_0/bias', 'Dense_0/kernel')
    """
    paths, _ = tree_flatten_with_path(params)
    names = []
    for path, _ in paths:
        parts = [_key_text(key) for key in path]
        if len(parts) > 1 and parts[0] in _SILENT_FIRST:
            parts = parts[1:]
        # Only as an attribute: a dict may well have a weight called "value".
        if len(parts) > 1 and isinstance(path[-1], GetAttrKey) and parts[-1] in _SILENT_LAST:
            parts = parts[:-1]
        names.append("/".join(parts) or "param")
    return _unique(names)


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    namer = Namer()
    return tuple(namer.use(name) for name in names)


def joined(names: Iterable[str]) -> str:
    """One name for a tensor made of several leaves.

    >>> joined(["LSTM/hf/kernel", "LSTM/hi/kernel"])
    'LSTM/{hf,hi}/kernel'
    """
    paths = [name.split("/") for name in sorted(set(names))]
    if len(paths) == 1:
        return "/".join(paths[0])
    # At least one part of every path stays between the braces.
    head = _shared([path[:-1] for path in paths])
    rest = [path[len(head) :] for path in paths]
    tail = _shared([path[:0:-1] for path in rest])[::-1]
    middle = ["/".join(path[: len(path) - len(tail)]) for path in rest]
    return "/".join([*head, f"{{{','.join(middle)}}}", *tail])


def _shared(paths: list[list[str]]) -> list[str]:
    """The parts with which all paths begin."""
    columns = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*paths, strict=False))
    return [column[0] for column in columns]


class Namer:
    """Hands out unique names; the second use of `a` is `a@1`.

    >>> namer = Namer()
    >>> [namer.use("a"), namer.use("a"), namer.number("b"), namer.number("b")]
    ['a', 'a@1', 'b_0', 'b_1']
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._given: set[str] = set()

    def use(self, name: str) -> str:
        """The name itself the first time, then with a call index."""
        return self._next(name, lambda count: name if count == 0 else f"{name}@{count}")

    def number(self, stem: str) -> str:
        """`stem_0`, `stem_1`, ..."""
        return self._next(f"{stem}_", lambda count: f"{stem}_{count}")

    def _next(self, key: str, text: Callable[[int], str]) -> str:
        while True:
            count = self._counts.get(key, 0)
            self._counts[key] = count + 1
            if text(count) not in self._given:
                self._given.add(text(count))
                return text(count)


def scope_name(scope: str, leaf_names: Iterable[str]) -> str:
    """A Flax name stack as it reads in the params tree.

    The root module's class name and the einsum subscripts are no part of it.

    >>> scope_name("Block/Attention_0/...qhd,...khd->...hqk", ["Attention_0/query/kernel"])
    'Attention_0'
    """
    parts = [p for p in scope.split("/") if p and "->" not in p and "(" not in p]
    firsts = {name.split("/")[0] for name in leaf_names}
    if parts and parts[0] not in firsts:
        parts = parts[1:]
    return "/".join(parts)

"""Layers that must share a format.

A tied weight (an embedding table that is also the output layer) and a scanned stack need no group:
each is one layer of the table, with one decision.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxrmils.graph import ModelTable
from jaxrmils.policies.constraints import matching
from jaxrmils.policies.formats import PlanError

Groups = str | Sequence[str | Sequence[str]]
"""Globs whose matches share a format, sequences of such globs, or the name "qkv"."""

QKV = "qkv"

_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)


def resolve_groups(table: ModelTable, groups: Groups) -> tuple[tuple[str, ...], ...]:
    """The layers of every group.

    Args:
      table: the model's layers.
      groups: each a glob, a sequence of globs whose matches form one group, or "qkv" for one group
        of every attention's query, key and value projections.

    Returns:
      Layer names by group, in the model's order.

    Raises:
      PlanError: a pattern that matches nothing, a group of one layer, "qkv" without any, or
        something that is no pattern.
    """
    found: list[tuple[str, ...]] = []
    names = list(table.layer)
    for group in (groups,) if isinstance(groups, str) else groups:
        if isinstance(group, str) and group == QKV and QKV not in names:
            found += _projections(names)
            continue
        patterns = (group,) if isinstance(group, str) else tuple(group)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise PlanError(f"the group {group!r} is no glob and no sequence of globs of layers")
        matched = {name for pattern in patterns for name in matching(pattern, names)}
        if len(matched) < 2:
            raise PlanError(
                f"the group {group!r} holds {len(matched)} layer ({', '.join(matched)}); two or "
                "more can share a format. (A tied weight and a scanned stack are one layer.)"
            )
        found.append(tuple(name for name in names if name in matched))
    return tuple(found)


def _projections(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Query, key and value projections with a common parent."""
    families: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        parts = name.split("/")
        for i, part in enumerate(parts):
            for triple in _PROJECTIONS:
                if part in triple:
                    place = ("/".join(parts[:i]), "/".join(parts[i + 1 :]), *triple)
                    families.setdefault(place, {})[part] = name
    found = [tuple(own.values()) for own in families.values() if len(own) == 3]
    if not found:
        known = ", ".join("/".join(triple) for triple in _PROJECTIONS)
        raise PlanError(
            f"the group 'qkv' found no three layers with a common parent that are called {known}; "
            "a fused projection is one layer already, others can be given as globs"
        )
    return found

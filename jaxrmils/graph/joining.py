"""Names the sites that were found, and joins the uses of every weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import compat, naming
from jaxrmils.graph.equations import uncontracted_axes
from jaxrmils.graph.expression import (
    Expression,
    Leaf,
    evaluate,
    leaf_indices,
    loops_of,
    signature,
)
from jaxrmils.graph.sites import CoverageEntry, Kind, Loop, Operand, Site, Weight, WeightUse


@dataclass(eq=False)
class RawSite:
    """A site before all uses of its weight are known.

    Attributes:
      kind, eqn, operands, scope, loops, macs, note: as in `Site`.
      weight_operand: which operand is the weight, None for an activation x activation dot.
      root: the weight without transposes and casts.
      permutation: from the root's axes to the operand's.
    """

    kind: Kind
    eqn: compat.JaxprEqn
    operands: tuple[Operand, ...]
    weight_operand: int | None
    root: Expression | None
    permutation: tuple[int, ...] | None
    scope: str
    loops: tuple[Loop, ...]
    macs: int
    note: str


def join(
    raw_sites: Sequence[RawSite], leaf_names: Sequence[str], leaves: Sequence[jax.ShapeDtypeStruct]
) -> tuple[tuple[Site, ...], dict[str, Weight], dict[str, Expression]]:
    """Sites in the order given, their weights by name, and the weights' root expressions."""
    weight_namer, site_namer = naming.Namer(), naming.Namer()
    weight_names: dict[str, str] = {}
    expressions: dict[str, Expression] = {}
    sites: list[Site] = []
    last_parent = ""
    for raw in raw_sites:
        weight = None
        if raw.root is not None and raw.weight_operand is not None:
            key = signature(raw.root)
            if key not in weight_names:
                names = [leaf_names[i] for i in leaf_indices(raw.root)]
                weight_names[key] = weight_namer.use(naming.joined(names))
                expressions[weight_names[key]] = raw.root
            weight = WeightUse(
                weight_names[key], raw.weight_operand, raw.permutation, loops_of(raw.root)
            )
            name = site_namer.use(weight.name)
            last_parent = weight.name.rsplit("/", 2)[0] if weight.name.count("/") > 1 else ""
        else:
            stem = naming.scope_name(raw.scope, leaf_names) or last_parent
            name = site_namer.number(f"{stem}/{raw.kind}".strip("/"))
        sites.append(
            Site(
                name=name,
                kind=raw.kind,
                layer=weight.name if weight else name,
                operands=raw.operands,
                weight=weight,
                scope=raw.scope,
                loops=raw.loops,
                macs=raw.macs,
                note=raw.note,
            )
        )
    weights = {
        name: _weight(name, expression, raw_sites, sites, leaves)
        for name, expression in expressions.items()
    }
    return tuple(sites), weights, expressions


def _weight(
    name: str,
    expression: Expression,
    raw_sites: Sequence[RawSite],
    sites: Sequence[Site],
    leaves: Sequence[jax.ShapeDtypeStruct],
) -> Weight:
    struct = _struct(expression, leaves)
    depth = len(loops_of(expression))
    uses = [i for i, s in enumerate(sites) if s.weight and s.weight.name == name]
    channels = set.intersection(*(_channels(raw_sites[i]) for i in uses))
    return Weight(
        name=name,
        leaves=tuple(sorted(leaf_indices(expression))),
        shape=tuple(struct.shape),
        dtype=str(struct.dtype),
        channel_axes=(*range(depth), *(depth + a for a in sorted(channels))),
        uses=tuple(sites[i].name for i in uses),
    )


def _struct(expression: Expression, leaves: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """Shape and dtype of an expression's value, a leading axis for every loop."""
    if isinstance(expression, Leaf):
        return leaves[expression.index]
    read = {i: leaves[i] for i in leaf_indices(expression)}

    def value(read: dict[int, Any]) -> Any:
        return jnp.asarray(evaluate(expression, [read.get(i) for i in range(len(leaves))]))

    return jax.eval_shape(value, read)


def _channels(raw: RawSite) -> set[int]:
    """The weight's axes that a use leaves uncontracted, in the weight's own layout."""
    axes = uncontracted_axes(raw.kind, raw.eqn, raw.weight_operand or 0)
    return {raw.permutation[a] for a in axes} if raw.permutation else axes


def name_entries(
    entries: Sequence[CoverageEntry | int], raw_sites: Sequence[RawSite], sites: Sequence[Site]
) -> tuple[CoverageEntry, ...]:
    """Coverage entries, with the names of the sites that stand there by index."""
    return tuple(
        CoverageEntry(
            raw_sites[entry].eqn.primitive.name, raw_sites[entry].scope, "site", sites[entry].name
        )
        if isinstance(entry, int)
        else entry
        for entry in entries
    )

"""Who reads a program's values, and when: what can be kept as codes between sites.

A block's input is often read twice, by its first site and by the shortcut around it. Where a graph
shares (see `trace`), readers that are no sites and come after the first site that reads a value
find what that site makes of it. In integers that is the codes' value, so that nothing in float has
to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxrmils.graph import compat

MAX_POOL = "reduce_window_max"


class Read(NamedTuple):
    """One reading of a variable.

    Attributes:
      position: of the step that reads it; the program's end is after all steps.
      site: the site's number, None for a reader that is no site.
      operand: which of its operands.
    """

    position: int
    site: int | None
    operand: int


@dataclass(frozen=True, eq=False)
class Reads:
    """Readings of a program's values.

    Attributes:
      shared: per site number, the operands that it is the first site to read, and that something
        else reads after it.
      own_pools: results of max-pooling that only sites read.
      shared_pools: results of max-pooling that only sites read where values are shared.
    """

    shared: Mapping[int, frozenset[int]]
    own_pools: frozenset[Any]
    shared_pools: frozenset[Any]

    def pools(self, shares: bool) -> frozenset[Any]:
        """The results of max-pooling that nothing but sites reads in float."""
        return self.shared_pools if shares else self.own_pools


def find_reads(
    steps: Sequence[tuple[int | None, Sequence[Any]]],
    outputs: Sequence[Any],
    known: Mapping[Any, Any],
    pooled: Sequence[Any],
) -> Reads:
    """Sorts a program's readings.

    Args:
      steps: per step, its site's number (None for a step that is no site) and what it reads.
      outputs: what the program returns.
      known: variables that depend on parameters alone; they are left out.
      pooled: the variables that max-pooling makes.
    """
    readings: dict[Any, list[Read]] = {}
    for position, (site, atoms) in enumerate((*steps, (None, outputs))):
        for operand, atom in _variables(atoms, known):
            readings.setdefault(atom, []).append(Read(position, site, operand))
    shared: dict[int, set[int]] = {}
    is_later: dict[Any, bool] = {}
    for atom, reads in readings.items():
        first = next((read for read in reads if read.site is not None), None)
        others = [read.position for read in reads if read.site is None]
        if first is None:
            continue
        is_later[atom] = all(position > first.position for position in others)
        if any(position > first.position for position in others):
            assert first.site is not None
            shared.setdefault(first.site, set()).add(first.operand)
    by_sites = {atom for atom in is_later if all(read.site is not None for read in readings[atom])}
    return Reads(
        shared={site: frozenset(operands) for site, operands in shared.items()},
        own_pools=frozenset(atom for atom in pooled if atom in by_sites),
        shared_pools=frozenset(atom for atom in pooled if is_later.get(atom)),
    )


def _variables(atoms: Sequence[Any], known: Mapping[Any, Any]) -> Iterator[tuple[int, Any]]:
    for operand, atom in enumerate(atoms):
        if not isinstance(atom, compat.Literal) and atom not in known:
            yield operand, atom

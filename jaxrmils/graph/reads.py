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
      own: values that only sites read.
      first: values that sites read before anything else does: where values are shared, nothing but
        sites reads these in float.
      once: values that one operation reads, at one place, and that are not returned.
    """

    shared: Mapping[int, frozenset[int]]
    own: frozenset[Any]
    first: frozenset[Any]
    once: frozenset[Any]

    def by_sites(self, shares: bool) -> frozenset[Any]:
        """The values that nothing but sites reads in float."""
        return self.first if shares else self.own


def find_reads(
    steps: Sequence[tuple[int | None, Sequence[Any]]],
    outputs: Sequence[Any],
    known: Mapping[Any, Any],
) -> Reads:
    """Sorts a program's readings.

    Args:
      steps: per step, its site's number (None for a step that is no site) and what it reads.
      outputs: what the program returns.
      known: variables that depend on parameters alone; they are left out.
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
        own=frozenset(by_sites),
        first=frozenset(atom for atom, later in is_later.items() if later),
        once=frozenset(
            atom
            for atom, reads in readings.items()
            if len(reads) == 1 and reads[0].position < len(steps)
        ),
    )


def _variables(atoms: Sequence[Any], known: Mapping[Any, Any]) -> Iterator[tuple[int, Any]]:
    for operand, atom in enumerate(atoms):
        if not isinstance(atom, compat.Literal) and atom not in known:
            yield operand, atom

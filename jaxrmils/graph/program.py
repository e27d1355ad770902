"""A jaxpr, read once: which steps are sites, which values are known from parameters.

`Program` mirrors a jaxpr. Its steps are equations to bind as they are, sites that a handler
takes over, and calls (`jit`, `remat`, `scan`, `cond`, custom derivatives) that hold sites.
`interpreter.run` executes it; `builder.build` makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jaxrmils.graph import compat
from jaxrmils.graph.expression import Expression
from jaxrmils.graph.functions import MOST_EQUATIONS, Function, find_function
from jaxrmils.graph.reads import MAX_POOL, Reads, find_reads
from jaxrmils.graph.sites import Loop

CallKind = Literal["inline", "remat", "scan", "cond"]


@dataclass(frozen=True, eq=False)
class Bind:
    """An equation that runs untouched."""

    eqn: compat.JaxprEqn


@dataclass(frozen=True, eq=False)
class SiteStep:
    """An equation that a handler runs; `index` is the site's number in the trace."""

    eqn: compat.JaxprEqn
    index: int


@dataclass(frozen=True, eq=False)
class Call:
    """An equation whose inner programs hold sites.

    Attributes:
      kind: how to run it.
      eqn: the equation.
      programs: its inner program, or one per branch for `cond`.
      arguments: for every program, the outer variables that feed its inputs.
      outvars: the outer variables that its results define, for results that are read.
      loop: the scan's loop.
      slices: for a scan, the parameter slices that its body may read, with the body's node.
      num_constants, num_carry: how a scan's arguments divide.
      gives_known_results: True if some results of an inlined `jit` are known, and left out here.
    """

    kind: CallKind
    eqn: compat.JaxprEqn
    programs: tuple[Program, ...]
    arguments: tuple[tuple[Any, ...], ...]
    outvars: tuple[Any, ...]
    loop: Loop | None = None
    slices: tuple[Expression, ...] = ()
    num_constants: int = 0
    num_carry: int = 0
    gives_known_results: bool = False


Step = Bind | SiteStep | Call


@dataclass(frozen=True, eq=False)
class Program:
    """A jaxpr with its sites marked.

    Attributes:
      inputs: the variables that are passed in when it runs.
      steps: what to do, in order; equations whose result nobody reads are left out.
      outputs: variables or literals to return, those that somebody reads.
      known: variables that depend on parameters and constants alone.
      site_indices: the sites inside, at any depth.
    """

    inputs: tuple[Any, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]
    known: Mapping[Any, Expression]
    site_indices: tuple[int, ...]

    @cached_property
    def joined(self) -> tuple[Step | Function, ...]:
        """The steps, with equations that are one function of one value as one step."""
        eqns = [step.eqn if isinstance(step, Bind) else None for step in self.steps]
        counts = Counter(
            atom
            for atoms in (*map(_atoms, self.steps), self.outputs)
            for atom in atoms
            if not isinstance(atom, compat.Literal)
        )
        found: list[Step | Function] = []
        position = 0
        while position < len(self.steps):
            function = find_function(eqns[position : position + MOST_EQUATIONS])
            if function is not None and _is_closed(function, counts):
                found.append(function)
                position += len(function.eqns)
            else:
                found.append(self.steps[position])
                position += 1
        return tuple(found)

    @cached_property
    def reads(self) -> Reads:
        """Who reads which value, where functions are one step."""
        steps = [
            (step.index if isinstance(step, SiteStep) else None, _atoms(step))
            for step in self.joined
        ]
        return find_reads(steps, self.outputs, self.known)


def is_max_pool(step: Bind) -> bool:
    """True for a maximum over windows."""
    return step.eqn.primitive.name == MAX_POOL


def _atoms(step: Step | Function) -> Sequence[Any]:
    """All variables and literals that a step reads; of a call, its outer ones."""
    match step:
        case Function():
            return [step.operand]
        case Call():
            atoms = [atom for arguments in step.arguments for atom in arguments]
            return [*step.eqn.invars[:1], *atoms] if step.kind == "cond" else atoms
    return step.eqn.invars


def _is_closed(function: Function, counts: Mapping[Any, int]) -> bool:
    """Are the results of its equations, but the last, read by them alone?"""
    own = Counter(
        atom for eqn in function.eqns for atom in eqn.invars if not isinstance(atom, compat.Literal)
    )
    between = [eqn.outvars[0] for eqn in function.eqns[:-1]]
    return all(counts[var] == own[var] for var in between)

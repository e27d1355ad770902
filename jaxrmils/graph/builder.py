"""Reads a jaxpr into a `Program`: finds sites, weights and what must stay float.

Params-only partial evaluation decides what is a weight: an equation whose inputs are all
known becomes an expression, and a dot with one known operand is a site with a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax

from jaxrmils.graph import compat, equations
from jaxrmils.graph.expression import (
    Apply,
    Constant,
    Expression,
    Leaf,
    Output,
    Slice,
    leaf_indices,
    loops_of,
    peel,
)
from jaxrmils.graph.folding import Fold, folds
from jaxrmils.graph.joining import RawSite, join, name_entries
from jaxrmils.graph.program import Bind, Call, Program, SiteStep, Step
from jaxrmils.graph.sites import (
    Coverage,
    CoverageEntry,
    Kind,
    Loop,
    Operand,
    Role,
    Site,
    Status,
    Weight,
)


class TraceError(ValueError):
    """A model that cannot be read as a function of parameters and independent examples."""


@dataclass(frozen=True)
class Traced:
    """All that reading a jaxpr gives.

    Attributes:
      program: the program to run.
      sites: its sites, by index.
      eqns: their equations.
      weights: the weights they read, by name.
      expressions: the weights' root expressions, by name.
      coverage: what became of every dot and convolution.
      reads: expressions that something other than a site reads in float.
      structs: shapes and dtypes of the parameter leaves.
      structure: the tree that the program's outputs are the leaves of.
    """

    program: Program
    sites: tuple[Site, ...]
    eqns: tuple[compat.JaxprEqn, ...]
    weights: dict[str, Weight]
    expressions: dict[str, Expression]
    coverage: Coverage
    reads: tuple[Expression, ...]
    structs: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any

    @cached_property
    def float_leaves(self) -> frozenset[int]:
        """Parameter leaves that something other than a site reads."""
        return frozenset(leaf for each in self.reads for leaf in leaf_indices(each))

    @cached_property
    def folds(self) -> Mapping[str, Fold]:
        """Expressions that stand for leaves, by signature."""
        return folds(self.reads, self.expressions.values(), self.structs)


def build(
    closed: compat.ClosedJaxpr,
    leaf_names: Sequence[str],
    leaves: Sequence[jax.ShapeDtypeStruct],
    structure: Any,
) -> Traced:
    """Reads a jaxpr whose first inputs are the parameter leaves.

    Args:
      closed: the jaxpr of `apply(params, inputs)`, flattened.
      leaf_names: a name for every parameter leaf.
      leaves: their shapes and dtypes.
      structure: of the outputs, before they were flattened.

    Raises:
      TraceError: if the function draws random numbers.
    """
    builder = _Builder()
    known: list[Expression | None] = [Leaf(i) for i in range(len(leaf_names))]
    known += [None] * (len(closed.jaxpr.invars) - len(known))
    program = builder.program(closed, known, _Place("", ""))
    builder.need_values(program.outputs, program.known)
    sites, weights, expressions = join(builder.raw, leaf_names, leaves)
    return Traced(
        program=program,
        sites=sites,
        eqns=tuple(raw.eqn for raw in builder.raw),
        weights=weights,
        expressions=expressions,
        coverage=Coverage(name_entries(builder.entries, builder.raw, sites)),
        reads=tuple(dict.fromkeys(builder.reads)),
        structs=tuple(leaves),
        structure=structure,
    )


@dataclass(frozen=True)
class _Place:
    """Where an equation is: its Flax scope, and what a user should know about sites there."""

    scope: str
    note: str

    def of(self, eqn: compat.JaxprEqn) -> _Place:
        """The place of an equation inside this one."""
        return replace(self, scope=f"{self.scope}/{compat.name_stack(eqn)}".strip("/"))


Values = Sequence[Expression | None]


@dataclass(eq=False)
class _Builder:
    raw: list[RawSite] = field(default_factory=list)
    entries: list[CoverageEntry | int] = field(default_factory=list)  # int: a site's index
    reads: list[Expression] = field(default_factory=list)
    loops: tuple[Loop, ...] = ()
    loop_count: int = 0

    def program(
        self,
        closed: compat.ClosedJaxpr,
        inputs: Values,
        place: _Place,
        outputs_read: Sequence[bool] | None = None,
    ) -> Program:
        """The program of a jaxpr; outputs that are not read are left out."""
        jaxpr = closed.jaxpr
        known: dict[Any, Expression] = {}
        consts = (Constant(c) for c in closed.consts)
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update((v, e) for v, e in zip(jaxpr.invars, inputs, strict=True) if e is not None)
        steps: list[Step] = []
        first = len(self.raw)
        results_read = equations.read_results(jaxpr, outputs_read)
        for eqn, read in zip(jaxpr.eqns, results_read, strict=True):
            here = place.of(eqn)
            if read is None:
                self.cover(eqn, here.scope, "unused", "its result is not read")
                continue
            _refuse_random(eqn, here.scope)
            values = [_known_value(v, known) for v in eqn.invars]
            if all(v is not None for v in values) and not eqn.effects:
                self.fold(eqn, [v for v in values if v is not None], known, here)
            else:
                steps.append(self.step(eqn, values, known, here, read))
        return Program(
            inputs=_unknown(jaxpr.invars, inputs),
            steps=tuple(steps),
            outputs=_selected(jaxpr.outvars, outputs_read or [True] * len(jaxpr.outvars)),
            known=known,
            site_indices=tuple(range(first, len(self.raw))),
        )

    def fold(
        self,
        eqn: compat.JaxprEqn,
        values: list[Expression],
        known: dict[Any, Expression],
        place: _Place,
    ) -> None:
        """Keeps an equation whose inputs are all known as an expression."""
        node = Apply(eqn, tuple(values))
        for i, var in enumerate(eqn.outvars):
            known[var] = Output(node, i)
        self.cover(eqn, place.scope, "folded", "depends on parameters and constants alone")

    def step(
        self,
        eqn: compat.JaxprEqn,
        values: Values,
        known: dict[Any, Expression],
        place: _Place,
        read: Sequence[bool],
    ) -> Step:
        """A site, a call that holds sites, or the equation as it is."""
        name = eqn.primitive.name
        if name in equations.OPS:
            return self.operation(eqn, values, place)
        if name == "gather" and equations.is_lookup(eqn, values[0]):
            return self.add_site("gather", eqn, values, place)
        if name in equations.INLINED_JITS and not equations.holds(eqn, equations.SITE_PRIMITIVES):
            if equations.gives_known_results(eqn, [v is not None for v in values]):
                return self.inline(eqn, values, known, place, read)
        elif equations.holds(eqn, equations.SITE_PRIMITIVES):
            first = len(self.raw)
            call = self.call(eqn, values, known, place, read)
            # Without sites inside, an equation runs as it is, with its own derivative rule.
            if call is not None and (len(self.raw) > first or call.gives_known_results):
                return call
            if call is None:
                self.cover(eqn, place.scope, "float", equations.why_not_entered(name))
        elif name in equations.UNSUPPORTED_OPS:
            self.cover(eqn, place.scope, "float", f"{name} has no integer form here")
        return self.bind(eqn, values)

    def bind(self, eqn: compat.JaxprEqn, values: Values) -> Bind:
        """Leaves an equation as it is; it reads its parameters in float."""
        self.reads += [value for value in values if value is not None]
        return Bind(eqn)

    def need_values(self, atoms: Sequence[Any], known: Mapping[Any, Expression]) -> None:
        """Notes that the values of these variables are read in float."""
        own = (atom for atom in atoms if not isinstance(atom, compat.Literal))
        self.reads += [known[atom] for atom in own if atom in known]

    def cover(self, eqn: compat.JaxprEqn, scope: str, status: Status, reason: str) -> None:
        """Lists an operation that is no site, or the operations inside a call."""
        name = eqn.primitive.name
        if name in equations.OPS or name in equations.UNSUPPORTED_OPS:
            self.entries.append(CoverageEntry(name, scope, status, reason))
        for _, jaxpr in compat.inner_jaxprs(eqn):
            for inner in jaxpr.eqns:
                self.cover(inner, _Place(scope, "").of(inner).scope, status, reason)

    # Operations

    def operation(self, eqn: compat.JaxprEqn, values: Values, place: _Place) -> Step:
        """A dot or convolution."""
        reason = equations.why_not_quantizable(eqn, values)
        if reason:
            self.cover(eqn, place.scope, "float", reason)
            return self.bind(eqn, values)
        return self.add_site(
            "dot" if eqn.primitive.name == "dot_general" else "conv", eqn, values, place
        )

    def add_site(self, kind: Kind, eqn: compat.JaxprEqn, values: Values, place: _Place) -> SiteStep:
        """Notes a site; its first known operand is the weight."""
        weight_operand = next((i for i, v in enumerate(values) if v is not None), None)
        expression = None if weight_operand is None else values[weight_operand]
        root, permutation = (None, None) if expression is None else peel(expression)
        roles: list[Role] = ["weight" if i == weight_operand else "activation" for i in range(2)]
        if kind == "gather":
            roles[1] = "indices"
        operands = tuple(
            Operand(role, tuple(compat.aval(v).shape), str(compat.aval(v).dtype))
            for role, v in zip(roles, eqn.invars, strict=True)
        )
        macs = equations.multiply_accumulates(kind, eqn)
        site = RawSite(
            kind=kind,
            eqn=eqn,
            operands=operands,
            weight_operand=weight_operand,
            root=root,
            permutation=permutation,
            scope=place.scope,
            loops=self.loops,
            macs=macs * math.prod(loop.length for loop in self.loops),
            note=place.note,
        )
        self.entries.append(len(self.raw))
        self.raw.append(site)
        return SiteStep(eqn, len(self.raw) - 1)

    # Equations with inner jaxprs

    def call(
        self,
        eqn: compat.JaxprEqn,
        values: Values,
        known: dict[Any, Expression],
        place: _Place,
        read: Sequence[bool],
    ) -> Call | None:
        """Enters an equation; None if there is no way into its kind."""
        name = eqn.primitive.name
        if name in equations.INLINED_JITS or name in equations.INLINED_CUSTOM_RULES:
            return self.inline(eqn, values, known, place, read)
        if name in equations.REMATS:
            return self.remat(eqn, values, place, read)
        if name == "scan":
            return self.scan(eqn, values, known, place, read)
        if name == "cond":
            return self.cond(eqn, values, known, place, read)
        return None

    def inline(
        self,
        eqn: compat.JaxprEqn,
        values: Values,
        known: dict[Any, Expression],
        place: _Place,
        read: Sequence[bool],
    ) -> Call:
        name = eqn.primitive.name
        if name in equations.INLINED_CUSTOM_RULES:
            note = f"{name}: its custom derivative is replaced by the true one"
            place, key = replace(place, note=note), equations.INLINED_CUSTOM_RULES[name]
        else:
            key = equations.INLINED_JITS[name]
        inner = self.program(compat.close(eqn.params[key]), values, place, read)
        outputs, outvars = [], []
        for inner_var, var in zip(inner.outputs, _selected(eqn.outvars, read), strict=True):
            value = _known_value(inner_var, inner.known)
            if value is not None:
                known[var] = value
            else:
                outputs.append(inner_var)
                outvars.append(var)
        return Call(
            kind="inline",
            eqn=eqn,
            programs=(replace(inner, outputs=tuple(outputs)),),
            arguments=(_unknown(eqn.invars, values),),
            outvars=tuple(outvars),
            gives_known_results=len(outvars) < sum(read) and name in equations.INLINED_JITS,
        )

    def remat(
        self, eqn: compat.JaxprEqn, values: Values, place: _Place, read: Sequence[bool]
    ) -> Call:
        inner = self.program(compat.close(eqn.params["jaxpr"]), values, place, read)
        self.need_values(inner.outputs, inner.known)
        return Call(
            kind="remat",
            eqn=eqn,
            programs=(inner,),
            arguments=(_unknown(eqn.invars, values),),
            outvars=_selected(eqn.outvars, read),
        )

    def scan(
        self,
        eqn: compat.JaxprEqn,
        values: Values,
        known: dict[Any, Expression],
        place: _Place,
        read: Sequence[bool],
    ) -> Call:
        num_constants, num_carry = compat.scan_parts(eqn)
        first_xs = num_constants + num_carry
        carry, xs = eqn.invars[num_constants:first_xs], values[first_xs:]
        self.loop_count += 1
        stacked = any(v is not None and leaf_indices(v) for v in xs)
        loop = Loop(self.loop_count, eqn.params["length"], stacked)
        slices = [None if v is None else Slice(v, loop.number) for v in xs]
        # Every carried value is kept: later iterations may read it.
        read = [*[True] * num_carry, *read[num_carry:]]
        first, outer, self.loops = len(self.raw), self.loops, (*self.loops, loop)
        inner = self.program(
            compat.close(eqn.params["jaxpr"]),
            [*values[:num_constants], *[None] * num_carry, *slices],
            place,
            read,
        )
        self.loops = outer
        loop = self.settle(loop, first)
        self.need_values(inner.outputs, inner.known)
        self.need_values(carry, known)
        constants = _unknown(eqn.invars[:num_constants], values[:num_constants])
        return Call(
            kind="scan",
            eqn=eqn,
            programs=(inner,),
            arguments=((*constants, *carry, *_unknown(eqn.invars[first_xs:], xs)),),
            outvars=_selected(eqn.outvars, read),
            loop=loop,
            slices=tuple(s for s in slices if s is not None),
            num_constants=len(constants),
            num_carry=num_carry,
        )

    def settle(self, loop: Loop, first: int) -> Loop:
        """Marks a loop as stacked if it picks weights by a number (`w[i]`) it scans over."""
        inside = self.raw[first:]
        if loop.stacked or not any(s.root and loop.number in loops_of(s.root) for s in inside):
            return loop
        settled = replace(loop, stacked=True)
        for site in inside:
            site.loops = tuple(settled if each is loop else each for each in site.loops)
        return settled

    def cond(
        self,
        eqn: compat.JaxprEqn,
        values: Values,
        known: dict[Any, Expression],
        place: _Place,
        read: Sequence[bool],
    ) -> Call:
        self.need_values(eqn.invars[:1], known)
        programs = []
        for branch in eqn.params["branches"]:
            inner = self.program(compat.close(branch), values[1:], place, read)
            self.need_values(inner.outputs, inner.known)
            programs.append(inner)
        return Call(
            kind="cond",
            eqn=eqn,
            programs=tuple(programs),
            arguments=(_unknown(eqn.invars[1:], values[1:]),) * len(programs),
            outvars=_selected(eqn.outvars, read),
        )


def _unknown(atoms: Sequence[Any], values: Values) -> tuple[Any, ...]:
    return tuple(atom for atom, value in zip(atoms, values, strict=True) if value is None)


def _selected(atoms: Sequence[Any], mask: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(atom for atom, chosen in zip(atoms, mask, strict=True) if chosen)


def _known_value(atom: Any, known: Mapping[Any, Expression]) -> Expression | None:
    if isinstance(atom, compat.Literal):
        return Constant(compat.literal_value(atom))
    return known.get(atom)


def _refuse_random(eqn: compat.JaxprEqn, where: str) -> None:
    name = equations.random_primitive(eqn)
    if name:
        raise TraceError(
            f"apply draws random numbers ({name} in {where or 'the top level'}). "
            "Quantization noise can't be told from dropout noise: call the model in evaluation "
            "mode (Linen: deterministic=True or train=False; NNX: model.eval())."
        )

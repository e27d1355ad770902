"""Runs a program, giving every site to a handler.

All later stages are handlers: record ranges, insert probes, add noise, run integer
operations. A handler is a function of a `SiteCall` that returns the operation's results and
a record (any pytree of arrays, or None); records come back by site name, with a leading axis
for every scan around the site. Nothing is mutated, so a run can be jitted, differentiated
and vmapped. A handler may also return a result that is `Pending`; what reads it is then
computed with it where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrmils.graph import compat
from jaxrmils.graph.depthwise import bind_depthwise, is_depthwise
from jaxrmils.graph.expression import (
    Apply,
    Constant,
    Expression,
    Leaf,
    Node,
    Output,
    Slice,
    children,
    leaf_indices,
    ordered,
)
from jaxrmils.graph.functions import Function
from jaxrmils.graph.pending import Pending, settled
from jaxrmils.graph.program import Bind, Call, Program, SiteStep, is_max_pool
from jaxrmils.graph.sites import Site

Records = dict[str, Any]


class MissingLeafError(RuntimeError):
    """A float parameter was asked for that the caller left out."""


class Frame:
    """Evaluates known expressions inside one level of tracing.

    Values made inside a scan body must not leak out of it, so each body has a frame of its
    own that can read what outer frames have computed.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        parent: Frame | None = None,
        *,
        leaf_names: Sequence[str] | None = None,
    ) -> None:
        self.leaves = leaves
        self._names = leaf_names
        self._parent = parent
        self._values: dict[Any, Any] = {}
        self._shared: dict[Hashable, tuple[Any, Any]] = {}

    def child(self) -> Frame:
        """A frame for an inner trace."""
        return Frame(self.leaves, self, leaf_names=self._names)

    def set(self, node: Expression, value: Any) -> None:
        """Gives the value of a slice in this iteration."""
        self._values[node] = value

    def give(self, output: Output, value: Any) -> None:
        """Gives the one result of an equation, which is not computed then."""
        self._values[output.node] = [value]

    def once(self, source: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives for a value and a key, made once in this level of tracing."""
        found = self._shared.get((id(source), key))
        if found is None:
            # The source is kept, so that no other value can get its id.
            found = self._shared[id(source), key] = (source, make())
        return found[1]

    def _lookup(self, node: Any) -> Any:
        frame: Frame | None = self
        while frame is not None:
            if node in frame._values:
                return frame._values[node]
            frame = frame._parent
        return None

    def available(self, expression: Expression) -> bool:
        """True if all the leaves it reads were given."""
        return all(self.leaves[i] is not None for i in leaf_indices(expression))

    def force(self, expression: Expression) -> Any:
        """The value of a known expression, computed at most once per frame.

        Raises:
          MissingLeafError: it reads a parameter that was left out.
        """
        for node in ordered(expression, self._missing):
            if isinstance(node, Apply) and self._lookup(node) is None:
                inputs = [self._value(each) for each in node.inputs]
                self._values[node] = compat.bind(node.eqn, inputs)
        return self._value(expression)

    def _missing(self, node: Node) -> tuple[Node, ...]:
        """What must be computed before a node."""
        is_given = isinstance(node, Slice) or self._lookup(node) is not None
        return () if is_given else children(node)

    def _value(self, node: Expression) -> Any:
        match node:
            case Constant():
                return node.value
            case Leaf():
                value = self.leaves[node.index]
            case Slice():
                value = self._lookup(node)
            case _:
                return self._lookup(node.node)[node.index]
        if value is None:
            names = [self._names[i] if self._names else i for i in sorted(leaf_indices(node))]
            raise MissingLeafError(
                f"parameter {', '.join(map(str, names))} is needed in float but was left out; "
                "every leaf that something other than a handled site reads must be given"
            )
        return value


class Pooled(NamedTuple):
    """A max-pooling, and what it pools."""

    eqn: compat.JaxprEqn
    operand: Any


@dataclass(frozen=True)
class SiteCall:
    """What a handler gets at a site.

    Attributes:
      site: which one.
      eqn: its equation; `eqn.params` holds dimension numbers, strides and so on.
      weight: the caller's value for the site's weight (`weights[name]`), already sliced for
        the current iteration of stacked loops; None where it gave none.
      state: the caller's value for the site (`state[name]`), sliced likewise.
      step: the caller's value for this iteration (`steps[name]`), sliced by every loop.
      shared: positions of the operands whose value others read after this site, and are to read
        as it does; see `trace`'s `shortcuts`.
    """

    site: Site
    eqn: compat.JaxprEqn
    weight: Any
    state: Any
    step: Any
    shared: frozenset[int]
    _read: Callable[[int], Any]
    _store: Callable[[int, Any], None]
    _pooled: Callable[[int], Pooled | None]
    _frame: Frame

    def once(self, index: int, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """`make(operand)`, computed once for all sites that read the same value.

        Args:
          index: of the operand.
          key: whatever else the result depends on; equal keys must mean equal results.
          make: a function of the operand, which is pending if it was left so.
        """
        operand = self._read(index)
        return self._frame.once(operand, key, lambda: make(operand))

    def operand(self, index: int) -> Any:
        """The float value of an operand; a weight is computed from the parameters."""
        return settled(self._read(index))

    def operands(self) -> tuple[Any, ...]:
        """All float operands."""
        return tuple(self.operand(i) for i in range(len(self.eqn.invars)))

    def contracted(self, index: int) -> tuple[int, ...]:
        """The dims of a dot's operand that are summed over; what is left counts its rows."""
        return tuple(self.eqn.params["dimension_numbers"][0][index])

    def pooled(self, index: int) -> Pooled | None:
        """The max-pooling that an operand comes from, if nothing but sites reads its result."""
        return self._pooled(index)

    def store(self, index: int, value: Any) -> None:
        """What later readers of an operand find, if it is among `shared`; nothing otherwise."""
        if index not in self.shared:
            return
        if not isinstance(value, Pending):
            value = value.astype(compat.abstract(self.eqn.invars[index]).dtype)
        self._store(index, value)

    def _store_changed(self, operands: Sequence[Any]) -> None:
        for index in self.shared:
            if operands[index] is not settled(self._read(index)):
                self.store(index, operands[index])

    def bind(self, *operands: Any) -> Any:
        """The original operation on other operands, which are stored."""
        self._store_changed(operands)
        return _run(self.eqn, operands)

    def bind_highest(self, *operands: Any) -> Any:
        """The same at `highest` matmul precision, where the model leaves the precision open."""
        self._store_changed(operands)
        return _run(_with_precision(self.eqn, float32=False), operands)

    def bind_float32(self, *operands: Any) -> Any:
        """The operation on any float32 operands, accumulated and returned in float32.

        Nothing is stored.
        """
        return _run(_with_precision(self.eqn, float32=True), operands)

    def bind_wide(self, *operands: Any) -> Any:
        """The operation in float32 on operands of any float dtype, in the model's own dtype.

        What an integer site does: exact products, one rounding at the end. Operands are stored.
        """
        self._store_changed(operands)
        floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in operands]
        wide = [x.astype(jnp.float32) if f else x for x, f in zip(operands, floating, strict=True)]
        return self.bind_float32(*wide).astype(compat.abstract(self.eqn.outvars[0]).dtype)

    def view(self, array: Any) -> Any:
        """An array in the weight's layout (or a keepdims scale), in the operand's layout."""
        permutation = self.site.weight.permutation if self.site.weight else None
        return array if permutation is None else array.transpose(permutation)


def _run(eqn: compat.JaxprEqn, operands: tuple[Any, ...]) -> Any:
    if is_depthwise(eqn):
        return bind_depthwise(eqn, operands)
    (result,) = compat.bind(eqn, operands)
    return result


def _with_precision(eqn: compat.JaxprEqn, *, float32: bool) -> compat.JaxprEqn:
    changes: dict[str, Any] = {}
    if "precision" in eqn.params and (float32 or eqn.params["precision"] is None):
        highest = jax.lax.Precision.HIGHEST
        changes["precision"] = (highest, highest)
    if float32 and "preferred_element_type" in eqn.params:
        changes["preferred_element_type"] = jnp.dtype(jnp.float32)
    return eqn.replace(params={**eqn.params, **changes})


Handler = Callable[[SiteCall], tuple[Any, Any]]
Operation = Callable[[compat.JaxprEqn, Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Scope:
    """All that a run carries along.

    Attributes:
      handler: called at every site.
      sites: the sites of the trace, by index.
      frame: known values.
      weights: per weight name, a pytree whose leaves lead with the weight's stacked loops.
      state: per site name, a pytree whose leaves lead with the site's stacked loops.
      steps: per site name, a pytree whose leaves lead with all of the site's loops, as records do.
      absent: value of a record in a `cond` branch that does not hold the site, given the
        record's shape and dtype.
      shares: whether later readers of a site's operand read what the site makes of it.
      operations: other ways to run equations that are no sites, by primitive.
    """

    handler: Handler
    sites: Sequence[Site]
    frame: Frame
    weights: Mapping[str, Any]
    state: Mapping[str, Any]
    steps: Mapping[str, Any]
    absent: Callable[[jax.ShapeDtypeStruct], Any]
    shares: bool = False
    operations: Mapping[str, Operation] = field(default_factory=dict)


def run(program: Program, args: Sequence[Any], scope: Scope) -> tuple[list[Any], Records]:
    """Runs a program.

    Args:
      program: what to run.
      args: values for `program.inputs`.
      scope: handler and values.

    Returns:
      The values of `program.outputs` and the handler's records by site name.
    """
    env = dict(zip(program.inputs, args, strict=True))
    stored: dict[Any, Any] = {}
    pooled: dict[Any, Pooled] = {}
    records: Records = {}

    def own(atom: Any) -> Any:
        if isinstance(atom, compat.Literal):
            return compat.literal_value(atom)
        if atom in env:
            return env[atom]
        return scope.frame.force(program.known[atom])

    def read(atom: Any) -> Any:
        is_stored = not isinstance(atom, compat.Literal) and atom in stored
        return stored[atom] if is_stored else own(atom)

    def read_now(atom: Any) -> Any:
        return settled(read(atom))

    reads = program.reads
    by_sites = reads.by_sites(scope.shares)

    for step in program.joined:
        if isinstance(step, Function):
            outvars = (step.result,)
            results = [_applied(step, read(step.operand), scope)]
        elif isinstance(step, Bind):
            outvars = step.eqn.outvars
            inputs = _bind_inputs(step.eqn, read)
            if is_max_pool(step):
                pooled[outvars[0]] = Pooled(step.eqn, inputs[0])
            results = _bound(step.eqn, inputs, scope)
        elif isinstance(step, SiteStep):
            outvars = step.eqn.outvars
            shared = reads.shared.get(step.index, frozenset()) if scope.shares else ()
            values = _Values(own, stored, {v: p for v, p in pooled.items() if v in by_sites})
            result, record = _run_site(step, frozenset(shared), values, scope)
            results = [result]
            if record is not None:
                records[scope.sites[step.index].name] = record
        else:
            outvars = step.outvars
            results, inner = _CALLS[step.kind](step, read_now, scope)
            records.update(inner)
        for variable, result in zip(outvars, results, strict=True):
            # Whoever waits must be asked for one thing: a next operation, or codes.
            waits = variable in reads.once or variable in by_sites
            env[variable] = result if waits else settled(result)
    return [read_now(atom) for atom in program.outputs], records


def _bound(eqn: compat.JaxprEqn, inputs: Sequence[Any], scope: Scope) -> Sequence[Any]:
    """The results of an equation that is no site; a pending operand may take it along."""
    for position, operand in enumerate(inputs):
        if isinstance(operand, Pending):
            result = operand.followed_by(eqn, inputs, position)
            if result is not None:
                return [result]
    bind = scope.operations.get(eqn.primitive.name, compat.bind)
    return bind(eqn, [settled(operand) for operand in inputs])


def _applied(function: Function, operand: Any, scope: Scope) -> Any:
    """What a function gives; a pending operand may take it along."""
    if isinstance(operand, Pending):
        result = operand.applied(function.name)
        if result is not None:
            return result
    values = {function.operand: settled(operand)}
    for eqn in function.eqns:
        inputs = [None if isinstance(v, compat.Literal) else values[v] for v in eqn.invars]
        (values[eqn.outvars[0]],) = _bound(eqn, inputs, scope)
    return values[function.result]


def _bind_inputs(eqn: compat.JaxprEqn, read: Callable[[Any], Any]) -> list[Any]:
    return [None if isinstance(v, compat.Literal) else read(v) for v in eqn.invars]


class _Values(NamedTuple):
    """What sites read and write, by variable."""

    read: Callable[[Any], Any]
    stored: dict[Any, Any]
    pooled: Mapping[Any, Pooled]


def _run_site(
    step: SiteStep, shared: frozenset[int], values: _Values, scope: Scope
) -> tuple[Any, Any]:
    site, atoms = scope.sites[step.index], step.eqn.invars
    call = SiteCall(
        site=site,
        eqn=step.eqn,
        weight=scope.weights.get(site.weight.name) if site.weight else None,
        state=scope.state.get(site.name),
        step=scope.steps.get(site.name),
        shared=shared,
        _read=lambda i: values.read(atoms[i]),
        _store=lambda i, value: values.stored.update({atoms[i]: value}),
        _pooled=lambda i: values.pooled.get(atoms[i]),
        _frame=scope.frame,
    )
    return scope.handler(call)


def _arguments(step: Call, read: Callable[[Any], Any], branch: int = 0) -> list[Any]:
    return [read(atom) for atom in step.arguments[branch]]


def _inline(step: Call, read: Callable[[Any], Any], scope: Scope) -> tuple[list[Any], Records]:
    return run(step.programs[0], _arguments(step, read), scope)


def _remat(step: Call, read: Callable[[Any], Any], scope: Scope) -> tuple[list[Any], Records]:
    params = step.eqn.params

    def body(*args: Any) -> tuple[list[Any], Records]:
        return run(step.programs[0], args, replace(scope, frame=scope.frame.child()))

    checkpointed = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return checkpointed(*_arguments(step, read))


def _scan(step: Call, read: Callable[[Any], Any], scope: Scope) -> tuple[list[Any], Records]:
    program, loop = step.programs[0], step.loop
    assert loop is not None
    inner_sites = [scope.sites[i] for i in program.site_indices]
    sliced_weights = {
        s.weight.name for s in inner_sites if s.weight and loop.number in s.weight.loops
    }
    xs_weights = {n: scope.weights[n] for n in sliced_weights if n in scope.weights}
    xs_state = {s.name: scope.state[s.name] for s in inner_sites if s.name in scope.state}
    if not loop.stacked:
        xs_state = {}
    xs_steps = {s.name: scope.steps[s.name] for s in inner_sites if s.name in scope.steps}
    slices = [s for s in step.slices if isinstance(s, Slice) and scope.frame.available(s)]
    xs_slices = [scope.frame.force(s.source) for s in slices]
    args = _arguments(step, read)
    constants = args[: step.num_constants]
    carry = args[step.num_constants : step.num_constants + step.num_carry]
    xs = args[step.num_constants + step.num_carry :]

    def body(carry: list[Any], xs: Any) -> tuple[list[Any], Any]:
        values, slice_values, weights, state, steps = xs
        frame = scope.frame.child()
        for node, value in zip(slices, slice_values, strict=True):
            frame.set(node, value)
        inner = replace(
            scope,
            frame=frame,
            weights={**scope.weights, **weights},
            state={**scope.state, **state},
            steps={**scope.steps, **steps},
        )
        outs, records = run(program, [*constants, *carry, *values], inner)
        return outs[: step.num_carry], (outs[step.num_carry :], records)

    params = step.eqn.params
    carry, (ys, records) = jax.lax.scan(
        body,
        carry,
        (xs, xs_slices, xs_weights, xs_state, xs_steps),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], records


def _cond(step: Call, read: Callable[[Any], Any], scope: Scope) -> tuple[list[Any], Records]:
    index = read(step.eqn.invars[0])
    arguments = [_arguments(step, read, branch) for branch in range(len(step.programs))]

    def branch_function(branch: int) -> Callable[[list[list[Any]]], tuple[list[Any], Records]]:
        def function(arguments: list[list[Any]]) -> tuple[list[Any], Records]:
            inner = replace(scope, frame=scope.frame.child())
            return run(step.programs[branch], arguments[branch], inner)

        return function

    functions = [branch_function(b) for b in range(len(step.programs))]
    union: Records = {}
    for function in functions:
        union.update(jax.eval_shape(function, arguments)[1])

    def complete(
        function: Callable[[list[list[Any]]], tuple[list[Any], Records]],
    ) -> Callable[[list[list[Any]]], tuple[list[Any], Records]]:
        def completed(arguments: list[list[Any]]) -> tuple[list[Any], Records]:
            outs, records = function(arguments)
            missing = {
                name: jax.tree.map(scope.absent, struct)
                for name, struct in union.items()
                if name not in records
            }
            return outs, {**records, **missing}

        return completed

    return jax.lax.switch(index, [complete(f) for f in functions], arguments)


_CALLS: Mapping[str, Callable[[Call, Callable[[Any], Any], Scope], tuple[list[Any], Records]]] = {
    "inline": _inline,
    "remat": _remat,
    "scan": _scan,
    "cond": _cond,
}

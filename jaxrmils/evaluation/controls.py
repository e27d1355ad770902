"""What a plan must be compared with before its result means anything.

* The same plan rounded otherwise: nearest, floor, ceil, at random, flipped. If the directions carry
  information, they beat these.
* The float model with the plan's mean noise as a constant shift, and with a fitted temperature: no
  quantization at all. What these gain as well, quantization does not deserve credit for.
* Uniform formats, and a naive choice of layers at the same size.

Everything is simulated by one compiled function; the constant shift has two small ones of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import numpy as np

from jaxrmils.evaluation.constant_shift import mean_noise, shifted_apply
from jaxrmils.evaluation.measure import measure
from jaxrmils.evaluation.simulate import EvaluationError, Measured, SimulatedModel
from jaxrmils.evaluation.temperature import (
    Temperature,
    fit_temperature,
    unfit_for_temperature,
    unfit_outputs,
)
from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.numerics import Rounding
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import to_host
from jaxrmils.policies import LayerPlan, Plan, check_plan, uniform
from jaxrmils.policies.constraints import nearest_layer
from jaxrmils.policies.formats import parse_format
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Loss
from jaxrmils.statistics import NonInferiority, mean_interval, noninferiority, verdict_words

Kind = Literal["this plan", "rounding", "float", "uniform"]
THIS_PLAN: Kind = "this plan"
SHIFT, TEMPERATURE = "float + same constant shift", "float + temperature"
PLAN_TEMPERATURE, NAIVE = "this plan + its own temperature", "naive at equal size"
_DRAWS = 50
FLIPPED: Mapping[Rounding, Rounding] = {"floor": "ceil", "ceil": "floor"}


@dataclass(frozen=True)
class Control:
    """A plan, or a change of the float model, beside the plan that is judged.

    Attributes:
      name: what it is.
      kind: "this plan", "rounding", "float" or "uniform".
      size_bits: its size.
      test: of its paired loss change against the float model.
      verdict: the test in plain words.
      accuracy_difference: change of accuracy, in [-1, 1]; None without labels.
      note: what a reader should know; "" for nothing.
    """

    name: str
    kind: Kind
    size_bits: int
    test: NonInferiority
    verdict: str
    accuracy_difference: float | None
    note: str = ""


def controls(
    graph: Graph,
    params: Any,
    plan: Plan,
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    fit_batches: Sequence[tuple[Any, Any]],
    margin: float,
    alpha: float = 0.05,
    groups: Any = None,
    seed: int = 0,
    compare: Sequence[str] = ("int8", "int4"),
    unit: str = "nats",
    simulation: SimulatedModel | None = None,
    progress: Progress = silent,
) -> tuple[Control, ...]:
    """A plan and its controls on the same held-out data, all in simulation.

    Args:
      graph: from `trace`.
      params: the float parameters.
      plan: the plan that is judged.
      batches: held-out `(inputs, targets)` batches that chose nothing.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: the ranges that the plan was made with.
      fit_batches: `(inputs, targets)` batches of the selection data; constant shifts are measured
        and temperatures fitted on them.
      margin: of the non-inferiority tests.
      alpha: their one-sided level.
      groups: [N], which held-out examples belong together; None for none.
      seed: of the random directions.
      compare: formats of the uniform plans.
      unit: of the loss.
      simulation: of the same model, where there is one already; saves a compilation.
      progress: see `jaxrmils.progress`.

    Returns:
      The plan itself, then the controls. Rounding controls and the constant shift are left out for
      a plan without quantized activations; temperatures for outputs that are not all floats or more
      than 100,000 an example, and for a loss that does not normalise them, which the plan's note
      says. Uniform and naive plans leave layers that calibration never reached in float.

    Raises:
      EvaluationError: no data, or losses that are not finite.
      PlanError: an unknown format, or a plan of another model.
    """
    if not batches or not fit_batches:
        raise EvaluationError("controls need held-out batches and selection batches; one is empty")
    table = tabulate(graph)
    check_plan(plan, table)
    simulation = simulation or SimulatedModel(graph, params, ranges, loss)
    simulation = simulation.holding([plan, *(uniform(table, name) for name in compare)])
    bench = _Bench(simulation, plan, table, batches, fit_batches, groups)
    base = bench.float_model
    found = []
    jobs = bench.jobs(seed, compare)
    for job in progress(jobs, "measuring controls", len(jobs)):
        row = job()
        test = noninferiority(
            row.measured.loss - base.loss,
            margin=margin,
            alpha=alpha,
            groups=groups,
            identical=row.is_float,
        )
        found.append(
            Control(
                name=row.name,
                kind=row.kind,
                size_bits=row.size_bits,
                test=test,
                verdict=verdict_words(test, unit=unit),
                accuracy_difference=_accuracy(base, row.measured),
                note=row.note,
            )
        )
    return tuple(found)


def explanations(found: Sequence[Control]) -> tuple[str, ...]:
    """What gains at least as much as the plan without quantizing anything, in words.

    Args:
      found: from `controls`.

    Returns:
      A sentence for each such control; empty where the plan does not lower the loss.
    """
    means = {control.name: control.test.mean for control in found}
    gain = -means.get(THIS_PLAN, 0.0)
    words = {
        TEMPERATURE: "the plan's gain may be one of confidence alone",
        SHIFT: "the plan's gain may be no more than what a bias would give",
    }
    return tuple(
        f"{name} lowers the float model's loss by {-means[name]:.3g}, the plan by {gain:.3g}: "
        f"{meaning}"
        for name, meaning in words.items()
        if gain > 0 and name in means and -means[name] >= gain
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """A measured control; fields as in `Control`."""

    name: str
    kind: Kind
    size_bits: int
    measured: Measured
    note: str = ""
    is_float: bool = False  # the float model itself, by construction


@dataclass(frozen=True, eq=False)
class _Bench:
    """Measures each control when it is asked for; fields as in `controls`."""

    simulation: SimulatedModel
    plan: Plan
    table: ModelTable
    batches: Sequence[tuple[Any, Any]]
    fit_batches: Sequence[tuple[Any, Any]]
    groups: Any

    def jobs(self, seed: int, compare: Sequence[str]) -> list[Callable[[], _Row]]:
        """The controls that apply, in the order of the report."""
        jobs: list[Callable[[], _Row]] = [self.this_plan]
        if any(layer.rounding for layer in self.plan.layers.values()):
            for name, plan in rounding_plans(self.plan, seed).items():
                jobs.append(partial(self.other_plan, name, "rounding", plan))
            jobs.append(self.shift)
        if not self.unfit:
            jobs.append(self.float_at_temperature)
            if not all(layer.is_float for layer in self.plan.layers.values()):
                jobs.append(self.plan_at_temperature)
        for name in compare:
            plan = uniform(self.table, name, skip=self.unreached)
            jobs.append(partial(self.other_plan, f"uniform {name}", "uniform", plan))
        size = self.table.size_bits(self.plan.formats())
        if size < self.table.float_bits:
            plan = naive_plan(self.table, size, skip=self.unreached)
            jobs.append(partial(self.other_plan, NAIVE, "uniform", plan))
        return jobs

    @cached_property
    def unreached(self) -> tuple[str, ...]:
        """Layers with an operand that has no range."""
        stats = self.simulation.ranges.stats
        return tuple(
            row.name
            for row in self.table.layers
            if any(a.site not in stats for a in row.activations)
        )

    @cached_property
    def float_model(self) -> Measured:
        return self.simulation.run(self.batches)

    @cached_property
    def fit_logits(self) -> Measured:
        return self.simulation.run(self.fit_batches, keep_outputs=True)

    @cached_property
    def fit_targets(self) -> Any:
        targets = [y for _, y in self.fit_batches]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *targets)

    @cached_property
    def unfit(self) -> str:
        """Why temperatures do not apply; "" where they do."""
        graph = self.simulation.graph
        reason = unfit_outputs(jax.eval_shape(graph.apply, graph.params, graph.example))
        if reason:
            return reason
        outputs = self.fit_logits.outputs
        return unfit_for_temperature(outputs, self.fit_targets, self.simulation.loss)

    @cached_property
    def measured_plan(self) -> Measured:
        return self.simulation.run(self.batches, self.plan)

    @cached_property
    def temperature(self) -> Temperature:
        """The float model's."""
        return fit_temperature(self.fit_logits.outputs, self.fit_targets, self.simulation.loss)

    @cached_property
    def cooled_float(self) -> Measured:
        return self.simulation.run(self.batches, temperature=self.temperature.value)

    def this_plan(self) -> _Row:
        note = f"no temperatures: {self.unfit}" if self.unfit else ""
        size = self.table.size_bits(self.plan.formats())
        return _Row(THIS_PLAN, THIS_PLAN, size, self.measured_plan, note, self.plan.is_float)

    def other_plan(self, name: str, kind: Kind, plan: Plan) -> _Row:
        size = self.table.size_bits(plan.formats())
        counts = ", ".join(f"{count} {format_}" for format_, count in plan.counts().items())
        note = counts if name == NAIVE else ""
        if plan.layers == self.plan.layers:
            return _Row(name, kind, size, self.measured_plan, "the same as this plan")
        if name == NAIVE and size > self.table.size_bits(self.plan.formats()):
            note += "; larger than this plan, which has less than int4 weights with int8 inputs"
        return _Row(name, kind, size, self.simulation.run(self.batches, plan), note)

    def shift(self) -> _Row:
        s = self.simulation
        shifts = to_host(
            mean_noise(s.graph, s.params, self.plan, self.fit_batches, s.ranges, s.sharding)
        )
        measured = measure(
            s.graph,
            lambda params, x: shifted_apply(s.graph, params, shifts, x),
            self.batches,
            s.loss,
            params=s.params,
            sharding=s.sharding,
        )
        note = "the plan's mean noise at every operand, as a constant"
        return _Row(SHIFT, "float", self.table.float_bits, measured, note)

    def float_at_temperature(self) -> _Row:
        note = _temperature_words(self.temperature, self.fit_logits.loss.size)
        same = self.temperature.value == 1.0  # as for a distance to the float model itself
        return _Row(TEMPERATURE, "float", self.table.float_bits, self.cooled_float, note, same)

    def plan_at_temperature(self) -> _Row:
        s = self.simulation
        logits = s.run(self.fit_batches, self.plan, keep_outputs=True).outputs
        temperature = fit_temperature(logits, self.fit_targets, s.loss)
        measured = s.run(self.batches, self.plan, temperature=temperature.value)
        size = self.table.size_bits(self.plan.formats())
        rest = mean_interval(measured.loss - self.cooled_float.loss, groups=self.groups)
        fitted = _temperature_words(temperature, self.fit_logits.loss.size)
        note = (
            f"{fitted}; against float at its own: "
            f"{rest.mean:+.5f} [{rest.lower:+.5f}, {rest.upper:+.5f}]"
        )
        return _Row(PLAN_TEMPERATURE, "float", size, measured, note)


def rounding_plans(plan: Plan, seed: int = 0) -> dict[str, Plan]:
    """A plan with the same formats and other rounding directions of its activations.

    Args:
      plan: with quantized activations.
      seed: of the random directions.

    Returns:
      Plans by name: all nearest, floor and ceil, flipped (if the plan has directions to flip), and
      random: floor or ceil for every operand, drawn again while it is one of the others (a plan
      with one or two operands may have no other).

    >>> plan = Plan({"a": LayerPlan(8, 8, ("floor",))}, "")
    >>> rounding_plans(plan)["flipped directions"].layers["a"].rounding
    ('ceil',)
    """
    choices: dict[str, Callable[[Rounding], Rounding]] = {
        "all nearest": lambda _: "nearest",
        "all floor": lambda _: "floor",
        "all ceil": lambda _: "ceil",
        "flipped directions": lambda r: FLIPPED.get(r, r),
    }
    result = {name: _rounded(plan, name, choose) for name, choose in choices.items()}
    if result["flipped directions"].layers == plan.layers:
        del result["flipped directions"]
    random = np.random.default_rng(seed)
    known = [plan.layers, *(other.layers for other in result.values())]
    for _ in range(_DRAWS):
        drawn = _rounded(
            plan, "random directions", lambda _: "ceil" if random.integers(2) else "floor"
        )
        if drawn.layers not in known:
            break
    return {**result, "random directions": drawn}


def _rounded(plan: Plan, name: str, choose: Callable[[Rounding], Rounding]) -> Plan:
    layers = {
        key: dataclasses.replace(layer, rounding=tuple(choose(r) for r in layer.rounding))
        for key, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers, policy={**plan.policy, "rounding": name})


def naive_plan(table: ModelTable, size_bits: int, *, skip: Sequence[str] = ()) -> Plan:
    """What one would do at a size without looking at the model: all roundings to nearest.

    Args:
      table: from `tabulate(graph)`.
      size_bits: the size not to exceed.
      skip: layers that stay float.

    Returns:
      Below int8's size: int8 with int4 weights (w4a8) layer by layer in network order, until it is
      small enough (or all have them). Above: int8 with as many layers as fit left in float at the
      input side.

    >>> import jaxrmils as jr
    >>> params = {"a": np.ones((8, 8), "f"), "b": np.ones((8, 8), "f")}
    >>> graph = jr.trace(lambda p, x: x @ p["a"] @ p["b"], params, np.ones((2, 8), "f"))
    >>> int8 = jr.tabulate(graph).size_bits({"a": (8, 8), "b": (8, 8)})
    >>> [layer.format for layer in naive_plan(jr.tabulate(graph), int8 - 1).layers.values()]
    ['w4a8', 'w8a8']
    """
    names = [name for name in table.layer if name not in skip]
    plans = {
        format_: {
            name: nearest_layer(table, name, parse_format("float" if name in skip else format_))
            for name in table.layer
        }
        for format_ in ("float", "int8", "w4a8")
    }

    def size(layers: Mapping[str, LayerPlan]) -> int:
        return table.size_bits({n: p.bits for n, p in layers.items()})

    layers = dict(plans["int8"])
    if size(layers) <= size_bits:
        for name in names:
            wider = {**layers, name: plans["float"][name]}
            if size(wider) > size_bits:
                break
            layers = wider
    else:
        for name in names:
            layers[name] = plans["w4a8"][name]
            if size(layers) <= size_bits:
                break
    return Plan(layers, table.fingerprint, {"name": "naive", "size_bits": size_bits})


def _temperature_words(fitted: Temperature, n: int) -> str:
    bound = ", an end of the search range" if fitted.at_bound else ""
    return f"T = {fitted.value:.3f}{bound}, fitted on {n} selection examples"


def _accuracy(before: Measured, after: Measured) -> float | None:
    if before.correct is None or after.correct is None:
        return None
    return float(after.correct.mean() - before.correct.mean())

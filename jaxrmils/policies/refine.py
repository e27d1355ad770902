"""Secant refinement of a budget's plan: from single layers' costs to those in company.

The tangent's plan is simulated, and what it costs beyond slopes shared out among its layers by the
secant (`jaxrmils.sensitivity.secant`). What options are believed to cost is corrected by these
shares (`beliefs`), first-order slopes are added as far as they are more than luck, and the budget
is solved again in a trust region: at most so many layers may differ from the best plan so far.
Plans are compared by what is believed of them, not by what was measured (`refine_search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from jaxrmils.policies.budget.choices import Rules
from jaxrmils.policies.budget.groups import Groups
from jaxrmils.policies.budget.limits import LatencyTable, Limits
from jaxrmils.policies.budget.policy import DEFAULT_FORMATS
from jaxrmils.policies.budget.programme import Solution
from jaxrmils.policies.budget.solve import infeasible, plan_of, programme_of
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.objectives import Roundings, layer_options, tangent_costs
from jaxrmils.policies.plan import LayerPlan, Plan
from jaxrmils.policies.refine_search import (
    RefinementSearch,
    Step,
    bare,
    believed,
    first_beliefs,
    tangents_of,
)
from jaxrmils.policies.rest import Rest, is_linear
from jaxrmils.policies.simulation import Simulation
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Scores
from jaxrmils.statistics import Interval, group_numbers, mean_interval

Guard = Literal["mean", "chance"]
"""When a uniform plan of the budget rules another one out: see `refined`."""


@dataclass(frozen=True, eq=False)
class Round:
    """One plan of the refinement; the first is the tangent's.

    Attributes:
      plan: the plan.
      selection: its measured joint change on the selection examples, which chose it.
      estimate: the change as far as it is believed: without what is luck of these examples (see
        `refine_search`).
      size_bytes: of the quantized model.
      radius: in how many layers it could differ from the plan it came from; None for the first.
      changed: in how many it does.
      is_improvement: did the estimate become lower? Only then do further rounds go on from here.
    """

    plan: Plan
    selection: Interval
    estimate: Interval
    size_bytes: float
    radius: int | None
    changed: int
    is_improvement: bool


@dataclass(frozen=True, eq=False)
class UniformPlan:
    """One format wherever the rules allow it, within the budget.

    Attributes:
      format: its name.
      plan: the plan.
      selection: its measured joint change on the selection examples.
      estimate: as of a `Round`.
      size_bytes: of the quantized model.
    """

    format: str
    plan: Plan
    selection: Interval
    estimate: Interval
    size_bytes: float


@dataclass(frozen=True, eq=False)
class Refined:
    """The result of `refined`.

    Attributes:
      plan: the plan: on the selection examples no worse than any of `uniforms`, see `guard`.
      selection: its measured joint change on the selection examples: no evidence, since they chose
        it.
      estimate: what is believed of it; of all plans that `guard` allows, the lowest upper end.
      chosen: the plan's index in `rounds`; None where a uniform plan was taken.
      rounds: what was tried, in order.
      uniforms: every uniform plan within the budget.
    """

    plan: Plan
    selection: Interval
    estimate: Interval
    chosen: int | None
    rounds: tuple[Round, ...]
    uniforms: tuple[UniformPlan, ...]

    @property
    def uniform(self) -> UniformPlan | None:
        """The uniform plan with the least measured change; None if none is within the budget."""
        return min(self.uniforms, key=lambda u: u.selection.mean, default=None)


def refined(
    simulation: Simulation,
    scores: Scores,
    limits: Limits,
    *,
    objective: str | Costs = "squared",
    rounds: int = 4,
    radius: int | None = None,
    guard: Guard = "mean",
    rounding: Roundings = "nearest",
    formats: Sequence[str] = DEFAULT_FORMATS,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
    groups: Groups = (),
    capabilities: str | Sequence[str] | None = None,
    latency: LatencyTable | None = None,
    clusters: Any = None,
    time_limit: float = 60.0,
    progress: Progress = silent,
) -> Refined:
    """The plan of the least loss within a budget that a few rounds of measuring find.

    A round costs one attribution (`Simulation.attribute`) and two measurements of a plan; before
    the first, every format is attributed throughout the network once.

    Args:
      simulation: `Simulator(graph, loss).on(params, ranges, selection)`.
      scores: from `score` on the same examples in the same order.
      limits: what the plan may use.
      objective: where beliefs start: "squared", or the `Costs` of another objective; none may be
        negative.
      rounds: steps after the first plan, at most.
      radius: in how many layers the first step may differ from the first plan; by default all of
        them. It is doubled after a step that improves and halved after one that does not.
      guard: what a plan must not be, against any uniform plan of the budget, on the selection
        examples: "mean", of a higher mean loss; "chance", of a higher mean loss beyond chance, by
        the 95 % interval of the paired difference. The second does not fall for a uniform plan
        that a few noisy examples happen to like.
      rounding, formats, skip, force, groups, capabilities, latency, time_limit: as for `budget`.
      clusters: [N], the group of each example, where examples depend on each other; standard
        errors are then the groups'.
      progress: see `jaxrmils.progress`.

    Returns:
      The plan, and what was tried. `plan.policy` is that of `budget` and has the rounds as
      "refinement".

    Raises:
      InfeasibleBudgetError: no plan is within the limits.
      PlanError: numbers out of range, a single example, scores of other examples or another model,
        an objective that is negative or zero throughout, and as `budget`.
      ScoreError: a loss that is not finite.
      StatisticsError: clusters that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, score, trace
    >>> from jaxrmils.policies.simulation import Simulator
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> params = {n: jax.random.normal(jax.random.key(i), (8, 8)) for i, n in enumerate("abc")}
    >>> graph = trace(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x)
    >>> ranges, data = calibrate(graph, params, [x]), [(x, x)]
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, 1)
    >>> simulation = Simulator(graph, squares).on(params, ranges, data)
    >>> scores = score(graph, params, data, squares, ranges)
    >>> found = refined(simulation, scores, Limits(weight_bits=8))
    >>> found.selection.mean <= found.uniform.selection.mean
    True
    """
    rules = Rules(formats, skip, dict(force or {}), groups, capabilities, latency)
    allowed = [*rules.allowed().values(), *rules.force.values()]
    simulation = simulation.holding(allowed)
    _check(simulation, scores, rounds, radius)
    if guard not in get_args(Guard):
        raise PlanError(f"guard {guard!r}; expected one of {', '.join(get_args(Guard))}")
    numbers = None if clusters is None else group_numbers(clusters, len(scores))
    if len(scores) < 2:
        raise PlanError("of one example, what is luck can't be told; two or more are needed")
    costs = objective
    if not isinstance(costs, Costs):
        costs = tangent_costs(scores, costs, layer_options(scores, allowed, rounding))
    programme = programme_of(scores.table, costs, rules, time_limit)
    beliefs = first_beliefs(programme, costs)
    first = programme.minimise(limits.given(), beliefs)
    if first is None:
        raise infeasible(programme, limits)
    tangents = tangents_of(scores, programme)
    kept, of_labels = believed(tangents, programme, numbers)
    if is_linear(simulation, scores, bare(programme, first)):
        of_labels = 1.0
    rest = Rest(simulation, scores, of_labels)
    search = RefinementSearch(simulation, rest, programme, limits, numbers, tangents, kept)
    beliefs = search.learn_formats(beliefs, progress)
    found = search.steps(first, beliefs, rounds, radius or len(costs.options))
    steps = list(progress(found, "refining plans", rounds + 1))
    return _Writer(search, rules, limits, clusters, guard).result(steps)


def _check(simulation: Simulation, scores: Scores, rounds: int, radius: int | None) -> None:
    """PlanError for numbers out of range, and for scores of other examples."""
    if rounds < 0 or (radius is not None and radius < 1):
        raise PlanError(f"rounds {rounds}, radius {radius}: expected at least 0 and 1")
    if scores.table.fingerprint != simulation.simulator.graph.fingerprint:
        raise PlanError("the scores were made for another model; score this one")
    losses = simulation.float_loss
    scale = np.abs(losses).max(initial=1e-6)
    if losses.shape != scores.loss.shape or np.abs(losses - scores.loss).max() > 0.01 * scale:
        raise PlanError(
            f"the scores hold other examples ({len(scores)}) than the simulation ({losses.size}), "
            "or another loss; score the simulation's examples in the same order"
        )


@dataclass(frozen=True)
class _Writer:
    """Chooses among what was found, and writes it down."""

    search: RefinementSearch
    rules: Rules
    limits: Limits
    clusters: Any
    guard: Guard

    def result(self, steps: Sequence[Step]) -> Refined:
        """Of the plans that no uniform plan beats, the one whose estimate has the lowest upper end:
        with few examples, a plan whose noise is large is often lucky.
        """
        rounds = tuple(self._round(step) for step in steps)
        uniforms = tuple(
            self._uniform(name, at, steps[-1].costs) for name, at in self.search.uniforms().items()
        )
        naive = [self.search.change(at) for at in self.search.uniforms().values()]
        # Of equal bounds a round's counts, and the earliest.
        found = [
            (r.estimate.upper, 0, i)
            for i, (r, step) in enumerate(zip(rounds, steps, strict=True))
            if self._unbeaten(self.search.change(step.at), naive)
        ]
        found += [
            (u.estimate.upper, 1, i)
            for i, u in enumerate(uniforms)
            if self._unbeaten(naive[i], naive)
        ]
        plans = (rounds, uniforms)
        _, kind, index = min(found)
        best = plans[kind][index]
        record = {
            "chosen": best.format if isinstance(best, UniformPlan) else index,
            "selection": best.selection.mean,
            "estimate": best.estimate.mean,
            "rounds": [_record(each) for each in rounds],
            "uniform": {u.format: u.selection.mean for u in uniforms},
        }
        plan = replace(best.plan, policy={**best.plan.policy, "refinement": record})
        chosen = None if kind else index
        return Refined(plan, best.selection, best.estimate, chosen, rounds, uniforms)

    def _unbeaten(self, change: np.ndarray, naive: Sequence[np.ndarray]) -> bool:
        """Is a plan with these changes not worse than any of the naive ones?"""
        if self.guard == "mean":
            return all(change.mean() <= other.mean() for other in naive)
        return all(self._interval(change - other).lower <= 0 for other in naive)

    def _round(self, step: Step) -> Round:
        return Round(
            self._plan(step.at, step.costs),
            self._interval(self.search.change(step.at)),
            self._interval(self.search.estimate(step.at)),
            self.search.programme.used("size_bytes", step.at),
            step.radius,
            step.changed,
            step.is_improvement,
        )

    def _uniform(self, name: str, at: Solution, costs: np.ndarray) -> UniformPlan:
        return UniformPlan(
            name,
            self._plan(at, costs),
            self._interval(self.search.change(at)),
            self._interval(self.search.estimate(at)),
            self.search.programme.used("size_bytes", at),
        )

    def _plan(self, at: Solution, believed: np.ndarray) -> Plan:
        programme = self.search.programme
        options: dict[str, dict[LayerPlan, float]] = {}
        for (name, layer), cost in zip(programme.columns, believed.tolist(), strict=True):
            options.setdefault(name, {})[layer] = cost
        costs = Costs("secant", "nats", options)
        return plan_of(programme, costs, self.rules, self.limits, at)

    def _interval(self, change: np.ndarray) -> Interval:
        return mean_interval(change, method="t", groups=self.clusters)


def _record(each: Round) -> dict[str, Any]:
    """A round as plain values."""
    return {
        "selection": each.selection.mean,
        "estimate": each.estimate.mean,
        "size_bytes": each.size_bytes,
        "radius": each.radius,
        "changed": each.changed,
    }

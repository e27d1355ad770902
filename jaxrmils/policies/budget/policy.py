"""The `budget` policy: the least predicted loss within a budget, from saved scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from jaxrmils.policies.budget.choices import Rules
from jaxrmils.policies.budget.groups import Groups
from jaxrmils.policies.budget.joint import Joint, minimise_bound
from jaxrmils.policies.budget.limits import LatencyTable, Limits
from jaxrmils.policies.budget.programme import Programme
from jaxrmils.policies.budget.solve import optimum, plan_of, programme_of
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.objectives import (
    OBJECTIVES,
    Roundings,
    check_errors,
    layer_options,
    tangent_costs,
)
from jaxrmils.policies.plan import Plan
from jaxrmils.policies.tangents import Tangents, check_clusters, error_factor, plan_interval
from jaxrmils.statistics import Interval

JOINT = "joint_upper_bound"
DEFAULT_FORMATS = ("w8a8", "w4a8", "w4a4")


class Settings(TypedDict, total=False):
    """What `budget` takes besides scores and limits, for functions that pass it on."""

    objective: str | Costs
    z: float
    rounding: Roundings
    formats: Sequence[str]
    skip: Sequence[str]
    force: Mapping[str, str] | None
    groups: Groups
    capabilities: str | Sequence[str] | None
    latency: LatencyTable | None
    clusters: Any
    time_limit: float


def budget(
    scores: Tangents,
    limits: Limits,
    *,
    objective: str | Costs = "squared",
    z: float = 1.645,
    rounding: Roundings = "nearest",
    formats: Sequence[str] = DEFAULT_FORMATS,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
    groups: Groups = (),
    capabilities: str | Sequence[str] | None = None,
    latency: LatencyTable | None = None,
    clusters: Any = None,
    time_limit: float = 60.0,
) -> Plan:
    """The plan of the least predicted loss within a budget. The model is not run.

    Args:
      scores: from `score` or `score_moments`, or loaded. Of moments the result is the same.
      limits: what the plan may use, for example `Limits(size_share=0.15, activation_bits=8)`.
      objective: what is minimised. From the scores: "signed", "upper_bound", "squared" (see
        `jaxrmils.policies.objectives`), or "joint_upper_bound", the plan's own upper bound with
        the covariance between layers (see `jaxrmils.policies.budget.joint`). From a pass over the
        data: the `Costs` of another objective, such as `squared_output_costs`.
      z: standard errors that the upper bounds add; 1.645 is one-sided 95 %.
      rounding: "nearest"; "directed" to choose between that and rounding every operand against the
        sign of its mean slope, as RMILS does; or the directions that
        `jaxrmils.sensitivity.directions` proposes. With `Costs`, those that they have.
      formats: the formats to choose from besides float.
      skip: globs of layers that stay float.
      force: format by glob; its roundings are still chosen.
      groups: layers that share a format; see `solve`.
      capabilities: "cpu", "cuda", "tpu" or the names of formats; see `solve`.
      latency: seconds by layer and format; must be given for a limit on latency.
      clusters: [N], the group of each example, where examples depend on each other; standard
        errors are then the groups'.
      time_limit: seconds for one run of the solver; see `solve`.

    Returns:
      The plan. Besides what `solve` records, `policy["predicted"]` has the mean first-order change
      of the loss and its standard error, with the covariance between layers. It is a prediction
      on the data that chose the plan, and better than the truth for that reason: measure the plan
      on other data. For the joint bound, `policy["joint"]` has the bound of the plan that it
      started from, and a lower bound of every plan's.

    Raises:
      InfeasibleBudgetError: no plan is within the limits; it says what the nearest values are.
      PlanError: an unknown option, formats that were not scored, patterns that match nothing,
        costs of another model, clusters for moments.
      StatisticsError: clusters that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, score, trace
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> params = {n: jax.random.normal(jax.random.key(i), (8, 8)) for i, n in enumerate("ab")}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    >>> ranges = calibrate(graph, params, [x])
    >>> scores = score(graph, params, [(x, x)], lambda o, t: jnp.sum((o - t) ** 2, 1), ranges)
    >>> plan = budget(scores, Limits(weight_bits=6), objective="squared")
    >>> plan.policy["used"]["weight_bits"], sorted(plan.policy["predicted"])
    (6.0, ['examples', 'mean', 'standard_error'])
    """
    return problem(
        scores,
        objective=objective,
        z=z,
        rounding=rounding,
        formats=formats,
        skip=skip,
        force=force,
        groups=groups,
        capabilities=capabilities,
        latency=latency,
        clusters=clusters,
        time_limit=time_limit,
    ).solve(limits)[0]


def problem(scores: Tangents, **settings: Unpack[Settings]) -> Problem:
    """Prepares `budget` for many limits: costs and constraints are made once.

    Args:
      scores: from `score` or `score_moments`.
      **settings: as for `budget`.

    Raises:
      PlanError, StatisticsError: as `budget`.
    """
    objective, z = settings.get("objective", "squared"), settings.get("z", 1.645)
    formats = settings.get("formats", DEFAULT_FORMATS)
    roundings, clusters = settings.get("rounding", "nearest"), settings.get("clusters")
    force = dict(settings.get("force") or {})
    rules = Rules(
        formats,
        settings.get("skip", ()),
        force,
        settings.get("groups", ()),
        settings.get("capabilities"),
        settings.get("latency"),
    )
    if len(scores) < 2:
        raise PlanError("a standard error needs two or more examples; got one")
    if isinstance(objective, Costs):
        costs = objective
    else:
        if objective not in (*OBJECTIVES, JOINT):
            raise PlanError(
                f"objective {objective!r}; expected one of {', '.join((*OBJECTIVES, JOINT))}, or "
                "the Costs of another"
            )
        allowed = [*rules.allowed().values(), *force.values()]
        options = layer_options(scores, allowed, roundings)
        additive = "upper_bound" if objective == JOINT else objective
        costs = tangent_costs(scores, additive, options, z=z, clusters=clusters)
    check_clusters(scores, clusters)
    if objective == JOINT:
        check_errors(scores, z)
    programme = programme_of(scores.table, costs, rules, settings.get("time_limit", 60.0))
    word = "of the costs" if isinstance(objective, Costs) else roundings
    word = word if isinstance(word, str) else "given"
    return Problem(
        scores, costs, rules, programme, word, z if objective == JOINT else None, clusters
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Scores and rules, prepared once; solved for many limits.

    Attributes:
      scores: from `score` or `score_moments`.
      costs: what is minimised; for the joint bound, the sum of bounds that it starts from.
      rules: what a plan may hold.
      programme: the integer programme.
      rounding: which roundings there are, for the record.
      z: of the joint bound; None for an additive objective.
      clusters: [N], the group of each example, or None.
    """

    scores: Tangents
    costs: Costs
    rules: Rules
    programme: Programme
    rounding: str
    z: float | None
    clusters: Any

    def solve(self, limits: Limits) -> tuple[Plan, Interval]:
        """The plan, and its predicted change on the data that chose it (95 %, Student's t).

        Raises:
          InfeasibleBudgetError: no plan is within the limits.
          PlanError: a chosen format was not scored.
        """
        solution, joint = optimum(self.programme, limits), None
        if self.z is not None:
            factor = error_factor(self.scores, self.programme.columns, self.clusters)
            joint = minimise_bound(self.programme, limits.given(), solution, *factor, self.z)
            solution = joint.solution
        plan = plan_of(self.programme, self.costs, self.rules, limits, solution)
        predicted = plan_interval(self.scores, plan, self.clusters)
        record = {
            "rounding": self.rounding,
            "predicted": {
                "mean": predicted.mean,
                "standard_error": predicted.standard_error,
                "examples": len(self.scores),
            },
            **({} if joint is None else _joint_record(joint, self.z)),
        }
        return dataclasses.replace(plan, policy={**plan.policy, **record}), predicted


def _joint_record(joint: Joint, z: float | None) -> dict[str, Any]:
    settings = {
        "z": z,
        "start": joint.start,
        "lower_bound": joint.lower,
        "rounds": joint.rounds,
    }
    gap = joint.bound - joint.lower
    return {"objective": JOINT, "cost": joint.bound, "gap": gap, "joint": settings}

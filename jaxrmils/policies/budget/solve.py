"""The cheapest plan within a budget, or why there is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrmils.graph import ModelTable
from jaxrmils.policies.budget.choices import Rules, choices
from jaxrmils.policies.budget.groups import Groups
from jaxrmils.policies.budget.limits import UNITS, LatencyTable, Limits
from jaxrmils.policies.budget.programme import Programme, Solution
from jaxrmils.policies.budget.resources import usage
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.plan import Plan


@dataclass(frozen=True)
class Reach:
    """How far down a limit could go.

    Attributes:
      limit: what was asked for.
      alone: the smallest value of any allowed plan.
      together: the smallest value with all other limits kept; None if no plan meets those.
    """

    limit: float
    alone: float
    together: float | None


class InfeasibleBudgetError(PlanError):
    """No allowed plan is within the limits.

    Attributes:
      reach: by limit, the nearest values that a plan can have.
      conflict: limits that no plan meets together, none of which can be left out; one that no
        plan meets stands alone.
    """

    def __init__(self, message: str, reach: Mapping[str, Reach], conflict: Sequence[str]) -> None:
        super().__init__(message)
        self.reach = reach
        self.conflict = tuple(conflict)


def solve(
    table: ModelTable,
    costs: Costs,
    limits: Limits,
    *,
    formats: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
    groups: Groups = (),
    capabilities: str | Sequence[str] | None = None,
    latency: LatencyTable | None = None,
    time_limit: float = 60.0,
) -> Plan:
    """The allowed plan of the smallest total cost within limits, by an exact integer programme.

    Of plans whose costs are equal within a millionth, a smaller one is taken. The same arguments
    give the same plan.

    Args:
      table: the model's layers.
      costs: of every option of every layer, for this model.
      limits: what the plan may use; without any, the cheapest plan is returned.
      formats: the formats to choose from besides float; by default all that have a cost.
      skip: globs of layers that stay float.
      force: format by glob; its roundings are still chosen.
      groups: layers that share a format: globs, sequences of globs, or "qkv" for every attention's
        query, key and value projections. Their roundings may differ. A tied weight or a scanned
        stack is one layer, with one decision, without this.
      capabilities: "cpu", "cuda" or "tpu" for the formats that gain something there
        (`CAPABILITIES`), or the names of such formats.
      latency: seconds by layer and format; must be given for a limit on latency.
      time_limit: seconds for the solver. If they run out the best plan so far is returned, and its
        `policy["gap"]` says by how much its cost may be above the optimum; else that is 0.

    Returns:
      The plan. Its `policy` records the settings, the limits, what the plan uses of everything
      that can be limited ("used"), and its total cost.

    Raises:
      InfeasibleBudgetError: no plan is within the limits; it says what the nearest values are and
        which limits exclude each other.
      PlanError: an unknown format, backend or pattern, costs of another model, layers or formats
        that the latency table lacks, rules that contradict each other.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import LayerPlan, tabulate, trace
    >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    >>> table = tabulate(trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 8))))
    >>> def own(int8, int4):
    ...     return {LayerPlan(): 0.0, LayerPlan(8): int8, LayerPlan(4): int4}
    >>> costs = Costs("by hand", "nats", {"a": own(0.1, 0.4), "b": own(0.2, 0.9)})
    >>> solve(table, costs, Limits(weight_bits=6)).counts()
    {'w4': 1, 'w8': 1}
    """
    rules = Rules(formats, skip, dict(force or {}), groups, capabilities, latency)
    programme = programme_of(table, costs, rules, time_limit)
    return plan_of(programme, costs, rules, limits, optimum(programme, limits))


def programme_of(table: ModelTable, costs: Costs, rules: Rules, time_limit: float) -> Programme:
    """The programme behind `solve`, to be solved for many limits; PlanError as there."""
    if not time_limit > 0:
        raise PlanError(f"time_limit is {time_limit}; expected seconds above 0")
    return Programme(table, choices(table, costs, rules), rules.latency, time_limit)


def optimum(programme: Programme, limits: Limits) -> Solution:
    """The solution within limits; InfeasibleBudgetError if there is none."""
    solution = programme.minimise(limits.given())
    if solution is None:
        raise infeasible(programme, limits)
    return solution


def plan_of(
    programme: Programme, costs: Costs, rules: Rules, limits: Limits, solution: Solution
) -> Plan:
    """The plan of a solution, with its record."""
    layers = programme.layers(solution)
    record: dict[str, Any] = {
        "name": "budget",
        "objective": costs.objective,
        "unit": costs.unit,
        "limits": {name: _plain(value) for name, value in limits.given().items()},
        "used": usage(programme.table, layers, rules.latency),
        "cost": float(costs.total(layers)),
        "gap": solution.gap,
        "formats": None if rules.formats is None else list(rules.formats),
        "skip": list(rules.skip),
        "force": dict(rules.force),
        "groups": [list(group) for group in programme.choices.groups],
        "capabilities": (
            rules.capabilities
            if rules.capabilities is None or isinstance(rules.capabilities, str)
            else list(rules.capabilities)
        ),
    }
    if rules.latency is not None:
        record["latency"] = {"backend": rules.latency.backend, "source": rules.latency.source}
    return Plan(layers, programme.table.fingerprint, record)


def _plain(value: float) -> float:
    """A number that JSON can hold, from numpy's or Python's."""
    return int(value) if int(value) == value else float(value)


def infeasible(programme: Programme, limits: Limits) -> InfeasibleBudgetError:
    """What to say of limits that no plan meets."""
    given = limits.given()
    if programme.minimise({}) is None:
        return InfeasibleBudgetError(
            "skipped, forced and grouped layers contradict each other: there is no plan at all, "
            f"whatever its size. Groups: {programme.choices.groups}",
            {},
            (),
        )
    reach = {}
    for name, limit in given.items():
        alone = programme.minimum(name, {})
        others = {n: v for n, v in given.items() if n != name}
        assert alone is not None
        reach[name] = Reach(limit, alone, programme.minimum(name, others) if others else alone)
    conflict = _conflict(programme, given)
    return InfeasibleBudgetError(_message(reach, conflict), reach, conflict)


def _conflict(programme: Programme, given: Mapping[str, float]) -> tuple[str, ...]:
    """The fewest limits that no plan meets together."""
    for count in range(1, len(given)):
        for names in itertools.combinations(given, count):
            if programme.minimise({n: given[n] for n in names}) is None:
                return names
    return tuple(given)


def _message(reach: Mapping[str, Reach], conflict: Sequence[str]) -> str:
    asked = " and ".join(f"{n} <= {reach[n].limit:g}" for n in conflict)
    what = "exclude each other" if len(conflict) > 1 else "is out of reach"
    lines = [f"no allowed plan is within the budget: {asked} {what}. The nearest feasible values:"]
    for name, each in reach.items():
        if len(reach) == 1:
            nearest = "can't go below " + rounded_up(each.alone)
        else:
            rest = (
                "no plan meets the other limits"
                if each.together is None
                else f"{rounded_up(each.together)} with the other limits kept"
            )
            nearest = f"{rounded_up(each.alone)} alone, {rest}"
        lines.append(f"  {name} (asked: {each.limit:g}): {nearest} ({UNITS[name]})")
    lines.append("Raise a limit, allow more formats, or release skipped, forced or grouped layers.")
    return "\n".join(lines)


def rounded_up(value: float) -> str:
    """A number of six digits that is not below the value, so that it can be used as a limit.

    >>> rounded_up(0.1234561), rounded_up(1234567.5), rounded_up(0.25)
    ('0.123457', '1234570', '0.25')
    """
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    up = math.ceil(value / unit * (1 - 1e-12)) * unit
    return f"{up:.0f}" if abs(up) >= 1e6 else f"{up:.6g}"

"""The rounds of a secant refinement; `refine` has the whole.

What an option i costs in company has two parts, which are learnt apart:

    cost_i = k_i t_i + b_i

t_i is the mean of its first-order contributions c_i, b_i what the network makes of its noise beyond
them (`rest`). The second is a cost, and its noise small. The first may be a gain, and is mostly
luck: a trained network's mean slope is close to 0, and what one sees of it depends on the examples.
With v_i the variance of t_i, the mean over options of t_i^2 / v_i would be 1 if all true slopes
were 0. With F what it is,

    k_i = max(0, 1 - 1 / F)                (positive-part James-Stein)

for the options of a format together, those that round against the slope apart. A plan is judged by
its posterior mean in the same sense: its measured rest, plus k_i c_i of all its options. Since luck
is shrunk before plans are compared, the least of many estimates is not the luckiest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxrmils.policies.beliefs import Corrected, corrected
from jaxrmils.policies.budget.limits import Limits
from jaxrmils.policies.budget.programme import Programme, Solution
from jaxrmils.policies.budget.solve import infeasible
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import PlanError, fit
from jaxrmils.policies.plan import Plan, layer_prediction
from jaxrmils.policies.rest import Rest
from jaxrmils.policies.simulation import Simulation
from jaxrmils.progress import Progress
from jaxrmils.sensitivity import Scores
from jaxrmils.statistics import pseudo_values

# What an option is believed to cost at least, as a share of the mean of its format: noise whose
# slope is zero is not free.
_LEAST = 0.01
# Formats are learnt from noise of this scale: throughout the network, some of them destroy it.
_SMALL = 0.2


@dataclass(frozen=True)
class Step:
    """A round before it is written down; see `Round`."""

    at: Solution
    costs: np.ndarray
    radius: int | None
    changed: int
    is_improvement: bool


@dataclass(frozen=True)
class RefinementSearch:
    """What does not change during a refinement.

    Attributes:
      simulation: of the model on the selection examples; it keeps what it measured.
      rest: what plans cost beyond first-order slopes.
      programme: the allowed plans.
      limits: the budget.
      clusters: int64 [N], numbers of the examples' groups; None where there are none.
      tangents: float64 [N, columns], every option's first-order contributions.
      kept: float64 [columns], k: how much of them is believed.
    """

    simulation: Simulation
    rest: Rest
    programme: Programme
    limits: Limits
    clusters: np.ndarray | None
    tangents: np.ndarray
    kept: np.ndarray

    def steps(
        self, first: Solution, beliefs: np.ndarray, rounds: int, radius: int
    ) -> Iterator[Step]:
        """The first plan, then one plan a round, until nothing moves or the radius is 0.

        Args:
          first: the first plan.
          beliefs: float64 [columns], what options cost beyond first-order slopes.
          rounds: steps after the first plan, at most.
          radius: of the first step.
        """
        best = last = Step(first, self.costs(beliefs), None, 0, True)
        yield best
        for _ in range(rounds):
            beliefs = self._learnt(beliefs, last.at)
            costs = self.costs(beliefs)
            found = self.minimum(costs, (best.at, radius))
            changed = int(np.sum(found.columns != best.at.columns))
            if not changed:
                return
            better = float(self.estimate(found).mean()) < float(self.estimate(best.at).mean())
            last = Step(found, costs, radius, changed, better)
            yield last
            if better:
                best, radius = last, min(2 * radius, len(found.columns))
            else:
                radius //= 2
            if radius == 0:
                return

    def costs(self, beliefs: np.ndarray) -> np.ndarray:
        """float64 [columns]: what every option is believed to cost, slopes and beyond."""
        return beliefs + self.kept * self.tangents.mean(axis=0)

    def minimum(self, costs: np.ndarray, near: tuple[Solution, int] | None = None) -> Solution:
        """The plan of least costs, within a trust region; InfeasibleBudgetError if there is none.

        Args:
          costs: float64 [columns].
          near: a plan, and in how many layers another may differ from it.
        """
        found = self.programme.minimise(self.limits.given(), costs, near=near)
        if found is None:
            raise infeasible(self.programme, self.limits)
        return found

    def change(self, solution: Solution) -> np.ndarray:
        """float64 [N]: the plan's measured joint change."""
        return self.simulation.change(bare(self.programme, solution))

    def estimate(self, solution: Solution) -> np.ndarray:
        """float64 [N]: the plan's change as far as it is believed."""
        slopes = (self.kept * self.tangents)[:, solution.columns].sum(axis=1)
        return self.rest.change(bare(self.programme, solution)) + slopes

    def learn_formats(self, beliefs: np.ndarray, progress: Progress) -> np.ndarray:
        """Beliefs in the loss's unit, from the shares of every format used throughout the network,
        its noise scaled down.

        Options that no format used are scaled as those of the median format.
        """
        plans = {
            s.columns.tobytes(): s for s in self._throughout().values() if self._columns(s).size
        }
        found = [
            self._corrected(beliefs, solution, _SMALL)
            for solution in progress(list(plans.values()), "attributing formats", len(plans))
        ]
        if not found:
            return beliefs
        learnt = beliefs * float(np.median([each.scale for _, each in found]))
        for columns, each in found[::-1]:
            learnt[columns] = each.costs
        return learnt

    def _learnt(self, beliefs: np.ndarray, solution: Solution) -> np.ndarray:
        """Beliefs corrected by the shares of a plan; what it does not use is scaled with it."""
        if not self._columns(solution).size:
            return beliefs
        columns, each = self._corrected(beliefs, solution)
        learnt = beliefs * each.scale
        learnt[columns] = each.costs
        return learnt

    def _columns(self, solution: Solution) -> np.ndarray:
        """The options of a plan that are not float."""
        own = [i for i in solution.columns if not self.programme.columns[i][1].is_float]
        return np.array(own, np.int64)

    def _corrected(
        self, beliefs: np.ndarray, solution: Solution, scale: float = 1.0
    ) -> tuple[np.ndarray, Corrected]:
        """What a plan quantizes, and the corrected beliefs in it."""
        columns = self._columns(solution)
        shares = self.rest.shares(bare(self.programme, solution), scale)
        names = [self.programme.columns[i][0] for i in columns]
        means, variances = np.transpose([_mean(shares[name], self.clusters) for name in names])
        return columns, corrected(beliefs[columns], means, variances)

    def _throughout(self) -> dict[str, Solution]:
        """The plan that comes closest to every format: float where the rules don't allow it."""
        table, result = self.programme.table, {}
        for bits, name in self.programme.choices.formats.items():
            distance = np.zeros(len(self.programme.columns))
            for i, (layer, p) in enumerate(self.programme.columns):
                if p.bits != fit(table.layer[layer], bits):
                    distance[i] = 4.0 if p.is_float else 8.0
                elif any(r != "nearest" for r in p.rounding):
                    distance[i] = 1.0
            found = self.programme.minimise({}, distance)
            if found is not None:
                result[name] = found
        return result

    def uniforms(self) -> dict[str, Solution]:
        """Those of them that are within the budget."""
        limits = self.limits.given().items()
        return {
            name: found
            for name, found in self._throughout().items()
            if all(self.programme.used(n, found) <= limit * (1 + 1e-12) for n, limit in limits)
        }


def bare(programme: Programme, solution: Solution) -> Plan:
    """A solution as a plan that can be simulated."""
    return Plan(programme.layers(solution), programme.table.fingerprint)


def tangents_of(scores: Scores, programme: Programme) -> np.ndarray:
    """float64 [N, columns]: the options' first-order contributions."""
    return np.stack([layer_prediction(scores, n, p) for n, p in programme.columns], axis=1)


def believed(
    tangents: np.ndarray, programme: Programme, clusters: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """The k of every option, float64 [columns], and their mean, weighted by noise."""
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, (_, p) in enumerate(programme.columns):
        kinds.setdefault((p.format, all(r == "nearest" for r in p.rounding)), []).append(i)
    kept, weights = np.ones(len(programme.columns)), np.zeros(len(programme.columns))
    for own in kinds.values():
        found = [_mean(tangents[:, i], clusters) for i in own]
        weights[own] = [variance for _, variance in found]
        ratios = [mean**2 / variance for mean, variance in found if variance > 0]
        if ratios:
            kept[own] = max(0.0, 1 - 1 / max(float(np.mean(ratios)), 1e-300))
    return kept, float(np.average(kept, weights=weights)) if weights.any() else 0.0


def _mean(values: np.ndarray, clusters: np.ndarray | None) -> tuple[float, float]:
    """Mean over the examples, and the variance of that mean."""
    units = values if clusters is None else pseudo_values(values, clusters)
    return float(values.mean()), float(units.var(ddof=1) / units.size)


def first_beliefs(programme: Programme, costs: Costs) -> np.ndarray:
    """float64 [columns]: first beliefs, above 0 where anything is quantized."""
    values = np.array([costs.options[name][p] for name, p in programme.columns])
    formats = np.array([p.format for _, p in programme.columns])
    quantized = np.array([not p.is_float for _, p in programme.columns], bool)
    if (values < 0).any():
        name, layer = programme.columns[int(np.argmin(values))]
        raise PlanError(
            f"the objective {costs.objective!r} says {values.min()} of {layer.format} in {name}; a "
            "refinement starts from costs that are not negative, such as 'squared'"
        )
    if quantized.any() and not values.any():
        raise PlanError(
            f"the objective {costs.objective!r} is 0 for every option, as the tangent is of losses "
            "against the float model's own outputs; pass costs such as `sqnr_costs`"
        )
    least = 1e-4 * values.max(initial=0.0)
    for name in set(formats[quantized]):
        own = formats == name
        values[own] = np.maximum(values[own], _LEAST * max(values[own].mean(), least))
    return values

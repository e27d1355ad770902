"""The rounds of a secant refinement; `refine` has the whole.

What an option i costs in company has two parts, which are learnt apart:

    cost_i = k t_i + b_i

t_i is the mean of its first-order contributions c_i, b_i what the network makes of its noise beyond
the first order: shares of measured changes without c_i (`beliefs`). The second is a cost, and its
noise small. The first may be a gain, and is mostly luck: a trained network's mean slope is close to
0, and what one sees of it depends on the examples. With v_i the variance of t_i, the mean over
options of t_i^2 / v_i would be 1 if all true slopes were 0. With F what it is,

    k = max(0, 1 - 1 / F)                  (positive-part James-Stein)

for the options of a format together, those that round against the slope apart. The rest,
(1 - k) c_i, is taken from cross-fitted changes before they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxrmils.policies.beliefs import Corrected, corrected
from jaxrmils.policies.budget.limits import Limits
from jaxrmils.policies.budget.programme import Programme, Solution
from jaxrmils.policies.budget.solve import infeasible
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import PlanError, fit
from jaxrmils.policies.plan import Plan, layer_prediction
from jaxrmils.policies.simulation import Simulation
from jaxrmils.progress import Progress
from jaxrmils.sensitivity import Scores
from jaxrmils.statistics import pseudo_values

# What an option is believed to cost at least, as a share of the mean of its format: noise whose
# slope is zero is not free.
_LEAST = 0.01


@dataclass(frozen=True)
class Chain:
    """The refinement as these examples see it; the first chain sees all.

    Attributes:
      sees: bool [N].
      beliefs: float64 [columns], what options cost beyond the first order.
      at: the plan so far.
    """

    sees: np.ndarray
    beliefs: np.ndarray
    at: Solution


@dataclass(frozen=True)
class Step:
    """A round before it is written down; see `Round`."""

    at: Solution
    costs: np.ndarray
    change: np.ndarray
    cross_fitted: np.ndarray
    radius: int | None
    changed: int
    is_improvement: bool


@dataclass(frozen=True)
class RefinementSearch:
    """What does not change during a refinement, and what was measured.

    Attributes:
      simulation: of the model on the selection examples.
      programme: the allowed plans.
      limits: the budget.
      clusters: int64 [N], numbers of the examples' groups; None where there are none.
      tangents: float64 [N, columns], every option's first-order contributions.
      kept: float64 [columns], k: how much of them is believed.
      changes: measured changes, by the bytes of a plan's columns; it grows.
    """

    simulation: Simulation
    programme: Programme
    limits: Limits
    clusters: np.ndarray | None
    tangents: np.ndarray
    kept: np.ndarray
    changes: dict[bytes, np.ndarray]

    def steps(self, chains: list[Chain], rounds: int, radius: int) -> Iterator[Step]:
        """The first plan, then one plan a round, until nothing moves or the radius is 0."""
        best = self._step(chains, chains[0].at, None, None)
        yield best
        last = best
        for _ in range(rounds):
            chains = self._learnt(chains, last.at)
            trials = [replace(c, at=self._minimum(self.costs(c), (c.at, radius))) for c in chains]
            if all(_same(t.at, c.at) for t, c in zip(trials, chains, strict=True)):
                return
            last = self._step(trials, chains[0].at, radius, best)
            yield last
            if last.is_improvement:
                best, chains, radius = last, trials, min(2 * radius, len(last.at.columns))
            else:
                radius //= 2
            if radius == 0:
                return

    def costs(self, chain: Chain) -> np.ndarray:
        """float64 [columns]: what every option is believed to cost, first order and beyond."""
        return chain.beliefs + self.kept * self.tangents[chain.sees].mean(axis=0)

    def first(self, beliefs: np.ndarray) -> Solution:
        """The plan that is best by these beliefs; InfeasibleBudgetError if there is none."""
        return self._minimum(beliefs, None)

    def _minimum(self, beliefs: np.ndarray, near: tuple[Solution, int] | None) -> Solution:
        found = self.programme.minimise(self.limits.given(), beliefs, near=near)
        if found is None:
            raise infeasible(self.programme, self.limits)
        return found

    def _step(
        self, chains: Sequence[Chain], before: Solution, radius: int | None, best: Step | None
    ) -> Step:
        """Measures the first chain's plan on all examples, the others' where they are blind."""
        whole, *others = chains
        cross_fitted = np.zeros(len(whole.sees))
        for chain in others:
            cross_fitted[~chain.sees] = self.steadied(chain.at)[~chain.sees]
        return Step(
            whole.at,
            self.costs(whole),
            self.change(whole.at),
            cross_fitted,
            radius,
            int(np.sum(whole.at.columns != before.columns)),
            best is None or float(cross_fitted.mean()) < float(best.cross_fitted.mean()),
        )

    def change(self, solution: Solution) -> np.ndarray:
        """float64 [N]: the plan's measured joint change."""
        key = solution.columns.tobytes()
        if key not in self.changes:
            self.changes[key] = self.simulation.change(self._bare(solution))
        return self.changes[key]

    def steadied(self, solution: Solution) -> np.ndarray:
        """float64 [N]: the same without what is luck of its first-order part."""
        luck = (1 - self.kept) * self.tangents
        return self.change(solution) - luck[:, solution.columns].sum(axis=1)

    def learn_formats(self, chains: Sequence[Chain], progress: Progress) -> list[Chain]:
        """Beliefs in the loss's unit, from the shares of every format used throughout the network.

        Options that no format used are scaled as those of the median format.
        """
        plans = {
            s.columns.tobytes(): s for s in self._throughout().values() if self._columns(s).size
        }
        found = [
            self._corrected(chains, solution)
            for solution in progress(list(plans.values()), "attributing formats", len(plans))
        ]
        if not found:
            return list(chains)
        result = []
        for chain, of_formats in zip(chains, zip(*found, strict=True), strict=True):
            beliefs = chain.beliefs * float(np.median([each.scale for _, each in of_formats]))
            for columns, each in of_formats[::-1]:
                beliefs[columns] = each.costs
            result.append(replace(chain, beliefs=beliefs))
        return result

    def _learnt(self, chains: Sequence[Chain], solution: Solution) -> list[Chain]:
        """Beliefs corrected by the shares of a plan; what it does not use is scaled with it."""
        if not self._columns(solution).size:
            return list(chains)
        result = []
        for chain, (columns, each) in zip(chains, self._corrected(chains, solution), strict=True):
            beliefs = chain.beliefs * each.scale
            beliefs[columns] = each.costs
            result.append(replace(chain, beliefs=beliefs))
        return result

    def _columns(self, solution: Solution) -> np.ndarray:
        """The options of a plan that are not float."""
        own = [i for i in solution.columns if not self.programme.columns[i][1].is_float]
        return np.array(own, np.int64)

    def _corrected(
        self, chains: Sequence[Chain], solution: Solution
    ) -> list[tuple[np.ndarray, Corrected]]:
        """Per chain, what a plan quantizes and the corrected beliefs in it."""
        columns = self._columns(solution)
        found = self.simulation.attribute(self._bare(solution))
        names = [self.programme.columns[i][0] for i in columns]
        result = []
        for chain in chains:
            means, variances = np.transpose(
                [
                    _mean(found.layers[name] - self.tangents[:, i], chain.sees, self.clusters)
                    for name, i in zip(names, columns, strict=True)
                ]
            )
            result.append((columns, corrected(chain.beliefs[columns], means, variances)))
        return result

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

    def _bare(self, solution: Solution) -> Plan:
        return Plan(self.programme.layers(solution), self.programme.table.fingerprint)


def tangents_of(scores: Scores, programme: Programme) -> np.ndarray:
    """float64 [N, columns]: the options' first-order contributions."""
    return np.stack([layer_prediction(scores, n, p) for n, p in programme.columns], axis=1)


def believed(tangents: np.ndarray, programme: Programme, clusters: np.ndarray | None) -> np.ndarray:
    """float64 [columns]: the k of every option."""
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, (_, p) in enumerate(programme.columns):
        kinds.setdefault((p.format, all(r == "nearest" for r in p.rounding)), []).append(i)
    kept, sees = np.ones(len(programme.columns)), np.ones(len(tangents), bool)
    for own in kinds.values():
        found = [_mean(tangents[:, i], sees, clusters) for i in own]
        ratios = [mean**2 / variance for mean, variance in found if variance > 0]
        if ratios:
            kept[own] = max(0.0, 1 - 1 / max(float(np.mean(ratios)), 1e-300))
    return kept


def _same(a: Solution, b: Solution) -> bool:
    return bool(np.array_equal(a.columns, b.columns))


def _mean(values: np.ndarray, sees: np.ndarray, clusters: np.ndarray | None) -> tuple[float, float]:
    """Mean over the examples that are seen, and the variance of that mean."""
    own = values[sees]
    units = own
    if clusters is not None:
        units = pseudo_values(own, np.unique(clusters[sees], return_inverse=True)[1])
    return float(own.mean()), float(units.var(ddof=1) / units.size)


def sides_of(n: int, folds: int, numbers: np.ndarray | None, seed: int) -> list[np.ndarray]:
    """bool [n] each: all examples, then all but those of each fold; PlanError for too few."""
    units = np.arange(n) if numbers is None else numbers
    sizes = np.bincount(units)
    if sizes.size < 2 * folds:
        what = "examples" if numbers is None else "clusters"
        raise PlanError(f"{sizes.size} {what} for {folds} folds; {2 * folds} or more are needed")
    fold_of, filled = np.zeros(sizes.size, np.int64), np.zeros(folds)
    for unit in np.random.default_rng(seed).permutation(sizes.size):
        fold_of[unit] = np.argmin(filled)
        filled[fold_of[unit]] += sizes[unit]
    return [np.ones(n, bool), *(fold_of[units] != fold for fold in range(folds))]


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

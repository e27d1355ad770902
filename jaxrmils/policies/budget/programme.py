"""The integer programme: one binary for every option of every layer.

    minimise    sum_lo c_lo x_lo
    subject to  sum_o x_lo = 1                                    for every layer l
                base_r + sum_lo a_rlo x_lo <= limit_r             for every limit r
                sum_{o in format b} x_lo <= sum_{f becomes b in l} y_gf,  sum_f y_gf = 1
                                                                  for every l in a group g
                z_i >= x_lo                       for every l that reads leaf i and every o that
                                                  keeps its weight in float
                sum_{l, o not of plan p} x_lo <= r                for a trust region around p

A group agrees on a format f (y_gf); what a layer makes of it may differ (an activation x activation
dot makes "a8" of "w4a8"). Leaf i of several layers is stored once (z_i). HiGHS solves it
(Huangfu & Hall 2018, Parallelizing the dual revised simplex method).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from jaxrmils.graph import ModelTable
from jaxrmils.policies.budget.choices import Choices
from jaxrmils.policies.budget.limits import LatencyTable
from jaxrmils.policies.budget.resources import Resource, resource
from jaxrmils.policies.formats import FLOAT_BITS, PlanError, fit
from jaxrmils.policies.plan import LayerPlan

# The solver's tolerances are absolute, 1e-6: costs are scaled so that they are far below what
# matters, and what it returns is checked exactly.
_SCALE = 1e6
# What the whole size counts against costs of `_SCALE`: it decides between equal costs alone.
_TIE = 1e-3
# Where costs reach further above the optimum, options that cost more are excluded, and rescaled.
_SPREAD = 1e3
# How many plans just above a limit are cut off one by one.
_COVERS = 50
# Cuts are dense rows and bounds besides: their last digits take most of the time.
_CUT_GAP = 1e-5
# A limit is passed by no more than the rounding of its own arithmetic.
_ROUNDING = 1e-12

_AtMost = tuple[np.ndarray, int]
"""bool [columns], and how many of these options a plan may have."""


@dataclass(frozen=True)
class Solution:
    """An optimal choice.

    Attributes:
      columns: the index of every layer's option among all columns.
      gap: how far the objective may be above the optimum, in its unit: 0, unless time ran out or
        the programme has cuts.
    """

    columns: np.ndarray
    gap: float


@dataclass(frozen=True, eq=False)
class Programme:
    """A model's allowed plans; made once, solved for many limits.

    Attributes:
      table: the model's layers.
      choices: the options.
      latency: predicts seconds.
      time_limit: seconds that one solution may take.
    """

    table: ModelTable
    choices: Choices
    latency: LatencyTable | None = None
    time_limit: float = 60.0

    @functools.cached_property
    def columns(self) -> tuple[tuple[str, LayerPlan], ...]:
        """Layer and option behind every binary."""
        return tuple((n, p) for n, own in self.choices.options.items() for p in own)

    @functools.cached_property
    def layer_of(self) -> np.ndarray:
        """int [columns]: the layer's number."""
        counts = [len(own) for own in self.choices.options.values()]
        return np.repeat(np.arange(len(counts)), counts)

    @functools.cached_property
    def costs(self) -> np.ndarray:
        """float64 [columns]."""
        return np.array([c for own in self.choices.costs.values() for c in own], np.float64)

    def layers(self, solution: Solution) -> dict[str, LayerPlan]:
        """The plan's layers."""
        return dict(self.columns[i] for i in solution.columns)

    @functools.cached_property
    def _resources(self) -> dict[str, tuple[Resource, np.ndarray]]:
        return {}

    def resource(self, name: str) -> tuple[Resource, np.ndarray]:
        """A resource, and float64 [columns], what every option uses of it."""
        if name not in self._resources:
            found = resource(self.table, name, self.latency)
            row = [found.amount(self.table.layer[n], p) for n, p in self.columns]
            self._resources[name] = found, np.array(row, np.float64)
        return self._resources[name]

    def used(self, name: str, solution: Solution) -> float:
        """What a solution uses of a resource, in the limit's unit."""
        return self.resource(name)[0].used(self.table, self.layers(solution))

    def minimise(
        self,
        limits: Mapping[str, float],
        costs: np.ndarray | None = None,
        *,
        cuts: Sequence[np.ndarray] = (),
        term: float = 0.0,
        near: tuple[Solution, int] | None = None,
    ) -> Solution | None:
        """The allowed plan of the smallest cost within limits.

        Args:
          limits: by name.
          costs: float64 [columns]; by default those of the choices.
          cuts: float64 [columns] each: an extra term of the objective is at least the sum of
            the chosen entries, and at least 0.
          term: weight of that term, above 0.
          near: a plan, and in how many layers at most the result may differ from it.

        Returns:
          The solution; None if no plan is within the limits.

        Raises:
          PlanError: the solver found nothing in its time.
        """
        costs = self.costs if costs is None else costs
        shifted = costs - np.minimum.reduceat(costs, self._starts)[self.layer_of]
        usable = shifted < np.inf if cuts else self._undominated(costs, limits)
        tie = _TIE / max(self.table.float_bits, 1) * self.resource("size_bytes")[1]
        leaf = _TIE / max(self.table.float_bits, 1)
        region = []
        if near is not None:
            usable[near[0].columns] = True
            others = np.ones(len(costs), bool)
            others[near[0].columns] = False
            region = [(others, near[1])]
        extra = _Extra(tie, leaf, 0.0, tuple(cuts), term)
        return self._rescaled(limits, shifted, usable, extra, region)

    def minimum(self, name: str, limits: Mapping[str, float]) -> float | None:
        """The smallest use of a resource within limits on others; None if they are infeasible."""
        found, row = self.resource(name)
        shifted = row - np.minimum.reduceat(row, self._starts)[self.layer_of]
        leaf = 1.0 if found.shared_leaves else 0.0
        extra = _Extra(np.zeros(len(row)), 0.0, leaf)
        solution = self._rescaled(limits, shifted, shifted < np.inf, extra)
        return None if solution is None else self.used(name, solution)

    def _rescaled(
        self,
        limits: Mapping[str, float],
        costs: np.ndarray,
        usable: np.ndarray,
        extra: _Extra,
        region: Sequence[_AtMost] = (),
    ) -> Solution | None:
        """The optimum of costs that are at least 0, however far they reach."""
        covers = list(region)
        while True:
            most = np.maximum.reduceat(np.where(usable, costs, 0.0), self._starts).sum()
            most = float(most) + extra.leaf_cost * sum(bits for bits, _ in self._shared_leaves)
            scaled = _Scaled(costs, usable, _SCALE / (most or 1.0), extra)
            solution = self._within(limits, scaled, covers)
            if solution is None:
                return None
            reached = costs[solution.columns].sum() + self._extra_cost(extra, solution)
            # No optimal plan has an option that alone costs more than this plan.
            fewer = usable & (costs <= reached * (1 + 1e-9))
            if reached == 0.0 or reached * _SPREAD >= most or fewer.sum() == usable.sum():
                return solution
            usable = fewer

    def _extra_cost(self, extra: _Extra, solution: Solution) -> float:
        """What the extra part of an objective costs, without what decides ties."""
        layers = self.layers(solution)
        kept = sum(
            bits
            for bits, names in self._shared_leaves
            if any(layers[n].weight_bits == FLOAT_BITS for n in names)
        )
        return extra.leaf_cost * kept + extra.term * highest(extra.cuts, solution)

    @property
    def _shared_leaves(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        return self.resource("size_bytes")[0].shared_leaves

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """int [layers]: the first column of every layer."""
        return np.flatnonzero(np.diff(self.layer_of, prepend=-1))

    @property
    def _count(self) -> int:
        """Layers."""
        return len(self._starts)

    def _undominated(self, costs: np.ndarray, limits: Mapping[str, float]) -> np.ndarray:
        """bool [columns]: options that no other of their layer is as good as in every respect."""
        sizes = self.resource("size_bytes")[1]
        free = {n for group in self.choices.groups for n in group}
        free |= {n for _, names in self._shared_leaves for n in names}
        merits = np.stack([costs, sizes, *(self.resource(n)[1] for n in limits)])
        kept = np.ones(len(costs), bool)
        for name, start, end in zip(
            self.choices.options, self._starts, [*self._starts[1:], len(costs)], strict=True
        ):
            if name in free:
                continue
            own = merits[:, start:end]
            no_worse = np.all(own[:, :, None] <= own[:, None, :], axis=0)  # [a, b]: a for b
            earlier = np.tri(end - start, k=-1, dtype=bool).T
            kept[start:end] = ~np.any(no_worse & (~no_worse.T | earlier), axis=0)
        return kept

    def _within(
        self,
        limits: Mapping[str, float],
        scaled: _Scaled,
        covers: list[_AtMost],
    ) -> Solution | None:
        """The optimum of one scaling; plans that pass a limit within tolerance are cut off."""
        for _ in range(_COVERS):
            solution = self._solved(limits, scaled, covers)
            if solution is None:
                return None
            passed = [
                name
                for name, limit in limits.items()
                if self.used(name, solution) > limit * (1 + _ROUNDING)
            ]
            if not passed:
                return solution
            covers += [(self._cover(name, solution), self._count - 1) for name in passed]
        raise PlanError(
            f"more than {_COVERS} plans lie within a millionth above the limit {passed[0]} "
            f"({limits[passed[0]]!r}); lower or raise it a little"
        )

    def _cover(self, name: str, solution: Solution) -> np.ndarray:
        """bool [columns]: options that use at least what this plan's use, layer by layer."""
        found, row = self.resource(name)
        cover = row >= row[solution.columns][self.layer_of]
        if found.shared_leaves:
            is_float = np.array([p.weight_bits == FLOAT_BITS for _, p in self.columns])
            cover &= is_float | ~is_float[solution.columns][self.layer_of]
        return cover

    def _solved(
        self, limits: Mapping[str, float], scaled: _Scaled, covers: Sequence[_AtMost]
    ) -> Solution | None:
        rows, extra = _Rows(len(self.columns)), scaled.extra
        self._choose_one(rows)
        self._agree(rows)
        leaves = self._keep_leaves(rows)
        for name, limit in limits.items():
            if not self._limit(rows, name, limit, leaves):
                return None
        for cover, most in covers:
            rows.add(dict.fromkeys(np.flatnonzero(cover).tolist(), 1.0), upper=most)
        if extra.cuts:
            # The term is counted in the objective's scale, lest it be lost in the tolerances.
            term = rows.new()
            for cut in extra.cuts:
                slope = cut * scaled.scale * extra.term
                rows.add({**dict(enumerate(slope.tolist())), term: -1.0}, upper=0.0)
        objective = np.zeros(rows.count)
        objective[: len(self.columns)] = scaled.costs * scaled.usable * scaled.scale + extra.ties
        for leaf, (bits, _) in zip(leaves, self._shared_leaves, strict=True):
            objective[leaf] = bits * (extra.leaf_cost * scaled.scale + extra.leaf_tie)
        if extra.cuts:
            objective[-1] = 1.0
        return self._run(rows, objective, scaled)

    def _run(self, rows: _Rows, objective: np.ndarray, scaled: _Scaled) -> Solution | None:
        count, size = rows.count, len(self.columns)
        upper = np.ones(count)
        upper[:size] = scaled.usable
        integrality = np.ones(count)
        if scaled.extra.cuts:
            upper[-1], integrality[-1] = np.inf, 0
        result = optimize.milp(
            objective,
            constraints=rows.constraint(),
            bounds=optimize.Bounds(np.zeros(count), upper),  # pyright: ignore[reportArgumentType]
            integrality=integrality,
            options={
                "mip_rel_gap": _CUT_GAP if scaled.extra.cuts else 0.0,
                "time_limit": self.time_limit,
            },
        )
        if result.status == 2:
            return None
        if result.x is None:
            raise PlanError(
                f"the solver found no plan in {self.time_limit} s: {result.message} Raise the time "
                "limit, or allow fewer formats"
            )
        chosen = result.x[:size]
        columns = [int(np.argmax(part)) for part in np.split(chosen, self._starts[1:])]
        is_exact = result.status == 0 and not scaled.extra.cuts
        gap = 0.0 if is_exact else max(result.fun - result.mip_dual_bound, 0.0) / scaled.scale
        return Solution(self._starts + np.array(columns), float(gap))

    def _choose_one(self, rows: _Rows) -> None:
        for start, end in zip(self._starts, [*self._starts[1:], len(self.columns)], strict=True):
            rows.add(dict.fromkeys(range(start, end), 1.0), lower=1.0, upper=1.0)

    def _agree(self, rows: _Rows) -> None:
        starts = dict(zip(self.choices.options, self._starts.tolist(), strict=True))
        for group in self.choices.groups:
            agreed = {bits: rows.new() for bits in self.choices.formats}
            rows.add(dict.fromkeys(agreed.values(), 1.0), lower=1.0, upper=1.0)
            for name in group:
                row, by_bits = self.table.layer[name], {}
                for i, p in enumerate(self.choices.options[name]):
                    by_bits.setdefault(p.bits, []).append(i)
                for bits, own in by_bits.items():
                    become = [v for f, v in agreed.items() if fit(row, f) == bits]
                    entries = dict.fromkeys((starts[name] + i for i in own), 1.0)
                    rows.add({**entries, **dict.fromkeys(become, -1.0)}, upper=0.0)

    def _keep_leaves(self, rows: _Rows) -> list[int]:
        """A variable for every leaf of several layers: is it stored?"""
        leaves = []
        for _, names in self._shared_leaves:
            leaf = rows.new()
            leaves.append(leaf)
            for i, (layer, p) in enumerate(self.columns):
                if layer in names and p.weight_bits == FLOAT_BITS:
                    rows.add({i: 1.0, leaf: -1.0}, upper=0.0)
        return leaves

    def _limit(self, rows: _Rows, name: str, limit: float, leaves: Sequence[int]) -> bool:
        """Adds a limit's row; False if nothing can meet it."""
        found, row = self.resource(name)
        room = limit * found.total * (1 + _ROUNDING) - found.base
        shared = [bits for bits, _ in found.shared_leaves]
        if found.is_exact:
            step = math.gcd(*(int(a) for a in row), *shared) or 1
            room = math.floor(room / step) * step
        if room < 0:
            return False
        unit = room or float(row.max()) or 1.0
        entries = {i: a / unit for i, a in enumerate(row.tolist()) if a}
        if shared:
            entries |= {leaf: b / unit for leaf, b in zip(leaves, shared, strict=True)}
        rows.add(entries, upper=room / unit)
        return True


@dataclass(frozen=True)
class _Extra:
    """What an objective has besides the options' costs.

    Attributes:
      ties: float64 [columns], added after scaling.
      leaf_tie: the same for a bit of a leaf that several layers read.
      leaf_cost: what such a bit costs.
      cuts: float64 [columns] each, see `Programme.minimise`.
      term: weight of the cuts' term.
    """

    ties: np.ndarray
    leaf_tie: float
    leaf_cost: float
    cuts: tuple[np.ndarray, ...] = ()
    term: float = 0.0


@dataclass(frozen=True)
class _Scaled:
    """An objective as the solver sees it.

    Attributes:
      costs: float64 [columns], at least 0.
      usable: bool [columns].
      scale: what costs are multiplied by.
      extra: the rest.
    """

    costs: np.ndarray
    usable: np.ndarray
    scale: float
    extra: _Extra


class _Rows:
    """Rows of a sparse constraint matrix, and how many variables there are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._entries: list[dict[int, float]] = []
        self._bounds: list[tuple[float, float]] = []

    def new(self) -> int:
        """One more variable."""
        self.count += 1
        return self.count - 1

    def add(self, entries: dict[int, float], *, lower: float = -np.inf, upper: float) -> None:
        """One more row."""
        self._entries.append(entries)
        self._bounds.append((lower, upper))

    def constraint(self) -> optimize.LinearConstraint:
        """All rows."""
        ends = np.cumsum([0, *(len(e) for e in self._entries)])
        columns = np.fromiter((c for e in self._entries for c in e), np.int32, ends[-1])
        values = np.fromiter((v for e in self._entries for v in e.values()), float, ends[-1])
        shape = (len(self._entries), self.count)
        matrix = sparse.csr_array((values, columns, ends), shape=shape)
        lower, upper = np.array(self._bounds).T
        return optimize.LinearConstraint(matrix, lower, upper)


def highest(cuts: Sequence[np.ndarray], solution: Solution) -> float:
    """The term that the cuts demand of a solution, at least 0."""
    return max([0.0, *(float(cut[solution.columns].sum()) for cut in cuts)])

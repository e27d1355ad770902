"""A sequence of plans from least to most compressed, chosen on selection data.

The tangent orders a first path of plans. Secant attributions of every uniform format then give each
layer's share in a network that is quantized throughout, and a few rounds refine them where it
matters: walk the path (`frontier`), find by bisection the last plan that keeps within the margin,
attribute the first one that does not, and walk again with the shares found there. A layer that
costs much falls back (demoted, or rounded to nearest again); what fits into the room that is left
is added. Every plan looked at is measured jointly, so the sequence is the Pareto frontier of what
was measured, not of what was predicted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrmils.graph import LayerRow, ModelTable, tabulate
from jaxrmils.numerics import Rounding
from jaxrmils.policies.attribution import PlanAttribution
from jaxrmils.policies.constraints import Constraints
from jaxrmils.policies.formats import FLOAT_BITS, PlanError, fit, parse_format, several
from jaxrmils.policies.frontier import Estimate, Option, path, saving
from jaxrmils.policies.plan import FLOAT_LAYER, LayerPlan, Plan, layer_prediction
from jaxrmils.policies.simulation import Simulation
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import ScoreError, Scores
from jaxrmils.statistics import group_numbers, pseudo_values

Directions = Mapping[int, Mapping[str, Sequence[Rounding]]]
"""Per width, per site, the rounding direction proposed for each activation operand."""

Choice = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Search:
    """How a sequence is built.

    Attributes:
      formats: the formats to choose from, besides float.
      rounds: how often shares are attributed at the boundary and the path is walked again.
      length: plans in the sequence, at most.
      caution: standard errors that are added to a cost.
      compute: what a share of the work counts against a share of the size (see `frontier.saving`).
    """

    formats: Sequence[str] = ("w8a8", "w4a8", "w4a4")
    rounds: int = 4
    length: int = 16
    caution: float = 1.0
    compute: float = 0.1

    def check(self) -> None:
        """Raises PlanError for numbers out of range or unknown formats."""
        if not self.formats:
            raise PlanError("formats is empty; expected some, such as ('w8a8', 'w4a8')")
        for name in several(self.formats):
            parse_format(name)
        if self.rounds < 0 or self.length < 1 or not self.caution >= 0 or not self.compute >= 0:
            raise PlanError(
                f"rounds {self.rounds}, length {self.length}, caution {self.caution}, compute "
                f"{self.compute}: expected at least 0, 1, 0 and 0"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredPlan:
    """A plan with its joint loss change on the selection data.

    Attributes:
      plan: the plan.
      saving: what it saves, see `frontier.saving`.
      change: float64 [N], quantized minus float loss.
      standard_error: of their mean, clustered where there are groups.
    """

    plan: Plan
    saving: float
    change: np.ndarray
    standard_error: float

    def bound(self, errors: float) -> float:
        """The mean change plus this many standard errors; a gain counts as no change.

        On the data that chose the plan, a gain is mostly luck: if it counted, plans that were
        lucky would push aside mild ones that are safe.
        """
        return max(float(self.change.mean()), 0.0) + errors * self.standard_error

    def clearance(self, margin: float) -> float:
        """How many standard errors the change, if not a gain, stays below a margin."""
        room = margin - self.bound(0.0)
        if self.standard_error == 0.0:
            return math.copysign(math.inf, room)
        return room / self.standard_error


def plan_sequence(
    simulation: Simulation,
    *,
    margin: float,
    search: Search | None = None,
    scores: Scores | None = None,
    directions: Directions | None = None,
    groups: Any = None,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> tuple[MeasuredPlan, ...]:
    """Plans from least to most compressed, none of which is dominated on the selection data.

    Args:
      simulation: of the model on the selection data.
      margin: the largest mean loss change that counts as lossless.
      search: how to search.
      scores: of the same data, for a first path; None where the loss has no tangent.
      directions: roundings that may be chosen besides nearest.
      groups: [N], the group of each example; standard errors are clustered by them.
      skip: globs of layers that stay float.
      force: format by glob.
      settings: what the plans say of their policy.
      progress: see `jaxrmils.progress`.

    Returns:
      At most `search.length` plans. Plans whose change is above the margin beyond doubt are left
      out, unless there is no other.

    Raises:
      PlanError: unknown format, a pattern that matches nothing, nothing to quantize.
    """
    search = search or Search()
    search.check()
    table = tabulate(simulation.simulator.graph)
    fixed = Constraints(skip, force or {}).resolve(table)
    options = {
        row.name: _options(table, row, fixed.get(row.name), search, directions, simulation)
        for row in table.layers
    }
    if all(len(choices) == 1 and choices[0].layer.is_float for choices in options.values()):
        raise PlanError("every layer is skipped or can't be quantized; nothing is left to plan")
    size = simulation.float_loss.size
    if size < 2:
        raise ScoreError(f"the selection data holds {size} example; 2 or more are needed")
    numbers = None if groups is None else group_numbers(groups, size)
    settings = dict(settings or {})
    state = _State(simulation, table, options, margin, search, settings, numbers, {}, {})
    if scores is not None:
        state.start_from(scores)
        state.refine()
    anchors = state.anchors(directions)
    for choice in progress(anchors, "attributing uniform plans", len(anchors)):
        state.attribute(choice)
    for _ in progress(range(search.rounds), "refining plans", search.rounds):
        if not state.refine():
            break
    state.fill()
    state.spread()
    return _thinned(_frontier(state.measured.values(), margin, search), margin, search)


@dataclasses.dataclass(frozen=True)
class _State:
    """What is known during a search; the two mappings grow."""

    simulation: Simulation
    table: ModelTable
    options: Mapping[str, Sequence[Option]]
    margin: float
    search: Search
    settings: Mapping[str, Any]
    groups: np.ndarray | None
    estimates: dict[tuple[str, int], Estimate]
    measured: dict[Choice, MeasuredPlan]

    def plan(self, choice: Choice) -> Plan:
        layers = {
            name: choices[index].layer
            for (name, choices), index in zip(self.options.items(), choice, strict=True)
        }
        return Plan(layers, self.table.fingerprint, self.settings)

    def record(self, choice: Choice, change: np.ndarray) -> MeasuredPlan:
        gain = sum(
            choices[index].saving
            for choices, index in zip(self.options.values(), choice, strict=True)
        )
        error = self.estimate(change).standard_error
        self.measured[choice] = MeasuredPlan(self.plan(choice), gain, change, error)
        return self.measured[choice]

    def estimate(self, values: np.ndarray) -> Estimate:
        """Mean and standard error of per-example numbers."""
        units = values if self.groups is None else pseudo_values(values, self.groups)
        return Estimate(float(values.mean()), float(units.std(ddof=1)) / math.sqrt(units.size))

    def measure(self, choice: Choice) -> MeasuredPlan:
        if choice not in self.measured:
            self.record(choice, self.simulation.change(self.plan(choice)))
        return self.measured[choice]

    def fits(self, choice: Choice) -> bool:
        """Does the plan keep within the margin, with caution?"""
        return self.measure(choice).bound(self.search.caution) <= self.margin

    def start_from(self, scores: Scores) -> None:
        """First estimates: the tangent, and half its mean square for the curvature (Fisher)."""
        for name, choices in self.options.items():
            for index, option in enumerate(choices):
                if not option.layer.is_float:
                    share = layer_prediction(scores, name, option.layer)
                    share = share + 0.5 * np.mean(share**2)
                    self.estimates[name, index] = self.estimate(share)

    def attribute(self, choice: Choice) -> None:
        """Replaces the estimates of a plan's options by their shares in the joint change."""
        found: PlanAttribution = self.simulation.attribute(self.plan(choice))
        self.record(choice, found.change)
        for (name, choices), index in zip(self.options.items(), choice, strict=True):
            if not choices[index].layer.is_float:
                self.estimates[name, index] = self.estimate(found.layers[name])

    def anchors(self, directions: Directions | None) -> list[Choice]:
        """Every format everywhere, to nearest and with the proposed roundings."""
        found = []
        for name in self.search.formats:
            for proposed in (None, directions):
                choice = []
                for row in self.table.layers:
                    layer = _in_format(row, name, proposed)
                    layers = [option.layer for option in self.options[row.name]]
                    choice.append(layers.index(layer) if layer in layers else 0)
                found.append(tuple(choice))
        return [choice for choice in dict.fromkeys(found) if self.quantizes(choice)]

    def quantizes(self, choice: Choice) -> bool:
        """Is anything of the plan not float?"""
        chosen = zip(self.options.values(), choice, strict=True)
        return any(not choices[index].layer.is_float for choices, index in chosen)

    def path(self) -> list[Choice]:
        costs = {
            name: [
                self.estimates[name, i].cost(self.search.caution)
                if (name, i) in self.estimates
                else (0.0 if option.layer.is_float else math.inf)
                for i, option in enumerate(choices)
            ]
            for name, choices in self.options.items()
        }
        known = {
            name: [o for o, c in zip(choices, costs[name], strict=True) if c < math.inf]
            for name, choices in self.options.items()
        }
        index = {
            name: [i for i, c in enumerate(costs[name]) if c < math.inf] for name in self.options
        }
        finite = {name: [costs[name][i] for i in index[name]] for name in self.options}
        return [
            tuple(index[name][chosen[name]] for name in self.options)
            for chosen in path(known, finite)
        ]

    def boundary(self, plans: Sequence[Choice]) -> int:
        """Index of the last plan that fits; bisection, so the path counts as monotone. -1: none."""
        low, high = -1, len(plans)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(plans[middle]) else (low, middle)
        return low

    def refine(self) -> bool:
        """Attributes the first plan of the path that does not fit; False if nothing is new."""
        plans = self.path()
        choice = plans[min(self.boundary(plans) + 1, len(plans) - 1)]
        before = dict(self.estimates)
        self.attribute(choice)
        return self.estimates != before

    def fill(self) -> None:
        """Adds to the last plan that fits what else fits, in the order of the path."""
        plans = self.path()
        last = self.boundary(plans)
        if last < 0:
            return
        current, tries = plans[last], self.search.length
        for before, after in zip(plans[last + 1 :], plans[last + 2 :], strict=False):
            if tries == 0:
                return
            changed = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
            trial = (*current[:changed], after[changed], *current[changed + 1 :])
            tries -= 1
            if self.fits(trial):
                current = trial

    def spread(self) -> None:
        """Measures plans of the path, most of them around the last that fits."""
        plans = self.path()[1:]
        for index in _around(self.boundary(plans), len(plans), self.search.length):
            self.measure(plans[index])


def _options(
    table: ModelTable,
    row: LayerRow,
    fixed: LayerPlan | None,
    search: Search,
    directions: Directions | None,
    simulation: Simulation,
) -> list[Option]:
    """A layer's options: float first, then the formats, each also with proposed roundings."""
    layers = [FLOAT_LAYER]
    for name in search.formats:
        layers += [_in_format(row, name, None), _in_format(row, name, directions)]
    if any(a.site not in simulation.ranges.grids for a in row.activations):
        # No calibration example reached it, so it has no range.
        layers = [layer for layer in layers if layer.activation_bits == FLOAT_BITS]
    if fixed is not None:
        layers = [fixed]
    return [
        Option(layer, saving(table, row.name, layer, search.compute))
        for layer in dict.fromkeys(layers)
    ]


def _in_format(row: LayerRow, name: str, directions: Directions | None) -> LayerPlan:
    """A layer in a format, with the proposed roundings where there are any."""
    own = fit(row, parse_format(name))
    if own.activation_bits == FLOAT_BITS:
        return LayerPlan.of(own)
    # Directions are those of calibrated grids.
    by_site = {} if own.dynamic else (directions or {}).get(own.activation_bits, {})
    rounding: tuple[Rounding, ...] = tuple(
        by_site[a.site][a.position] if a.site in by_site else "nearest" for a in row.activations
    )
    return LayerPlan.of(own, rounding)


def _frontier(measured: Any, margin: float, search: Search) -> list[MeasuredPlan]:
    """Quantized plans that no other beats in both saving and clearance, least compressed first."""

    def merit(each: MeasuredPlan) -> tuple[float, float]:
        return each.clearance(margin), -each.bound(search.caution)

    plans = sorted(
        (m for m in measured if any(not layer.is_float for layer in m.plan.layers.values())),
        key=lambda m: (m.saving, merit(m)),
        reverse=True,
    )
    best, kept = (-math.inf, -math.inf), []
    for each in plans:
        if merit(each) > best:
            best = merit(each)
            kept.append(each)
    hopeful = [m for m in kept if m.clearance(margin) >= HOPELESS]
    return (hopeful or kept[-1:])[::-1]


# Clearances at which plans are tested, in standard errors on the selection data: hardly any plan
# with more than the first fails on other data, hardly any with less than the second passes.
SAFE, HOPELESS = 8.0, -2.0


def _thinned(
    plans: Sequence[MeasuredPlan], margin: float, search: Search
) -> tuple[MeasuredPlan, ...]:
    """At most `search.length` plans of the frontier: the first, and the most compressed of each
    of several clearances above `search.caution` and some below.
    """
    if len(plans) <= search.length:
        return tuple(plans)
    clearances = np.array([each.clearance(margin) for each in plans])  # falling
    behind = (search.length - 1) // 3
    safe = np.linspace(0.0, 1.0, max(search.length - 1 - behind, 1))
    doubtful = np.linspace(0.0, 1.0, behind + 1)[1:] ** 2
    levels = [
        *(search.caution + safe * max(SAFE - search.caution, 0.0)),
        *(search.caution - doubtful * max(search.caution - HOPELESS, 0.0)),
    ]
    chosen = {int(np.sum(clearances >= level)) - 1 for level in levels} - {-1}
    if search.length > 1:
        chosen |= {0}
    # Levels that met the same plan leave room for others at the margin.
    nearest = np.argsort(np.abs(clearances - search.caution), kind="stable")
    others = [int(index) for index in nearest if index not in chosen]
    return tuple(plans[i] for i in sorted([*chosen, *others[: search.length - len(chosen)]]))


def _around(center: int, count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices below `count`: dense around one of them, wider further off.

    A third of them lies behind the center, those before it reach down to the first.

    >>> _around(20, 40, 9)
    [0, 11, 16, 18, 19, 20, 21, 23, 28]
    """
    if count <= wanted:
        return list(range(count))
    center = min(max(center, 0), count - 1)
    rest = count - 1 - center
    behind = min(max(wanted // 3, wanted - 1 - center), rest)
    before = _distances(wanted - 1 - behind, center)
    after = _distances(behind, min(rest, 2**behind))
    return sorted({center} | {center - d for d in before} | {center + d for d in after})


def _distances(steps: int, furthest: int) -> list[int]:
    """Up to so many growing distances, from 1 to the furthest.

    >>> _distances(4, 40)
    [1, 3, 12, 40]
    """
    ratio = furthest ** (1 / max(steps - 1, 1))
    return [min(max(k, round(ratio ** (k - 1))), furthest) for k in range(1, steps + 1)]

"""From what each layer costs in each format to a path of plans, from float to the smallest.

Every layer has options; option o of layer l saves s[l, o] and costs c[l, o]. Minimising the cost
for a given saving is a multiple-choice knapsack; its Lagrangian relaxation is solved exactly by
walking down the layers' lower convex hulls, always taking the step that costs least for what it
saves. The walk visits, for every Lagrange multiplier, an optimal plan of the relaxed problem
(Sinha & Zoltners 1979, The multiple-choice knapsack problem).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxrmils.graph import ModelTable
from jaxrmils.policies.formats import FLOAT_BITS
from jaxrmils.policies.plan import LayerPlan


@dataclass(frozen=True)
class Option:
    """One way to run a layer.

    Attributes:
      layer: the decision.
      saving: what it saves, as a share of the float model (see `savings`).
    """

    layer: LayerPlan
    saving: float


@dataclass(frozen=True)
class Estimate:
    """What an option does to the loss: mean and standard error of its share, in its unit."""

    mean: float
    standard_error: float

    def cost(self, caution: float) -> float:
        """The mean, shrunk towards zero, plus `caution` standard errors.

        The positive-part factor 1 - (k se / mean)^2 (James & Stein 1961, for one coordinate, with
        k = 1) takes back what a mean owes to noise: without it, the best of many options is chosen
        for its luck. What looks like a gain is shrunk harder, with k = 2: options are picked for
        their gains, which are therefore luckier than losses.

        >>> round(Estimate(0.01, 0.005).cost(caution=0.0), 4)
        0.0075
        >>> Estimate(-0.01, 0.005).cost(caution=1.0)
        0.005
        """
        if self.standard_error == 0.0:
            return self.mean
        k = 1.0 if self.mean > 0 else 2.0
        ratio = (k * self.standard_error / self.mean) ** 2 if self.mean else math.inf
        return self.mean * max(0.0, 1.0 - ratio) + caution * self.standard_error


def saving(table: ModelTable, name: str, layer: LayerPlan, compute: float) -> float:
    """What a format saves of the float model: of its size, plus `compute` times of its work.

    Work is counted in bit operations, MACs x weight bits x activation bits. It decides where size
    does not: between activation widths, and for dots of two activations, which have no weight.

    Args:
      table: the model's layers.
      name: the layer.
      layer: its decision.
      compute: how much a share of the work counts against the same share of the size.
    """
    row = table.layer[name]
    saved = table.layer_bits(name, FLOAT_BITS) - table.layer_bits(
        name, layer.weight_bits, layer.weight_group
    )
    weight = layer.weight_bits if row.has_weight else layer.activation_bits
    total = sum(r.macs for r in table.layers) or 1
    work = row.macs / total * (1 - weight * layer.activation_bits / FLOAT_BITS**2)
    return saved / max(table.float_bits, 1) + compute * work


def path(
    options: Mapping[str, Sequence[Option]], costs: Mapping[str, Sequence[float]]
) -> list[dict[str, int]]:
    """The plans along the walk, from the first options to the greatest saving.

    Args:
      options: per layer; the first is where the walk begins.
      costs: per layer, the cost of every option.

    Returns:
      Per plan, the index of each layer's option. Plans are nested: each changes one layer.

    >>> layer = [Option(LayerPlan(), 0.0), Option(LayerPlan(8), 0.3), Option(LayerPlan(4), 0.4)]
    >>> path({"a": layer}, {"a": [0.0, 0.01, 0.5]})
    [{'a': 0}, {'a': 1}, {'a': 2}]
    """
    steps = []
    for name, choices in options.items():
        hull = _hull([(o.saving, c) for o, c in zip(choices, costs[name], strict=True)])
        for before, after in itertools.pairwise(hull):
            gain = choices[after].saving - choices[before].saving
            slope = (costs[name][after] - costs[name][before]) / gain
            steps.append((slope, name, after))
    # A layer's own steps have rising slopes, so sorting keeps their order.
    steps.sort(key=lambda step: step[0])
    current = dict.fromkeys(options, 0)
    plans = [dict(current)]
    for _, name, after in steps:
        current[name] = after
        plans.append(dict(current))
    return plans


def _hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the lower convex hull of (saving, cost), from the first point rightwards."""
    start = points[0][0]
    # Of options that save the same, the cheapest; nothing that saves less than the first.
    cheapest: dict[float, int] = {start: 0}
    for index, (gain, cost) in enumerate(points[1:], 1):
        if gain > start and (gain not in cheapest or cost < points[cheapest[gain]][1]):
            cheapest[gain] = index
    hull: list[int] = []
    for index in (cheapest[gain] for gain in sorted(cheapest)):
        while len(hull) > 1 and _is_above(points[hull[-2]], points[hull[-1]], points[index]):
            hull.pop()
        hull.append(index)
    return hull


def _is_above(
    left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]
) -> bool:
    """True if the middle point is not below the line through the others."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (
        middle[0] - left[0]
    )

"""What a plan's joint quantization costs or gains, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, tabulate
from jaxrmils.graph.checks import check_finite
from jaxrmils.graph.naming import leaf_names
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.numerics.placement import in_reading_order, spread, to_host, with_params
from jaxrmils.policies.formats import FLOAT_BITS, PlanError
from jaxrmils.policies.plan import Plan, check_plan, roundings_by_site
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Loss, ScoreError
from jaxrmils.sensitivity.scores import check_targets
from jaxrmils.sensitivity.secant import Attribution, Formats, secant
from jaxrmils.statistics import Interval, mean_interval


@dataclasses.dataclass(frozen=True, eq=False)
class PlanAttribution:
    """The joint loss change of a plan, shared out among its layers.

    A layer's share is its part of the joint change along the path from the float to the quantized
    network; it is not the effect of quantizing that layer alone.

    Attributes:
      layers: per quantized layer, float64 [N] in the loss's unit, activations and weight together.
      float_loss: float64 [N].
      quantized_loss: float64 [N], of the simulated quantized network.
      points: number of quadrature points.
    """

    layers: Mapping[str, np.ndarray]
    float_loss: np.ndarray
    quantized_loss: np.ndarray
    points: int

    @property
    def change(self) -> np.ndarray:
        """float64 [N]: the measured joint change."""
        return self.quantized_loss - self.float_loss

    @property
    def residual(self) -> np.ndarray:
        """float64 [N]: what the layers' sum leaves unexplained; more points drive it down."""
        return self.change - sum(self.layers.values(), np.zeros_like(self.float_loss))

    def intervals(self, *, level: float = 0.95, groups: Any = None) -> dict[str, Interval]:
        """Confidence intervals of the layers' mean shares.

        Args:
          level: confidence of each interval by itself.
          groups: [N], the group of each example, where examples come in groups.

        Returns:
          Per quantized layer, the interval of its mean share over examples like these.
        """
        return {
            name: mean_interval(share, level=level, groups=groups)
            for name, share in self.layers.items()
        }


def attribute(
    graph: Graph,
    params: Any,
    plan: Plan,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    points: int = 2,
    sharding: NamedSharding | None = None,
    progress: Progress = silent,
) -> PlanAttribution:
    """Attributes the joint loss change of a plan to its layers, example by example.

    See `jaxrmils.sensitivity.secant` for the mathematics.

    Args:
      graph: from `trace`.
      params: the float parameters.
      plan: from a policy.
      batches: `(inputs, targets)` batches.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: the ranges that the plan was made with.
      points: Gauss-Legendre points; each costs a forward and a backward pass.
      sharding: how the examples' axis is split over a mesh, as in `score`.
      progress: see `jaxrmils.progress`.

    Returns:
      The attribution.

    Raises:
      PlanError: the plan or the ranges are another model's.
      ScoreError: no data, targets that do not fit, or a loss that is not finite.
      TraceError: params or inputs that do not fit.
      PlacementError: a sharding by which batches can't be spread.
    """
    params = with_params(params, sharding)
    check_params(graph, params)
    check_plan(plan, tabulate(graph))
    if ranges.fingerprint != graph.fingerprint:
        raise PlanError("the ranges were calibrated on another model; calibrate this one")
    formats = formats_of(graph, plan)

    @jax.jit
    def step(params: Any, ranges: Ranges, inputs: Any, targets: Any) -> Attribution:
        return secant(graph, params, inputs, targets, loss, ranges, formats, points=points)

    grids, parts, readers = to_host(ranges), [], []
    read = checked(graph, batches, progress, "attributing")
    for number, placed in enumerate(spread((batch for _, *batch in read), sharding)):
        found = step(params, grids, *placed.values)
        parts.append(finite(placed.taken(found), number))
        readers.append(placed.readers)
    return by_layer(graph, plan, parts, np.concatenate(readers))


def checked(
    graph: Graph,
    batches: Iterable[tuple[Any, Any]],
    progress: Progress = silent,
    description: str = "simulating",
) -> Iterator[tuple[int, Any, Any]]:
    """Numbered batches whose inputs are finite and whose targets fit; ScoreError if none."""
    total = len(batches) if isinstance(batches, Sequence) else None
    number = -1
    for number, (inputs, targets) in enumerate(progress(batches, description, total)):
        check_finite(inputs, f"batch {number}", leaf_names(inputs))
        check_targets(graph, inputs, targets, number)
        yield number, inputs, targets
    if number < 0:
        raise ScoreError("the data holds no batches")


def finite(found: Attribution, number: int) -> Attribution:
    """The attribution of a batch in float64, if its losses are finite; ScoreError if not."""
    if not np.all(np.isfinite(found.float_loss) & np.isfinite(found.quantized_loss)):
        raise ScoreError(f"batch {number}: a loss is NaN or infinite; finite values were expected")
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def by_layer(
    graph: Graph, plan: Plan, parts: Sequence[Attribution], readers: np.ndarray
) -> PlanAttribution:
    """The attributions of all batches, summed over each planned layer's sites.

    Args:
      graph: from `trace`.
      plan: what is quantized.
      parts: float64, by batch.
      readers: [N], as in `in_reading_order`.
    """
    merged = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    merged = in_reading_order(readers, merged)
    layers = {
        name: np.zeros_like(merged.float_loss)
        for name, layer in plan.layers.items()
        if not layer.is_float
    }
    for site, values in merged.activations.items():
        if graph.site[site].layer in layers:
            layers[graph.site[site].layer] += values.sum(axis=1)
    for site, values in merged.weights.items():
        if graph.site[site].layer in layers:
            layers[graph.site[site].layer] += values
    return PlanAttribution(layers, merged.float_loss, merged.quantized_loss, merged.points)


def formats_of(graph: Graph, plan: Plan) -> Formats:
    """A plan, operand by operand."""
    activations = {
        site: tuple(plan.layers[graph.site[site].layer].candidate(r) for r in each)
        for site, each in roundings_by_site(graph, plan).items()
    }
    weights = {
        name: layer.weight_candidate
        for name, layer in plan.layers.items()
        if layer.weight_bits < FLOAT_BITS
    }
    return Formats(activations, weights)

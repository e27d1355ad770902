"""Any plan of a model, simulated through functions that are compiled once.

A policy looks at dozens of plans. Here a plan is data (switches), so that only the first one costs
a compilation, and so does only the first of several trainings of the same network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, tabulate
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.numerics.placement import Layout, in_reading_order, spread, to_host, with_params
from jaxrmils.policies.attribution import PlanAttribution, by_layer, checked, finite
from jaxrmils.policies.formats import FLOAT_BITS, PlanError
from jaxrmils.policies.plan import Plan, check_plan, roundings_by_site
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    Candidate,
    Formats,
    Loss,
    ScoreError,
    all_off,
    perturbed_losses,
    secant,
    weight_noise,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Simulator:
    """Compiled functions of a network, for any parameters, ranges and plans.

    Attributes:
      graph: from `trace`.
      loss: `loss(outputs, targets) -> [batch]`.
      points: quadrature points of an attribution.
      sharding: how the examples' axis is split over a mesh, as in `score`.
    """

    graph: Graph
    loss: Loss
    points: int = 2
    sharding: NamedSharding | None = None

    @functools.cached_property
    def noise(self) -> Any:
        """`noise(params)`: what `weight_noise` returns."""
        return jax.jit(lambda params: weight_noise(self.graph, params))

    @functools.cached_property
    def losses(self) -> Any:
        """`losses(params, noise, ranges, switches, inputs, targets)`: float32 [batch]."""

        def step(params: Any, noise: Any, ranges: Any, switches: Any, x: Any, y: Any) -> Any:
            return perturbed_losses(
                self.graph, params, x, y, self.loss, ranges, *switches, noise=noise
            )

        return jax.jit(step)

    @functools.cached_property
    def secants(self) -> Any:
        """`secants(params, noise, ranges, switches, inputs, targets, float_loss)`: attributions."""

        def step(
            params: Any, noise: Any, ranges: Any, switches: Any, x: Any, y: Any, float_loss: Any
        ) -> Any:
            formats = Formats(*switches)
            return secant(
                self.graph,
                params,
                x,
                y,
                self.loss,
                ranges,
                formats,
                points=self.points,
                noise=noise,
                float_loss=float_loss,
            )

        return jax.jit(step)

    def on(self, params: Any, ranges: Ranges, batches: Sequence[tuple[Any, Any]]) -> Simulation:
        """The simulation of these parameters on these examples, which it reads in every pass.

        Raises:
          PlanError: the ranges are another model's.
          ScoreError: no data, targets that do not fit.
          TraceError: params or inputs that do not fit.
          PlacementError: a sharding by which batches can't be spread.
        """
        params = with_params(params, self.sharding)
        check_params(self.graph, params)
        if ranges.fingerprint != self.graph.fingerprint:
            raise PlanError("the ranges were calibrated on another model; calibrate this one")
        for _ in checked(self.graph, batches):
            pass
        return Simulation(self, params, self.noise(params), to_host(ranges), batches)


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
    """A network with its parameters and a set of examples; see `Simulator.on`."""

    simulator: Simulator
    params: Any
    noise: Any
    ranges: Ranges
    batches: Sequence[tuple[Any, Any]]

    @functools.cached_property
    def float_loss(self) -> np.ndarray:
        """float64 [N]: the float model's losses."""
        return self._float_losses[0]

    @functools.cached_property
    def _float_losses(self) -> tuple[np.ndarray, np.ndarray]:
        """And whose examples they are."""
        return self._losses(to_host(all_off(self.simulator.graph, self.ranges)))

    def change(self, plan: Plan) -> np.ndarray:
        """float64 [N]: quantized minus float loss of every example.

        Raises:
          PlanError: the plan is for another model, or quantizes what has no range.
          ScoreError: a loss is not finite.
        """
        return self._losses(self._switches(plan))[0] - self.float_loss

    def attribute(self, plan: Plan, progress: Progress = silent) -> PlanAttribution:
        """The plan's joint change, shared out among its layers; see `attribute`."""
        switches, parts, readers = self._switches(plan), [], []
        read = progress(self._with_float_losses(), "attributing", len(self.batches))
        for number, placed in enumerate(spread(read, self.simulator.sharding)):
            found = self.simulator.secants(
                self.params, self.noise, self.ranges, switches, *placed.values
            )
            parts.append(finite(placed.taken(found), number))
            readers.append(placed.readers)
        return by_layer(self.simulator.graph, plan, parts, np.concatenate(readers))

    def _with_float_losses(self) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """This process's batches, each with the float losses of its examples."""
        losses, readers = self._float_losses
        sharding = self.simulator.sharding
        if sharding is not None:
            losses = losses[readers == Layout(sharding).own]
        start = 0
        for inputs, targets in self.batches:
            stop = start + jax.tree.leaves(inputs)[0].shape[0]
            yield inputs, targets, losses[start:stop].astype(np.float32)
            start = stop

    def _switches(self, plan: Plan) -> Any:
        check_plan(plan, tabulate(self.simulator.graph))
        return to_host(plan_switches(self.simulator.graph, self.ranges, plan))

    def _losses(self, switches: Any) -> tuple[np.ndarray, np.ndarray]:
        """float64 [N], and whose examples they are."""
        parts, readers = [], []
        for placed in spread(self.batches, self.simulator.sharding):
            found = self.simulator.losses(
                self.params, self.noise, self.ranges, switches, *placed.values
            )
            parts.append(placed.taken(found).astype(np.float64))
            readers.append(placed.readers)
        readers = np.concatenate(readers)
        losses, readers = in_reading_order(readers, (np.concatenate(parts), readers))
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise ScoreError(
                f"the loss of example {bad[0]} is {losses[bad[0]]} ({bad.size} of {losses.size} "
                "examples); finite values were expected"
            )
        return losses, readers


def plan_switches(
    graph: Graph, ranges: Ranges, plan: Plan
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A plan as `perturbed_losses` takes it.

    Args:
      graph: from `trace`.
      ranges: from `calibrate`.
      plan: from a policy.

    Returns:
      Per site, int32 [operands], and per weight, an int32 scalar: 0 for float, k + 1 for candidate
      k of `ACTIVATION_CANDIDATES` and of `WEIGHT_CANDIDATES`.

    Raises:
      PlanError: a planned site has no range.
    """
    activations, weights = all_off(graph, ranges)
    for name, layer in plan.layers.items():
        if layer.weight_bits < FLOAT_BITS:
            candidate = Candidate(layer.weight_bits, layer.weight_rounding)
            weights[name] = jnp.int32(WEIGHT_CANDIDATES.index(candidate) + 1)
    for site, roundings in roundings_by_site(graph, plan).items():
        if site not in activations:
            raise PlanError(
                f"site {site} is planned in integers, but no calibration example reached it, so it "
                "has no range; skip it or calibrate on examples that reach it"
            )
        bits = plan.layers[graph.site[site].layer].activation_bits
        switches = [ACTIVATION_CANDIDATES.index(Candidate(bits, r)) + 1 for r in roundings]
        activations[site] = jnp.asarray(switches, jnp.int32)
    return activations, weights

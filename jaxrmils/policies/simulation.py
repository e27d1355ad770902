"""Any plan of a model, simulated through functions that are compiled once.

A policy looks at dozens of plans. Here a plan is data (switches), so that only the first one costs
a compilation, and so does only the first of several trainings of the same network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph, tabulate
from jaxrmils.numerics.calibration import Ranges, check_params
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
from jaxrmils.sensitivity.scores import padded


@dataclasses.dataclass(frozen=True, eq=False)
class Simulator:
    """Compiled functions of a network, for any parameters, ranges and plans.

    Attributes:
      graph: from `trace`.
      loss: `loss(outputs, targets) -> [batch]`.
      points: quadrature points of an attribution.
    """

    graph: Graph
    loss: Loss
    points: int = 2

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
        """
        check_params(self.graph, params)
        if ranges.fingerprint != self.graph.fingerprint:
            raise PlanError("the ranges were calibrated on another model; calibrate this one")
        for _ in checked(self.graph, batches):
            pass
        return Simulation(self, params, self.noise(params), ranges, batches)


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
        return self._losses(all_off(self.simulator.graph, self.ranges))

    def change(self, plan: Plan) -> np.ndarray:
        """float64 [N]: quantized minus float loss of every example.

        Raises:
          PlanError: the plan is for another model, or quantizes what has no range.
          ScoreError: a loss is not finite.
        """
        return self._losses(self._switches(plan)) - self.float_loss

    def attribute(self, plan: Plan, progress: Progress = silent) -> PlanAttribution:
        """The plan's joint change, shared out among its layers; see `attribute`."""
        switches, parts = self._switches(plan), []
        total, start = len(self.batches), 0
        for number, (x, y) in enumerate(progress(self.batches, "attributing", total)):
            inputs, targets, count = self._whole(x, y)
            size = jax.tree.leaves(inputs)[0].shape[0]
            known = np.resize(self.float_loss[start : start + count], size).astype(np.float32)
            start += count
            found = self.simulator.secants(
                self.params, self.noise, self.ranges, switches, inputs, targets, known
            )
            part = jax.tree.map(lambda a, n=count: np.asarray(a)[:n], jax.device_get(found))
            parts.append(finite(part, number))
        return by_layer(self.simulator.graph, plan, parts)

    def _switches(self, plan: Plan) -> Any:
        check_plan(plan, tabulate(self.simulator.graph))
        return plan_switches(self.simulator.graph, self.ranges, plan)

    def _losses(self, switches: Any) -> np.ndarray:
        parts = []
        for x, y in self.batches:
            inputs, targets, count = self._whole(x, y)
            found = self.simulator.losses(
                self.params, self.noise, self.ranges, switches, inputs, targets
            )
            parts.append(np.asarray(found, np.float64)[:count])
        losses = np.concatenate(parts)
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise ScoreError(
                f"the loss of example {bad[0]} is {losses[bad[0]]} ({bad.size} of {losses.size} "
                "examples); finite values were expected"
            )
        return losses

    def _whole(self, inputs: Any, targets: Any) -> tuple[Any, Any, int]:
        """A batch filled up to the first one's size, so that it does not compile again."""
        count = jax.tree.leaves(inputs)[0].shape[0]
        return *padded((inputs, targets), self._size), count

    @functools.cached_property
    def _size(self) -> int:
        """Examples in the first batch."""
        return jax.tree.leaves(self.batches[0][0])[0].shape[0]


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

"""Any plan of a model, simulated through functions that are compiled once.

A policy looks at dozens of plans. Here a plan is data (switches), so that only the first one costs
a compilation, and so does only the first of several trainings of the same network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, tabulate
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.numerics.placement import Layout, in_reading_order, spread, to_host, with_params
from jaxrmils.policies.attribution import (
    PlanAttribution,
    by_layer,
    checked,
    finite,
    formats_of,
)
from jaxrmils.policies.formats import PlanError, candidates_for
from jaxrmils.policies.plan import Plan, check_plan
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import (
    Candidate,
    CandidateSet,
    Formats,
    Loss,
    ScoreError,
    all_off,
    perturbed_losses,
    secant,
    weight_noise,
)

_USUAL = CandidateSet()
# Of what a simulation keeps. An attribution has a number for every example and layer: of 5,000
# examples and 100 layers 4 MB, while the changes of a plan are 40 kB.
ATTRIBUTIONS_BYTES = 256 * 10**6
CHANGES_BYTES = 64 * 10**6
T = TypeVar("T", np.ndarray, PlanAttribution)


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
        """`noise(params)`: what `weight_noise` returns; `candidates` as in `losses`."""

        def step(params: Any, candidates: CandidateSet = _USUAL) -> Any:
            return weight_noise(self.graph, params, candidates.weights)

        return jax.jit(step, static_argnames="candidates")

    @functools.cached_property
    def losses(self) -> Any:
        """`losses(params, noise, ranges, switches, inputs, targets, slope)`: float32 [batch].

        `slope` as in `jaxrmils.sensitivity.perturbed_losses`. What the switches mean is a last
        argument, `candidates`, for which it is compiled.
        """

        def step(
            params: Any,
            noise: Any,
            ranges: Any,
            switches: Any,
            x: Any,
            y: Any,
            slope: Any = None,
            candidates: CandidateSet = _USUAL,
        ) -> Any:
            return perturbed_losses(
                self.graph,
                params,
                x,
                y,
                self.loss,
                ranges,
                *switches,
                activation_candidates=candidates.activations,
                weight_candidates=candidates.weights,
                noise=noise,
                slope=slope,
            )

        return jax.jit(step, static_argnames="candidates")

    @functools.cached_property
    def secants(self) -> Any:
        """`secants(params, noise, ranges, switches, inputs, targets, float_loss, scale, slope)`.

        Attributions. `scale` multiplies all noise; `slope` and `candidates` as in `losses`.
        """

        def step(
            params: Any,
            noise: Any,
            ranges: Any,
            switches: Any,
            x: Any,
            y: Any,
            float_loss: Any,
            scale: Any,
            slope: Any = None,
            candidates: CandidateSet = _USUAL,
        ) -> Any:
            formats = Formats(*switches, candidates=candidates)
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
                slope=slope,
                scale=scale,
            )

        return jax.jit(step, static_argnames="candidates")

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
        return Simulation(self, params, to_host(ranges), batches)


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
    """A network with its parameters and a set of examples; see `Simulator.on`.

    Attributes:
      simulator, params, ranges, batches: as given.
      candidates: what its programs know; a plan that has others gets a program of its own.
      slope: losses are divergences from the float model's outputs with so much of the slope, see
        `jaxrmils.sensitivity.divergence`; None for the losses themselves.
    """

    simulator: Simulator
    params: Any
    ranges: Ranges
    batches: Sequence[tuple[Any, Any]]
    candidates: CandidateSet = _USUAL
    slope: float | None = None

    def holding(self, formats: Iterable[str]) -> Simulation:
        """The simulation whose one program knows these formats too; itself if it does already.

        For whoever looks at many plans: their mixtures would each compile another program.
        """
        known = candidates_for(formats)
        candidates = self.candidates.holding(known.activations, known.weights)
        if candidates == self.candidates:
            return self
        wider = dataclasses.replace(self, candidates=candidates)
        # What is made already serves both.
        for name in ("_noises", "_changes", "_attributions"):
            wider.__dict__[name] = getattr(self, name)
        return wider

    def divergences(self, slope: float = 0.0) -> Simulation:
        """The simulation of what the loss adds to its slope at the float outputs.

        Args:
          slope: how much of the slope is added to it.
        """
        if slope not in self._divergences:
            other = dataclasses.replace(self, slope=slope)
            other.__dict__["_noises"] = self._noises
            self._divergences[slope] = other
        return self._divergences[slope]

    @property
    def noise(self) -> Any:
        """Of the weights under its candidates."""
        return self._noise_of(self.candidates)

    @functools.cached_property
    def float_loss(self) -> np.ndarray:
        """float64 [N]: the float model's losses."""
        return self._float_losses[0]

    @functools.cached_property
    def _float_losses(self) -> tuple[np.ndarray, np.ndarray]:
        """And whose examples they are."""
        off = to_host(all_off(self.simulator.graph, self.ranges))
        return self._losses(off, self.candidates)

    def change(self, plan: Plan) -> np.ndarray:
        """float64 [N]: quantized minus float loss of every example.

        Raises:
          PlanError: the plan is for another model, or quantizes what has no range.
          ScoreError: a loss is not finite.
        """

        def measured() -> np.ndarray:
            change = self._losses(*self._switches(plan))[0] - self.float_loss
            change.setflags(write=False)  # It may be handed out again.
            return change

        return self._changes.of(_key(plan), measured)

    def attribute(
        self, plan: Plan, progress: Progress = silent, *, scale: float = 1.0
    ) -> PlanAttribution:
        """The plan's joint change, shared out among its layers; see `attribute`.

        Args:
          plan: what is quantized.
          progress: see `jaxrmils.progress`.
          scale: multiplies all noise, as in `jaxrmils.sensitivity.secant`.
        """
        key = (_key(plan), scale)
        return self._attributions.of(key, lambda: self._attributed(plan, scale, progress))

    def _attributed(self, plan: Plan, scale: float, progress: Progress) -> PlanAttribution:
        (switches, candidates), parts, readers = self._switches(plan), [], []
        noise = self._noise_of(candidates)
        read = progress(self._with_float_losses(), "attributing", len(self.batches))
        for number, placed in enumerate(spread(read, self.simulator.sharding)):
            found = self.simulator.secants(
                self.params,
                noise,
                self.ranges,
                switches,
                *placed.values,
                np.float32(scale),
                self._slope,
                candidates=candidates,
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

    def _switches(self, plan: Plan) -> tuple[Any, CandidateSet]:
        """A plan's switches, and what they mean."""
        graph = self.simulator.graph
        check_plan(plan, tabulate(graph))
        candidates = switch_candidates(graph, plan, self.candidates)
        return to_host(plan_switches(graph, self.ranges, plan, candidates)), candidates

    def _noise_of(self, candidates: CandidateSet) -> Any:
        """The weights' noise under candidates; made once for each set."""
        if candidates.weights not in self._noises:
            made = self.simulator.noise(self.params, candidates=candidates)
            self._noises[candidates.weights] = made
        return self._noises[candidates.weights]

    @functools.cached_property
    def _changes(self) -> _Kept[np.ndarray]:
        return _Kept(CHANGES_BYTES)

    @functools.cached_property
    def _attributions(self) -> _Kept[PlanAttribution]:
        return _Kept(ATTRIBUTIONS_BYTES)

    @functools.cached_property
    def _divergences(self) -> dict[float, Simulation]:
        return {}

    @property
    def _slope(self) -> np.float32 | None:
        return None if self.slope is None else np.float32(self.slope)

    @functools.cached_property
    def _noises(self) -> dict[tuple[Candidate, ...], Any]:
        return {}

    def _losses(self, switches: Any, candidates: CandidateSet) -> tuple[np.ndarray, np.ndarray]:
        """float64 [N], and whose examples they are."""
        parts, readers, noise = [], [], self._noise_of(candidates)
        for placed in spread(self.batches, self.simulator.sharding):
            found = self.simulator.losses(
                self.params,
                noise,
                self.ranges,
                switches,
                *placed.values,
                self._slope,
                candidates=candidates,
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


class _Kept(Generic[T]):
    """The last results, by plan: refinements at several budgets start from the same plans.

    Args:
      most: bytes of all their arrays. The last result is kept, however large.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes, self.found = most, 0, dict[Any, T]()

    def of(self, key: Any, make: Callable[[], T]) -> T:
        """The result of a plan, made if it is not kept."""
        if key in self.found:
            found = self.found.pop(key)
        else:
            found = make()
            self.bytes += _array_bytes(found)
        self.found[key] = found
        while self.bytes > self.most and len(self.found) > 1:
            self.bytes -= _array_bytes(self.found.pop(next(iter(self.found))))
        return found


def _array_bytes(result: np.ndarray | PlanAttribution) -> int:
    if isinstance(result, np.ndarray):
        return result.nbytes
    shares = sum(share.nbytes for share in result.layers.values())
    return shares + result.float_loss.nbytes + result.quantized_loss.nbytes


def _key(plan: Plan) -> Any:
    """What a simulation depends on."""
    return plan.fingerprint, tuple(sorted(plan.layers.items(), key=lambda item: item[0]))


def switch_candidates(graph: Graph, plan: Plan, known: CandidateSet = _USUAL) -> CandidateSet:
    """What a plan's switches must be able to say: known candidates, and others behind them.

    A program is compiled for a set. Plans of the formats that are always scored share one.

    Args:
      graph: from `trace`.
      plan: from a policy.
      known: by default those that are always scored.
    """
    formats = formats_of(graph, plan)
    activations = [c for each in formats.activations.values() for c in each]
    return known.holding(activations, formats.weights.values())


def plan_switches(
    graph: Graph, ranges: Ranges, plan: Plan, candidates: CandidateSet = _USUAL
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A plan as `perturbed_losses` takes it.

    Args:
      graph: from `trace`.
      ranges: from `calibrate`.
      plan: from a policy.
      candidates: what switches mean, as from `switch_candidates`.

    Returns:
      Per site, int32 [operands], and per weight, an int32 scalar: 0 for float, k + 1 for candidate
      k of the set.

    Raises:
      PlanError: a planned site has no range, or the set lacks a format of the plan.
    """
    activations, weights = all_off(graph, ranges)
    formats = formats_of(graph, plan)
    for name, candidate in formats.weights.items():
        weights[name] = jnp.int32(_switch(candidate, candidates.weights))
    for site, own in formats.activations.items():
        if site not in activations:
            raise PlanError(
                f"site {site} is planned in integers, but no calibration example reached it, so it "
                "has no range; skip it or calibrate on examples that reach it"
            )
        switches = [_switch(candidate, candidates.activations) for candidate in own]
        activations[site] = jnp.asarray(switches, jnp.int32)
    return activations, weights


def _switch(candidate: Candidate, known: Sequence[Candidate]) -> int:
    if candidate not in known:
        raise PlanError(
            f"the plan has {candidate}, which these switches can't say; pass "
            "`switch_candidates(graph, plan)`"
        )
    return known.index(candidate) + 1

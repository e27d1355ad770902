"""Any plan of a model, simulated through functions that are compiled once.

A policy looks at dozens of plans. Here a plan is data (switches), so that only the first one costs
a compilation, and so does only the first of several trainings of the same network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
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
)
from jaxrmils.policies.formats import PlanError, candidates_for
from jaxrmils.policies.kept import Kept
from jaxrmils.policies.plan import Plan, check_plan
from jaxrmils.policies.switches import USUAL, plan_switches, switch_candidates
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import (
    Candidate,
    CandidateSet,
    Formats,
    Loss,
    ScoreError,
    all_off,
    float_network,
    perturbed_losses,
    perturbed_slopes,
    secant,
    weight_noise,
)

# Of what a simulation keeps. An attribution has a number for every example and layer: of 5,000
# examples and 100 layers 4 MB, while the changes of a plan are 40 kB.
ATTRIBUTIONS_BYTES = 256 * 10**6
CHANGES_BYTES = 64 * 10**6
# The float model's outputs: 1,000 logits of 64,000 examples.
OUTPUTS_BYTES = 256 * 10**6


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

        def step(params: Any, candidates: CandidateSet = USUAL) -> Any:
            return weight_noise(self.graph, params, candidates.weights)

        return jax.jit(step, static_argnames="candidates")

    @functools.cached_property
    def losses(self) -> Any:
        """`losses(params, noise, ranges, switches, inputs, targets)`: float32 [batch].

        What the switches mean is a last argument, `candidates`, for which it is compiled.
        """

        def step(
            params: Any,
            noise: Any,
            ranges: Any,
            switches: Any,
            x: Any,
            y: Any,
            candidates: CandidateSet = USUAL,
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
            )

        return jax.jit(step, static_argnames="candidates")

    @functools.cached_property
    def outputs(self) -> Any:
        """`outputs(params, inputs)`: the float model's, as `perturbed_slopes` takes them."""
        return jax.jit(functools.partial(float_network, self.graph))

    @functools.cached_property
    def slopes(self) -> Any:
        """`slopes(params, noise, ranges, switches, inputs, targets, float_outputs)`.

        Losses and slopes as of `jaxrmils.sensitivity.perturbed_slopes`; `candidates` as in
        `losses`.
        """

        def step(
            params: Any,
            noise: Any,
            ranges: Any,
            switches: Any,
            x: Any,
            y: Any,
            float_outputs: Any = None,
            candidates: CandidateSet = USUAL,
        ) -> Any:
            return perturbed_slopes(
                self.graph,
                params,
                x,
                y,
                self.loss,
                ranges,
                *switches,
                float_outputs=float_outputs,
                activation_candidates=candidates.activations,
                weight_candidates=candidates.weights,
                noise=noise,
            )

        return jax.jit(step, static_argnames="candidates")

    @functools.cached_property
    def secants(self) -> Any:
        """`secants(params, noise, ranges, switches, inputs, targets, float_loss, scale, slope,
        float_outputs)`.

        Attributions. `scale` multiplies all noise; the others as in
        `jaxrmils.sensitivity.secant`, `candidates` as in `losses`.
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
            float_outputs: Any = None,
            candidates: CandidateSet = USUAL,
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
                float_outputs=float_outputs,
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
    """

    simulator: Simulator
    params: Any
    ranges: Ranges
    batches: Sequence[tuple[Any, Any]]
    candidates: CandidateSet = USUAL

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
        for name in ("_noises", "_changes", "_apart", "_attributions"):
            wider.__dict__[name] = getattr(self, name)
        return wider

    def divergences(self, slope: float = 0.0) -> Divergences:
        """What the loss adds to its slope at the float outputs.

        Args:
          slope: how much of the slope is added to it.
        """
        return Divergences(self, slope)

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
        losses, readers = self._over_data(self.simulator.losses, off, self.candidates)
        return _finite(losses), readers

    @functools.cached_property
    def _float_outputs(self) -> Any:
        """The float model's outputs, a pytree of [N, ...]; None where they are too much to keep, or
        not all of them have a row for every example.
        """
        parts, readers = [], []
        for placed in spread((x for x, _ in self.batches), self.simulator.sharding):
            found = self.simulator.outputs(self.params, placed.values)
            rows = jax.tree.leaves(placed.values)[0].shape[0]
            leaves = jax.tree.leaves(found)
            bytes_each = sum(leaf.nbytes for leaf in leaves) / rows
            if any(leaf.shape[:1] != (rows,) for leaf in leaves):
                return None
            if bytes_each * self.float_loss.size > OUTPUTS_BYTES:
                return None
            parts.append(placed.taken(found))
            readers.append(placed.readers)
        whole = jax.tree.map(lambda *each: np.concatenate(each), *parts)
        return in_reading_order(np.concatenate(readers), whole)

    def change(self, plan: Plan) -> np.ndarray:
        """float64 [N]: quantized minus float loss of every example.

        Raises:
          PlanError: the plan is for another model, or quantizes what has no range.
          ScoreError: a loss is not finite.
        """
        if self.__dict__.get("_float_outputs") is not None:
            # Divergences are looked at, too: one pass gives both.
            return self.apart(plan)[0]

        def measured() -> np.ndarray:
            losses, _ = self._over_data(self.simulator.losses, *self._switches(plan))
            change = _finite(losses) - self.float_loss
            change.setflags(write=False)  # It may be handed out again.
            return change

        return self._changes.of(_key(plan), measured)

    def apart(self, plan: Plan) -> np.ndarray:
        """float64 [2, N]: the change, and how much of it is the slope at the float outputs.

        Raises:
          PlanError, ScoreError: as `change`.
        """

        def measured() -> np.ndarray:
            known = () if self._float_outputs is None else (self._float_outputs,)
            switches = self._switches(plan)
            (losses, slopes), _ = self._over_data(self.simulator.slopes, *switches, *known)
            found = np.stack(
                [
                    _finite(losses) - self.float_loss,
                    _finite(slopes, "slope of the loss at the float outputs"),
                ]
            )
            found.setflags(write=False)
            return found

        return self._apart.of(_key(plan), measured)

    def attribute(
        self, plan: Plan, progress: Progress = silent, *, scale: float = 1.0
    ) -> PlanAttribution:
        """The plan's joint change, shared out among its layers; see `attribute`.

        Args:
          plan: what is quantized.
          progress: see `jaxrmils.progress`.
          scale: multiplies all noise, as in `jaxrmils.sensitivity.secant`.
        """
        key = (_key(plan), scale, None)
        return self._attributions.of(key, lambda: self._attributed(plan, scale, None, progress))

    def _attributed(
        self, plan: Plan, scale: float, slope: float | None, progress: Progress
    ) -> PlanAttribution:
        """With a slope, of the divergence; see `Divergences.attribute`."""
        (switches, candidates), parts, readers = self._switches(plan), [], []
        noise, how = self._noise_of(candidates), (np.float32(scale),)
        if slope is not None:
            how = (np.float32(scale), np.float32(slope))
        losses = np.float32(self.float_loss if slope is None else np.zeros_like(self.float_loss))
        outputs = None if slope is None else self._float_outputs
        beside = self._beside((losses, *(() if outputs is None else (outputs,))))
        read = progress(beside, "attributing", len(self.batches))
        for number, placed in enumerate(spread(read, self.simulator.sharding)):
            x, y, known, *origin = placed.values
            found = self.simulator.secants(
                self.params,
                noise,
                self.ranges,
                switches,
                x,
                y,
                known,
                *how,
                *origin,
                candidates=candidates,
            )
            parts.append(finite(placed.taken(found), number))
            readers.append(placed.readers)
        return by_layer(self.simulator.graph, plan, parts, np.concatenate(readers))

    def _beside(self, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """This process's batches, `(inputs, targets, *parts)`, with its examples' part of values.

        Args:
          values: pytrees of [N, ...].
        """
        sharding = self.simulator.sharding
        if values and sharding is not None:
            own = self._float_losses[1] == Layout(sharding).own
            values = jax.tree.map(lambda value: value[own], values)
        start = 0
        for inputs, targets in self.batches:
            rows = slice(start, start + jax.tree.leaves(inputs)[0].shape[0])
            yield inputs, targets, *jax.tree.map(lambda value, rows=rows: value[rows], values)
            start = rows.stop

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
    def _changes(self) -> Kept[np.ndarray]:
        return Kept(CHANGES_BYTES)

    @functools.cached_property
    def _attributions(self) -> Kept[PlanAttribution]:
        return Kept(ATTRIBUTIONS_BYTES)

    @functools.cached_property
    def _apart(self) -> Kept[np.ndarray]:
        return Kept(CHANGES_BYTES)

    @functools.cached_property
    def _noises(self) -> dict[tuple[Candidate, ...], Any]:
        return {}

    def _over_data(
        self, program: Any, switches: Any, candidates: CandidateSet, *values: Any
    ) -> tuple[Any, np.ndarray]:
        """What a program gives, a pytree of float64 [N], and whose examples they are.

        Args:
          program: of the simulator, such as `losses`.
          switches, candidates: of a plan.
          values: what it is given beside inputs and targets, pytrees of [N, ...].
        """
        parts, readers, noise = [], [], self._noise_of(candidates)
        for placed in spread(self._beside(values), self.simulator.sharding):
            found = program(
                self.params, noise, self.ranges, switches, *placed.values, candidates=candidates
            )
            parts.append(jax.tree.map(np.float64, placed.taken(found)))
            readers.append(placed.readers)
        whole = jax.tree.map(lambda *each: np.concatenate(each), *parts)
        readers = np.concatenate(readers)
        return in_reading_order(readers, (whole, readers))


@dataclasses.dataclass(frozen=True, eq=False)
class Divergences:
    """What a simulated loss adds to its slope at the float outputs; see `Simulation.divergences`.

    Float outputs are kept up to `OUTPUTS_BYTES`; larger ones cost a forward pass in every other.

    Attributes:
      simulation: keeps what was measured.
      slope: how much of the slope is added, see `jaxrmils.sensitivity.divergence`.
    """

    simulation: Simulation
    slope: float

    def change(self, plan: Plan) -> np.ndarray:
        """float64 [N]: the divergence of a plan, on every example; raises what that raises."""
        change, slopes = self.simulation.apart(plan)
        return change - (1 - self.slope) * slopes

    def attribute(
        self, plan: Plan, progress: Progress = silent, *, scale: float = 1.0
    ) -> PlanAttribution:
        """The divergence shared out among the layers; arguments as of `Simulation.attribute`."""

        def made() -> PlanAttribution:
            return self.simulation._attributed(plan, scale, self.slope, progress)

        return self.simulation._attributions.of((_key(plan), scale, self.slope), made)


def _finite(values: np.ndarray, what: str = "loss") -> np.ndarray:
    """ScoreError if a value is not finite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ScoreError(
            f"the {what} of example {bad[0]} is {values[bad[0]]} ({bad.size} of {values.size} "
            "examples); finite values were expected"
        )
    return values


def _key(plan: Plan) -> Any:
    """What a simulation depends on."""
    return plan.fingerprint, tuple(sorted(plan.layers.items(), key=lambda item: item[0]))

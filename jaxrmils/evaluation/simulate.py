"""A model under any plan, in simulation, through one compiled function.

The plan and the temperature are inputs of that function, so a report's layers and controls cost
one forward pass each and one compilation together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph
from jaxrmils.numerics import ROUNDINGS
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import spread, to_host, with_params
from jaxrmils.policies import Plan
from jaxrmils.policies.switches import plan_switches, switch_candidates
from jaxrmils.sensitivity import (
    Candidate,
    CandidateSet,
    Loss,
    all_off,
    perturbed_outputs,
    weight_noise,
)
from jaxrmils.sensitivity.scores import check_targets

Batches = Iterable[tuple[Any, Any]]

_USUAL = CandidateSet()


class EvaluationError(ValueError):
    """Data or a model that cannot be evaluated."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Per-example results of one model.

    Attributes:
      loss: float64 [N].
      correct: bool [N], whether the largest logit is the label; None where targets are no labels.
      outputs: pytree of arrays [N, ...] where the outputs were asked for, else None.
      metrics: float64 [N] by name, where metrics were asked for.
    """

    loss: np.ndarray
    correct: np.ndarray | None
    outputs: Any = None
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SimulatedModel:
    """A float model and the noise of every plan for it.

    Attributes:
      graph: from `trace`.
      params: the float parameters.
      ranges: the ranges that the plans were made with.
      loss: `loss(outputs, targets) -> [batch]`.
      sharding: how the examples' axis is split over a mesh, as in `score`.
      candidates: what its program knows; a plan that has others gets a program of its own.
    """

    graph: Graph
    params: Any
    ranges: Ranges
    loss: Loss
    sharding: NamedSharding | None = None
    candidates: CandidateSet = _USUAL

    def holding(self, plans: Iterable[Plan]) -> SimulatedModel:
        """The model whose one program knows what these plans have, in every rounding direction.

        Parts of the plans and their controls then need no other. Itself if it does already.
        """
        candidates = self.candidates
        for plan in plans:
            candidates = switch_candidates(self.graph, plan, candidates)
        rounded = [
            replace(c, rounding=rounding)
            for c in candidates.activations
            for rounding in ROUNDINGS
            if rounding != "stochastic"
        ]
        candidates = candidates.holding(rounded)
        if candidates == self.candidates:
            return self
        wider = replace(self, candidates=candidates)
        # What is compiled and made already serves both.
        wider.__dict__.update(_step=self._step, _noises=self._noises, _params=self._params)
        return wider

    def run(
        self,
        batches: Sequence[tuple[Any, Any]],
        plan: Plan | None = None,
        *,
        temperature: float = 1.0,
        keep_outputs: bool = False,
    ) -> Measured:
        """Per-example results of a plan.

        Args:
          batches: `(inputs, targets)` batches; smaller ones than the first are filled up, so that
            they do not compile again.
          plan: what is quantized; None for the float model.
          temperature: what floating outputs are divided by before the loss.
          keep_outputs: also return the outputs, before the division.

        Returns:
          Losses, and for a classifier which examples are right.

        Raises:
          EvaluationError: no data, or a loss that is not finite.
          PlanError: the plan quantizes an operand without a range.
          PlacementError: a sharding by which batches can't be spread.
        """
        switches, candidates = self._switches(plan)
        noise = self._noise(candidates.weights)
        parts = []
        for placed in spread(with_fitting_targets(self.graph, batches), self.sharding):
            loss, correct, outputs = self._step(
                self._params,
                noise,
                *placed.values,
                switches,
                np.float32(temperature),
                candidates=candidates,
            )
            parts.append(placed.taken((loss, correct, outputs if keep_outputs else None)))
        return merged(parts, "simulating")

    @cached_property
    def _params(self) -> Any:
        return with_params(self.params, self.sharding)

    def _switches(self, plan: Plan | None) -> tuple[Any, CandidateSet]:
        """Switches, and what they mean."""
        if plan is None:
            return to_host(all_off(self.graph, self.ranges)), self.candidates
        candidates = switch_candidates(self.graph, plan, self.candidates)
        return to_host(plan_switches(self.graph, self.ranges, plan, candidates)), candidates

    def _noise(self, candidates: tuple[Candidate, ...]) -> Any:
        if candidates not in self._noises:
            make = jax.jit(lambda params: weight_noise(self.graph, params, candidates))
            self._noises[candidates] = make(self._params)
        return self._noises[candidates]

    @cached_property
    def _noises(self) -> dict[tuple[Candidate, ...], Any]:
        return {}

    @cached_property
    def _step(self) -> Any:
        """Losses float32 [batch], a classifier's hits bool [batch], and the outputs."""

        def step(
            params: Any,
            noise: Any,
            x: Any,
            y: Any,
            switches: Any,
            temperature: Any,
            candidates: CandidateSet,
        ) -> Any:
            outputs = perturbed_outputs(
                self.graph,
                params,
                x,
                self.ranges,
                *switches,
                activation_candidates=candidates.activations,
                weight_candidates=candidates.weights,
                noise=noise,
            )
            losses = self.loss(cooled(outputs, temperature), y).astype(jnp.float32)
            correct = None
            if classifies(outputs, y):
                (logits,) = jax.tree.leaves(outputs)
                correct = jnp.argmax(logits, axis=1) == y
            return losses, correct, outputs

        return jax.jit(step, static_argnames="candidates")


def cooled(outputs: Any, temperature: Any) -> Any:
    """Outputs with their floating leaves divided by a temperature, a float32 scalar."""
    return jax.tree.map(
        lambda z: z / temperature.astype(z.dtype) if jnp.issubdtype(z.dtype, jnp.floating) else z,
        outputs,
    )


def classifies(outputs: Any, targets: Any) -> bool:
    """True for a single [batch, classes] float output with one integer label for every example.

    >>> classifies(np.zeros((4, 10), np.float32), np.zeros(4, np.int32))
    True
    >>> classifies(np.zeros((4, 8, 10), np.float32), np.zeros((4, 8), np.int32))
    False
    """
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or leaves[0].ndim != 2 or not hasattr(targets, "dtype"):
        return False
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        return False
    return targets.ndim == 1 and bool(jnp.issubdtype(targets.dtype, jnp.integer))


def with_fitting_targets(graph: Graph, batches: Batches) -> Iterator[tuple[Any, Any]]:
    """The batches; ScoreError where targets do not fit the inputs."""
    for number, (inputs, targets) in enumerate(batches):
        check_targets(graph, inputs, targets, number)
        yield inputs, targets


def merged(parts: Sequence[tuple[Any, Any, Any]], description: str) -> Measured:
    """Losses, hits (or None) and outputs (or None) of all batches; EvaluationError as `joined`."""
    losses = joined([loss for loss, _, _ in parts], description)
    _, correct, outputs = jax.tree.map(lambda *each: np.concatenate(each), *parts)
    return Measured(losses, correct, outputs)


def joined(losses: Sequence[Any], description: str) -> np.ndarray:
    """float64 [N]: the batches' losses; EvaluationError if there are none or one is not finite."""
    if not losses:
        raise EvaluationError("the data holds no batches")
    merged = np.concatenate([np.asarray(each, np.float64) for each in losses])
    bad = np.flatnonzero(~np.isfinite(merged))
    if bad.size:
        raise EvaluationError(
            f"{description}: the loss of example {bad[0]} is {merged[bad[0]]} ({bad.size} of "
            f"{merged.size} examples); finite values were expected"
        )
    return merged

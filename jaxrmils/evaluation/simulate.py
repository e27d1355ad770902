"""A model under any plan, in simulation, through one compiled function.

The plan and the temperature are inputs of that function, so a report's layers and controls cost
one forward pass each and one compilation together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.policies import Plan
from jaxrmils.policies.simulation import plan_switches
from jaxrmils.sensitivity import Loss, all_off, perturbed_losses, weight_noise
from jaxrmils.sensitivity.scores import check_targets, padded

Batches = Iterable[tuple[Any, Any]]


class EvaluationError(ValueError):
    """Data or a model that cannot be evaluated."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Per-example results of one model.

    Attributes:
      loss: float64 [N].
      correct: bool [N], whether the largest logit is the label; None where targets are no labels.
      logits: float32 [N, classes] where they were asked for, else None.
    """

    loss: np.ndarray
    correct: np.ndarray | None
    logits: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SimulatedModel:
    """A float model and the noise of every plan for it.

    Attributes:
      graph: from `trace`.
      params: the float parameters.
      ranges: the ranges that the plans were made with.
      loss: `loss(outputs, targets) -> [batch]`.
    """

    graph: Graph
    params: Any
    ranges: Ranges
    loss: Loss

    def run(
        self,
        batches: Sequence[tuple[Any, Any]],
        plan: Plan | None = None,
        *,
        temperature: float = 1.0,
        keep_logits: bool = False,
    ) -> Measured:
        """Per-example results of a plan.

        Args:
          batches: `(inputs, targets)` batches; smaller ones than the first are filled up, so that
            they do not compile again.
          plan: what is quantized; None for the float model.
          temperature: what logits are divided by, for a classifier (see `classifies`).
          keep_logits: also return a classifier's logits, before the division.

        Returns:
          Losses, and for a classifier which examples are right.

        Raises:
          EvaluationError: no data, or a loss that is not finite.
          PlanError: the plan quantizes an operand without a range.
        """
        switches = self._switches(plan)
        size = jax.tree.leaves(batches[0][0])[0].shape[0] if batches else 0
        losses, right, logits = [], [], []
        for number, (inputs, targets) in enumerate(batches):
            check_targets(self.graph, inputs, targets, number)
            count = jax.tree.leaves(inputs)[0].shape[0]
            x, y = padded((inputs, targets), size)
            found = self._step(self.params, self._noise, x, y, switches, jnp.float32(temperature))
            found = np.asarray(found)[:count]
            if found.ndim == 1:
                losses.append(found)
                continue
            losses.append(found[:, 0])
            right.append(np.argmax(found[:, 1:], axis=1) == np.asarray(targets))
            if keep_logits:
                logits.append(found[:, 1:])
        return Measured(
            joined(losses, "simulating"),
            np.concatenate(right) if right else None,
            np.concatenate(logits) if logits else None,
        )

    def _switches(self, plan: Plan | None) -> Any:
        if plan is None:
            return all_off(self.graph, self.ranges)
        return plan_switches(self.graph, self.ranges, plan)

    @cached_property
    def _noise(self) -> Any:
        return jax.jit(lambda params: weight_noise(self.graph, params))(self.params)

    @cached_property
    def _step(self) -> Any:
        """float32 [batch], or of a classifier [batch, 1 + classes]: losses, then logits."""

        def step(params: Any, noise: Any, x: Any, y: Any, switches: Any, temperature: Any) -> Any:
            def judged(outputs: Any, targets: Any) -> Any:
                if not classifies(outputs, targets):
                    return self.loss(outputs, targets)
                (logits,) = jax.tree.leaves(outputs)
                cooled = jax.tree.map(lambda z: z / temperature.astype(z.dtype), outputs)
                losses = self.loss(cooled, targets).astype(jnp.float32)
                return jnp.concatenate([losses[:, None], logits.astype(jnp.float32)], axis=1)

            return perturbed_losses(
                self.graph, params, x, y, judged, self.ranges, *switches, noise=noise
            )

        return jax.jit(step)


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

"""Measures losses on held-out data: the float model, the integer model, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph
from jaxrmils.lowering import QuantizedModel
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.policies import Plan, roundings_by_site
from jaxrmils.policies.formats import FLOAT_BITS
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    Candidate,
    Loss,
    all_off,
    perturbed_losses,
    weight_noise,
)
from jaxrmils.sensitivity.scores import check_targets

Batches = Iterable[tuple[Any, Any]]


class EvaluationError(ValueError):
    """Data or a model that cannot be evaluated."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Per-example results of one model.

    Attributes:
      loss: float64 [N].
      correct: bool [N], whether the largest logit is the label; None where targets are no labels.
    """

    loss: np.ndarray
    correct: np.ndarray | None


def measure(
    graph: Graph,
    apply: Callable[[Any], Any],
    batches: Batches,
    loss: Loss,
    *,
    progress: Progress = silent,
    description: str = "measuring",
) -> Measured:
    """Runs a model over data.

    Args:
      graph: the traced model, to check the targets against.
      apply: `apply(inputs) -> outputs`; it is jitted here.
      batches: `(inputs, targets)` batches.
      loss: `loss(outputs, targets) -> [batch]`.
      progress: see `jaxrmils.progress`.
      description: what the progress bar says.

    Returns:
      Losses and, for classification, which examples are right.

    Raises:
      EvaluationError: no data, or a loss that is not finite.
      ScoreError: targets that do not fit.
    """

    @jax.jit
    def step(inputs: Any, targets: Any) -> tuple[Any, Any]:
        outputs = apply(inputs)
        return loss(outputs, targets), _correct(outputs, targets)

    losses, right = [], []
    total = len(batches) if isinstance(batches, Sequence) else None
    for number, (inputs, targets) in enumerate(progress(batches, description, total)):
        check_targets(graph, inputs, targets, number)
        values, correct = step(inputs, targets)
        losses.append(np.asarray(values, np.float64))
        right.append(correct)
    if not losses:
        raise EvaluationError("the data holds no batches")
    merged = np.concatenate(losses)
    bad = np.flatnonzero(~np.isfinite(merged))
    if bad.size:
        raise EvaluationError(
            f"{description}: the loss of example {bad[0]} is {merged[bad[0]]} ({bad.size} of "
            f"{merged.size} examples); finite values were expected"
        )
    correct = None if right[0] is None else np.concatenate([np.asarray(r) for r in right])
    return Measured(merged, correct)


def _correct(outputs: Any, targets: Any) -> Any:
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or leaves[0].ndim != 2 or not hasattr(targets, "dtype"):
        return None
    if targets.ndim != 1 or not jnp.issubdtype(targets.dtype, jnp.integer):
        return None
    return jnp.argmax(leaves[0], axis=-1).astype(targets.dtype) == targets


def measure_layers(
    graph: Graph,
    params: Any,
    plan: Plan,
    ranges: Ranges,
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    *,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """The measured loss change of quantizing each planned layer alone.

    One compiled simulation serves all layers; it makes one pass over the data for each.

    Args:
      graph: from `trace`.
      params: the float parameters.
      plan: whose layers are measured.
      ranges: the ranges that the plan was made with.
      batches: `(inputs, targets)` batches.
      loss: `loss(outputs, targets) -> [batch]`.
      progress: see `jaxrmils.progress`.

    Returns:
      Per quantized layer, float64 [N]: quantized minus float loss of every example.
    """
    noise = jax.jit(lambda p: weight_noise(graph, p))(params)

    @jax.jit
    def step(params: Any, noise: Any, inputs: Any, targets: Any, switches: Any) -> Any:
        return perturbed_losses(
            graph, params, inputs, targets, loss, ranges, *switches, noise=noise
        )

    quantized = [name for name, layer in plan.layers.items() if not layer.is_float]
    off = all_off(graph, ranges)
    base = [np.asarray(step(params, noise, x, y, off), np.float64) for x, y in batches]
    changes = {}
    for name in progress(quantized, "measuring layers", len(quantized)):
        switches = layer_switches(graph, ranges, plan, name)
        parts = [
            np.asarray(step(params, noise, x, y, switches), np.float64) - b
            for (x, y), b in zip(batches, base, strict=True)
        ]
        changes[name] = np.concatenate(parts)
    return changes


def layer_switches(graph: Graph, ranges: Ranges, plan: Plan, name: str) -> tuple[Any, Any]:
    """Switches for `perturbed_losses` that put one layer into its planned format."""
    activations, weights = all_off(graph, ranges)
    layer = plan.layers[name]
    if layer.weight_bits < FLOAT_BITS:
        candidate = Candidate(layer.weight_bits, layer.weight_rounding)
        weights[name] = jnp.int32(WEIGHT_CANDIDATES.index(candidate) + 1)
    for site, roundings in roundings_by_site(graph, plan.only(name)).items():
        candidates = [Candidate(layer.activation_bits, rounding) for rounding in roundings]
        switches = [ACTIVATION_CANDIDATES.index(c) + 1 for c in candidates]
        activations[site] = jnp.asarray(switches, jnp.int32)
    return activations, weights


def code_agreement(model: QuantizedModel, inputs: Any) -> dict[str, tuple[float, int]]:
    """How the integer model's activation codes differ from the simulation's, end to end.

    Every site agrees bit for bit on identical inputs; between sites, a last-place difference in a
    float operation that two compilations fuse differently can flip a later rounding.

    Args:
      model: the integer model.
      inputs: a batch.

    Returns:
      Per site, the fraction of codes that differ and the largest difference in steps.
    """
    integer = jax.jit(lambda p, x: model.apply_with_codes(p, x)[1])
    simulated = jax.jit(lambda p, x: model.apply_with_codes(p, x, mode="simulate")[1])
    ours, reference = integer(model.params, inputs), simulated(model.params, inputs)
    result = {}
    for site, codes in ours.items():
        pairs = list(zip(codes, reference[site], strict=True))
        steps = [np.abs(np.int32(a) - np.int32(b)) for a, b in pairs]
        differing = sum(int(np.count_nonzero(s)) for s in steps)
        size = sum(s.size for s in steps)
        result[site] = (differing / max(size, 1), max(int(s.max(initial=0)) for s in steps))
    return result

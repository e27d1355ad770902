"""Measures losses on held-out data: the float model, the integer model, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.evaluation.metrics import Metrics, metric_values
from jaxrmils.evaluation.simulate import (
    Batches,
    Measured,
    SimulatedModel,
    classifies,
    merged,
    with_fitting_targets,
)
from jaxrmils.graph import Graph
from jaxrmils.lowering import QuantizedModel
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import spread, with_params
from jaxrmils.policies import Plan
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Loss


def measure(
    graph: Graph,
    apply: Callable[..., Any],
    batches: Batches,
    loss: Loss,
    *,
    params: Any = None,
    metrics: Metrics | None = None,
    sharding: NamedSharding | None = None,
    progress: Progress = silent,
    description: str = "measuring",
) -> Measured:
    """Runs a model over data.

    Args:
      graph: the traced model, to check the targets against.
      apply: `apply(inputs) -> outputs`, or `apply(params, inputs)` with params; jitted here.
      batches: `(inputs, targets)` batches; smaller ones than the first are filled up, so that they
        do not compile again.
      loss: `loss(outputs, targets) -> [batch]`.
      params: what apply reads, so that it stays where it lies and is no constant of the program.
      metrics: computed from all outputs, which are kept in host memory until then; None for none.
      sharding: how the examples' axis is split over a mesh, as in `score`.
      progress: see `jaxrmils.progress`.
      description: what the progress bar says.

    Returns:
      Losses, metrics and, for classification, which examples are right.

    Raises:
      EvaluationError: no data, a loss that is not finite, or metrics that do not fit.
      ScoreError: targets that do not fit.
      PlacementError: a sharding by which batches can't be spread.
    """

    @jax.jit
    def step(params: Any, inputs: Any, targets: Any) -> tuple[Any, Any, Any]:
        outputs = apply(inputs) if params is None else apply(params, inputs)
        kept = None if metrics is None else outputs
        return loss(outputs, targets), _correct(outputs, targets), kept

    params = with_params(params, sharding)
    total = len(batches) if isinstance(batches, Sequence) else None
    read = with_fitting_targets(graph, progress(batches, description, total))
    parts = [placed.taken(step(params, *placed.values)) for placed in spread(read, sharding)]
    found = merged(parts, description)
    if metrics is None:
        return found
    values = metric_values(metrics, found.outputs, found.loss.size)
    return Measured(found.loss, found.correct, metrics=values)


def _correct(outputs: Any, targets: Any) -> Any:
    if not classifies(outputs, targets):
        return None
    (logits,) = jax.tree.leaves(outputs)
    return jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets


def measure_layers(
    graph: Graph,
    params: Any,
    plan: Plan,
    ranges: Ranges,
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    *,
    simulation: SimulatedModel | None = None,
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
      simulation: of the same model, where there is one already; saves a compilation.
      progress: see `jaxrmils.progress`.

    Returns:
      Per quantized layer, float64 [N]: quantized minus float loss of every example.
    """
    simulation = (simulation or SimulatedModel(graph, params, ranges, loss)).holding([plan])
    quantized = [name for name, layer in plan.layers.items() if not layer.is_float]
    base = simulation.run(batches).loss
    return {
        name: simulation.run(batches, plan.only(name)).loss - base
        for name in progress(quantized, "measuring layers", len(quantized))
    }


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

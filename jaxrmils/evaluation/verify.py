"""Holds a quantized model against its float model, on data that chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxrmils.evaluation.measure import (
    EvaluationError,
    Measured,
    code_agreement,
    measure,
    measure_layers,
)
from jaxrmils.graph import Coverage, Graph
from jaxrmils.lowering import QuantizedModel, compiled_integer_sites
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.policies import predict
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Loss, Scores
from jaxrmils.statistics import (
    AccuracyChange,
    Interval,
    NonInferiority,
    accuracy_change,
    default_margin,
    mean_interval,
    noninferiority,
    verdict_words,
)


@dataclass(frozen=True)
class LayerReport:
    """One line of the per-layer table.

    Attributes:
      name: the layer.
      format: what the plan made of it.
      rounding: rounding directions of its activations.
      float_bits, quantized_bits: size of its weight before and after, in bits.
      predicted: first-order prediction of its loss change on the selection data.
      measured: change measured on the held-out data with this layer alone quantized.
    """

    name: str
    format: str
    rounding: tuple[str, ...]
    float_bits: int
    quantized_bits: int
    predicted: Interval | None
    measured: Interval | None


@dataclass(frozen=True)
class Report:
    """The result of a quantization, as it is printed and saved.

    Attributes:
      layers: one line per layer.
      coverage: what became of every dot and convolution.
      float_bits, quantized_bits: size of the whole model before and after, in bits.
      float_loss: mean loss of the float model on the held-out data.
      predicted: sum of the layers' predictions, on the selection data.
      measured: paired loss change of the whole integer model, on the held-out data.
      test: the non-inferiority test behind the verdict.
      verdict: the test's outcome in plain words.
      float_accuracy: accuracy of the float model; None without labels.
      accuracy: paired accuracy change.
      differing_codes: largest fraction, over sites, of activation codes that differ between
        the integer model and its simulation.
      code_steps: by how many steps they differ at most.
      planned_sites: sites whose activations the plan quantizes.
      integer_sites: those of them at which the compiled program holds an integer operation.
      notes: what a user should know (formats that are smaller but not faster, ...).
    """

    layers: tuple[LayerReport, ...]
    coverage: Coverage
    float_bits: int
    quantized_bits: int
    float_loss: float
    predicted: Interval | None
    measured: Interval
    test: NonInferiority
    verdict: str
    float_accuracy: float | None
    accuracy: AccuracyChange | None
    differing_codes: float
    code_steps: int
    planned_sites: int
    integer_sites: int
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, for JSON."""
        return asdict(self)


def verify(
    graph: Graph,
    params: Any,
    model: QuantizedModel,
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    *,
    ranges: Ranges | None = None,
    scores: Scores | None = None,
    margin: float | None = None,
    alpha: float = 0.05,
    progress: Progress = silent,
) -> Report:
    """Measures a quantized model against its float model and puts the result into words.

    Args:
      graph: from `trace`.
      params: the float parameters.
      model: from `quantize`.
      batches: held-out `(inputs, targets)` batches that chose nothing: neither ranges, nor scores,
        nor the plan, nor the training of the model.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: to also measure every layer alone; None leaves that out.
      scores: to show the predictions beside the measurement.
      margin: largest mean loss change that counts as lossless; default 0.5 % of the float loss,
        at least 0.005.
      alpha: one-sided level of the test.
      progress: see `jaxrmils.progress`.

    Returns:
      The report.

    Raises:
      EvaluationError: no data, or losses that are not finite.
    """
    if not batches:
        raise EvaluationError("the held-out data holds no batches")
    before = measure(
        graph,
        lambda x: graph.apply(params, x),
        batches,
        loss,
        progress=progress,
        description="measuring the float model",
    )
    after = measure(
        graph, model, batches, loss, progress=progress, description="measuring the integer model"
    )
    changes = after.loss - before.loss
    float_loss = float(before.loss.mean())
    test = noninferiority(
        changes, margin=default_margin(float_loss) if margin is None else margin, alpha=alpha
    )
    alone = (
        measure_layers(graph, params, model.plan, ranges, batches, loss, progress=progress)
        if ranges is not None
        else {}
    )
    predicted = predict(scores, model.plan) if scores is not None else {}
    agreement = code_agreement(model, batches[0][0])
    in_integers = compiled_integer_sites(model, batches[0][0])
    return Report(
        layers=_layers(model, predicted, alone),
        coverage=graph.coverage,
        float_bits=model.sizes.float_bits,
        quantized_bits=model.size_bits,
        float_loss=float_loss,
        predicted=mean_interval(sum(predicted.values())) if predicted else None,
        measured=mean_interval(changes),
        test=test,
        verdict=verdict_words(test),
        float_accuracy=None if before.correct is None else float(before.correct.mean()),
        accuracy=_accuracy(before, after),
        differing_codes=max((fraction for fraction, _ in agreement.values()), default=0.0),
        code_steps=max((steps for _, steps in agreement.values()), default=0),
        planned_sites=len(agreement),
        integer_sites=sum(site in in_integers for site in agreement),
        notes=_notes(model, [site for site in agreement if site not in in_integers]),
    )


def _accuracy(before: Measured, after: Measured) -> AccuracyChange | None:
    if before.correct is None or after.correct is None:
        return None
    return accuracy_change(before.correct, after.correct)


def _layers(
    model: QuantizedModel,
    predicted: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
) -> tuple[LayerReport, ...]:
    rows = []
    for name, layer in model.plan.layers.items():
        quantized = not layer.is_float
        rows.append(
            LayerReport(
                name=name,
                format=layer.format,
                rounding=layer.rounding,
                float_bits=model.sizes.layer_bits(name, 32),
                quantized_bits=model.sizes.layer_bits(name, layer.weight_bits),
                predicted=mean_interval(predicted[name])
                if quantized and name in predicted
                else None,
                measured=mean_interval(measured[name]) if name in measured else None,
            )
        )
    return tuple(rows)


def _notes(model: QuantizedModel, in_float: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if in_float:
        notes.append(
            f"no integer operation was found in the compiled program at {', '.join(in_float[:5])}"
            f"{' ...' if len(in_float) > 5 else ''}"
        )
    formats = {layer.format for layer in model.plan.layers.values()}
    if model.backend == "cpu" and formats & {"w4a4", "w4a8", "w4"}:
        notes.append(
            "int4 weights are smaller but not faster on CPU: every call unpacks them to int8"
        )
    if model.backend == "cpu" and formats & {"w8", "w4"}:
        notes.append("weight-only formats save memory, not time: the operation stays float")
    return tuple(notes)

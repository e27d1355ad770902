"""Holds a quantized model against its float model, on data that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.evaluation.controls import Control, controls, explanations
from jaxrmils.evaluation.curve import CurvePoint, calibration_curve
from jaxrmils.evaluation.measure import code_agreement, measure, measure_layers
from jaxrmils.evaluation.metrics import Metrics, metric_changes
from jaxrmils.evaluation.simulate import EvaluationError, Measured, SimulatedModel
from jaxrmils.graph import Coverage, Graph, tabulate
from jaxrmils.lowering import EXACT_FLOAT, WIDENED, QuantizedModel, compiled_integer_sites
from jaxrmils.lowering.table import remarks
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import PlacementError, with_params
from jaxrmils.policies import Plan, attribute, predict, predict_second_order, uniform
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Curvature, Loss, Scores
from jaxrmils.statistics import (
    AccuracyChange,
    Interval,
    MetricChange,
    NonInferiority,
    StatisticsError,
    accuracy_change,
    default_margin,
    group_numbers,
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
      attributed: its secant share of the joint change on the held-out data.
      measured: change measured on the held-out data with this layer alone quantized.
      curvature: second-order prediction on the selection data; None where none was made.
    """

    name: str
    format: str
    rounding: tuple[str, ...]
    float_bits: int
    quantized_bits: int
    predicted: Interval | None
    attributed: Interval | None
    measured: Interval | None
    curvature: Interval | None = None


@dataclass(frozen=True)
class Report:
    """The result of a quantization, as it is printed and saved.

    Attributes:
      layers: one line per layer.
      coverage: what became of every dot and convolution.
      float_bits, quantized_bits: size of the whole model before and after, in bits.
      float_loss: mean loss of the float model on the held-out data.
      predicted: sum of the layers' first-order predictions (tangent), on the selection data.
      predicted_secant: sum of the layers' secant shares on the selection data.
      attributed: sum of the layers' secant shares on the held-out data.
      residual: the simulated joint change on the held-out data minus `attributed`.
      measured: paired loss change of the whole integer model, on the held-out data.
      test: the non-inferiority test behind the verdict.
      verdict: the test's outcome in plain words.
      float_accuracy: accuracy of the float model; None without labels.
      accuracy: paired accuracy change.
      metrics: paired changes of the metrics that were asked for, of the whole integer model on the
        held-out data.
      differing_codes: largest fraction, over sites, of activation codes that differ between
        the integer model and its simulation.
      code_steps: by how many steps they differ at most.
      planned_sites: sites whose activations the plan quantizes.
      integer_sites: those of them at which the compiled program holds an integer operation; the
        notes name the others.
      controls: the simulated plan and what it is compared with; empty where they were not run.
      curve: the prediction against the number of selection examples; empty without scores.
      lossless: the record of a search for a lossless plan; None where there was none.
      notes: what a user should know (formats that are smaller but not faster, ...).
    """

    layers: tuple[LayerReport, ...]
    coverage: Coverage
    float_bits: int
    quantized_bits: int
    float_loss: float
    predicted: Interval | None
    predicted_secant: Interval | None
    attributed: Interval | None
    residual: Interval | None
    measured: Interval
    test: NonInferiority
    verdict: str
    float_accuracy: float | None
    accuracy: AccuracyChange | None
    differing_codes: float
    code_steps: int
    planned_sites: int
    integer_sites: int
    controls: tuple[Control, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    lossless: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    metrics: tuple[MetricChange, ...] = ()

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
    curvature: Curvature | None = None,
    margin: float | None = None,
    alpha: float = 0.05,
    groups: Any = None,
    metrics: Metrics | None = None,
    layers: bool = True,
    attributed: bool = True,
    points: int = 2,
    selection: Sequence[tuple[Any, Any]] | None = None,
    selection_groups: Any = None,
    compare: Sequence[str] = ("int8", "int4"),
    unit: str = "nats",
    seed: int = 0,
    sharding: NamedSharding | None = None,
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
      ranges: those that the plan was made with; without them nothing is simulated (no layers, no
        attribution, no controls).
      scores: to show the predictions beside the measurement.
      curvature: of the selection data, to show second-order terms beside them.
      margin: largest mean loss change that counts as lossless; by default the one that the plan's
        policy tested, else that of the selection data's float loss (`default_margin`), else that of
        these examples.
      alpha: one-sided level of the test.
      groups: [N], which held-out examples belong together (one patient, one speaker), so that
        intervals are clustered; None for examples that are independent.
      metrics: `metrics(outputs) -> {name: [N]}`, what else the model is judged by: numbers in
        [0, 1], larger ones better, from all held-out outputs in order, a pytree of numpy arrays
        [N, ...]; None for none.
      layers: also measure every layer alone.
      attributed: also share out the joint change among the layers (`attribute`).
      points: quadrature points of the attribution.
      selection: the selection data's batches, on which the controls are fitted; None leaves the
        controls and the secant's prediction out.
      selection_groups: as `groups`, for the selection data.
      compare: uniform formats among the controls.
      unit: of the loss.
      seed: of the control with random directions.
      sharding: how the examples' axis is split over a mesh, as in `score`; parameters of both
        models stay as they lie on it. In one process alone.
      progress: see `jaxrmils.progress`.

    Returns:
      The report.

    Raises:
      EvaluationError: no data, groups of another length, losses that are not finite, or metrics
        of another length or outside [0, 1].
      PlacementError: a sharding by which batches can't be spread, or several processes.

    >>> import jaxrmils as jr
    >>> params = {"w": np.eye(3, dtype=np.float32)}
    >>> graph = jr.trace(lambda p, x: x @ p["w"], params, np.ones((2, 3), "f"))
    >>> x, y = np.float32([[1, 0, 0], [0, 2, 1]]), np.float32([[1, 0, 0], [0, 2, 0]])
    >>> plan = jr.uniform(jr.tabulate(graph), "w8")
    >>> model = jr.quantize(graph, params, plan, jr.calibrate(graph, params, [x]))
    >>> squares = lambda z, y: ((z - y) ** 2).sum(axis=1)
    >>> near = lambda z: {"near": np.abs(z - y).max(axis=1) < 0.5}
    >>> report = jr.verify(graph, params, model, [(x, y)], squares, metrics=near)
    >>> report.metrics[0].name, report.metrics[0].float_mean, report.metrics[0].quantized_mean
    ('near', 0.5, 0.5)
    """
    if not batches:
        raise EvaluationError("the held-out data holds no batches")
    if selection and ranges is None:
        raise EvaluationError("selection data was given for the controls; they need ranges= too")
    if sharding is not None and jax.process_count() > 1:
        raise PlacementError(
            f"verify runs in one process, found {jax.process_count()}; give it a mesh of this "
            "process's devices in a job of its own"
        )
    _check_groups("groups", groups, batches)
    if selection:
        _check_groups("selection_groups", selection_groups, selection)
    params = with_params(params, sharding)
    model = replace(model, params=with_params(model.params, sharding))
    data = {"batches": batches, "loss": loss, "metrics": metrics, "sharding": sharding}
    run = partial(measure, graph, **data, progress=progress)
    before = run(graph.apply, params=params, description="measuring the float model")
    after = run(model.apply, params=model.params, description="measuring the integer model")
    changes = after.loss - before.loss
    if margin is None:
        margin = _margin(model.plan, before.loss if scores is None else scores.loss, unit)
    test = noninferiority(
        changes, margin=margin, alpha=alpha, groups=groups, identical=model.plan.is_float
    )
    simulated = _Simulated()
    if ranges is not None:
        others = [uniform(tabulate(graph), name) for name in compare] if selection else []
        simulated = _simulate(
            SimulatedModel(graph, params, ranges, loss, sharding).holding([model.plan, *others]),
            model.plan,
            batches,
            selection,
            groups=(groups, selection_groups),
            layers=layers,
            points=points if attributed else 0,
            control=partial(
                controls,
                margin=margin,
                alpha=alpha,
                groups=groups,
                seed=seed,
                compare=compare,
                unit=unit,
            ),
            progress=progress,
        )
    report = _report(graph, model, batches[0][0], before, after, test, simulated, groups, unit)
    if curvature is not None:
        report = _with_curvature(report, curvature, model, selection_groups)
    if scores is None:
        return report
    return _with_predictions(report, scores, model.plan, selection_groups, seed)


@dataclass(frozen=True, eq=False)
class _Simulated:
    """What simulation adds to a report: per-example changes by layer, intervals, controls."""

    alone: Mapping[str, np.ndarray] = field(default_factory=dict)
    shares: Mapping[str, np.ndarray] = field(default_factory=dict)
    residual: Interval | None = None
    predicted: Interval | None = None
    controls: tuple[Control, ...] = ()


def _simulate(
    simulation: SimulatedModel,
    plan: Plan,
    batches: Sequence[tuple[Any, Any]],
    selection: Sequence[tuple[Any, Any]] | None,
    *,
    groups: tuple[Any, Any],
    layers: bool,
    points: int,
    control: Callable[..., tuple[Control, ...]],
    progress: Progress,
) -> _Simulated:
    """Layers alone, the attribution (points > 0) and, with selection data, the controls."""
    s = simulation
    result = _Simulated()
    if layers:
        alone = measure_layers(
            s.graph, s.params, plan, s.ranges, batches, s.loss, simulation=s, progress=progress
        )
        result = replace(result, alone=alone)
    if points and not all(layer.is_float for layer in plan.layers.values()):
        # One call for both splits compiles once.
        others = selection or ()
        data = progress(chain(batches, others), "attributing", len(batches) + len(others))
        options = {"points": points, "sharding": s.sharding}
        found = attribute(s.graph, s.params, plan, data, s.loss, s.ranges, **options)
        n = sum(len(jax.tree.leaves(inputs)[0]) for inputs, _ in batches)
        total = found.change - found.residual
        result = replace(
            result,
            shares={name: values[:n] for name, values in found.layers.items()},
            residual=mean_interval(found.residual[:n], groups=groups[0]),
            predicted=mean_interval(total[n:], groups=groups[1]) if selection else None,
        )
    if selection:
        measured = control(
            s.graph,
            s.params,
            plan,
            batches,
            s.loss,
            s.ranges,
            fit_batches=selection,
            simulation=s,
            progress=progress,
        )
        result = replace(result, controls=measured)
    return result


def _report(
    graph: Graph,
    model: QuantizedModel,
    inputs: Any,
    before: Measured,
    after: Measured,
    test: NonInferiority,
    simulated: _Simulated,
    groups: Any,
    unit: str,
) -> Report:
    """The report without predictions; `inputs` is a batch to compile the integer model for."""
    agreement = code_agreement(model, inputs)
    found = compiled_integer_sites(model, inputs)
    in_float = [site for site in agreement if site not in found]
    exact = [site for site in agreement if found.get(site) == {EXACT_FLOAT}]
    wide = [site for site in agreement if found.get(site, set()) & {*WIDENED.values()}]
    shares = simulated.shares
    return Report(
        layers=_layers(model, simulated, groups),
        coverage=graph.coverage,
        float_bits=model.sizes.float_bits,
        quantized_bits=model.size_bits,
        float_loss=float(before.loss.mean()),
        predicted=None,
        predicted_secant=simulated.predicted,
        attributed=mean_interval(sum(shares.values()), groups=groups) if shares else None,
        residual=simulated.residual,
        measured=mean_interval(after.loss - before.loss, groups=groups),
        test=test,
        verdict=verdict_words(test, unit=unit),
        float_accuracy=None if before.correct is None else float(before.correct.mean()),
        accuracy=_accuracy(before, after, test.alpha, groups),
        metrics=metric_changes(before.metrics, after.metrics, alpha=test.alpha, groups=groups),
        differing_codes=max((fraction for fraction, _ in agreement.values()), default=0.0),
        code_steps=max((steps for _, steps in agreement.values()), default=0),
        planned_sites=len(agreement),
        integer_sites=len(agreement) - len(in_float) - len(exact),
        controls=simulated.controls,
        notes=(*_notes(model, in_float, exact, wide), *explanations(simulated.controls)),
    )


def _with_predictions(report: Report, scores: Scores, plan: Plan, groups: Any, seed: int) -> Report:
    """The report with what the scores predict and the calibration-size curve."""
    predicted = predict(scores, plan)
    by_layer = {
        name: mean_interval(predicted[name], groups=groups)
        for name, layer in plan.layers.items()
        if not layer.is_float
    }
    return replace(
        report,
        layers=tuple(replace(row, predicted=by_layer.get(row.name)) for row in report.layers),
        predicted=mean_interval(sum(predicted.values()), groups=groups),
        curve=calibration_curve(scores, plan, groups=groups, seed=seed),
    )


def _with_curvature(
    report: Report, curvature: Curvature, model: QuantizedModel, groups: Any
) -> Report:
    """The report with the layers' second-order terms."""
    terms = predict_second_order(curvature, model.plan, model.sizes)
    intervals = {name: mean_interval(term, groups=groups) for name, term in terms.items()}
    rows = (replace(row, curvature=intervals.get(row.name)) for row in report.layers)
    return replace(report, layers=tuple(rows))


def _check_groups(name: str, groups: Any, batches: Sequence[tuple[Any, Any]]) -> None:
    if groups is None:
        return
    try:
        group_numbers(groups, sum(len(jax.tree.leaves(x)[0]) for x, _ in batches))
    except StatisticsError as error:
        raise EvaluationError(f"{name}: {error}") from error


def _margin(plan: Plan, float_loss: np.ndarray, unit: str) -> float:
    tested = plan.policy.get("margin")
    return default_margin(float(np.mean(float_loss)), unit=unit) if tested is None else tested


def _accuracy(
    before: Measured, after: Measured, alpha: float, groups: Any
) -> AccuracyChange | None:
    if before.correct is None or after.correct is None:
        return None
    return accuracy_change(before.correct, after.correct, alpha=alpha, groups=groups)


def _layers(model: QuantizedModel, simulated: _Simulated, groups: Any) -> tuple[LayerReport, ...]:
    def of(values: Mapping[str, np.ndarray], name: str) -> Interval | None:
        return mean_interval(values[name], groups=groups) if name in values else None

    return tuple(
        LayerReport(
            name=name,
            format=layer.format,
            rounding=layer.rounding,
            float_bits=model.sizes.layer_bits(name, 32),
            quantized_bits=model.sizes.layer_bits(name, layer.weight_bits, layer.weight_group),
            predicted=None,
            attributed=of(simulated.shares, name),
            measured=of(simulated.alone, name),
        )
        for name, layer in model.plan.layers.items()
    )


def _first(sites: Sequence[str], count: int = 5) -> str:
    """The first sites, and how many more there are."""
    more = f" and {len(sites) - count} more" if len(sites) > count else ""
    return ", ".join(sites[:count]) + more


def _notes(
    model: QuantizedModel, in_float: Sequence[str], exact: Sequence[str], wide: Sequence[str]
) -> tuple[str, ...]:
    notes = []
    if in_float:
        notes.append(
            f"no integer operation was found in the compiled program at {_first(in_float)}"
        )
    if exact:
        notes.append(
            f"codes are multiplied in float32, exactly and faster there, at {_first(exact)}"
        )
    if wide:
        notes.append(
            "codes are widened to int32 before they are multiplied, since no int8 kernel takes the "
            f"shape, at {_first(wide)}"
        )
    formats = {layer.format for layer in model.plan.layers.values()}
    return (*notes, *remarks(model.backend, formats))

"""Costs of every layer in every format that take a pass over the data of their own.

Published objectives and the measurement that they stand for; docs/objectives.md has the formulas.
All of them round to nearest and look at a layer alone: an option's cost is what quantizing this
layer in this format does while all others are float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrmils.graph import Format, Graph, LayerRow, tabulate
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.numerics.placement import with_params
from jaxrmils.policies import cost_programs as programs
from jaxrmils.policies.constraints import nearest_layer
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import FLOAT_BITS, PlanError, parse_format, several
from jaxrmils.policies.plan import FLOAT_LAYER, LayerPlan, Plan
from jaxrmils.policies.simulation import Simulator
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Loss, ScoreError
from jaxrmils.sensitivity.hessian_trace import hessian_traces, weight_stack
from jaxrmils.sensitivity.output_noise import NEAREST, WIDTHS
from jaxrmils.sensitivity.streaming import even_batches, mean_over_examples
from jaxrmils.sensitivity.tangent import check_ranges

DEFAULT_FORMATS = ("w8a8", "w8a4", "w4a8", "w4a4")

Batches = Iterable[tuple[Any, Any]]


def squared_output_costs(
    graph: Graph,
    params: Any,
    batches: Batches,
    loss: Loss,
    ranges: Ranges,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    progress: Progress = silent,
) -> Costs:
    """The score of ModelOpt's `auto_quantize`: the mean over examples of sum_j g_j^2 (Y_f - Y)_j^2.

    Y is the output of the layer's operation, g the gradient of the example's loss there, Y_f the
    output on operands of format f. A layer's sites and the iterations of loops are summed.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches.
      loss: `loss(outputs, targets) -> [batch]`. Where its gradient is zero at the float model, as
        that of a loss without labels, every cost is zero.
      ranges: from `calibrate`.
      formats: names of formats; a layer takes of them what it has (see `nearest_layer`).
      progress: see `jaxrmils.progress`.

    Returns:
      Costs in squared nats (the loss's unit). An option that quantizes activations without a range,
      since no calibration example reached them, is left out: no plan may hold it.

    Raises:
      PlanError: no formats, or an unknown one.
      ScoreError: no data, targets that do not fit, ranges of another model, or a score that is not
        finite (it names the site).
      TraceError: params or inputs that do not fit.

    References:
      NVIDIA ModelOpt, `AutoQuantizeGradientSearcher`. It takes gradients of each batch's mean loss
      and sums over batches, which differs by a constant factor where batches are equal.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> data = [(x, jnp.zeros((4, 2)))]
    >>> costs = squared_output_costs(graph, params, data, squares, calibrate(graph, params, [x]))
    >>> [layer.format for layer in costs.options["w"]]
    ['float', 'w8a8', 'w8a4', 'w4a8', 'w4a4']
    """
    params = with_params(params, None)
    bits = _checked_bits(graph, params, ranges, formats)
    noise = programs.noise_of(graph, params, NEAREST)

    def step(inputs: Any, targets: Any) -> Any:
        return programs.squared_output(
            graph, params, inputs, targets, loss, ranges, bits, noise=noise
        )

    data = even_batches(graph, batches, "squared output", progress=progress)
    means = mean_over_examples(data, step, "squared output change")

    def cost(row: LayerRow, layer: LayerPlan, number: int) -> float:
        return sum(means[site][number] for site in row.sites)

    return Costs("squared_output", "squared nats", _options(graph, ranges, formats, cost))


def sqnr_costs(
    graph: Graph,
    params: Any,
    batches: Batches,
    ranges: Ranges,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    progress: Progress = silent,
) -> Costs:
    """The noise-to-signal ratio E|Y_f - Y|^2 / E|Y|^2 of every layer's output.

    The inverse of the signal-to-quantization-noise ratio, not in decibels, so that it can be
    summed: over a layer's sites, and over the layers of a scanned stack, each with its own ratio.
    The steps of a recurrence share one. Neither labels nor gradients are read.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches; targets are not read.
      ranges: from `calibrate`.
      formats: names of formats.
      progress: see `jaxrmils.progress`.

    Returns:
      Costs as ratios; options as for `squared_output_costs`.

    Raises:
      PlanError: no formats, or an unknown one.
      ScoreError: no data, ranges of another model, a power that is not finite, or noise on a
        signal that is zero throughout (it names the site).
      TraceError: params or inputs that do not fit.
    """
    params = with_params(params, None)
    bits = _checked_bits(graph, params, ranges, formats)
    noise = programs.noise_of(graph, params, NEAREST)

    def step(inputs: Any, targets: Any) -> Any:
        return programs.output_power(graph, params, inputs, ranges, bits, noise=noise)

    data = even_batches(graph, batches, "noise-to-signal ratios", labels=False, progress=progress)
    powers = mean_over_examples(data, step, "output's power")
    ratios = {site: _ratio(site, *power) for site, power in powers.items()}

    def cost(row: LayerRow, layer: LayerPlan, number: int) -> float:
        return sum(ratios[site][number] for site in row.sites)

    return Costs("sqnr", "noise-to-signal ratio", _options(graph, ranges, formats, cost))


def _ratio(site: str, noise: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """Noise [stacked loops, formats] over signal [stacked loops], summed over the stack."""
    silent_noise = noise[signal == 0]
    if np.any(silent_noise > 0):
        raise ScoreError(
            f"the output of site {site} is zero on all examples, but quantization noise is not: "
            "its noise-to-signal ratio is infinite. Skip its layer, or take data that reaches it."
        )
    ratios = noise / np.where(signal == 0, 1.0, signal)[..., None]
    return ratios.reshape(-1, noise.shape[-1]).sum(axis=0)


def fisher_costs(
    graph: Graph,
    params: Any,
    batches: Batches,
    loss: Loss,
    ranges: Ranges,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    progress: Progress = silent,
) -> Costs:
    """Half the diagonal of the empirical Fisher information times the noise's squares.

    1/2 E sum_j (dl/dw_j)^2 delta_j^2 for the weight, plus 1/2 E sum_j (dl/dh_j)^2 eps_j^2 for every
    activation operand. Weight and activations are added, without their cross term.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches; weight gradients are held for every example of one.
      loss: `loss(outputs, targets) -> [batch]`; see `squared_output_costs`.
      ranges: from `calibrate`.
      formats: names of formats.
      progress: see `jaxrmils.progress`.

    Returns:
      Costs; for cross-entropy an estimate of the loss change in its unit, for other losses half
      the mean square of a first-order change. Options as for `squared_output_costs`.

    Raises:
      PlanError: no formats, or an unknown one.
      ScoreError: no data, targets that do not fit, ranges of another model, or a value that is not
        finite (it names the weight or the site).
      TraceError: params or inputs that do not fit.

    References:
      Kunstner et al. (2019), arXiv 1905.12558, on what the empirical Fisher information is not.
    """
    params = with_params(params, None)
    _checked_bits(graph, params, ranges, formats)
    noise = programs.noise_of(graph, params, NEAREST)

    def step(inputs: Any, targets: Any) -> Any:
        weights, activations = programs.fisher_diagonal(
            graph, params, inputs, targets, loss, ranges, noise=noise
        )
        return {f"weight {n}": v for n, v in weights.items()} | {
            f"site {n}": v for n, v in activations.items()
        }

    data = even_batches(graph, batches, "Fisher information", progress=progress)
    means = mean_over_examples(data, step, "Fisher information")

    def cost(row: LayerRow, layer: LayerPlan, number: int) -> float:
        total = 0.0
        if layer.weight_bits < FLOAT_BITS:
            total += means[f"weight {row.name}"][WIDTHS.index(layer.weight_bits)]
        if layer.activation_bits < FLOAT_BITS:
            column = WIDTHS.index(layer.activation_bits)
            total += sum(means[f"site {a.site}"][a.position, column] for a in row.activations)
        return total / 2

    return Costs("fisher", "nats", _options(graph, ranges, formats, cost))


def hessian_trace_costs(
    graph: Graph,
    params: Any,
    batches: Batches,
    loss: Loss,
    ranges: Ranges,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    probes: int = 4,
    seed: int = 0,
    activations: bool = True,
    progress: Progress = silent,
) -> Costs:
    """HAWQ-V2's sensitivity: the Hessian's average eigenvalue times the noise's power, halved.

    1/2 (tr H_w / n_w) |delta|^2 for the weight of n_w elements: what noise of this power and no
    preferred direction costs to second order. With `activations`, the same for every operand:
    1/2 (E tr H_h / n_h) E |eps|^2. HAWQ-V2 looks at both; what HAWQ-V3 hands to its integer
    programme is the weight's alone, each layer's activations having the width of its weight.
    Traces are by Hutchinson's estimator; a negative one counts as 0, since the theory is that of a
    minimum, where there is none.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches, read twice: a list or another re-iterable.
      loss: `loss(outputs, targets) -> [batch]`, twice differentiable in the outputs.
      ranges: from `calibrate`.
      formats: names of formats.
      probes: vectors per batch; each is a forward-over-reverse pass, two with `activations`.
      seed: of the vectors' signs.
      activations: False for the weights alone: formats that differ in their activations then cost
        the same, and a product of two activations costs nothing.
      progress: see `jaxrmils.progress`.

    Returns:
      Costs in the loss's unit; options as for `squared_output_costs`.

    Raises:
      PlanError: no formats, or an unknown one.
      ScoreError: fewer than one probe, no data or a one-shot iterator, targets that do not fit,
        ranges of another model, or a trace that is not finite (it names the weight or the site).
      TraceError: params or inputs that do not fit.

    References:
      Dong et al. (2020), HAWQ-V2, arXiv 1911.03852. Yao et al. (2021), HAWQ-V3, arXiv 2011.10680.
    """
    params = with_params(params, None)
    _checked_bits(graph, params, ranges, formats)
    if iter(batches) is batches:
        raise ScoreError(
            "batches is a one-shot iterator, but two passes are made; pass a list or a data set"
        )
    traces = hessian_traces(
        graph,
        params,
        batches,
        loss,
        probes=probes,
        seed=seed,
        activations=activations,
        progress=progress,
    )
    noise = jax.device_get(programs.noise_of(graph, params, NEAREST))
    powers: Mapping[str, Any] = {}
    if activations:
        data = even_batches(graph, batches, "operands' noise", labels=False, progress=progress)
        powers = mean_over_examples(
            data,
            lambda inputs, _: programs.operand_power(graph, params, inputs, ranges),
            "noise power",
        )

    def weight_cost(name: str, bits: int) -> float:
        stack = weight_stack(graph, name)
        delta = np.asarray(noise[name][WIDTHS.index(bits)], np.float64)
        power = np.square(delta).reshape(*stack, -1)
        return float(np.sum(np.maximum(traces.weights[name], 0) * power.mean(axis=-1)))

    def operand_cost(site: str, position: int, size: int, bits: int) -> float:
        trace = traces.activations[site][position]
        power = powers[site][..., position, WIDTHS.index(bits)]
        return float(np.sum(np.maximum(trace, 0) * power / size))

    def cost(row: LayerRow, layer: LayerPlan, number: int) -> float:
        total = 0.0
        if layer.weight_bits < FLOAT_BITS:
            total += weight_cost(row.name, layer.weight_bits)
        if layer.activation_bits < FLOAT_BITS and activations:
            for a in row.activations:
                size = a.size * a.iterations // a.grids  # of all steps of a recurrence
                total += operand_cost(a.site, a.position, size, layer.activation_bits)
        return total / 2

    return Costs("hessian_trace", "nats", _options(graph, ranges, formats, cost))


def measured_costs(
    graph: Graph,
    params: Any,
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    simulator: Simulator | None = None,
    progress: Progress = silent,
) -> Costs:
    """The measured change of the mean loss with one layer quantized: the expensive reference.

    A forward pass over the data for every layer and format, through one compiled simulation.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches, read once for every option.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      formats: names of formats.
      simulator: a `Simulator(graph, loss)` that is already compiled.
      progress: see `jaxrmils.progress`; one step for every option.

    Returns:
      Costs in the loss's unit, negative where a layer's noise helps; options as for
      `squared_output_costs`.

    Raises:
      PlanError: no formats, or an unknown one; ranges of another model.
      ScoreError: no data, targets that do not fit, a loss that is not finite, or a simulator of
        another model or loss.
      TraceError: params or inputs that do not fit.
    """
    _checked(graph, params, ranges, formats)
    simulator = simulator or Simulator(graph, loss)
    if simulator.graph is not graph or simulator.loss is not loss:
        raise ScoreError("the simulator was made for another graph or loss; make one for these")
    simulation = simulator.on(params, ranges, batches).holding(formats)
    float_plan = dict.fromkeys(graph.layers, FLOAT_LAYER)
    options = _options(graph, ranges, formats, lambda row, layer, number: 0.0)
    pairs = [(n, layer) for n, own in options.items() for layer in own if not layer.is_float]
    for name, layer in progress(pairs, "measuring layers", len(pairs)):
        plan = Plan({**float_plan, name: layer}, graph.fingerprint)
        options[name][layer] = float(simulation.change(plan).mean())
    return Costs("measured", "nats", options)


def _checked(
    graph: Graph, params: Any, ranges: Ranges, formats: Sequence[str]
) -> tuple[Format, ...]:
    """The formats, if everything fits together."""
    if not several(formats):
        raise PlanError(f"formats is {formats!r}; expected some, such as ('w8a8', 'w4a8')")
    found = tuple(parse_format(name) for name in formats)
    check_params(graph, params)
    check_ranges(graph, ranges)
    return found


def _checked_bits(
    graph: Graph, params: Any, ranges: Ranges, formats: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """The formats' bits; PlanError for what has more than bits."""
    found = _checked(graph, params, ranges, formats)
    check_calibrated(formats)
    return tuple((each.weight_bits, each.activation_bits) for each in found)


def check_calibrated(formats: Iterable[str]) -> None:
    """PlanError for formats that only the measured costs know: of grids of rows, or of groups."""
    for name in formats:
        each = parse_format(name)
        if each.dynamic or each.group:
            raise PlanError(
                f"{name}: these costs know calibrated grids for whole tensors and scales for whole "
                "channels alone; take 'measured', or an objective of scores, such as 'squared'"
            )


def _options(
    graph: Graph,
    ranges: Ranges,
    formats: Sequence[str],
    cost: Callable[[LayerRow, LayerPlan, int], float],
) -> dict[str, dict[LayerPlan, float]]:
    """A layer's options with their costs: float, then the formats that it can have."""
    table = tabulate(graph)
    result = {}
    for row in table.layers:
        has_ranges = all(a.site in ranges.grids for a in row.activations)
        options = {FLOAT_LAYER: 0.0}
        for number, name in enumerate(formats):
            layer = nearest_layer(table, row.name, parse_format(name))
            if layer in options or (layer.activation_bits < FLOAT_BITS and not has_ranges):
                continue
            options[layer] = float(cost(row, layer, number))
        result[row.name] = options
    return result


def _sqnr(
    graph: Graph, params: Any, batches: Batches, loss: Loss, ranges: Ranges, **options: Any
) -> Costs:
    """`sqnr_costs` with a loss that is not read."""
    return sqnr_costs(graph, params, batches, ranges, **options)


MEASURED_COSTS: Mapping[str, Callable[..., Costs]] = {
    "squared_output": squared_output_costs,
    "fisher": fisher_costs,
    "hessian_trace": hessian_trace_costs,
    "sqnr": _sqnr,
    "measured": measured_costs,
}
"""By name, `costs(graph, params, batches, loss, ranges, *, formats, progress)`."""

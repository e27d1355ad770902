"""The `lossless` policy: the most compressed plan that a held-out test lets pass.

Selection data fixes a sequence of plans from least to most compressed (`sequence`). Confirmation
data, which chose nothing, tests them in that order for non-inferiority, each at level alpha, and
stops at the first failure; the last that passed is returned. A plan that is truly worse than the
margin is returned only if the first such plan of the sequence passes its test, so the chance of
that is at most alpha, however long the sequence is (fixed-sequence testing: Maurer, Hothorn &
Lehmacher 1995; Westfall & Krishen 2001).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.numerics import Ranges, format_size
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.plan import FLOAT_LAYER, Plan
from jaxrmils.policies.sequence import Directions, MeasuredPlan, Search, plan_sequence
from jaxrmils.policies.simulation import Simulation, Simulator
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Curvature, Loss, ScoreError, Scores, directions, fisher
from jaxrmils.statistics import (
    Interval,
    NonInferiority,
    default_margin,
    mean_interval,
    noninferiority,
    verdict_words,
)


@dataclasses.dataclass(frozen=True)
class LosslessStep:
    """One plan of the sequence.

    Attributes:
      plan: the plan.
      size_bits: size of the quantized model in bits.
      selection: its mean loss change on the selection data, which chose it: no evidence.
      test: its test on the confirmation data; None where an earlier plan had failed.
    """

    plan: Plan
    size_bits: int
    selection: Interval
    test: NonInferiority | None


@dataclasses.dataclass(frozen=True)
class Lossless:
    """The result of the `lossless` policy.

    Attributes:
      plan: the most compressed plan that passed; all in float where none did.
      chosen: its index in `steps`; None where none passed.
      margin: the largest mean loss change that counts as lossless.
      alpha: the chance, at most, that a plan worse than the margin is returned.
      steps: the sequence, least compressed first.
      words: the outcome in plain words.
    """

    plan: Plan
    chosen: int | None
    margin: float
    alpha: float
    steps: tuple[LosslessStep, ...]
    words: str


def lossless(
    graph: Graph,
    params: Any,
    selection: Sequence[tuple[Any, Any]],
    confirmation: Sequence[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    margin: float | None = None,
    alpha: float = 0.05,
    unit: str = "nats",
    search: Search | None = None,
    scores: Scores | None = None,
    curvature: Curvature | None = None,
    directed: bool = True,
    groups: Any = None,
    selection_groups: Any = None,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
    simulator: Simulator | None = None,
    progress: Progress = silent,
) -> Lossless:
    """The most compressed plan whose loss is shown to be no higher than the float model's.

    Compressed means: in size, and in `search.compute` times its work. Plans are run in simulation,
    whose operands are the integer model's at every site, multiplied in float32.

    Args:
      graph: from `trace`.
      params: the float parameters.
      selection: `(inputs, targets)` batches that choose the plans.
      confirmation: batches that test them; of other examples, and other groups, than selection,
        ranges and training data.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`, on other data.
      margin: largest mean loss change that counts as lossless; by default 0.5 % of the float loss
        on the selection data, and at least 0.005 if that is in nats.
      alpha: one-sided level of every test.
      unit: of the loss.
      search: how plans are searched for.
      scores: from `score` on the selection data, for a first path and for rounding directions;
        None where the loss has no tangent (label-free losses).
      curvature: from `curvature`, against which directions must pay; by default the empirical
        Fisher term of the scores.
      directed: allow the rounding directions that `jaxrmils.sensitivity.directions` proposes.
      groups: [N], the group of each confirmation example, where examples come in groups.
      selection_groups: those of the selection examples.
      skip: globs of layers that stay float.
      force: format by glob.
      simulator: one that is already compiled for this graph and loss.
      progress: see `jaxrmils.progress`.

    Returns:
      The plan, the tested sequence, and the outcome in words.

    Raises:
      PlanError: unknown format or pattern, nothing to quantize, ranges of another model.
      ScoreError: no data, targets that do not fit, a loss that is not finite, or the same examples
        for selection and confirmation.
      StatisticsError: `margin` or `alpha` out of range, or groups that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> params = {"w": jnp.array([[0.5, -1.0], [1.0, 0.25], [0.75, 1.0]])}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> data = [(x, x @ params["w"] + 1.0)]
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> found = lossless(
    ...     graph, params, [(x[:32], data[0][1][:32])], [(x[32:], data[0][1][32:])], squares,
    ...     calibrate(graph, params, [x]), margin=0.1,
    ... )
    >>> found.plan.layers["w"].weight_bits
    4
    """
    simulator = simulator or Simulator(graph, loss)
    if simulator.graph is not graph or simulator.loss is not loss:
        raise PlanError("the simulator was made for another graph or loss")
    if scores is not None and scores.table.fingerprint != graph.fingerprint:
        raise PlanError("the scores were made for another model; score this one")
    search = search or Search()
    search.check()
    formats = [*search.formats, *(force or {}).values()]
    on_selection, on_confirmation = _other_examples(
        simulator.on(params, ranges, selection).holding(formats),
        simulator.on(params, ranges, confirmation).holding(formats),
    )
    if margin is None:
        margin = default_margin(float(on_selection.float_loss.mean()), unit=unit)
    # The options of the tests, checked before the long part begins.
    noninferiority(on_confirmation.float_loss, margin=margin, alpha=alpha, groups=groups)
    settings = {
        "name": "lossless",
        "margin": margin,
        "alpha": alpha,
        "directed": directed,
        **dataclasses.asdict(search),
        "formats": list(search.formats),
        "skip": list(skip),
        "force": dict(force or {}),
    }
    sequence = plan_sequence(
        on_selection,
        margin=margin,
        search=search,
        scores=scores,
        directions=_directions(scores, curvature) if directed else None,
        groups=selection_groups,
        skip=skip,
        force=force,
        settings=settings,
        progress=progress,
    )
    tests = _in_order(sequence, on_confirmation, margin, alpha, groups, progress)
    table = tabulate(graph)
    steps = [
        _step(table, each, test, selection_groups)
        for each, test in zip(sequence, tests, strict=True)
    ]
    passed = [i for i, test in enumerate(tests) if test is not None and test.passed]
    chosen = passed[-1] if passed else None
    float_plan = Plan(dict.fromkeys(table.layer, FLOAT_LAYER), graph.fingerprint, settings)
    return Lossless(
        plan=float_plan if chosen is None else steps[chosen].plan,
        chosen=chosen,
        margin=margin,
        alpha=alpha,
        steps=tuple(steps),
        words=_words(table, steps, chosen, unit),
    )


def _other_examples(
    selection: Simulation, confirmation: Simulation
) -> tuple[Simulation, Simulation]:
    """The two, if they hold different examples."""
    if np.array_equal(selection.float_loss, confirmation.float_loss):
        raise ScoreError(
            "selection and confirmation data have the same losses: the same examples would choose "
            "the plans and judge them; pass examples that chose nothing as confirmation"
        )
    return selection, confirmation


def _in_order(
    sequence: Sequence[MeasuredPlan],
    data: Simulation,
    margin: float,
    alpha: float,
    groups: Any,
    progress: Progress,
) -> list[NonInferiority | None]:
    """The plans' tests, up to the first failure; None behind it."""
    tests: list[NonInferiority | None] = []
    failed = False
    for each in progress(sequence, "testing the sequence", len(sequence)):
        test = None
        if not failed:
            test = noninferiority(data.change(each.plan), margin=margin, alpha=alpha, groups=groups)
            failed = not test.passed
        tests.append(test)
    return tests


def _directions(scores: Scores | None, curvature: Curvature | None) -> Directions | None:
    if scores is None:
        return None
    return directions(scores, curvature or fisher(scores))


def _step(
    table: ModelTable, measured: MeasuredPlan, test: NonInferiority | None, groups: Any
) -> LosslessStep:
    size = table.size_bits(measured.plan.formats())
    return LosslessStep(measured.plan, size, mean_interval(measured.change, groups=groups), test)


def _words(table: ModelTable, steps: Sequence[LosslessStep], chosen: int | None, unit: str) -> str:
    """The outcome of the tests."""

    def size(step: LosslessStep) -> str:
        share = 100 * step.size_bits / max(table.float_bits, 1)
        return f"{format_size(step.size_bits)} ({share:.1f} % of the float model)"

    if chosen is None:
        first = steps[0].test
        assert first is not None
        if first.lower_bound > first.margin:
            reason = "not possible at this margin with these formats"
        else:
            reason = f"no evidence either way{_needed(first)}"
        return (
            f"every layer stays float: {reason}. The least compressed plan, {size(steps[0])}, on "
            f"confirmation data: {verdict_words(first, unit=unit)}"
        )
    step = steps[chosen]
    assert step.test is not None
    words = f"{size(step)}, on confirmation data: {verdict_words(step.test, unit=unit)}"
    if chosen + 1 == len(steps):
        return f"{words}. It is the most compressed plan of the sequence"
    stopped = steps[chosen + 1]
    assert stopped.test is not None
    return f"{words}. The next plan, {size(stopped)}: {verdict_words(stopped.test, unit=unit)}"


def _needed(test: NonInferiority) -> str:
    if test.needed_n is None:
        return ""
    return f": about {test.needed_n} confirmation examples are needed"


def steps_of(result: Lossless) -> dict[str, Any]:
    """The outcome as plain values, for a report.

    Returns:
      `margin`, `alpha`, `words` and `steps`, each with `size_bits`, `formats` (layers of each
      format), `selection`, `test` and `chosen`.
    """
    return {
        "margin": result.margin,
        "alpha": result.alpha,
        "words": result.words,
        "steps": [
            {
                "size_bits": step.size_bits,
                "formats": step.plan.counts(),
                "selection": dataclasses.asdict(step.selection),
                "test": None if step.test is None else dataclasses.asdict(step.test),
                "chosen": index == result.chosen,
            }
            for index, step in enumerate(result.steps)
        ],
    }

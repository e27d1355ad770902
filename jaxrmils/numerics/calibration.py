"""Runs calibration data through a model and keeps what ranges need."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph, Site, SiteCall, interpret
from jaxrmils.graph.checks import check_examples_independent, check_finite, check_same_shapes
from jaxrmils.graph.naming import leaf_names
from jaxrmils.graph.trace import one_example
from jaxrmils.numerics.formats import BITS
from jaxrmils.numerics.quant_params import QuantParams
from jaxrmils.numerics.ranges import (
    ESTIMATORS,
    Estimator,
    RangeStats,
    estimate_range,
    histogram,
)
from jaxrmils.progress import Progress, silent

# Elements of an activation that enter the histogram, per batch. Minimum and maximum see all.
_HISTOGRAM_SAMPLE = 1 << 18


class CalibrationError(ValueError):
    """Calibration data that cannot give ranges."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stats", "grids"],
    meta_fields=["estimator", "symmetric", "percentile", "examples", "fingerprint"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
    """The activation ranges of a model and the integer grids chosen from them.

    Attributes:
      stats: per site, one `RangeStats` for every activation operand, in the order of
        `site.activations`; leading axes for stacked loops.
      grids: `grids[site][position][bits]` is a `QuantParams` for 8 and 4 bits: float32 scale and
        int32 zero point, shape () or one per layer of a stack.
      estimator: one of `ESTIMATORS`.
      symmetric: True for grids without zero points.
      percentile: for the "percentile" estimator.
      examples: how many examples were seen.
      fingerprint: the graph they belong to.
    """

    stats: Mapping[str, tuple[RangeStats, ...]]
    grids: Mapping[str, tuple[Mapping[int, QuantParams], ...]]
    estimator: Estimator
    symmetric: bool
    percentile: float
    examples: int
    fingerprint: str


def make_ranges(
    stats: Mapping[str, tuple[RangeStats, ...]],
    *,
    estimator: Estimator,
    symmetric: bool,
    percentile: float,
    examples: int,
    fingerprint: str,
) -> Ranges:
    """Chooses the grids for what calibration saw; see `Ranges` for the arguments.

    The same statistics give other ranges under another estimator, without the model.
    """

    # Compiled once for every shape of the statistics, not once for every site.
    estimate = jax.jit(
        functools.partial(
            estimate_range, estimator=estimator, symmetric=symmetric, percentile=percentile
        ),
        static_argnames="bits",
    )
    chosen = {
        site: tuple({bits: estimate(s, bits=bits) for bits in BITS} for s in parts)
        for site, parts in stats.items()
    }
    return Ranges(dict(stats), chosen, estimator, symmetric, percentile, examples, fingerprint)


def calibrate(
    graph: Graph,
    params: Any,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "mse",
    symmetric: bool = False,
    percentile: float = 99.99,
    progress: Progress = silent,
) -> Ranges:
    """Finds the range of every activation that a site reads.

    Two passes over the data: minimum and maximum, then a histogram between them ("minmax" needs
    only the first). No labels are read.

    Args:
      graph: from `trace`.
      params: concrete parameters.
      batches: batches of inputs; iterated twice, so a list or another re-iterable.
      estimator: "minmax", "percentile", "mse", "aciq_gauss" or "aciq_laplace".
      symmetric: grids without zero points.
      percentile: for "percentile".
      progress: see `jaxrmils.progress`.

    Returns:
      The ranges.

    Raises:
      CalibrationError: no batches, a one-shot iterator, or an activation that is NaN or infinite.
      TraceError: NaN or inf in params or inputs, or examples of a batch influence each other.
    """
    if estimator not in ESTIMATORS:
        raise CalibrationError(f"estimator is {estimator!r}; expected one of {ESTIMATORS}")
    if iter(batches) is batches:
        raise CalibrationError(
            "batches is a one-shot iterator, but two passes are made; pass a list"
        )
    check_params(graph, params)
    leaves = jax.tree.leaves(params)
    total = len(batches) if isinstance(batches, Sequence) else None
    extremes, examples = _minimum_and_maximum(graph, params, leaves, batches, total, progress)
    stats = {
        site: tuple(RangeStats(lo, hi, None) for lo, hi in pairs)
        for site, pairs in extremes.items()
    }
    if estimator != "minmax" and extremes:
        counts = _histograms(graph, leaves, extremes, batches, total, progress)
        stats = {
            site: tuple(
                RangeStats(s.minimum, s.maximum, h)
                for s, h in zip(parts, counts[site], strict=True)
            )
            for site, parts in stats.items()
        }
    return make_ranges(
        stats,
        estimator=estimator,
        symmetric=symmetric,
        percentile=percentile,
        examples=examples,
        fingerprint=graph.fingerprint,
    )


def check_params(graph: Graph, params: Any) -> None:
    """Raises TraceError unless params have the traced structure and shapes and are finite."""
    check_same_shapes(graph.params, params)
    check_finite(params, "params", graph.leaf_names)


def _minimum_and_maximum(
    graph: Graph,
    params: Any,
    leaves: list[Any],
    batches: Iterable[Any],
    total: int | None,
    progress: Progress,
) -> tuple[dict[str, list[tuple[Any, Any]]], int]:
    """Per site and activation (minimum, maximum); sites that no example reaches are left out."""

    def step(leaves: list[Any], inputs: Any) -> Any:
        _, records = interpret(graph, _lows_handler, leaves, inputs, absent=_no_lows)
        return {s: [_over_recurrence(graph.site[s], x) for x in v] for s, v in records.items()}

    jitted = jax.jit(step)
    lows: dict[str, Any] = {}
    examples, is_checked = 0, False
    for number, inputs in enumerate(progress(batches, "calibrating ranges", total)):
        check_finite(inputs, f"calibration batch {number}", leaf_names(inputs))
        one_example(inputs)
        size = jax.tree.leaves(inputs)[0].shape[0]
        if size > 1 and not is_checked:
            check_examples_independent(graph.apply, params, inputs)
            is_checked = True
        examples += size
        found = jitted(leaves, inputs)
        for site, values in found.items():
            _check_lows(site, values)
        lows = found if not lows else jax.tree.map(jnp.minimum, lows, found)
    if examples == 0:
        raise CalibrationError("the calibration data holds no examples")
    reached = {s: v for s, v in lows.items() if all(np.any(np.isfinite(x)) for x in v)}
    pairs = {s: [_fill_unreached(x) for x in v] for s, v in reached.items()}
    return {s: [(x[..., 0], -x[..., 1]) for x in v] for s, v in pairs.items()}, examples


# A range is kept as [min(x), min(-x)], so that +inf means "not reached yet" for both: the value of
# a record in the branch of a `cond` that does not hold the site.


def _lows_handler(call: SiteCall) -> tuple[Any, Any]:
    lows = []
    for index in call.site.activations:
        x = call.operand(index).astype(jnp.float32)
        lows.append(jnp.stack([jnp.min(x), jnp.min(-x)]))
    return call.bind(*call.operands()), lows or None


def _no_lows(struct: jax.ShapeDtypeStruct) -> Any:
    return jnp.full(struct.shape, jnp.inf, struct.dtype)


def _over_recurrence(site: Site, lows: Any) -> Any:
    """One range for all steps of a recurrence; stacked layers keep their own."""
    axes = tuple(i for i, loop in enumerate(site.loops) if not loop.stacked)
    return jnp.min(lows, axis=axes) if axes else lows


def _fill_unreached(lows: Any) -> Any:
    """Layers of a stack that no example reached get the range of those that were."""
    together = jnp.min(lows, axis=tuple(range(lows.ndim - 1)))
    return jnp.where(jnp.isfinite(lows), lows, together)


def _check_lows(site: str, values: list[Any]) -> None:
    for position, lows in enumerate(values):
        if np.any(np.isnan(lows)) or np.any(np.isneginf(lows)):
            raise CalibrationError(
                f"site {site}: activation {position} is NaN or infinite on calibration data, so it "
                "has no range. Check the model's float output first."
            )


def _histograms(
    graph: Graph,
    leaves: list[Any],
    extremes: Mapping[str, list[tuple[Any, Any]]],
    batches: Iterable[Any],
    total: int | None,
    progress: Progress,
) -> dict[str, list[Any]]:
    def step(leaves: list[Any], extremes: Any, inputs: Any) -> Any:
        _, records = interpret(graph, _histogram_handler, leaves, inputs, state=extremes)
        summed = {}
        for name, counts in records.items():
            loops = graph.site[name].loops
            axes = tuple(i for i, loop in enumerate(loops) if not loop.stacked)
            summed[name] = [jnp.sum(c, axis=axes) if axes else c for c in counts]
        return summed

    jitted = jax.jit(step)
    result: dict[str, list[Any]] = {}
    for inputs in progress(batches, "calibrating histograms", total):
        found = jitted(leaves, dict(extremes), inputs)
        result = found if not result else jax.tree.map(jnp.add, result, found)
    return result


def _histogram_handler(call: SiteCall) -> tuple[Any, Any]:
    counts = []
    if call.state is not None:  # None: no example reaches this branch of a `cond`.
        for (lo, hi), index in zip(call.state, call.site.activations, strict=True):
            counts.append(histogram(_sample(call.operand(index)), lo, hi))
    return call.bind(*call.operands()), counts or None


def _sample(x: Any) -> Any:
    """Every n-th element, n a prime that does not divide the size, so that every channel counts."""
    flat = x.reshape(-1)
    if flat.size <= _HISTOGRAM_SAMPLE:
        return flat
    stride = -(-flat.size // _HISTOGRAM_SAMPLE)
    while flat.size % stride == 0 or any(stride % d == 0 for d in range(2, int(stride**0.5) + 1)):
        stride += 1
    return flat[::stride]

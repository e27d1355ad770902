"""Runs calibration data through a model and keeps what ranges need."""

from __future__ import annotations

import dataclasses
import functools
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, Site, SiteCall, interpret
from jaxrmils.graph.checks import check_examples_independent, check_finite, check_same_shapes
from jaxrmils.graph.naming import leaf_names
from jaxrmils.graph.trace import one_example
from jaxrmils.numerics.formats import BITS
from jaxrmils.numerics.placement import Layout, few_everywhere, spread_exactly, to_host, with_params
from jaxrmils.numerics.progress_checkpoint import PathLike, Run, job_of
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
    sharding: NamedSharding | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> Ranges:
    """Finds the range of every activation that a site reads.

    Two passes over the data: minimum and maximum, then a histogram between them ("minmax" needs
    only the first). No labels are read.

    Args:
      graph: from `trace`.
      params: concrete parameters.
      batches: batches of inputs; iterated twice, so a list or another re-iterable. On several
        hosts, each process passes its own part of the data.
      estimator: "minmax", "percentile", "mse", "aciq_gauss" or "aciq_laplace".
      symmetric: grids without zero points.
      percentile: for "percentile".
      sharding: how the examples' axis is split over a mesh, such as
        `NamedSharding(mesh, PartitionSpec("data"))`; params stay as they are sharded. A batch that
        does not divide by the devices runs on each of them. None for one device.
      checkpoint: a folder that keeps the progress, from which the same job goes on.
      checkpoint_seconds: the least time between two saves.
      progress: see `jaxrmils.progress`.

    Returns:
      The ranges.

    Raises:
      CalibrationError: no batches, a one-shot iterator, or an activation that is NaN or infinite.
      TraceError: NaN or inf in params or inputs, or examples of a batch influence each other.
      PlacementError: a sharding by which batches can't be spread.
      CheckpointError: the checkpoint is that of another job.
    """
    if estimator not in ESTIMATORS:
        raise CalibrationError(f"estimator is {estimator!r}; expected one of {ESTIMATORS}")
    if iter(batches) is batches:
        raise CalibrationError(
            "batches is a one-shot iterator, but two passes are made; pass a list"
        )
    params = with_params(params, sharding)
    check_params(graph, params)

    def run(kind: str, values: Any) -> Run:
        return Run(
            None if checkpoint is None else Path(checkpoint) / kind,
            lambda: job_of(f"calibrate {kind}", graph, params, sharding, values=values),
            sharding=sharding,
            seconds=checkpoint_seconds,
        )

    data = _Data(graph, params, batches, sharding, progress)
    with run("extremes", ()) as extremes_run:
        extremes, examples = _minimum_and_maximum(data, extremes_run)
    stats = {
        site: tuple(RangeStats(jnp.asarray(lo), jnp.asarray(hi), None) for lo, hi in pairs)
        for site, pairs in extremes.items()
    }
    if estimator != "minmax" and extremes:
        with run("histograms", extremes) as histograms_run:
            counts = _histograms(data, extremes, histograms_run)
        stats = {
            site: tuple(
                RangeStats(s.minimum, s.maximum, jnp.asarray(h, jnp.float32))
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


@dataclasses.dataclass(frozen=True)
class _Data:
    """What both passes read."""

    graph: Graph
    params: Any
    batches: Iterable[Any]
    sharding: NamedSharding | None
    progress: Progress

    def read(self, description: str) -> Iterable[Any]:
        """The batches, with a bar."""
        total = len(self.batches) if isinstance(self.batches, Sequence) else None
        return self.progress(self.batches, description, total)

    def accumulate(
        self,
        batches: Iterable[Any],
        step: Callable[[Any], dict[str, list[Any]]],
        add: Callable[[Any, Any], Any],
        run: Run,
    ) -> tuple[dict[str, list[Any]], int]:
        """The records of all batches together, by site, and how many examples there were."""
        records, count = _decoded(run.restored)
        for inputs, size in spread_exactly(run.remaining(batches), self.sharding):
            found = to_host(step(inputs))
            records = found if not records else jax.tree.map(add, records, found)
            count += size
            run.after_round(functools.partial(_encoded, records, count))
        run.after_round(functools.partial(_encoded, records, count), last=True)
        return records, count


def _encoded(records: Mapping[str, list[Any]], examples: int) -> dict[str, np.ndarray]:
    """Records as arrays by name, as checkpoints keep them."""
    named = {
        urllib.parse.quote(f"{site}:{position:02d}", safe=""): np.asarray(value)
        for site, values in records.items()
        for position, value in enumerate(values)
    }
    return {**named, "examples": np.asarray([examples], np.int64)}


def _decoded(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, list[Any]], int]:
    records: dict[str, list[Any]] = {}
    for name, value in arrays.items():
        if name != "examples":
            records.setdefault(urllib.parse.unquote(name).rpartition(":")[0], []).append(value)
    return records, int(arrays["examples"][0]) if arrays else 0


def _minimum_and_maximum(data: _Data, run: Run) -> tuple[dict[str, list[tuple[Any, Any]]], int]:
    """Per site and activation (minimum, maximum); sites that no example reaches are left out."""
    graph, sharding = data.graph, data.sharding

    @jax.jit
    def lows(leaves: list[Any], inputs: Any) -> Any:
        _, records = interpret(graph, _lows_handler, leaves, inputs, absent=_no_lows)
        return {s: [_over_recurrence(graph.site[s], x) for x in v] for s, v in records.items()}

    leaves, is_checked = jax.tree.leaves(data.params), False

    def checked(batches: Iterable[Any]) -> Iterable[Any]:
        for number, inputs in enumerate(batches):
            check_finite(inputs, f"calibration batch {number}", leaf_names(inputs))
            one_example(inputs)
            yield inputs

    def step(inputs: Any) -> Any:
        nonlocal is_checked
        if jax.tree.leaves(inputs)[0].shape[0] > 1 and not is_checked:
            _check_examples_independent(graph, data.params, inputs, sharding)
            is_checked = True
        found = to_host(lows(leaves, inputs))
        for site, values in found.items():
            _check_lows(site, values)
        return found

    batches = checked(data.read("calibrating ranges"))
    found, examples = data.accumulate(batches, step, np.minimum, run)
    if examples == 0:
        raise CalibrationError("the calibration data holds no examples")
    reached = {s: v for s, v in found.items() if all(np.any(np.isfinite(x)) for x in v)}
    pairs = {s: [_fill_unreached(x) for x in v] for s, v in reached.items()}
    return {s: [(x[..., 0], -x[..., 1]) for x in v] for s, v in pairs.items()}, examples


def _check_examples_independent(
    graph: Graph, params: Any, inputs: Any, sharding: NamedSharding | None
) -> None:
    if sharding is None:
        check_examples_independent(graph.apply, params, inputs)
        return
    everywhere = Layout(sharding).replicated

    def apply(params: Any, inputs: Any) -> Any:
        return jax.lax.with_sharding_constraint(graph.apply(params, inputs), everywhere)

    check_examples_independent(apply, params, few_everywhere(inputs, sharding))


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
    together = np.min(lows, axis=tuple(range(lows.ndim - 1)))
    return np.where(np.isfinite(lows), lows, together)


def _check_lows(site: str, values: list[Any]) -> None:
    for position, lows in enumerate(values):
        if np.any(np.isnan(lows)) or np.any(np.isneginf(lows)):
            raise CalibrationError(
                f"site {site}: activation {position} is NaN or infinite on calibration data, so it "
                "has no range. Check the model's float output first."
            )


def _histograms(
    data: _Data, extremes: Mapping[str, list[tuple[Any, Any]]], run: Run
) -> dict[str, list[Any]]:
    """Counts per site and activation, float64: exact however many there are."""
    graph, leaves = data.graph, jax.tree.leaves(data.params)

    @jax.jit
    def counts(leaves: list[Any], extremes: Any, inputs: Any) -> Any:
        _, records = interpret(graph, _histogram_handler, leaves, inputs, state=extremes)
        summed = {}
        for name, counts in records.items():
            loops = graph.site[name].loops
            axes = tuple(i for i, loop in enumerate(loops) if not loop.stacked)
            summed[name] = [jnp.sum(c, axis=axes) if axes else c for c in counts]
        return summed

    def step(inputs: Any) -> Any:
        found = to_host(counts(leaves, dict(extremes), inputs))
        return jax.tree.map(lambda x: x.astype(np.float64), found)

    return data.accumulate(data.read("calibrating histograms"), step, np.add, run)[0]


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

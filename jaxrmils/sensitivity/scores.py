"""Scores: everything that later questions need, so that the model need not run again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.graph.checks import check_finite
from jaxrmils.graph.naming import leaf_names
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.numerics.placement import in_reading_order, spread, to_host, with_params
from jaxrmils.numerics.placement import padded as padded
from jaxrmils.numerics.progress_checkpoint import PathLike, Run, job_of
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity.candidates import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    Candidate,
)
from jaxrmils.sensitivity.shift import shift_secants
from jaxrmils.sensitivity.tangent import (
    Contributions,
    Loss,
    ScoreError,
    check_ranges,
    contributions,
    weight_noise,
)

SHIFT_BITS = (8, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Per-example contributions of every layer over a selection set.

    Attributes:
      table: the model's layers and sizes.
      ranges: the activation ranges that the scores were made with.
      loss: float32 [N], the float model's loss.
      activations: float32 [N, A, K], <p, Q_k(h) - h> for every activation operand.
      weights: float32 [N, W, Kw], <g_y, h (*) delta_k> for every site with a weight.
      gradient_sum: float32 [N, A], p . 1.
      gradient_square: float32 [N, A], |p|^2.
      shift: float32 [N, A, 2], the shift probe's secants at int8 and int4, or None.
      activation_rows: the (site, position) of every operand.
      weight_rows: the site of every weight use.
      activation_candidates: formats along the last axis of `activations`.
      weight_candidates: formats along the last axis of `weights`.
    """

    table: ModelTable
    ranges: Ranges
    loss: np.ndarray
    activations: np.ndarray
    weights: np.ndarray
    gradient_sum: np.ndarray
    gradient_square: np.ndarray
    shift: np.ndarray | None
    activation_rows: tuple[tuple[str, int], ...]
    weight_rows: tuple[str, ...]
    activation_candidates: tuple[Candidate, ...]
    weight_candidates: tuple[Candidate, ...]

    def __len__(self) -> int:
        return len(self.loss)

    def activation(self, site: str, position: int, candidate: Candidate) -> np.ndarray:
        """float32 [N]: per-example contributions of one operand under one format."""
        row = self.activation_rows.index((site, position))
        return self.activations[:, row, self.activation_candidates.index(candidate)]

    def weight(self, layer: str, candidate: Candidate) -> np.ndarray:
        """float32 [N]: per-example contributions of a layer's weight noise, all uses summed."""
        uses = self.table.layer[layer].sites
        rows = [i for i, site in enumerate(self.weight_rows) if site in uses]
        index = self.weight_candidates.index(candidate)
        return self.weights[:, rows, index].sum(axis=1)

    def contributions(self) -> Contributions:
        """The same numbers by site, as `contributions` returns them for a batch."""
        sites: dict[str, list[int]] = {}
        for row, (site, _) in enumerate(self.activation_rows):
            sites.setdefault(site, []).append(row)
        return Contributions(
            loss=self.loss,
            activations={site: self.activations[:, rows] for site, rows in sites.items()},
            weights={site: self.weights[:, i] for i, site in enumerate(self.weight_rows)},
            gradient_sum={site: self.gradient_sum[:, rows] for site, rows in sites.items()},
            gradient_square={site: self.gradient_square[:, rows] for site, rows in sites.items()},
            activation_candidates=self.activation_candidates,
            weight_candidates=self.weight_candidates,
        )

    def shifts(self) -> dict[str, np.ndarray] | None:
        """The shift probe's secants by site, [N, operands, 2]; None if it was not run."""
        if self.shift is None:
            return None
        sites: dict[str, list[int]] = {}
        for row, (site, _) in enumerate(self.activation_rows):
            sites.setdefault(site, []).append(row)
        return {site: self.shift[:, rows] for site, rows in sites.items()}

    def step(self, site: str, position: int, bits: int) -> float:
        """The grid's step; the mean over the layers of a scanned stack."""
        return float(np.mean(self.ranges.grids[site][position][bits].scale))


def score(
    graph: Graph,
    params: Any,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    shift_probe: bool = False,
    sharding: NamedSharding | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> Scores:
    """Scores every site and candidate over a selection set, in one pass.

    Args:
      graph: from `trace`.
      params: concrete parameters.
      batches: `(inputs, targets)` batches of the selection data. On several hosts, each process
        passes its own part of them, and the scores hold process 0's examples first.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`, on other data.
      activation_candidates: formats to score for activations.
      weight_candidates: formats to score for weights.
      shift_probe: also run the paper's shift probe (two forward passes per operand and batch).
      sharding: how the examples' axis is split over a mesh, such as
        `NamedSharding(mesh, PartitionSpec("data"))`; params stay as they are sharded. Batches are
        filled up to divide by the devices. None for one device.
      checkpoint: a folder that keeps the progress, from which the same job goes on.
      checkpoint_seconds: the least time between two saves.
      progress: see `jaxrmils.progress`.

    Returns:
      The scores.

    Raises:
      ScoreError: no data, a loss that is not finite, labels outside the model's classes.
      TraceError: params are not the traced model's, NaN in inputs.
      PlacementError: a sharding by which batches can't be spread.
      CheckpointError: the checkpoint is that of another job.
    """
    scoring = Scoring(
        graph,
        with_params(params, sharding),
        loss,
        ranges,
        tuple(activation_candidates),
        tuple(weight_candidates),
        shift_probe,
        sharding,
    )
    parts: list[dict[str, np.ndarray]] = []

    def joined() -> dict[str, np.ndarray]:
        parts[:] = [{name: np.concatenate([p[name] for p in parts]) for name in parts[0]}]
        return parts[0]

    first, batches, total = opened(batches)
    with scoring.run("score", first, checkpoint, checkpoint_seconds) as run:
        if run.restored:
            parts.append(run.restored)
        for part in scoring.matrices(progress(batches, "scoring", total), run):
            parts.append(part)
            run.after_round(joined)
        run.after_round(joined, last=True)
    merged = joined()
    return scoring.scores(in_reading_order(merged.pop("readers"), merged))


def opened(batches: Iterable[Any]) -> tuple[Any, Iterable[Any], int | None]:
    """The first batch, all batches, and how many they are if that is known; ScoreError if none."""
    total = len(batches) if isinstance(batches, Sequence) else None
    iterator = iter(batches)
    for first in iterator:
        return first, itertools.chain([first], iterator), total
    raise ScoreError("the selection data holds no examples")


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """How batches are scored: the arguments of `score` that are not data."""

    graph: Graph
    params: Any
    loss: Loss
    ranges: Ranges
    activation_candidates: tuple[Candidate, ...]
    weight_candidates: tuple[Candidate, ...]
    shift_probe: bool = False
    sharding: NamedSharding | None = None

    def __post_init__(self) -> None:
        check_params(self.graph, self.params)
        check_ranges(self.graph, self.ranges)

    @property
    def activation_rows(self) -> tuple[tuple[str, int], ...]:
        """The (site, position) of every operand that has a range."""
        stats = self.ranges.stats.items()
        return tuple((site, position) for site, each in stats for position in range(len(each)))

    @property
    def weight_rows(self) -> tuple[str, ...]:
        """The site of every weight use."""
        if not self.weight_candidates:
            return ()
        return tuple(site.name for site in self.graph.sites if site.weight)

    def run(self, kind: str, first: Any, folder: PathLike | None, seconds: float) -> Run:
        """A pass over data whose progress is kept; `first` is its first batch."""

        # Of shape and dtype alone: every process reads other examples.
        targets = jax.tree.map(lambda x: jnp.zeros_like(np.asarray(x)[:1]), first[1])

        def program(params: Any, inputs: Any) -> Any:
            return self.loss(self.graph.apply(params, inputs), targets)

        def job() -> dict[str, str]:
            return job_of(
                kind,
                self.graph,
                self.params,
                self.sharding,
                program=program,
                values=self.ranges,
                activation_candidates=self.activation_candidates,
                weight_candidates=self.weight_candidates,
                shift_probe=self.shift_probe,
            )

        return Run(folder, job, sharding=self.sharding, seconds=seconds)

    def step(self, params: Any, noise: Any, ranges: Ranges, inputs: Any, targets: Any) -> Any:
        """The matrices of a batch."""
        result = contributions(
            self.graph,
            params,
            inputs,
            targets,
            self.loss,
            ranges,
            activation_candidates=self.activation_candidates,
            weight_candidates=self.weight_candidates,
            noise=noise,
        )
        widths = len(self.activation_candidates), len(self.weight_candidates)
        rows, count = self.activation_rows, result.loss.shape[0]
        found = {
            "loss": result.loss,
            "activations": _columns(result.activations, rows, count, widths[0]),
            "weights": _stack([result.weights[s] for s in self.weight_rows], count, widths[1]),
            "gradient_sum": _columns(result.gradient_sum, rows, count),
            "gradient_square": _columns(result.gradient_square, rows, count),
        }
        if self.shift_probe:
            secants = shift_secants(
                self.graph, params, inputs, targets, self.loss, ranges, bits=SHIFT_BITS
            )
            found["shift"] = _columns(secants, rows, count, len(SHIFT_BITS))
        return found

    def matrices(self, batches: Iterable[Any], run: Run) -> Iterator[dict[str, np.ndarray]]:
        """The matrices of every batch, float32, and whose examples they are, int32 "readers"."""
        noise = jax.jit(lambda p: weight_noise(self.graph, p, self.weight_candidates))(self.params)
        ranges, step, seen = to_host(self.ranges), jax.jit(self.step), 0
        batches = run.remaining(self._checked(batches))
        for placed in spread(batches, self.sharding, rows=run.rows):
            run.rows = placed.per_device
            part = placed.taken(step(self.params, noise, ranges, *placed.values))
            _check_loss(part["loss"], seen)
            seen += len(part["loss"])
            yield {**part, "readers": placed.readers}
        if not seen and not run.restored:
            raise ScoreError("the selection data holds no examples")

    def _checked(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for number, (inputs, targets) in enumerate(batches):
            check_finite(inputs, f"selection batch {number}", leaf_names(inputs))
            check_targets(self.graph, inputs, targets, number)
            yield inputs, targets

    def scores(self, matrices: Mapping[str, Any]) -> Scores:
        """The matrices of all examples as `Scores`."""
        return Scores(
            table=tabulate(self.graph),
            ranges=self.ranges,
            **{"shift": None, **matrices},
            activation_rows=self.activation_rows,
            weight_rows=self.weight_rows,
            activation_candidates=self.activation_candidates,
            weight_candidates=self.weight_candidates,
        )


def _columns(
    by_site: Mapping[str, Any], rows: Sequence[tuple[str, int]], count: int, *last: int
) -> Any:
    return _stack([by_site[site][:, position] for site, position in rows], count, *last)


def _stack(columns: list[Any], count: int, *last: int) -> Any:
    if not columns:
        return jnp.zeros((count, 0, *last), jnp.float32)
    return jnp.stack(columns, axis=1)


def _check_loss(loss: np.ndarray, offset: int) -> None:
    bad = np.flatnonzero(~np.isfinite(loss))
    if bad.size:
        raise ScoreError(
            f"the loss of example {offset + int(bad[0])} is {loss[bad[0]]} ({bad.size} such "
            "examples in its batch); finite values were expected. A label outside the model's "
            "classes is a common cause."
        )


def check_targets(graph: Graph, inputs: Any, targets: Any, number: int) -> None:
    """Raises ScoreError for targets of another batch size, or integer labels outside the classes.

    Labels are recognised where they are one integer per example and the model returns a single
    [batch, classes] array.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    for name, leaf in zip(leaf_names(targets), jax.tree.leaves(targets), strict=True):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != count:
            raise ScoreError(
                f"batch {number}: targets {name} have shape {np.shape(leaf)} for {count} inputs"
            )
    outputs = jax.tree.leaves(jax.eval_shape(graph.apply, graph.params, graph.example))
    is_array = not isinstance(targets, (dict, list, tuple)) and hasattr(targets, "dtype")
    if len(outputs) != 1 or len(outputs[0].shape) != 2 or not is_array:
        return
    labels, classes = np.asarray(targets), outputs[0].shape[1]
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        return
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if bad.size:
        raise ScoreError(
            f"batch {number}: label {labels[bad[0]]} of example {bad[0]} is outside "
            f"0..{classes - 1}; the model returns {classes} classes"
        )

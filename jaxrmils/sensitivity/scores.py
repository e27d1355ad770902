"""Scores: everything that later questions need, so that the model need not run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.graph.checks import check_finite
from jaxrmils.graph.naming import leaf_names
from jaxrmils.numerics.calibration import Ranges, check_params
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
    progress: Progress = silent,
) -> Scores:
    """Scores every site and candidate over a selection set, in one pass.

    Args:
      graph: from `trace`.
      params: concrete parameters.
      batches: `(inputs, targets)` batches of the selection data.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`, on other data.
      activation_candidates: formats to score for activations.
      weight_candidates: formats to score for weights.
      shift_probe: also run the paper's shift probe (two forward passes per operand and batch).
      progress: see `jaxrmils.progress`.

    Returns:
      The scores.

    Raises:
      ScoreError: no data, a loss that is not finite, labels outside the model's classes.
      TraceError: params are not the traced model's, NaN in inputs.
    """
    check_params(graph, params)
    check_ranges(graph, ranges)
    activation_candidates = tuple(activation_candidates)
    weight_candidates = tuple(weight_candidates)
    noise = jax.jit(lambda p: weight_noise(graph, p, weight_candidates))(params)

    def step(params: Any, noise: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        result = contributions(
            graph,
            params,
            inputs,
            targets,
            loss,
            ranges,
            activation_candidates=activation_candidates,
            weight_candidates=weight_candidates,
            noise=noise,
        )
        if not shift_probe:
            return result, None
        secants = shift_secants(graph, params, inputs, targets, loss, ranges, bits=SHIFT_BITS)
        return result, secants

    jitted = jax.jit(step)
    parts = []
    total = len(batches) if isinstance(batches, Sequence) else None
    size = None
    for number, (inputs, targets) in enumerate(progress(batches, "scoring", total)):
        check_finite(inputs, f"selection batch {number}", leaf_names(inputs))
        check_targets(graph, inputs, targets, number)
        count = jax.tree.leaves(inputs)[0].shape[0]
        if count == 0:
            continue
        size = size or count
        inputs, targets = padded((inputs, targets), size)
        result = jax.device_get(jitted(params, noise, inputs, targets))
        part = jax.tree.map(lambda x, n=count: np.asarray(x)[:n], result)
        _check_loss(part[0].loss, sum(len(p[0].loss) for p in parts))
        parts.append(part)
    if not parts:
        raise ScoreError("the selection data holds no examples")
    merged, secants = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return _assemble(graph, ranges, merged, secants)


def _assemble(
    graph: Graph, ranges: Ranges, merged: Contributions, secants: Mapping[str, Any] | None
) -> Scores:
    """The matrices of all examples, from contributions by site."""
    rows = tuple(
        (site, position) for site, stats in ranges.stats.items() for position in range(len(stats))
    )
    weight_rows = tuple(site for site in (s.name for s in graph.sites) if site in merged.weights)
    widths = len(merged.activation_candidates), len(merged.weight_candidates)
    return Scores(
        table=tabulate(graph),
        ranges=ranges,
        loss=merged.loss,
        activations=_columns(merged.activations, rows, merged.loss, widths[0]),
        weights=_stack([merged.weights[s] for s in weight_rows], merged.loss, widths[1]),
        gradient_sum=_columns(merged.gradient_sum, rows, merged.loss),
        gradient_square=_columns(merged.gradient_square, rows, merged.loss),
        shift=_columns(secants, rows, merged.loss, len(SHIFT_BITS)) if secants else None,
        activation_rows=rows,
        weight_rows=weight_rows,
        activation_candidates=merged.activation_candidates,
        weight_candidates=merged.weight_candidates,
    )


def _columns(
    by_site: Mapping[str, Any], rows: Sequence[tuple[str, int]], loss: np.ndarray, *last: int
) -> np.ndarray:
    return _stack([by_site[site][:, position] for site, position in rows], loss, *last)


def _stack(columns: list[np.ndarray], loss: np.ndarray, *last: int) -> np.ndarray:
    if not columns:
        return np.zeros((len(loss), 0, *last), np.float32)
    return np.stack(columns, axis=1)


def padded(batch: Any, size: int) -> Any:
    """The batch, filled up with its first example so that it does not compile again."""

    def pad(x: Any) -> Any:
        x = np.asarray(x)
        missing = size - x.shape[0]
        return x if missing <= 0 else np.concatenate([x, np.repeat(x[:1], missing, axis=0)])

    return jax.tree.map(pad, batch)


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

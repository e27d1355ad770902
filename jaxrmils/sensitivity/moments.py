"""Scores reduced to moments: as many examples as you like in memory that does not grow.

Of the score matrix, mean and covariance of its columns stay: enough for every mean, its standard
error, and the standard error of any sum of columns, such as a plan's predicted change. Batches are
merged in float64 by the formula of Chan, Golub & LeVeque (1983):

    mean = mean_a + d n_b / n        d = mean_b - mean_a
    M    = M_a + M_b + d d' n_a n_b / n

where M is the sum of products of deviations from the mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import with_params
from jaxrmils.numerics.progress_checkpoint import PathLike
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity.candidates import ACTIVATION_CANDIDATES, WEIGHT_CANDIDATES, Candidate
from jaxrmils.sensitivity.scores import Scores, Scoring, opened
from jaxrmils.sensitivity.tangent import Loss, ScoreError

_MATRICES = ("activations", "weights", "gradient_sum", "gradient_square")


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and covariance of columns.

    Attributes:
      count: N, the number of rows.
      mean: float64 [C].
      products: float64 [C, C], sums of products of deviations from the mean.

    >>> rows = np.random.default_rng(0).normal(size=(100, 3))
    >>> merged = Moments.of(rows[:30]).merged(Moments.of(rows[30:]))
    >>> bool(np.allclose(merged.covariance, np.cov(rows.T)))
    True
    """

    count: int
    mean: np.ndarray
    products: np.ndarray

    @staticmethod
    def of(rows: np.ndarray) -> Moments:
        """Of rows [N, C]; computed in float64."""
        rows = np.asarray(rows, np.float64)
        if not len(rows):
            return Moments(0, np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2))
        mean = rows.mean(axis=0)
        deviations = rows - mean
        return Moments(len(rows), mean, deviations.T @ deviations)

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both (Chan, Golub & LeVeque 1983, equation 2.1)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        difference = other.mean - self.mean
        share = self.count * other.count / count
        return Moments(
            count,
            self.mean + difference * (other.count / count),
            self.products + other.products + np.outer(difference, difference) * share,
        )

    @property
    def covariance(self) -> np.ndarray:
        """float64 [C, C], unbiased.

        Raises:
          ScoreError: fewer than two rows.
        """
        if self.count < 2:
            raise ScoreError(f"a covariance needs two examples; there are {self.count}")
        return self.products / (self.count - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreMoments:
    """Scores of any number of examples, reduced to moments.

    Columns stand in this order: the loss; every operand's candidates, operand by operand; every
    weight use's candidates; p . 1 of every operand; |p|^2 of every operand. `Scores` says what
    they are. The shift probe and groups of examples need the matrix itself.

    Attributes:
      table: the model's layers and sizes.
      ranges: the activation ranges that the scores were made with.
      moments: of the columns.
      activation_rows: the (site, position) of every operand.
      weight_rows: the site of every weight use.
      activation_candidates: formats of every operand.
      weight_candidates: formats of every weight use.
    """

    table: ModelTable
    ranges: Ranges
    moments: Moments
    activation_rows: tuple[tuple[str, int], ...]
    weight_rows: tuple[str, ...]
    activation_candidates: tuple[Candidate, ...]
    weight_candidates: tuple[Candidate, ...]

    def __len__(self) -> int:
        return self.moments.count

    def __getattr__(self, name: str) -> NoReturn:
        """TypeError for what `Scores` holds of single examples."""
        if name in Scores.__dataclass_fields__ or name in vars(Scores):
            raise TypeError(
                f"moments hold no single examples, so there is no {name!r} in them; use `score` "
                "where every example counts"
            )
        raise AttributeError(f"ScoreMoments has no attribute {name!r}")

    @property
    def width(self) -> int:
        """How many columns there are."""
        operands = len(self.activation_candidates) + 2
        uses = len(self.weight_candidates)
        return 1 + len(self.activation_rows) * operands + len(self.weight_rows) * uses

    def activation_columns(self, site: str, position: int, candidate: Candidate) -> list[int]:
        """The column of one operand under one format."""
        row = self.activation_rows.index((site, position))
        return [1 + row * len(self.activation_candidates) + self._activation_index(candidate)]

    def weight_columns(self, layer: str, candidate: Candidate) -> list[int]:
        """The columns of a layer's weight noise under one format, one for each use."""
        uses = self.table.layer[layer].sites
        start = 1 + len(self.activation_rows) * len(self.activation_candidates)
        width, index = len(self.weight_candidates), self.weight_candidates.index(candidate)
        rows = [i for i, site in enumerate(self.weight_rows) if site in uses]
        return [start + row * width + index for row in rows]

    def gradient_sum_columns(self, site: str, position: int) -> list[int]:
        """The column of an operand's p . 1."""
        row = self.activation_rows.index((site, position))
        return [self.width - 2 * len(self.activation_rows) + row]

    def total(self, columns: Sequence[int]) -> tuple[float, float]:
        """Mean and standard error of a sum of columns, whatever they have in common.

        Args:
          columns: numbers of columns; one that comes twice counts twice.

        Returns:
          `(mean, standard error of the mean)`, in the loss's unit.

        Raises:
          ScoreError: fewer than two examples.
        """
        chosen = np.asarray(columns, np.int64)
        products = self.moments.products[np.ix_(chosen, chosen)].sum()
        if len(self) < 2:
            raise ScoreError(f"a standard error needs two examples; there are {len(self)}")
        variance = max(products, 0.0) / (len(self) - 1)
        return float(self.moments.mean[chosen].sum()), float(np.sqrt(variance / len(self)))

    def _activation_index(self, candidate: Candidate) -> int:
        return self.activation_candidates.index(candidate)


def moments_of(scores: Scores) -> ScoreMoments:
    """Scores that are already there, reduced.

    Args:
      scores: from `score`.
    """
    matrices = {name: getattr(scores, name) for name in ("loss", *_MATRICES)}
    return ScoreMoments(
        scores.table,
        scores.ranges,
        Moments.of(_columns(matrices)),
        scores.activation_rows,
        scores.weight_rows,
        scores.activation_candidates,
        scores.weight_candidates,
    )


def score_moments(
    graph: Graph,
    params: Any,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    sharding: NamedSharding | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> ScoreMoments:
    """As `score`, keeping moments in place of the matrix.

    Memory does not depend on the number of examples; it is 8 C^2 bytes for C columns, 23 MB for
    200 sites with 6 + 2 candidates.

    Args:
      graph, params, batches, loss, ranges: as for `score`.
      activation_candidates, weight_candidates, sharding: likewise.
      checkpoint, checkpoint_seconds, progress: likewise.

    Returns:
      The moments.

    Raises:
      ScoreError, TraceError, PlacementError, CheckpointError: as `score` does.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (64, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> ranges = calibrate(graph, params, [x])
    >>> batches = [(x[:32], jnp.zeros((32, 2))), (x[32:], jnp.zeros((32, 2)))]
    >>> found = score_moments(graph, params, batches, squares, ranges)
    >>> mean, error = found.total(found.activation_columns("w", 0, Candidate(4, "nearest")))
    >>> len(found), found.moments.mean.shape, error > 0
    (64, (11,), True)
    """
    scoring = Scoring(
        graph,
        with_params(params, sharding),
        loss,
        ranges,
        tuple(activation_candidates),
        tuple(weight_candidates),
        sharding=sharding,
    )
    first, batches, total = opened(batches)
    with scoring.run("score moments", first, checkpoint, checkpoint_seconds) as run:
        found = _decoded(run.restored) if run.restored else None
        for part in scoring.matrices(progress(batches, "scoring", total), run):
            more = Moments.of(_columns(part))
            found = more if found is None else found.merged(more)
            run.after_round(lambda found=found: _encoded(found))
        assert found is not None
        run.after_round(lambda: _encoded(found), last=True)
    return ScoreMoments(
        tabulate(graph),
        ranges,
        found,
        scoring.activation_rows,
        scoring.weight_rows,
        scoring.activation_candidates,
        scoring.weight_candidates,
    )


def _columns(matrices: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [N, C], in the order that `ScoreMoments` states."""
    loss = matrices["loss"]
    parts = [np.reshape(matrices[name], (len(loss), -1)) for name in _MATRICES]
    return np.concatenate([loss[:, None], *parts], axis=1).astype(np.float64)


def _encoded(moments: Moments) -> dict[str, np.ndarray]:
    count = np.asarray([moments.count], np.int64)
    return {"count": count, "mean": moments.mean, "products": moments.products}


def _decoded(arrays: Mapping[str, np.ndarray]) -> Moments:
    return Moments(int(arrays["count"][0]), arrays["mean"], arrays["products"])

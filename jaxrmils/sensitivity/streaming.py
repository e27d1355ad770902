"""Passes over a data set that keep a running mean and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrmils.graph import Graph, Site
from jaxrmils.graph.checks import check_finite
from jaxrmils.graph.naming import leaf_names
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity.scores import check_targets, padded
from jaxrmils.sensitivity.tangent import ScoreError


def even_batches(
    graph: Graph,
    batches: Iterable[tuple[Any, Any]],
    description: str,
    *,
    labels: bool = True,
    progress: Progress = silent,
) -> Iterator[tuple[int, Any, Any, int]]:
    """Checked batches, all as large as the first one, so that a step compiles once.

    Args:
      graph: from `trace`.
      batches: `(inputs, targets)` batches.
      description: of the progress bar.
      labels: False if targets are not read; they come back as None.
      progress: see `jaxrmils.progress`.

    Yields:
      The batch's number, inputs, targets, and how many examples are its own: those behind them
      repeat the first one.

    Raises:
      ScoreError: no examples, or targets that do not fit.
      TraceError: NaN or inf in inputs.
    """
    total = len(batches) if isinstance(batches, Sequence) else None
    size = None
    for number, (inputs, targets) in enumerate(progress(batches, description, total)):
        check_finite(inputs, f"batch {number}", leaf_names(inputs))
        if labels:
            check_targets(graph, inputs, targets, number)
        count = jax.tree.leaves(inputs)[0].shape[0]
        if count == 0:
            continue
        size = size or count
        inputs, targets = padded((inputs, targets if labels else None), size)
        yield number, inputs, targets, count
    if size is None:
        raise ScoreError("the data holds no examples")


def mean_over_examples(
    batches: Iterable[tuple[int, Any, Any, int]],
    step: Callable[[Any, Any], Mapping[str, Any]],
    what: str,
) -> dict[str, Any]:
    """The mean of per-example values, summed in float64.

    Args:
      batches: from `even_batches`.
      step: `step(inputs, targets)`: by name, a pytree of arrays [batch, ...].
      what: what the values are, for errors.

    Returns:
      By name, the same pytree of float64 arrays [...].

    Raises:
      ScoreError: a value is not finite; it names the site.
    """
    sums: dict[str, Any] = {}
    examples = 0
    for number, inputs, targets, count in batches:
        found = jax.device_get(step(inputs, targets))
        own = jax.tree.map(lambda x, n=count: x[:n].sum(axis=0, dtype=np.float64), dict(found))
        check_values(own, number, what)
        sums = jax.tree.map(np.add, sums, own) if sums else own
        examples += count
    return jax.tree.map(lambda x: x / examples, sums)


def check_values(by_name: Mapping[str, Any], number: int, what: str) -> None:
    """Raises ScoreError, naming the site, for a value that is NaN or infinite."""
    for name, values in by_name.items():
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(values)):
            raise ScoreError(
                f"batch {number}: the {what} of {name} is NaN or infinite; finite values were "
                "expected. Check the float model's loss on this batch, and a label outside the "
                "classes or an overflow in a narrow dtype as the common causes."
            )


def over_recurrence(site: Site, values: Any) -> Any:
    """A site's records [loops, ...] summed over all loops but stacks of layers."""
    axes = tuple(i for i, loop in enumerate(site.loops) if not loop.stacked)
    return values.sum(axis=axes) if axes else values

"""How many examples a command takes at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax

from jaxrmils.cli.checks import candidates_of
from jaxrmils.cli.costs import wanted_formats
from jaxrmils.cli.defaults import base_config
from jaxrmils.data import Task
from jaxrmils.graph import Graph
from jaxrmils.numerics import Ranges
from jaxrmils.policies import MEASURED_COSTS, batch_size_for
from jaxrmils.policies.batch_size import Step
from jaxrmils.policies.measured_costs import DEFAULT_FORMATS
from jaxrmils.sensitivity.batch_size import fitting_batch_size

_FIELDS = ("batch_size", "batch_size_exact", "memory_bytes")


def with_batch_size(config: Any, graph: Graph, task: Task) -> Any:
    """The config, with a batch size that fits into memory where it says 0."""
    if config.batch_size:
        return config
    objective = config.policy.objective if has_measured_costs(config) else ""
    return _with_size(config, _estimate(config, graph, task, objective))


def with_exact_batch_size(
    config: Any, graph: Graph, params: Any, task: Task, ranges: Ranges
) -> Any:
    """The config, with the batch size at which the programs of a run fit, as they are compiled.

    Raises:
      ScoreError: not even a single example fits.
    """
    steps: list[Step] = ["score"] if config.loss == "task" else ["simulate"]
    if config.policy.name == "lossless" or config.verify.attribute:
        steps.append("attribute")
    if config.policy.refine:
        steps.append("refine")
    if has_measured_costs(config):
        steps.append(_step(config.policy.objective))
    return _with_size(config, _exact(config, config.policy, graph, params, task, ranges, steps))


def with_recorded_size(config: Any, info: Mapping[str, Any], args: argparse.Namespace) -> Any:
    """The config, with the batch size that the run has chosen where it says 0.

    Args:
      config: the run's.
      info: of run.json.
      args: whose overrides may ask for another choice.
    """
    asked = any(
        text.lstrip("-").partition("=")[0] == f"config.{field}"
        for text in args.overrides
        for field in _FIELDS
    )
    if config.batch_size or asked or not info.get("batch_size"):
        return config
    return _with_size(config, int(info["batch_size"]))


def size_for_costs(
    config: Any, policy: Any, graph: Graph, params: Any, task: Task, ranges: Ranges
) -> int:
    """How many examples the pass of an objective may take at once, if the config says 0.

    Args:
      config: the run's, as it is.
      policy: whose objective is one of `MEASURED_COSTS`.
      graph, params, task, ranges: the run's.

    Raises:
      ScoreError: not even a single example fits.
    """
    if config.batch_size_exact:
        known = (graph, params, task, ranges)
        return _exact(config, policy, *known, steps=[_step(policy.objective)])
    return _estimate(config, graph, task, policy.objective)


def has_measured_costs(config: Any) -> bool:
    """Whether the policy's objective takes a pass of its own over the data."""
    return config.policy.name == "budget" and config.policy.objective in MEASURED_COSTS


def one_example(rows: Any) -> jax.ShapeDtypeStruct:
    """The shape of a data set's rows with one of them."""
    return jax.ShapeDtypeStruct((1, *rows.shape[1:]), rows.dtype)


def _step(objective: str) -> Step:
    """What an objective's pass is called by `batch_size_for`."""
    return "simulate" if objective == "measured" else cast("Step", objective)


def _estimate(config: Any, graph: Graph, task: Task, objective: str) -> int:
    memory = config.get("memory_bytes", base_config().memory_bytes)  # a run of an earlier version
    options = {"memory_bytes": memory, "weight_gradients": objective == "fisher"}
    return fitting_batch_size(graph, task.shapes, task.loss, *_shapes(task), **options)


def _exact(
    config: Any,
    policy: Any,
    graph: Graph,
    params: Any,
    task: Task,
    ranges: Ranges,
    steps: Sequence[Step],
) -> int:
    return batch_size_for(
        config.memory_bytes,
        graph,
        params,
        task.loss,
        ranges,
        *_shapes(task),
        steps=steps,
        points=config.verify.points,
        candidates=candidates_of(config, graph),
        formats=wanted_formats(policy) or DEFAULT_FORMATS,
    )


def _shapes(task: Task) -> Any:
    data = task.dataset
    return jax.tree.map(one_example, (data.inputs, data.targets))


def _with_size(config: Any, size: int) -> Any:
    config = config.copy_and_resolve_references()
    config.batch_size = size
    return config

"""Costs that need a pass over the selection split, and plans made from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxrmils.artifacts.costs_file import costs_info, load_costs, save_costs
from jaxrmils.artifacts.pareto_file import sources
from jaxrmils.cli.checks import RULES, budget_settings, forced, limits_of, refinement_rounds
from jaxrmils.graph import Format, Graph, tabulate
from jaxrmils.numerics import Ranges
from jaxrmils.policies import (
    MEASURED_COSTS,
    Costs,
    Plan,
    Simulator,
    Tangents,
    budget,
    parse_format,
    refined,
    solve,
)
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Loss, ScoreMoments

FOLDER = "costs"

Batches = Sequence[tuple[Any, Any]]


def costs_path(run: str | Path, objective: str) -> Path:
    """Where a run keeps the costs of an objective."""
    return Path(run) / FOLDER / f"{objective}.json"


def wanted_formats(policy: Any) -> tuple[str, ...]:
    """The formats besides float that a budget's plan can hold."""
    names = dict.fromkeys((*policy.formats, *forced(policy.force).values()))
    return tuple(name for name in names if parse_format(name) != parse_format("float"))


def measured(
    policy: Any,
    graph: Graph,
    params: Any,
    selection: Batches,
    loss: Loss,
    ranges: Ranges,
    progress: Progress = silent,
) -> Costs:
    """The costs of `policy.objective`, one of `MEASURED_COSTS`, on the selection split.

    Raises:
      ScoreError: a value that is not finite.
    """
    make = MEASURED_COSTS[policy.objective]
    formats = wanted_formats(policy)
    return make(graph, params, selection, loss, ranges, formats=formats, progress=progress)


def save_run_costs(costs: Costs, policy: Any, run: str | Path) -> str:
    """Writes costs into a run's folder, whose scores and plan are there; their place in it."""
    path = costs_path(run, costs.objective)
    path.parent.mkdir(exist_ok=True)
    info = {"formats": list(wanted_formats(policy)), "sources": _sources(run)}
    save_costs(costs, path, info=info)
    return str(path.relative_to(run))


def saved_costs(policy: Any, run: str | Path) -> Costs | None:
    """A run's costs of `policy.objective`; None unless they are of its scores and these formats.

    Raises:
      ArtifactError: the file is damaged.
    """
    path = costs_path(run, policy.objective)
    if not path.is_file():
        return None
    info = costs_info(path)
    wanted = _bits(wanted_formats(policy))
    fits = info.get("sources") == _sources(run) and wanted <= _bits(info.get("formats", ()))
    return load_costs(path) if fits else None


def _sources(run: str | Path) -> dict[str, str]:
    """Costs are those of the examples, ranges and model of the scores, whatever the plan."""
    return {name: found for name, found in sources(run).items() if name != "plan.json"}


def _bits(formats: Iterable[str]) -> set[Format]:
    return {parse_format(name) for name in formats}


def budget_plan(
    config: Any,
    graph: Graph,
    params: Any,
    selection: Batches,
    loss: Loss,
    ranges: Ranges,
    scores: Tangents | None,
    costs: Costs | None = None,
    clusters: Any = None,
    progress: Progress = silent,
) -> Plan:
    """The plan of the policy "budget".

    Args:
      config: see `jaxrmils.cli.defaults`.
      graph, params, selection, loss, ranges: where `policy.refine` asks for simulations.
      scores: of the selection split; None without labels.
      costs: from `measured`, where the objective is one of those.
      clusters: [N], the group of each selected example, or None.
      progress: draws bars.

    Raises:
      PlanError: limits that no plan is within, or as `budget` and `refined`.
    """
    policy = config.policy
    limits, settings = limits_of(policy), dict[str, Any](budget_settings(policy))
    if costs is not None:
        settings["objective"] = costs
    if scores is None:
        assert costs is not None
        rules = {name: value for name, value in settings.items() if name in RULES}
        return solve(tabulate(graph), costs, limits, **rules)
    settings["clusters"] = clusters
    rounds = refinement_rounds(policy)
    if not rounds:
        return budget(scores, limits, **settings)
    assert not isinstance(scores, ScoreMoments)
    simulation = Simulator(graph, loss).on(params, ranges, selection)
    found = refined(
        simulation,
        scores,
        limits,
        rounds=rounds,
        progress=progress,
        **settings,
    )
    return found.plan

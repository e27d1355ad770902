"""Finds mistakes in a config before anything expensive runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from jaxrmils import artifacts
from jaxrmils.artifacts.latency_file import load_latency
from jaxrmils.cli.config import ConfigError
from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.lowering import BACKENDS
from jaxrmils.numerics import ESTIMATORS
from jaxrmils.policies import (
    CAPABILITIES,
    MEASURED_COSTS,
    NORMALIZATIONS,
    OBJECTIVES,
    POLICIES,
    PROBES,
    VARIANTS,
    Constraints,
    Costs,
    Limits,
    Search,
    candidates_for,
    check_plan,
    formats_of,
    parse_format,
    solve,
)
from jaxrmils.policies.budget.policy import JOINT, Settings
from jaxrmils.policies.constraints import nearest_layer
from jaxrmils.policies.measured_costs import check_calibrated
from jaxrmils.policies.plan import FLOAT_LAYER
from jaxrmils.sensitivity import LABEL_FREE, CandidateSet

WIDTHS = ("int8", "int4", "float")
LOSSES = ("task", *LABEL_FREE)
KEPT = ("examples", "moments")
BUDGET_OBJECTIVES = (*OBJECTIVES, JOINT, *MEASURED_COSTS)
WITHOUT_LABELS = ("hessian_trace", "sqnr", "measured")
"""Objectives that are not zero for a loss against the float model's own outputs."""
REFINABLE = ("squared", "squared_output", "fisher", "hessian_trace", "sqnr")
"""Objectives that are never negative, from which a refinement can start."""
BUDGET_ROUNDINGS = ("nearest", "directed")
RULES = ("formats", "skip", "force", "groups", "capabilities", "latency")
"""The budget's settings that have nothing to do with costs."""
ROUNDS = 4
"""Of a refinement that is asked for without a number."""


def check_config(config: Any, graph: Graph) -> None:
    """Finds mistakes in a config before anything expensive runs.

    Raises:
      ConfigError: an unknown choice or a number out of range.
      PlanError: a pattern that matches nothing, an unknown format, limits that no plan is within.
      ArtifactError: a file that the policy names can't be read.
    """
    policy, settings = config.policy, config.ranges
    choices = {
        "policy.name": (policy.name, POLICIES),
        "policy.variant": (policy.variant, VARIANTS),
        "policy.normalization": (policy.normalization, NORMALIZATIONS),
        "policy.probe": (policy.probe, PROBES),
        "policy.weights": (policy.weights, ("same", *WIDTHS)),
        "policy.lookups": (policy.lookups, WIDTHS),
        "ranges.estimator": (settings.estimator, ESTIMATORS),
        "backend": (config.backend, ("", *BACKENDS)),
        "loss": (config.loss, LOSSES),
        "scores": (config.scores, KEPT),
    }
    for field, (value, allowed) in choices.items():
        check_choice(f"config field {field}", value, allowed)
    if not policy.bits or not set(policy.bits) <= {8, 4}:
        raise ConfigError(f"config field policy.bits is {policy.bits}; expected 8, 4 or both")
    if config.verify.points < 1:
        raise ConfigError(f"config field verify.points is {config.verify.points}; expected >= 1")
    if config.batch_size < 0 or config.verify.margin < 0 or not 0 < config.verify.alpha < 0.5:
        raise ConfigError(
            f"batch_size {config.batch_size}, verify.margin {config.verify.margin} and "
            f"verify.alpha {config.verify.alpha}: expected >= 0, >= 0, and between 0 and 0.5"
        )
    if config.memory_bytes <= 0:
        raise ConfigError(f"memory_bytes is {config.memory_bytes}; expected bytes above 0")
    if config.loss != "task":
        _check_without_labels(config)
    if config.scores == "moments":
        _check_moments(config)
    if config.loss == "squared" and not config.verify.margin:
        raise ConfigError(
            "config field loss is 'squared', a distance that is 0 for the float model, so there is "
            "no default margin; set verify.margin"
        )
    search_of(policy).check()
    table = tabulate(graph)
    Constraints(policy.skip, forced(policy.force)).resolve(table)
    for name in (policy.format, *config.verify.compare):
        parse_format(name)
    if policy.name == "budget":
        _check_budget(policy, table)
    elif refinement_rounds(policy):
        raise ConfigError(
            f"config field policy.refine is {policy.refine}, but policy.name is {policy.name!r}; "
            "only a budget is refined"
        )
    if policy.name == "file":
        check_plan(plan_of_file(policy), table)


def check_choice(what: str, value: Any, allowed: Sequence[str]) -> None:
    """ConfigError unless a value is one of some words; it names those and near ones.

    >>> check_choice("--objective", "squard", ("signed", "squared"))
    Traceback (most recent call last):
    ...
    jaxrmils.cli.config.ConfigError: --objective is 'squard'; did you mean 'squared'? Expected ...
    """
    if value in allowed:
        return
    words = ", ".join(repr(choice) for choice in allowed)
    near = difflib.get_close_matches(str(value), [each for each in allowed if each], n=1)
    hint = f"did you mean {near[0]!r}? Expected" if near else "expected"
    raise ConfigError(f"{what} is {value!r}; {hint} one of {words}")


def _check_budget(policy: Any, table: ModelTable) -> None:
    """Solves the budget with costs of 0: whether there is a plan does not depend on the scores."""
    limits, settings = limits_of(policy), budget_settings(policy)
    check_refinable(policy)
    if limits.latency is not None:
        check_has_latency("config field policy.limits.latency", settings)
    if not limits.given():
        raise ConfigError(
            "config field policy.name is 'budget', but nothing is limited; set one or more of "
            "policy.limits, as in --config.policy.limits.size_share=0.2"
        )
    names = {*policy.formats, *forced(policy.force).values()}
    if policy.objective in MEASURED_COSTS and policy.objective != "measured":
        check_calibrated(sorted(names))
    plans = {
        name: {FLOAT_LAYER: 0.0}
        | {nearest_layer(table, name, parse_format(each)): 0.0 for each in names}
        for name in table.layer
    }
    rules: dict[str, Any] = {n: value for n, value in settings.items() if n in RULES}
    solve(table, Costs("none", "nats", plans), limits, **rules)


def check_has_latency(what: str, settings: Settings) -> None:
    """ConfigError for a limit of seconds where no table says what layers take."""
    if settings.get("latency") is None:
        raise ConfigError(
            f"{what} limits seconds, but there is no table of what layers take. `jaxrmils profile "
            "RUN` measures one on this machine, `jaxrmils aot RUN --target tpu:v5e --latency FILE` "
            "estimates one; give it as --config.policy.latency_table=RUN/latency.json (or, for "
            "pareto, --latency RUN/latency.json)"
        )


def check_refinable(policy: Any) -> None:
    """ConfigError for a refinement of an objective that it can't start from."""
    if refinement_rounds(policy):
        check_choice(
            "policy.refine starts from costs that are never negative, but policy.objective",
            policy.objective,
            REFINABLE,
        )


def _check_without_labels(config: Any) -> None:
    """ConfigError for policies that go by a tangent, which is zero without labels."""
    policy, reason = config.policy, "whose tangent is zero at the float model"
    if policy.name == "rmils" or (
        policy.name == "budget" and policy.objective not in WITHOUT_LABELS
    ):
        budget = f", or policy.name 'budget' with policy.objective {', '.join(WITHOUT_LABELS)}"
        raise ConfigError(
            f"config field loss is {config.loss!r}, {reason}, so {policy.name} has nothing to go "
            f"by; use policy.name 'lossless', which runs on the secant{budget}"
        )
    if policy.name == "budget" and refinement_rounds(policy):
        raise ConfigError(
            f"config field loss is {config.loss!r}, {reason}, so a refinement has no scores to "
            "start from; leave out policy.refine"
        )


def _check_moments(config: Any) -> None:
    """ConfigError for policies that look at single examples."""
    policy = config.policy
    what = f"policy.name {policy.name!r}" if policy.name in ("lossless", "rmils") else ""
    if policy.name == "budget" and refinement_rounds(policy):
        what = "policy.refine"
    if what:
        raise ConfigError(
            f"config field scores is 'moments', but {what} needs every example's scores; use "
            "scores 'examples'"
        )


def refinement_rounds(policy: Any) -> int:
    """Rounds of refinement: `policy.refine`, of which True means the usual number.

    Raises:
      ConfigError: less than 0.
    """
    if policy.refine < 0:
        raise ConfigError(
            f"config field policy.refine is {policy.refine}; expected rounds, 0 for none"
        )
    return ROUNDS if policy.refine is True else int(policy.refine)


def limits_of(policy: Any) -> Limits:
    """The budget policy's limits; a field of 0 does not limit.

    Raises:
      PlanError: an unknown limit, or one out of range.
    """
    return Limits.named({name: value for name, value in policy.limits.items() if value})


def budget_settings(policy: Any) -> Settings:
    """What `budget` and `pareto` take besides scores and limits, as the config has it.

    Raises:
      ConfigError: an unknown objective, rounding or backend.
      ArtifactError: the latency table can't be read.
    """
    check_choice("config field policy.objective", policy.objective, BUDGET_OBJECTIVES)
    check_choice("config field policy.rounding", policy.rounding, BUDGET_ROUNDINGS)
    check_choice("config field policy.capabilities", policy.capabilities, ("", *CAPABILITIES))
    return {
        "objective": policy.objective,
        "rounding": policy.rounding,
        "formats": tuple(policy.formats),
        "skip": tuple(policy.skip),
        "force": forced(policy.force),
        "groups": tuple(policy.groups),
        "capabilities": policy.capabilities or None,
        "latency": load_latency(policy.latency_table) if policy.latency_table else None,
    }


def plan_of_file(policy: Any) -> Any:
    """The plan that policy.file names.

    Raises:
      ConfigError: it names none.
      ArtifactError: the file is no plan.
    """
    if not policy.file:
        raise ConfigError(
            "config field policy.name is 'file', but policy.file is empty; give a plan, as in "
            "--config.policy.file=RUN/pareto/budget-03.json"
        )
    return artifacts.load_plan(policy.file)


def candidates_of(config: Any, graph: Graph) -> CandidateSet:
    """What must be scored for the formats that a config names."""
    policy = config.policy
    names = set(forced(policy.force).values())
    if policy.name in ("lossless", "budget"):
        names |= set(policy.formats)
    if policy.name == "uniform":
        names.add(policy.format)
    found = candidates_for(sorted(names))
    if policy.name != "file":
        return found
    own = formats_of(graph, plan_of_file(policy))
    activations = [c for each in own.activations.values() for c in each]
    return found.holding(activations, own.weights.values())


def forced(entries: tuple[str, ...]) -> dict[str, str]:
    """The config's "glob=format" entries as a mapping; ConfigError if one is not of that form."""
    force = {}
    for entry in entries:
        pattern, separator, format_ = entry.rpartition("=")
        if not separator:
            raise ConfigError(
                f"policy.force holds {entry!r}; write glob=format, as in Dense_*=w8a8"
            )
        force[pattern] = format_
    return force


def search_of(policy: Any) -> Search:
    """The lossless policy's search as the config has it."""
    return Search(
        formats=tuple(policy.formats),
        rounds=policy.rounds,
        length=policy.length,
        caution=policy.caution,
        compute=policy.compute,
    )

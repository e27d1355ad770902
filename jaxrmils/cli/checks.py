"""Finds mistakes in a config before anything expensive runs."""

from __future__ import annotations

from typing import Any

from jaxrmils.cli.config import ConfigError
from jaxrmils.graph import Graph, tabulate
from jaxrmils.lowering import BACKENDS
from jaxrmils.numerics import ESTIMATORS
from jaxrmils.policies import (
    NORMALIZATIONS,
    POLICIES,
    PROBES,
    VARIANTS,
    Constraints,
    Search,
    parse_format,
)
from jaxrmils.sensitivity import LABEL_FREE

WIDTHS = ("int8", "int4", "float")
LOSSES = ("task", *LABEL_FREE)


def check_config(config: Any, graph: Graph) -> None:
    """Finds mistakes in a config before anything expensive runs.

    Raises:
      ConfigError: an unknown choice or a number out of range.
      PlanError: a pattern that matches nothing, an unknown format.
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
    }
    for field, (value, allowed) in choices.items():
        if value not in allowed:
            words = ", ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"config field {field} is {value!r}; expected one of {words}")
    if not policy.bits or not set(policy.bits) <= {8, 4}:
        raise ConfigError(f"config field policy.bits is {policy.bits}; expected 8, 4 or both")
    if config.verify.points < 1:
        raise ConfigError(f"config field verify.points is {config.verify.points}; expected >= 1")
    if config.batch_size < 0 or config.verify.margin < 0 or not 0 < config.verify.alpha < 0.5:
        raise ConfigError(
            f"batch_size {config.batch_size}, verify.margin {config.verify.margin} and "
            f"verify.alpha {config.verify.alpha}: expected >= 0, >= 0, and between 0 and 0.5"
        )
    if config.loss != "task" and policy.name == "rmils":
        raise ConfigError(
            f"config field loss is {config.loss!r}, whose tangent is zero at the float model, so "
            "rmils has nothing to go by; use policy.name 'lossless', which runs on the secant"
        )
    if config.loss == "squared" and not config.verify.margin:
        raise ConfigError(
            "config field loss is 'squared', a distance that is 0 for the float model, so there is "
            "no default margin; set verify.margin"
        )
    search_of(policy).check()
    Constraints(policy.skip, forced(policy.force)).resolve(tabulate(graph))
    for name in (policy.format, *config.verify.compare):
        parse_format(name)


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

"""Plans as switches: what compiled functions are told to quantize, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxrmils.graph import Graph
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.policies.attribution import formats_of
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.plan import Plan
from jaxrmils.sensitivity import Candidate, CandidateSet, all_off

USUAL = CandidateSet()
"""What is always scored."""


def switch_candidates(graph: Graph, plan: Plan, known: CandidateSet = USUAL) -> CandidateSet:
    """What a plan's switches must be able to say: known candidates, and others behind them.

    A program is compiled for a set. Plans of the formats that are always scored share one.

    Args:
      graph: from `trace`.
      plan: from a policy.
      known: by default those that are always scored.
    """
    formats = formats_of(graph, plan)
    activations = [c for each in formats.activations.values() for c in each]
    return known.holding(activations, formats.weights.values())


def plan_switches(
    graph: Graph, ranges: Ranges, plan: Plan, candidates: CandidateSet = USUAL
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A plan as `perturbed_losses` takes it.

    Args:
      graph: from `trace`.
      ranges: from `calibrate`.
      plan: from a policy.
      candidates: what switches mean, as from `switch_candidates`.

    Returns:
      Per site, int32 [operands], and per weight, an int32 scalar: 0 for float, k + 1 for candidate
      k of the set.

    Raises:
      PlanError: a planned site has no range, or the set lacks a format of the plan.
    """
    activations, weights = all_off(graph, ranges)
    formats = formats_of(graph, plan)
    for name, candidate in formats.weights.items():
        weights[name] = jnp.int32(_switch(candidate, candidates.weights))
    for site, own in formats.activations.items():
        if site not in activations:
            raise PlanError(
                f"site {site} is planned in integers, but no calibration example reached it, so it "
                "has no range; skip it or calibrate on examples that reach it"
            )
        switches = [_switch(candidate, candidates.activations) for candidate in own]
        activations[site] = jnp.asarray(switches, jnp.int32)
    return activations, weights


def _switch(candidate: Candidate, known: Sequence[Candidate]) -> int:
    if candidate not in known:
        raise PlanError(
            f"the plan has {candidate}, which these switches can't say; pass "
            "`switch_candidates(graph, plan)`"
        )
    return known.index(candidate) + 1

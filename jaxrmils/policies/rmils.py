"""The RMILS policy: thresholds on mu, with directed rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxrmils.graph import Graph
from jaxrmils.policies.assign import (
    Normalization,
    Variant,
    WeightBits,
    assign,
    decisions_of,
    plan_from_tree,
    weight_width,
)
from jaxrmils.policies.constraints import Constraints
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.plan import LayerPlan, Plan
from jaxrmils.sensitivity import Scores

Probe = Literal["tangent", "shift"]
PROBES: tuple[Probe, ...] = get_args(Probe)


def mu_values(
    graph: Graph,
    scores: Scores,
    *,
    normalization: Normalization = "raw",
    probe: Probe = "tangent",
) -> dict[str, dict[int, float]]:
    """What `rmils` compares with its threshold.

    Args:
      graph: from `trace`.
      scores: from `score`.
      normalization: "raw", "t" (studentised) or "cosine".
      probe: "tangent" or "shift".

    Returns:
      Per layer with activations that were scored, mu at 8 and at 4 bits.

    Raises:
      PlanError: as `rmils`.
    """
    tree = assign(
        graph,
        scores.contributions(),
        scores.ranges,
        normalization=normalization,
        shifts=_shifts(graph, scores, probe),
    )
    scored = {
        name
        for name, row in scores.table.layer.items()
        if row.activations and all(a.site in scores.ranges.stats for a in row.activations)
    }
    return {
        name: {8: float(decision.mu[0]), 4: float(decision.mu[1])}
        for name, decision in decisions_of(tree).items()
        if name in scored
    }


def _shifts(graph: Graph, scores: Scores, probe: Probe) -> Mapping[str, Any] | None:
    """The shift probe's secants if it is asked for; PlanError where scores do not fit."""
    if scores.table.fingerprint != graph.fingerprint:
        raise PlanError("the scores were made for another model; score this one")
    shifts = scores.shifts() if probe == "shift" else None
    if probe not in PROBES or (probe == "shift" and shifts is None):
        raise PlanError(
            f"probe {probe!r}: expected 'tangent', or 'shift' with scores made by "
            "score(..., shift_probe=True)"
        )
    return shifts


def rmils(
    graph: Graph,
    scores: Scores,
    *,
    mu: float = 0.4,
    variant: Variant = "radical",
    normalization: Normalization = "raw",
    probe: Probe = "tangent",
    bits: Sequence[int] = (8, 4),
    weights: WeightBits = "same",
    lookups: Literal["int8", "int4", "float"] = "float",
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
) -> Plan:
    """Quantizes the layers whose mu passes a threshold, rounding against the sign of p . 1.

    A layer gets the fewest bits b with mu(b) >= mu, and stays float if there are none; see
    `jaxrmils.policies.assign` for the formulas. Small thresholds are radical and quantize
    sensitive layers too; large ones leave most layers float.

    Args:
      graph: from `trace`.
      scores: from `score`.
      mu: the threshold, in nats per unit of activation ("raw"; the published 0.3 to 0.5), as a t
        statistic ("t"), or in nats per unit and per gradient norm ("cosine").
      variant: "radical", or "balanced", which also demands that the layer's predicted change is
        negative.
      normalization: how mu is normalised; the publication does not say.
      probe: "tangent" contracts the gradient with the true noise; "shift" is the publication's own,
        and needs `score(..., shift_probe=True)`.
      bits: the widths to choose from.
      weights: bits of the weights; "same" as the activations, as published. A wider weight keeps an
        int4 activation in "w8a4"; "float" keeps activations in float as well, since a float weight
        can't be multiplied in integers.
      lookups: format of embedding tables that are only looked up; they have no activation and so
        no mu. The publication leaves them float.
      skip: globs of layers that stay float.
      force: format by glob.

    Returns:
      The plan.

    Raises:
      PlanError: an unknown option, a pattern that matches nothing, scores of another model.
    """
    shifts = _shifts(graph, scores, probe)
    if not mu >= 0:
        raise PlanError(f"mu is {mu}; a threshold on an absolute value can't be negative")
    lookup = LayerPlan(weight_bits=weight_width(lookups))
    settings: dict[str, Any] = {
        "name": "rmils",
        "mu": float(mu),
        "variant": variant,
        "normalization": normalization,
        "probe": probe,
        "bits": list(bits),
        "weights": weights,
        "lookups": lookups,
        "skip": list(skip),
        "force": dict(force or {}),
    }
    tree = assign(
        graph,
        scores.contributions(),
        scores.ranges,
        mu=mu,
        variant=variant,
        normalization=normalization,
        bits=bits,
        weights=weights,
        shifts=shifts,
    )
    plan = plan_from_tree(graph, tree, settings)
    fixed = Constraints(skip, force or {}).resolve(scores.table)
    layers = {}
    for name, layer in plan.layers.items():
        chosen = lookup if scores.table.layer[name].is_lookup else layer
        layers[name] = fixed.get(name) or chosen
    return dataclasses.replace(plan, layers=layers)

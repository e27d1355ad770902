"""Objectives that saved scores hold already: costs of every option of every layer.

With c_n(l, o) the first-order contribution of layer l in option o to example n's loss, its operands
and its weight together, over n = 1..N examples:

    signed       mean_n c                                 RMILS: the total differential, Eq. 3
    upper_bound  mean_n c + z sd_n(c) / sqrt(N)           what sampling leaves possible
    squared      mean_n c^2                               the first-order mean squared loss change

Each is summed over layers. For `signed` the sum is the plan's own first-order prediction; for the
others it leaves out what layers have in common. Of bounds it is never less than the plan's joint
bound, since a standard deviation of a sum is at most the sum of standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxrmils import numerics
from jaxrmils.graph import LayerRow
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import FLOAT_BITS, PlanError, fit, parse_format
from jaxrmils.policies.plan import FLOAT_LAYER, LayerPlan
from jaxrmils.policies.tangents import (
    Tangents,
    check_clusters,
    operand_mean,
    option_error,
    option_mean,
    option_mean_square,
)
from jaxrmils.sensitivity import Candidate

Objective = Literal["signed", "upper_bound", "squared"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

Directions = Mapping[int, Mapping[str, Sequence[numerics.Rounding]]]
Roundings = Literal["nearest", "directed"] | Directions
"""Which roundings an activation format comes in; see `layer_options`."""

Options = Mapping[str, tuple[LayerPlan, ...]]


def layer_options(
    scores: Tangents, formats: Sequence[str], roundings: Roundings = "nearest"
) -> dict[str, tuple[LayerPlan, ...]]:
    """What every layer can become.

    Args:
      scores: from `score` or `score_moments`.
      formats: names of formats; a layer has of each what it can have.
      roundings: "nearest"; "directed" for a second option of every activation format, each operand
        rounded down or up, whichever has the smaller mean contribution (against the sign of
        E[p . 1]); or the roundings of that second option, as
        `jaxrmils.sensitivity.directions` proposes them where they pay. Dynamic activations have no
        second option.

    Returns:
      Per layer, in the model's order: float, then the formats. Activation formats are left out
      where no calibration example reached the layer, so that it has no range.

    Raises:
      PlanError: an unknown format or word, or a direction that was not scored.
    """
    if isinstance(roundings, str) and roundings not in ("nearest", "directed"):
        raise PlanError(
            f"rounding {roundings!r}; expected 'nearest', 'directed' or directions by width"
        )
    result = {}
    for row in scores.table.layers:
        found = [FLOAT_LAYER]
        reached = all(a.site in scores.ranges.grids for a in row.activations)
        for name in formats:
            own = fit(row, parse_format(name))
            if own.activation_bits == FLOAT_BITS:
                found.append(LayerPlan.of(own))
            elif reached:
                found.append(LayerPlan.of(own, ("nearest",) * len(row.activations)))
                if not own.dynamic:
                    rounding = _rounding(scores, row, own.activation_bits, roundings)
                    found.append(LayerPlan.of(own, rounding))
        result[row.name] = tuple(dict.fromkeys(found))
    return result


def _rounding(
    scores: Tangents, row: LayerRow, bits: int, roundings: Roundings
) -> tuple[numerics.Rounding, ...]:
    """The roundings of a layer's second option."""
    if roundings == "nearest":
        return ("nearest",) * len(row.activations)
    if roundings != "directed":
        assert not isinstance(roundings, str)
        by_site = roundings.get(bits, {})
        return tuple(
            by_site[a.site][a.position] if a.site in by_site else "nearest" for a in row.activations
        )
    candidates = (Candidate(bits, "floor"), Candidate(bits, "ceil"))
    missing = [str(c) for c in candidates if c not in scores.activation_candidates]
    if missing:
        raise PlanError(
            f"rounding 'directed' needs {' and '.join(missing)}, which the scores do not hold; "
            "score them too, or round to 'nearest'"
        )
    return tuple(
        min(
            candidates,
            key=lambda c, a=a: operand_mean(scores, a.site, a.position, c),
        ).rounding
        for a in row.activations
    )


def tangent_costs(
    scores: Tangents,
    objective: str,
    options: Options,
    *,
    z: float = 1.645,
    clusters: Any = None,
) -> Costs:
    """The costs of options by an objective that needs nothing but the scores.

    Args:
      scores: from `score` or `score_moments`, for losses whose gradient at the float model is not
        zero.
      objective: one of `OBJECTIVES`; the module has the formulas.
      options: per layer, from `layer_options`.
      z: standard errors that "upper_bound" adds; 1.645 is one-sided 95 %.
      clusters: [N], the group of each example, where examples depend on each other; standard errors
        are then the groups'.

    Returns:
      The costs: nats (the loss's unit), or squared nats for "squared". Float costs 0.

    Raises:
      PlanError: an unknown objective, a z that is not positive, a format that was not scored,
        too few examples for a standard error, or clusters for moments.
      StatisticsError: clusters that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, score, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (64, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> ranges = calibrate(graph, params, [x])
    >>> scores = score(graph, params, [(x, x)], lambda o, t: o[:, 0] ** 2, ranges)
    >>> costs = tangent_costs(scores, "squared", layer_options(scores, ["w8a8", "w4a4"]))
    >>> [layer.format for layer, _ in sorted(costs.options["w"].items(), key=lambda e: e[1])]
    ['float', 'w8a8', 'w4a4']
    """
    if objective not in OBJECTIVES:
        raise PlanError(f"objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if objective == "upper_bound":
        check_errors(scores, z)
    numbers = check_clusters(scores, clusters)

    def cost(name: str, layer: LayerPlan) -> float:
        if layer.is_float:
            return 0.0
        if objective == "squared":
            return option_mean_square(scores, name, layer)
        mean = option_mean(scores, name, layer)
        if objective == "signed":
            return mean
        return mean + z * option_error(scores, name, layer, numbers)

    unit = "squared nats" if objective == "squared" else "nats"
    table = {n: {layer: cost(n, layer) for layer in own} for n, own in options.items()}
    return Costs(objective, unit, table)


def check_errors(scores: Tangents, z: float) -> None:
    """PlanError unless upper bounds can be had."""
    if not (isinstance(z, (int, float)) and 0 < z < math.inf):
        raise PlanError(f"z is {z!r}; expected standard errors above 0, such as 1.645")
    if len(scores) < 2:
        raise PlanError("a standard error needs two or more examples; got one")

"""RMILS as a pytree transform: contributions go in, a plan that mirrors the params comes out.

For a layer with activation operands r, steps s_r(b) and candidates at width b, with c the
contribution <p, Q_b(h) - h>:

    direction_r(b) = floor or ceil, whichever has the smaller mean c    (against the sign of p . 1)
    mu(b) = sum_r 2 |E c_r(b)| / s_r(b)                                 "raw"
    mu(b) = |E c(b)| / (sd c(b) / sqrt(n)), c(b) = sum_r c_r(b)         "t"
    mu(b) = sum_r 2 |E c_r(b)| / (s_r(b) sqrt(k_r E |p_r|^2))           "cosine"

For small steps and unclipped values the raw form tends to the paper's |E p . 1|, since floor and
ceil move every element by s/2 on average. The fewest bits with mu(b) >= threshold are taken, else
the layer stays float ("radical"); "balanced" also demands a negative predicted change.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, LayerRow, tabulate
from jaxrmils.numerics import Rounding
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.policies.formats import FLOAT_BITS, PlanError
from jaxrmils.policies.plan import LayerPlan, Plan
from jaxrmils.sensitivity import Candidate, Contributions

Variant = Literal["radical", "balanced"]
Normalization = Literal["raw", "t", "cosine"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
WeightBits = Literal["same", "int8", "int4", "float"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

DIRECTIONS: tuple[Rounding, ...] = ("nearest", "floor", "ceil")
_WIDTHS = (8, 4)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight_bits", "activation_bits", "rounding", "mu", "predicted"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of one layer, as arrays.

    Attributes:
      weight_bits: int32, 32 for float.
      activation_bits: int32, 32 for float.
      rounding: int32 [operands], index into `DIRECTIONS`.
      mu: float32 [2], at int8 and int4.
      predicted: float32 [2], mean predicted change at int8 and int4, weight included.
    """

    weight_bits: Any
    activation_bits: Any
    rounding: Any
    mu: Any
    predicted: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "dots"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class PlanTree:
    """A plan in the shape of the params tree.

    Attributes:
      params: the params tree with a dict `{layer name: Decision}` in place of every leaf; empty for
        leaves that are no layer's weight.
      dots: `{layer name: Decision}` for layers without a weight.
    """

    params: Any
    dots: Mapping[str, Decision]


def assign(
    graph: Graph,
    contributions: Contributions,
    ranges: Ranges,
    *,
    mu: Any = 0.4,
    variant: Variant = "radical",
    normalization: Normalization = "raw",
    bits: Sequence[int] = (8, 4),
    weights: WeightBits = "same",
    shifts: Mapping[str, Any] | None = None,
) -> PlanTree:
    """Turns contributions into a plan. Pure, so it can be jitted together with `contributions`.

    Args:
      graph: from `trace`.
      contributions: of a selection batch (all candidates of `ACTIVATION_CANDIDATES`).
      ranges: from `calibrate`.
      mu: the threshold, in the unit of the normalization; may be a tracer.
      variant: "radical" or "balanced".
      normalization: "raw", "t" or "cosine".
      bits: the widths to choose from.
      weights: bits of the weights; see `rmils`.
      shifts: `shift_secants(...)` at (8, 4) bits, to take mu and the direction from the paper's own
        probe instead.

    Returns:
      A `PlanTree`; `plan_from_tree` makes a `Plan` of it.

    Raises:
      PlanError: an unknown option, a candidate that was not scored, ranges of another model, or one
        example alone for "t".
    """
    if variant not in VARIANTS or normalization not in NORMALIZATIONS:
        raise PlanError(
            f"variant {variant!r} and normalization {normalization!r}: expected one of {VARIANTS} "
            f"and one of {NORMALIZATIONS}"
        )
    if not set(bits) <= set(_WIDTHS) or not bits:
        raise PlanError(f"bits are {tuple(bits)}; expected 8, 4 or both")
    if shifts is not None and normalization == "cosine":
        raise PlanError("the shift probe has no cosine form; use 'raw' or 't'")
    if ranges.fingerprint != graph.fingerprint:
        raise PlanError("the ranges were calibrated on another model; calibrate this one")
    if normalization == "t" and len(contributions.loss) < 2:
        raise PlanError("a t statistic needs two or more examples; got one")
    if weights != "same":
        weight_width(weights)
    rule = _Rule(mu, variant, normalization, tuple(bits), weights)
    table = tabulate(graph)
    decisions = {
        row.name: _decide(row, contributions, ranges, shifts, rule) for row in table.layers
    }
    leaves: list[dict[str, Decision]] = [{} for _ in graph.leaf_names]
    dots = {}
    for row in table.layers:
        if not row.has_weight:
            dots[row.name] = decisions[row.name]
        for index in row.weight_leaves:
            leaves[index][row.name] = decisions[row.name]
    return PlanTree(jax.tree.unflatten(jax.tree.structure(graph.params), leaves), dots)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The settings of `assign`; see there."""

    threshold: Any
    variant: Variant
    normalization: Normalization
    bits: tuple[int, ...]
    weights: WeightBits


def _decide(
    row: LayerRow,
    contributions: Contributions,
    ranges: Ranges,
    shifts: Mapping[str, Any] | None,
    rule: _Rule,
) -> Decision:
    scored = [a for a in row.activations if a.site in contributions.activations]
    if not scored or len(scored) < len(row.activations):
        floats = jnp.int32(FLOAT_BITS)
        empty = jnp.zeros(2, jnp.float32)
        return Decision(floats, floats, jnp.zeros(len(row.activations), jnp.int32), empty, empty)
    statistics = [_at_width(i, row, contributions, ranges, shifts, rule) for i in range(2)]
    mu, predicted, directions = (jnp.stack(each) for each in zip(*statistics, strict=True))
    passes = mu >= jnp.asarray(rule.threshold, jnp.float32)
    passes &= jnp.asarray([width in rule.bits for width in _WIDTHS])
    if rule.variant == "balanced":
        passes &= predicted < 0
    if row.has_weight and rule.weights == "float":
        passes &= False
    bits = jnp.where(passes[1], 4, jnp.where(passes[0], 8, FLOAT_BITS)).astype(jnp.int32)
    rounding = jnp.where(passes[1], directions[1], directions[0])
    rounding = jnp.where(bits == FLOAT_BITS, 0, rounding).astype(jnp.int32)
    weight_bits = bits if rule.weights == "same" else jnp.int32(weight_width(rule.weights))
    if not row.has_weight:
        weight_bits = jnp.int32(FLOAT_BITS)
    weight_bits = jnp.where(bits == FLOAT_BITS, bits, weight_bits)
    return Decision(weight_bits, bits, rounding, mu, predicted)


def _at_width(
    i: int,
    row: LayerRow,
    contributions: Contributions,
    ranges: Ranges,
    shifts: Mapping[str, Any] | None,
    rule: _Rule,
) -> tuple[Any, Any, Any]:
    """mu, the predicted change and the directions of a layer at `_WIDTHS[i]`."""
    bits = _WIDTHS[i]
    down, up = (_activation(row, contributions, Candidate(bits, d)) for d in ("floor", "ceil"))
    secants = None if shifts is None else _secants(row, shifts, i)
    if secants is None:
        go_up = jnp.mean(up, axis=0) < jnp.mean(down, axis=0)
    else:
        go_up = jnp.mean(secants, axis=0) < 0
    chosen = jnp.where(go_up, up, down)
    if secants is None:
        grids = [ranges.grids[a.site][a.position][bits] for a in row.activations]
        steps = jnp.stack([jnp.mean(grid.scale) for grid in grids])
        norms = _norms(row, contributions) if rule.normalization == "cosine" else None
        mu = _mu(chosen, steps, norms, rule.normalization)
    else:
        # |E m| of a layer with several inputs is the sum of theirs, each shifted on its own.
        mu = _mu(jnp.where(go_up, secants, -secants), None, None, rule.normalization)
    width = bits if rule.weights == "same" else weight_width(rule.weights)
    predicted = jnp.mean(jnp.sum(chosen, axis=1) + _weight(row, contributions, width))
    return mu, predicted, jnp.where(go_up, 2, 1).astype(jnp.int32)


def _secants(row: LayerRow, shifts: Mapping[str, Any], i: int) -> Any:
    """float32 [batch, operands]."""
    columns = [shifts[a.site][:, a.position, i] for a in row.activations]
    return jnp.stack([jnp.asarray(c) for c in columns], axis=1)


def weight_width(name: str) -> int:
    """The bits of a weight format's name: "int8", "int4" or "float"."""
    widths = {"int8": 8, "int4": 4, "float": FLOAT_BITS}
    if name not in widths:
        raise PlanError(f"weight format {name!r}; expected one of {', '.join(widths)}")
    return widths[name]


def _activation(row: LayerRow, contributions: Contributions, candidate: Candidate) -> Any:
    """float32 [batch, operands]."""
    if candidate not in contributions.activation_candidates:
        raise PlanError(f"the candidate {candidate} was not scored for activations")
    index = contributions.activation_candidates.index(candidate)
    columns = [contributions.activations[a.site][:, a.position, index] for a in row.activations]
    return jnp.stack([jnp.asarray(c) for c in columns], axis=1)


def _weight(row: LayerRow, contributions: Contributions, bits: int) -> Any:
    """float32 [batch] or 0: the weight's contribution at a width, if it was scored."""
    candidate = Candidate(bits)
    if not row.has_weight or candidate not in contributions.weight_candidates:
        return jnp.float32(0)
    index = contributions.weight_candidates.index(candidate)
    uses = [contributions.weights[s] for s in row.sites if s in contributions.weights]
    return jnp.sum(jnp.stack([jnp.asarray(u)[:, index] for u in uses]), axis=0)


def _norms(row: LayerRow, contributions: Contributions) -> Any:
    """sqrt(k E |p|^2) for every operand, k its number of elements over all loop iterations."""
    squares = [contributions.gradient_square[a.site][:, a.position] for a in row.activations]
    sizes = jnp.asarray([float(a.size * a.iterations) for a in row.activations], jnp.float32)
    means = jnp.stack([jnp.mean(jnp.asarray(s)) for s in squares])
    return jnp.sqrt(sizes * means)


def _mu(values: Any, steps: Any, norms: Any, normalization: Normalization) -> Any:
    """mu of per-example values [batch, operands]; see the module's docstring."""
    if normalization == "t":
        total = jnp.sum(values, axis=1)
        spread = jnp.std(total, ddof=1) / jnp.sqrt(jnp.float32(total.shape[0]))
        return jnp.abs(jnp.mean(total)) / jnp.where(spread > 0, spread, jnp.float32(1))
    means = jnp.abs(jnp.mean(values, axis=0))
    if steps is not None:
        means = 2.0 * means / steps
    if norms is not None:
        means = means / jnp.where(norms > 0, norms, jnp.float32(1))
    return jnp.sum(means)


def plan_from_tree(graph: Graph, tree: PlanTree, policy: Mapping[str, Any] | None = None) -> Plan:
    """The plan that a `PlanTree` of concrete arrays describes.

    Args:
      graph: the graph it was made for.
      tree: from `assign`.
      policy: settings to record.
    """
    decisions = decisions_of(tree)
    layers = {name: _layer_plan(decisions[name]) for name in graph.layers}
    return Plan(layers, graph.fingerprint, dict(policy or {}))


def decisions_of(tree: PlanTree) -> dict[str, Decision]:
    """The decisions of a `PlanTree` by layer."""
    decisions: dict[str, Decision] = dict(tree.dots)

    def is_entry(x: Any) -> bool:
        return isinstance(x, dict) and all(isinstance(v, Decision) for v in x.values())

    for entry in jax.tree.leaves(tree.params, is_leaf=is_entry):
        if isinstance(entry, dict):
            decisions.update(entry)
    return decisions


def _layer_plan(decision: Decision) -> LayerPlan:
    activation_bits = int(decision.activation_bits)
    rounding: tuple[Rounding, ...] = ()
    if activation_bits < FLOAT_BITS:
        rounding = tuple(DIRECTIONS[int(i)] for i in decision.rounding)
    return LayerPlan(int(decision.weight_bits), activation_bits, rounding)

"""The precision plan: what every layer becomes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrmils.graph import Format, Graph, LayerRow, ModelTable
from jaxrmils.numerics import ROUNDINGS, Rounding
from jaxrmils.policies.formats import FLOAT_BITS, PlanError, format_name
from jaxrmils.sensitivity import Candidate, Curvature, ScoreMoments, Scores

_BITS = (32, 8, 4)


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer.

    Attributes:
      weight_bits: 8, 4, or 32 for float.
      activation_bits: 8, 4, or 32 for float.
      rounding: rounding direction of every activation operand, in the order of
        `LayerRow.activations`; empty where the activations stay float.
      weight_rounding: rounding of the weight.
      dynamic: whether every row of the activations has a grid of its own, made at run time.
      weight_group: how many weights along the contracted dim share a scale; 0 for a channel.

    >>> LayerPlan(8, 8, ("floor",)).format
    'w8a8'
    """

    weight_bits: int = FLOAT_BITS
    activation_bits: int = FLOAT_BITS
    rounding: tuple[Rounding, ...] = ()
    weight_rounding: Rounding = "nearest"
    dynamic: bool = False
    weight_group: int = 0

    @staticmethod
    def of(format_: Format, rounding: tuple[Rounding, ...] = ()) -> LayerPlan:
        """A layer in a format.

        >>> LayerPlan.of(Format(8, 8, dynamic=True), ("nearest",)).format
        'w8a8d'
        """
        return LayerPlan(
            format_.weight_bits,
            format_.activation_bits,
            rounding,
            dynamic=format_.dynamic,
            weight_group=format_.group,
        )

    @property
    def bits(self) -> Format:
        """Its format."""
        return Format(self.weight_bits, self.activation_bits, self.dynamic, self.weight_group)

    @property
    def format(self) -> str:
        """Its format's name ("w8a8", "w4", "a8", "w8a8d", "w4g128", "float")."""
        return format_name(*self.bits)

    @property
    def weight_candidate(self) -> Candidate:
        """What happens to its quantized weight."""
        return Candidate(self.weight_bits, self.weight_rounding, group=self.weight_group)

    @property
    def activation_candidates(self) -> tuple[Candidate, ...]:
        """What happens to every quantized activation operand."""
        return tuple(map(self.candidate, self.rounding))

    def candidate(self, rounding: Rounding) -> Candidate:
        """What happens to an activation operand with this rounding."""
        return Candidate(self.activation_bits, rounding, self.dynamic)

    @property
    def is_float(self) -> bool:
        """True if nothing in the layer is quantized."""
        return self.weight_bits == FLOAT_BITS and self.activation_bits == FLOAT_BITS


FLOAT_LAYER = LayerPlan()


@dataclass(frozen=True)
class Plan:
    """A precision plan for a model.

    Attributes:
      layers: a decision for every layer of the model, in its order.
      fingerprint: of the graph that it was made for.
      policy: the policy's name and settings, for the record.
    """

    layers: Mapping[str, LayerPlan]
    fingerprint: str
    policy: Mapping[str, Any] = field(default_factory=dict)

    def formats(self) -> dict[str, Format]:
        """Per layer its format, as `ModelTable.size_bits` reads them."""
        return {n: p.bits for n, p in self.layers.items()}

    @property
    def is_float(self) -> bool:
        """True if nothing in the model is quantized."""
        return all(layer.is_float for layer in self.layers.values())

    def counts(self) -> dict[str, int]:
        """How many layers have each format."""
        result: dict[str, int] = {}
        for layer in self.layers.values():
            result[layer.format] = result.get(layer.format, 0) + 1
        return result

    def only(self, name: str) -> Plan:
        """The plan with this layer alone quantized and all others in float."""
        layers = {n: (p if n == name else FLOAT_LAYER) for n, p in self.layers.items()}
        return Plan(layers, self.fingerprint, {**self.policy, "only": name})


def check_plan(plan: Plan, table: ModelTable) -> None:
    """Raises PlanError unless the plan is complete, executable and made for this model."""
    if plan.fingerprint != table.fingerprint:
        raise PlanError(
            f"the plan was made for another model (fingerprint {plan.fingerprint[:12]}, this model "
            f"has {table.fingerprint[:12]}); make a plan from this model's scores"
        )
    unknown = [name for name in plan.layers if name not in table.layer]
    if unknown:
        near = difflib.get_close_matches(unknown[0], table.layer, n=3)
        raise PlanError(f"the plan has an unknown layer {unknown[0]!r}; near matches: {near}")
    missing = [name for name in table.layer if name not in plan.layers]
    if missing:
        raise PlanError(f"the plan has no decision for {missing[:5]}")
    for name, layer in plan.layers.items():
        _check_layer(name, layer, table)


def _check_layer(name: str, layer: LayerPlan, table: ModelTable) -> None:
    row = table.layer[name]
    if layer.weight_bits not in _BITS or layer.activation_bits not in _BITS:
        raise PlanError(
            f"layer {name}: bits {layer.weight_bits}/{layer.activation_bits}; 32, 8 or 4 expected"
        )
    quantized = layer.activation_bits < FLOAT_BITS
    expected = len(row.activations) if quantized else 0
    if len(layer.rounding) != expected:
        raise PlanError(
            f"layer {name}: {len(layer.rounding)} rounding directions for {expected} quantized "
            "activations"
        )
    for rounding in (*layer.rounding, layer.weight_rounding):
        if rounding not in ROUNDINGS or rounding == "stochastic":
            raise PlanError(
                f"layer {name}: rounding {rounding!r}; nearest, floor or ceil expected (a plan "
                "must give the same result every time)"
            )
    if quantized and row.has_weight and layer.weight_bits == FLOAT_BITS:
        raise PlanError(
            f"layer {name}: int{layer.activation_bits} activations need an integer weight; "
            "a float weight was planned"
        )
    if layer.weight_group:
        _check_group(name, layer, row)
    if layer.dynamic and layer.activation_bits == 4:
        raise PlanError(f"layer {name}: dynamic activations have 8 bits; 4 were planned")
    if layer.dynamic and not (quantized and row.has_rows):
        raise PlanError(
            f"layer {name} is planned in {layer.format}, but has no quantized activations whose "
            "rows could have grids of their own; only dots have (not convolutions or lookups)"
        )
    if quantized and row.is_lookup:
        raise PlanError(f"layer {name} is an embedding lookup, which reads no activations")
    if layer.weight_bits < FLOAT_BITS and not row.has_weight:
        raise PlanError(f"layer {name} multiplies two activations and has no weight to quantize")


def _check_group(name: str, layer: LayerPlan, row: LayerRow) -> None:
    if layer.weight_group < 0 or not row.has_groups:
        raise PlanError(
            f"layer {name}: groups of {layer.weight_group} weights; expected a positive number, "
            "and only weights of dots and lookups have groups (not convolutions)"
        )
    if layer.activation_bits < FLOAT_BITS or layer.weight_bits == FLOAT_BITS:
        raise PlanError(
            f"layer {name}: {layer.format} was planned; groups are for integer weights with float "
            "activations"
        )


def roundings_by_site(graph: Graph, plan: Plan) -> dict[str, tuple[Rounding, ...]]:
    """The rounding directions of every site whose activations are quantized."""
    result = {}
    for name, sites in graph.layers.items():
        remaining = plan.layers[name].rounding
        for site in sites:
            count = len(site.activations)
            if remaining and count:
                result[site.name], remaining = remaining[:count], remaining[count:]
    return result


def predict(scores: Scores, plan: Plan) -> dict[str, np.ndarray]:
    """First-order prediction of every layer's contribution under a plan.

    Args:
      scores: from `score`; must hold the plan's candidates.
      plan: for the same model.

    Returns:
      Per layer, float64 [N]: the predicted change of every example's loss; zeros for float.

    Raises:
      PlanError: a format of the plan was not scored.
    """
    check_plan(plan, scores.table)
    result = {}
    for name, layer in plan.layers.items():
        result[name] = layer_prediction(scores, name, layer)
    return result


def layer_prediction(scores: Scores, name: str, layer: LayerPlan) -> np.ndarray:
    """First-order prediction of one layer's contribution, float64 [N]; see `predict`."""
    total = np.zeros(len(scores), np.float64)
    for part in _parts(scores, name, layer):
        total += part
    return total


def predict_second_order(
    curvature: Curvature, plan: Plan, table: ModelTable
) -> dict[str, np.ndarray]:
    """Second-order terms of every layer under a plan, operand by operand and weight alone.

    Where they are as large as the first-order prediction, read the secant instead.

    Args:
      curvature: from `jaxrmils.sensitivity.curvature`; must hold the plan's candidates.
      plan: for the same model.
      table: the model's.

    Returns:
      Per quantized layer, float64 [N]: estimates of 1/2 eps' H eps, summed over its operands and
      its weight without their cross terms.

    Raises:
      PlanError: a format of the plan is not in the curvature, or it is another model's.
    """
    check_plan(plan, table)
    if curvature.fingerprint != plan.fingerprint:
        raise PlanError("the curvature was computed for another model; compute it for this one")
    result = {}
    for name, layer in plan.layers.items():
        if layer.is_float:
            continue
        total = np.zeros(len(curvature), np.float64)
        try:
            if layer.weight_bits < FLOAT_BITS:
                total += curvature.weight(name, layer.weight_candidate)
            rows = table.layer[name].activations
            for row, candidate in zip(rows, layer.activation_candidates, strict=False):
                total += curvature.activation(row.site, row.position, candidate)
        except ValueError as error:
            raise PlanError(f"layer {name}: no curvature for the format {layer.format}") from error
        result[name] = total
    return result


def _parts(scores: Scores, name: str, layer: LayerPlan) -> list[np.ndarray]:
    parts = []
    try:
        if layer.weight_bits < FLOAT_BITS:
            parts.append(scores.weight(name, layer.weight_candidate))
        rows = scores.table.layer[name].activations
        for row, candidate in zip(rows, layer.activation_candidates, strict=False):
            parts.append(scores.activation(row.site, row.position, candidate))
    except ValueError as error:
        raise not_scored(scores, name, layer) from error
    return parts


def not_scored(scores: Scores | ScoreMoments, name: str, layer: LayerPlan) -> PlanError:
    """The error for a layer in a format that scores do not hold; it says what to score."""
    wanted = {"activation": layer.activation_candidates}
    if layer.weight_bits < FLOAT_BITS:
        wanted["weight"] = (layer.weight_candidate,)
    advice = _advice(scores, wanted)
    return PlanError(f"layer {name}: the format {layer.format} was not scored; {advice}")


def _advice(scores: Scores | ScoreMoments, wanted: Mapping[str, tuple[Candidate, ...]]) -> str:
    """What to score, by the operand's kind."""
    missing = []
    for kind, candidates in wanted.items():
        known = getattr(scores, f"{kind}_candidates")
        found = [str(c) for c in dict.fromkeys(candidates) if c not in known]
        if found:
            missing.append(f"{kind}_candidates with {', '.join(found)}")
    if not missing:
        return "no calibration example reached it"
    return (
        f"score it with {' and '.join(missing)}: `candidates_for` names them, and `jaxrmils "
        "quantize` scores the formats of config.policy.formats"
    )

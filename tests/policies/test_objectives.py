"""Objectives from saved scores, against sums written out."""

import dataclasses

import invented
import numpy as np
import pytest
from stages import scored, traced, unreached

from jaxrmils.policies import LayerPlan, PlanError
from jaxrmils.policies.objectives import OBJECTIVES, layer_options, tangent_costs
from jaxrmils.sensitivity import Candidate, directions, fisher


def model():
    """A dense layer, a product of activations, and a lookup."""
    return invented.table(
        invented.row("dense", "dense", 8, (0,)),
        invented.row("dot", "dot"),
        invented.row("lookup", "lookup", 8, (1,)),
        leaf_bits=[256, 256],
    )


def column(scores, layer, parts):
    """A layer's contributions: `parts` are (operand row or "weight", candidate)."""
    total = np.zeros(len(scores))
    for row, candidate in parts:
        if row == "weight":
            site = scores.weight_rows.index(layer)
            total += scores.weights[:, site, scores.weight_candidates.index(candidate)]
        else:
            total += scores.activations[:, row, scores.activation_candidates.index(candidate)]
    return total


def test_formulas():
    scores = invented.scores(model())
    options = layer_options(scores, ["w4a8"])
    dense, dot = LayerPlan(4, 8, ("nearest",)), LayerPlan(32, 8, ("nearest", "nearest"))
    columns = {
        ("dense", dense): column(scores, "dense", [("weight", Candidate(4)), (0, Candidate(8))]),
        ("dot", dot): column(scores, "dot", [(1, Candidate(8)), (2, Candidate(8))]),
        ("lookup", LayerPlan(4)): column(scores, "lookup", [("weight", Candidate(4))]),
    }
    formulas = {
        "signed": lambda c: c.mean(),
        "upper_bound": lambda c: c.mean() + 2.5 * np.std(c, ddof=1) / np.sqrt(len(c)),
        "squared": lambda c: np.mean(c**2),
    }
    assert set(formulas) == set(OBJECTIVES)
    for objective, formula in formulas.items():
        costs = tangent_costs(scores, objective, options, z=2.5)
        assert costs.objective == objective
        assert costs.unit == ("squared nats" if objective == "squared" else "nats")
        for (name, layer), values in columns.items():
            assert set(costs.options[name]) == {LayerPlan(), layer}
            assert costs.options[name][LayerPlan()] == 0
            assert costs.options[name][layer] == pytest.approx(formula(values), rel=1e-6)


def test_the_sum_of_bounds_is_a_bound_of_the_sum():
    scores = invented.scores(model(), shared=2.0)
    options = layer_options(scores, ["w4a4"])
    costs = tangent_costs(scores, "upper_bound", options, z=1.0)
    layers = {name: own[-1] for name, own in options.items()}
    every = [(0, Candidate(4)), (1, Candidate(4)), (2, Candidate(4))]
    total = column(scores, "dense", [*every, ("weight", Candidate(4))])
    total += column(scores, "lookup", [("weight", Candidate(4))])
    joint = total.mean() + np.std(total, ddof=1) / np.sqrt(len(total))
    assert costs.total(layers) >= joint
    signed = tangent_costs(scores, "signed", options)
    assert signed.total(layers) == pytest.approx(total.mean(), rel=1e-6)


def test_options_are_what_layers_can_have():
    found = layer_options(invented.scores(model()), ["w8a8", "w4", "int8", "w4a8"])
    assert [p.format for p in found["dense"]] == ["float", "w8a8", "w4", "w4a8"]
    assert [p.format for p in found["dot"]] == ["float", "a8"]
    assert [p.format for p in found["lookup"]] == ["float", "w8", "w4"]


def test_directed_options_go_against_the_slope():
    scores = invented.scores(model())
    values = np.zeros_like(scores.activations)
    index = scores.activation_candidates.index
    values[:, 0, index(Candidate(8, "floor"))] = -1
    values[:, 1, index(Candidate(8, "ceil"))] = -1
    values[:, 2, index(Candidate(8, "floor"))] = -1
    scores = dataclasses.replace(scores, activations=values)
    found = layer_options(scores, ["w8a8"], "directed")
    assert [p.rounding for p in found["dense"]] == [(), ("nearest",), ("floor",)]
    assert [p.rounding for p in found["dot"]] == [(), ("nearest",) * 2, ("ceil", "floor")]
    costs = tangent_costs(scores, "signed", found)
    assert min(costs.options["dot"].values()) == -2


def test_proposed_directions_are_options():
    scores = scored("transformer")
    proposed = directions(scores, fisher(scores), errors=0.0)
    found = layer_options(scores, ["w4a4"], proposed)
    row = next(r for r in scores.table.layers if len(found[r.name]) == 3)
    expected = tuple(proposed[4][a.site][a.position] for a in row.activations)
    assert found[row.name][2].rounding == expected != found[row.name][1].rounding


def test_layers_that_no_example_reached_keep_their_activations():
    missing = unreached("cond_parameter")
    assert missing and traced("cond_parameter")
    found = layer_options(scored("cond_parameter"), ["w8a8", "w8"])
    for name, own in found.items():
        assert any(p.activation_bits == 8 for p in own) == (name not in missing)


def test_clusters_widen_the_bound():
    scores = invented.scores(model())
    options = layer_options(scores, ["w8a8"])
    pairs = np.arange(len(scores)) // 2
    alone = tangent_costs(scores, "upper_bound", options, clusters=np.arange(len(scores)))
    assert alone.options == tangent_costs(scores, "upper_bound", options).options
    values = column(scores, "lookup", [("weight", Candidate(8))])
    means = values.reshape(-1, 2).mean(axis=1)
    expected = values.mean() + 1.645 * np.std(means, ddof=1) / np.sqrt(len(means))
    found = tangent_costs(scores, "upper_bound", options, clusters=pairs)
    assert found.options["lookup"][LayerPlan(8)] == pytest.approx(expected, rel=1e-6)


def test_refusals():
    scores = invented.scores(model())
    options = layer_options(scores, ["w8a8"])
    with pytest.raises(PlanError, match="objective 'fisher'; expected one of signed"):
        tangent_costs(scores, "fisher", options)
    for z in (0, -1, float("nan"), float("inf"), "95%"):
        with pytest.raises(PlanError, match="z is"):
            tangent_costs(scores, "upper_bound", options, z=z)
    one = dataclasses.replace(
        scores, loss=scores.loss[:1], activations=scores.activations[:1], weights=scores.weights[:1]
    )
    with pytest.raises(PlanError, match="two or more examples"):
        tangent_costs(one, "upper_bound", options)
    with pytest.raises(PlanError, match="rounding 'floor'; expected 'nearest'"):
        layer_options(scores, ["w8a8"], "floor")
    few = dataclasses.replace(
        scores, activations=scores.activations[..., :1], activation_candidates=(Candidate(8),)
    )
    with pytest.raises(PlanError, match="'directed' needs int8 floor and int8 ceil"):
        layer_options(few, ["w8a8"], "directed")
    with pytest.raises(PlanError, match="w4a4 was not scored"):
        tangent_costs(few, "signed", layer_options(few, ["w4a4"]))

"""RMILS on scores with chosen numbers; the expected mu are worked out here."""

import dataclasses

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import scored, traced
from synthetic import scores, steps

from jaxrmils import assign, mu_values, rmils, uniform
from jaxrmils.policies import PlanError, check_plan
from jaxrmils.policies.plan import FLOAT_LAYER

GRAPH, RANGES = synthetic.setup()
# Indices of ACTIVATION_CANDIDATES.
FLOOR8, CEIL8, FLOOR4, CEIL4 = 1, 2, 4, 5
SPREAD = np.array([-1, 1, -2, 2, -3, 3, -4, 4], np.float32)


def with_mu(row, mu8, mu4, sign=-1.0):
    """Columns that give a row mu8 and mu4; sign -1 lowers the loss under floor."""
    return {
        (row, FLOOR8): sign * mu8 * steps(row, 8) / 2,
        (row, CEIL8): -sign * mu8 * steps(row, 8) / 2,
        (row, FLOOR4): sign * mu4 * steps(row, 4) / 2,
        (row, CEIL4): -sign * mu4 * steps(row, 4) / 2,
    }


def mus(scores, **kwargs):
    tree = assign(GRAPH, scores.contributions(), RANGES, **kwargs)
    decisions = {**tree.params["first"], **tree.params["second"], **tree.dots}
    return {name: np.asarray(decision.mu) for name, decision in decisions.items()}


def test_mu_by_hand():
    data = scores({**with_mu(0, 0.5, 0.25), **with_mu(2, 0.1, 0.2), **with_mu(3, 0.3, 0.7, 1.0)})
    found = mus(data)
    np.testing.assert_allclose(found["first"], [0.5, 0.25], rtol=1e-5)
    np.testing.assert_array_equal(found["second"], [0, 0])
    # A product's operands add up.
    np.testing.assert_allclose(found["dot_0"], [0.4, 0.9], rtol=1e-5)


def test_t_by_hand():
    column = -1 + 0.1 * SPREAD
    data = scores({(0, FLOOR8): column, (2, FLOOR4): column, (3, CEIL4): 2 * column[::-1]})
    found = mus(data, normalization="t")
    deviation = np.std(column, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(found["first"], [1 / deviation, 0], rtol=1e-4)
    total = column + 2 * column[::-1]
    expected = abs(total.mean()) / (np.std(total, ddof=1) / np.sqrt(8))
    np.testing.assert_allclose(found["dot_0"], [0, expected], rtol=1e-4)


def test_cosine_by_hand():
    data = scores(with_mu(1, 0.6, 0.3), square={1: 4.0})
    size = 3 * 6  # elements of the layer's input for one example
    found = mus(data, normalization="cosine")
    np.testing.assert_allclose(found["second"], np.array([0.6, 0.3]) / np.sqrt(size * 4), rtol=1e-5)


def test_direction_against_the_sign():
    data = scores({**with_mu(0, 1, 1), **with_mu(1, 1, 1, sign=1.0)})
    plan = rmils(GRAPH, data, mu=0.5)
    assert plan.layers["first"].rounding == ("floor",)
    assert plan.layers["second"].rounding == ("ceil",)
    mixed = scores({**with_mu(2, 1, 1), **with_mu(3, 1, 1, sign=1.0)})
    assert rmils(GRAPH, mixed, mu=0.5).layers["dot_0"].rounding == ("floor", "ceil")


def test_each_width_has_its_own_direction():
    columns = with_mu(0, 1, 1)
    columns |= {k: v for k, v in with_mu(0, 1, 1, sign=1.0).items() if k[1] in (FLOOR4, CEIL4)}
    assert rmils(GRAPH, scores(columns), mu=0.5).layers["first"].rounding == ("ceil",)
    only8 = rmils(GRAPH, scores(columns), mu=0.5, bits=(8,)).layers["first"]
    assert only8.format == "w8a8" and only8.rounding == ("floor",)


@pytest.mark.parametrize(
    "mu8, mu4, format",
    [(1, 1, "w4a4"), (0, 1, "w4a4"), (1, 0, "w8a8"), (0, 0, "float"), (0.49, 0.49, "float")],
)
def test_the_fewest_bits_that_pass(mu8, mu4, format):
    layer = rmils(GRAPH, scores(with_mu(0, mu8, mu4)), mu=0.5).layers["first"]
    assert layer.format == format
    assert layer.rounding == (("floor",) if format != "float" else ())


def test_balanced_demands_a_predicted_gain():
    # int4: the weight's noise outweighs the gain of the activations; int8: it does not.
    columns, gain4 = with_mu(0, 1, 1), steps(0, 4) / 2
    data = scores(columns, weights={(0, 1): 2 * gain4})
    assert rmils(GRAPH, data, mu=0.5).layers["first"].format == "w4a4"
    assert rmils(GRAPH, data, mu=0.5, variant="balanced").layers["first"].format == "w8a8"
    # With int8 weights the noise of int4 weights does not count.
    wide = rmils(GRAPH, data, mu=0.5, variant="balanced", weights="int8")
    assert wide.layers["first"].format == "w8a4"
    # Both directions raise the loss (clipping): radical takes it, balanced does not.
    both = scores({(1, FLOOR8): 1.0, (1, CEIL8): 2.0})
    assert rmils(GRAPH, both, mu=0.5).layers["second"].rounding == ("floor",)
    assert rmils(GRAPH, both, mu=0.5, variant="balanced").layers["second"].is_float


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0, 2, width=16), min_size=8, max_size=8),
    st.lists(st.floats(0, 2, width=16), min_size=2, max_size=5),
    st.sampled_from(["raw", "t", "cosine"]),
)
def test_a_larger_threshold_never_takes_fewer_bits(values, thresholds, normalization):
    columns = {}
    for row in range(4):
        columns |= with_mu(row, values[2 * row], values[2 * row + 1])
    columns = {k: v * (1 + 0.1 * SPREAD) for k, v in columns.items()}
    data = scores(columns)
    previous = dict.fromkeys(synthetic.LAYERS, 0)
    for threshold in sorted(thresholds):
        plan = rmils(GRAPH, data, mu=threshold, normalization=normalization)
        check_plan(plan, data.table)
        bits = {name: layer.activation_bits for name, layer in plan.layers.items()}
        assert all(bits[name] >= previous[name] for name in bits)
        previous = bits


def test_bits_of_the_weights():
    data = scores({**with_mu(0, 1, 1), **with_mu(2, 1, 1)})
    formats = {
        weights: rmils(GRAPH, data, mu=0.5, weights=weights).layers["first"].format
        for weights in ("same", "int8", "int4", "float")
    }
    assert formats == {"same": "w4a4", "int8": "w8a4", "int4": "w4a4", "float": "float"}
    plan = rmils(GRAPH, data, mu=0.5, weights="float")
    check_plan(plan, data.table)
    assert plan.layers["dot_0"].format == "a4"
    assert plan.layers["first"] == FLOAT_LAYER


def test_the_shift_probe_gives_mu_and_direction():
    shift = np.zeros((8, 4, 2), np.float32)
    shift[:, 0] = [0.6, 0.2]  # positive slope: floor
    shift[:, 2], shift[:, 3] = [-0.3, -0.1], [0.3, 0.1]
    data = scores(with_mu(0, 5, 5, sign=1.0), shift=shift)
    np.testing.assert_allclose(mus(data, shifts=data.shifts())["first"], [0.6, 0.2], rtol=1e-6)
    np.testing.assert_allclose(mus(data, shifts=data.shifts())["dot_0"], [0.6, 0.2], rtol=1e-6)
    plan = rmils(GRAPH, data, mu=0.5, probe="shift")
    assert plan.layers["first"].format == "w8a8" and plan.layers["first"].rounding == ("floor",)
    assert plan.layers["dot_0"].rounding == ("ceil", "floor")
    # Balanced asks for the predicted change of that direction, which here is a loss.
    balanced = rmils(GRAPH, data, mu=0.5, probe="shift", variant="balanced")
    assert balanced.layers["first"].is_float


def test_lookups():
    graph, _, _ = traced("tied_embedding")
    data = scored("tied_embedding")
    row = data.table.layer["Embed_0/embedding"]
    untied = dataclasses.replace(row, sites=row.sites[:1], activations=())
    table = dataclasses.replace(
        data.table,
        layers=tuple(untied if r.name == row.name else r for r in data.table.layers),
    )
    only_lookup = dataclasses.replace(data, table=table)
    for lookups, bits in (("int8", 8), ("int4", 4), ("float", 32)):
        plan = rmils(graph, only_lookup, mu=1e9, lookups=lookups)
        layer = plan.layers["Embed_0/embedding"]
        assert (layer.weight_bits, layer.activation_bits, layer.rounding) == (bits, 32, ())


def test_skip_and_force():
    data = scores({**with_mu(0, 1, 1), **with_mu(1, 1, 1)})
    plan = rmils(GRAPH, data, mu=0.5, skip=("first",), force={"dot_0": "int8"})
    formats = {name: layer.format for name, layer in plan.layers.items()}
    assert formats == {"first": "float", "second": "w4a4", "dot_0": "a8"}
    with pytest.raises(PlanError, match="matches no layer"):
        rmils(GRAPH, data, skip=("frist",))


def test_the_record_holds_the_settings():
    policy = rmils(GRAPH, scores(), mu=0.3, variant="balanced", bits=(8,)).policy
    assert policy == {
        "name": "rmils",
        "mu": 0.3,
        "variant": "balanced",
        "normalization": "raw",
        "probe": "tangent",
        "bits": [8],
        "weights": "same",
        "lookups": "float",
        "skip": [],
        "force": {},
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mu": -0.1}, "can't be negative"),
        ({"mu": float("nan")}, "can't be negative"),
        ({"variant": "bold"}, "variant 'bold'"),
        ({"normalization": "z"}, "normalization 'z'"),
        ({"probe": "secant"}, "probe 'secant'"),
        ({"probe": "shift"}, "shift_probe=True"),
        ({"bits": (2,)}, r"bits are \(2,\)"),
        ({"bits": ()}, "expected 8, 4 or both"),
        ({"weights": "int2"}, "weight format 'int2'"),
        ({"lookups": "w8"}, "weight format 'w8'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        rmils(GRAPH, scores(), **options)


def test_what_cannot_be_computed_is_refused():
    shift = np.zeros((8, 4, 2), np.float32)
    with pytest.raises(PlanError, match="no cosine form"):
        rmils(GRAPH, scores(shift=shift), probe="shift", normalization="cosine")
    with pytest.raises(PlanError, match="two or more examples"):
        rmils(GRAPH, scores(count=1), normalization="t")
    few = synthetic.without(scores(), activation_candidates=scores().activation_candidates[:1])
    with pytest.raises(PlanError, match="int8 floor was not scored"):
        rmils(GRAPH, few)
    with pytest.raises(PlanError, match="scores were made for another model"):
        rmils(traced("plain")[0], scores())


def test_rmils_is_not_uniform_by_accident():
    data = scores({**with_mu(0, 1, 0), **with_mu(1, 0, 1)})
    plan = rmils(GRAPH, data, mu=0.5)
    assert plan.counts() == {"w8a8": 1, "w4a4": 1, "float": 1}
    assert plan.layers != uniform(data.table, "int8").layers


def test_mu_values_are_what_the_threshold_is_compared_with():
    graph, _, _ = traced("plain")
    found = scored("plain")
    for normalization in ("raw", "t", "cosine"):
        values = mu_values(graph, found, normalization=normalization)
        for name, by_bits in values.items():
            for bits, value in by_bits.items():
                kwargs = {"normalization": normalization, "bits": (bits,)}
                below = rmils(graph, found, mu=value * 0.999, **kwargs)
                above = rmils(graph, found, mu=value * 1.001, **kwargs)
                assert below.layers[name].activation_bits == bits
                assert above.layers[name].is_float

import jax
import numpy as np
import pytest
import synthetic
from stages import calibrated, scored, traced

from jaxrmils import assign, plan_from_tree, rmils
from jaxrmils.policies import Decision, PlanError, check_plan


def is_entry(x):
    return isinstance(x, dict) and all(isinstance(v, Decision) for v in x.values())


def tree_of(name, **kwargs):
    graph, _, _ = traced(name)
    return assign(graph, scored(name).contributions(), calibrated(name), **kwargs)


@pytest.mark.parametrize("name", ["transformer", "tied_embedding", "nnx_stack", "lstm", "plain"])
def test_the_tree_mirrors_the_params(name):
    graph, params, _ = traced(name)
    tree = tree_of(name, mu=0.01)
    assert jax.tree.structure(tree.params, is_leaf=is_entry) == jax.tree.structure(params)
    entries = jax.tree.leaves(tree.params, is_leaf=is_entry)
    for index, entry in enumerate(entries):
        owners = {w.name for w in graph.weights.values() if index in w.leaves}
        assert set(entry) == owners
    assert set(tree.dots) == {s.layer for s in graph.sites if s.weight is None}


@pytest.mark.parametrize("name", ["transformer", "tied_embedding", "scanned_stack", "cond_data"])
@pytest.mark.parametrize("variant", ["radical", "balanced"])
def test_plan_from_tree_is_the_policys_plan(name, variant):
    graph, _, _ = traced(name)
    tree = tree_of(name, mu=0.02, variant=variant)
    plan = plan_from_tree(graph, tree, {"name": "mine"})
    check_plan(plan, scored(name).table)
    assert plan.policy == {"name": "mine"}
    expected = rmils(graph, scored(name), mu=0.02, variant=variant)
    assert plan.layers == expected.layers
    saved = jax.tree.unflatten(jax.tree.structure(tree), jax.device_get(jax.tree.leaves(tree)))
    assert plan_from_tree(graph, saved).layers == plan.layers


@pytest.mark.parametrize("name", ["transformer", "scanned_stack"])
def test_jitted_with_a_traced_threshold(name):
    graph, _, _ = traced(name)
    ranges, contributions = calibrated(name), scored(name).contributions()
    jitted = jax.jit(lambda c, mu: assign(graph, c, ranges, mu=mu))
    for mu in (0.0, 0.02, 1e9):
        tree, expected = jitted(contributions, mu), tree_of(name, mu=mu)
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


def test_an_unreached_layer_stays_float():
    tree = tree_of("cond_parameter", mu=0.0)
    decision = tree.params["no"]["no"]
    assert int(decision.weight_bits) == int(decision.activation_bits) == 32
    assert int(tree.params["yes"]["yes"].activation_bits) == 4


def test_weight_bits_apart_from_activation_bits():
    tree = tree_of("plain", mu=0.0, weights="int8")
    decision = tree.params["right"]["right"]
    assert (int(decision.weight_bits), int(decision.activation_bits)) == (8, 4)


def test_ranges_of_another_model_are_refused():
    graph, _ = synthetic.setup()
    with pytest.raises(PlanError, match="another model"):
        assign(graph, synthetic.scores().contributions(), calibrated("plain"))

"""Parameters whose leaves are kept: a pytree like any other, that nobody can change in place."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxrmils as jr
from jaxrmils.lowering import QuantizedParams, QuantizedWeight


def model(width=4):
    params = {"a": jnp.eye(width), "b": jnp.full((width, 2), 0.5), "bias": jnp.ones(2)}
    inputs = jax.random.normal(jax.random.key(0), (3, width))

    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"]

    graph = jr.trace(apply, params, inputs)
    ranges = jr.calibrate(graph, params, [inputs])
    return jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "w4a8"), ranges), inputs


MODEL, INPUTS = model()
PARAMS = MODEL.params


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_mappings_can_not_be_changed():
    given = {"bias": jnp.ones(2)}
    sums = {"a": jnp.ones(2, jnp.int32)}
    weight = QuantizedWeight(PARAMS.weights["a"].tensor, sums)
    made = QuantizedParams(given, {"a": weight}, {})
    with pytest.raises(ValueError, match="immutable"):
        made.leaves["bias"] = jnp.zeros(2)
    with pytest.raises(ValueError, match="immutable"):
        made.weights["a"].sums["a"] = jnp.zeros(2, jnp.int32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.leaves = {}
    before = jax.tree.leaves(made)
    given["bias"], sums["a"] = jnp.zeros(2), jnp.zeros(2, jnp.int32)  # Copies were taken.
    assert made.leaves["bias"][0] == 1 and made.weights["a"].sums["a"][0] == 1
    assert all(a is b for a, b in zip(before, jax.tree.leaves(made), strict=True))


def test_a_replaced_field_is_seen():
    doubled = {name: 2 * leaf for name, leaf in PARAMS.leaves.items()}
    changed = dataclasses.replace(PARAMS, leaves=doubled)
    jitted = jax.jit(MODEL.apply)
    difference = jitted(changed, INPUTS) - jitted(PARAMS, INPUTS)
    np.testing.assert_allclose(difference, np.ones((3, 2)), rtol=1e-6)


def test_leaves_are_those_of_the_fields():
    fields = [PARAMS.leaves, PARAMS.weights, PARAMS.grids]
    assert list(map(id, jax.tree.leaves(PARAMS))) == list(map(id, jax.tree.leaves(fields)))
    mapped = jax.tree.map(lambda leaf: leaf + leaf, PARAMS)
    assert_same(mapped.weights, jax.tree.map(lambda leaf: leaf + leaf, PARAMS.weights))
    assert_same(mapped, dataclasses.replace(mapped, leaves=dict(mapped.leaves)))


def test_equal_structures_share_a_compiled_program():
    traces = []

    @jax.jit
    def total(params):
        traces.append(params)
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(params))

    again, _ = model()
    for params in (PARAMS, again.params, jax.tree.map(jnp.array, PARAMS), copy.deepcopy(PARAMS)):
        total(params)
    assert len(traces) == 1
    total(model(width=6)[0].params)
    assert len(traces) == 2


def test_paths_name_the_leaf():
    paths, _ = jax.tree_util.tree_flatten_with_path(PARAMS)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    assert found[".leaves['bias']"] is PARAMS.leaves["bias"]
    assert found[".weights['a'].tensor.values"] is PARAMS.weights["a"].tensor.values
    assert found[".grids['b'][0].scale"] is PARAMS.grids["b"][0].scale
    assert len(found) == len(jax.tree.leaves(PARAMS))


def test_none_and_tuples_may_stand_for_leaves():
    nothing = jax.tree.map(lambda leaf: None, PARAMS)
    assert jax.tree.leaves(nothing) == [] and nothing.leaves["bias"] is None
    pairs = jax.tree.map(lambda leaf: (leaf, leaf), PARAMS)
    outer, inner = jax.tree.structure(PARAMS), jax.tree.structure((0, 0))
    assert_same(jax.tree.transpose(outer, inner, pairs)[1], PARAMS)
    mapped = jax.vmap(MODEL.apply, in_axes=(jax.tree.map(lambda leaf: None, PARAMS), 0))
    np.testing.assert_array_equal(mapped(PARAMS, INPUTS[:, None])[:, 0], MODEL(INPUTS))


def test_copies_pickles_and_checkpoints(tmp_path):
    _ = jax.tree.leaves(PARAMS)
    assert_same(pickle.loads(pickle.dumps(PARAMS)), PARAMS)
    assert_same(copy.copy(PARAMS), PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", PARAMS)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "params", PARAMS), PARAMS)


def test_one_axis_for_a_whole_field_is_told():
    with pytest.raises(ValueError, match="in_axes"):
        jax.vmap(MODEL.apply, in_axes=(QuantizedParams(None, 0, 0), 0))(PARAMS, INPUTS[:, None])

"""Leaves that are only read together, and what stands for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxrmils as jr
from jaxrmils.graph.builder import TraceError
from jaxrmils.graph.trace import interpret


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(4)(x.mean((1, 2)))


def normalized():
    model, x = Normalized(), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    variables = model.init(jax.random.key(1), x)
    drawn = jax.tree.map(
        lambda a: a + jax.random.uniform(jax.random.key(2), a.shape, a.dtype), variables
    )
    apply, params = jr.from_linen(model, drawn)
    return jr.trace(apply, params, x), params, x


def names(function, params, shape=(4, 3)):
    graph = jr.trace(function, params, jnp.ones(shape))
    return {n: sorted(graph.leaf_names[i] for i in graph.folded_leaves(n)) for n in graph.folds}


def vectors(*which):
    return {"w": jnp.ones((3, 3))} | {n: jnp.linspace(1.0, 2.0, 3) for n in which}


def test_of_a_normalization_scale_and_variance_are_one():
    graph, params, x = normalized()
    (name,) = graph.folds
    assert name == "{BatchNorm_0/scale,batch_stats/BatchNorm_0/var}"
    assert len(graph.folded_leaves(name)) == 2
    norm = params["params"]["BatchNorm_0"]
    made = norm["scale"] * jax.lax.rsqrt(params["batch_stats"]["BatchNorm_0"]["var"] + 1e-5)
    # A run reads what it is given instead of them, at any batch size.
    leaves = [
        None if i in graph.folded_leaves(name) else leaf
        for i, leaf in enumerate(jax.tree.leaves(params))
    ]
    handler = lambda call: (call.bind(*call.operands()), None)  # noqa: E731
    for count in (1, 2, 4):
        given = made.reshape(1, 1, 1, -1)
        found, _ = interpret(graph, handler, leaves, x[:count], folded={name: given})
        np.testing.assert_allclose(found, graph.apply(params, x[:count]), rtol=1e-5, atol=1e-6)
        zero, _ = interpret(graph, handler, leaves, x[:count], folded={name: 0 * given})
        assert np.abs(zero - found).max() > 0.1


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_a_quantized_model_holds_it_instead(backend):
    graph, params, x = normalized()
    ranges, plan = jr.calibrate(graph, params, [x]), jr.uniform(jr.tabulate(graph), "w8a8")
    model = jr.quantize(graph, params, plan, ranges, backend=backend)
    (name,) = graph.folds
    held = model.params.leaves
    assert name in held and held[name].size == 8
    assert not {graph.leaf_names[i] for i in graph.folded_leaves(name)} & held.keys()
    # A model that was saved with all its leaves runs as before, with the same results.
    every = dict(zip(graph.leaf_names, jax.tree.leaves(params), strict=True))
    leaves = {n: leaf for n, leaf in every.items() if "kernel" not in n}
    old = dataclasses.replace(model.params, leaves=leaves)
    for mode in ("integer", "simulate"):
        run = jax.jit(lambda p, x, mode=mode: model.apply(p, x, mode=mode))
        np.testing.assert_array_equal(run(model.params, x), run(old, x))


def test_a_model_that_reads_them_otherwise_at_another_batch_size_is_refused():
    keys = vectors("a", "b")

    def changes_at_four(p, x):
        y = (x @ p["w"]) * (p["a"] / p["b"])
        return y + p["b"] if len(x) == 4 else y

    graph = jr.trace(changes_at_four, keys, jnp.ones((3, 3)))
    ranges = jr.calibrate(graph, keys, [jnp.ones((3, 3))])
    model = jr.quantize(graph, keys, jr.uniform(jr.tabulate(graph), "w8a8"), ranges)
    assert "{a,b}" in model.params.leaves
    np.testing.assert_allclose(model(jnp.ones((2, 3))).shape, (2, 3))
    with pytest.raises(TraceError, match=r"\{a,b\} are held as one, but at this input shape"):
        model(jnp.ones((4, 3)))


def test_only_what_is_smaller_and_read_by_nothing_else():
    keys = vectors("a", "b", "c")
    assert names(lambda p, x: (x @ p["w"]) * (p["a"] / p["b"]), keys) == {"{a,b}": ["a", "b"]}
    # One leaf is as small as what is made of it; one that is read elsewhere stays.
    assert names(lambda p, x: (x @ p["w"]) * (2 * p["a"]), keys) == {}
    assert names(lambda p, x: (x @ p["w"]) * (p["a"] / p["b"]) + p["b"], keys) == {}
    shared = lambda p, x: (x @ p["w"]) * (p["a"] / p["b"] / p["c"]) + p["c"]  # noqa: E731
    assert names(shared, keys) == {"{a,b}": ["a", "b"]}
    twice = lambda p, x: ((x @ p["w"]) * (p["a"] / p["b"])) @ p["w"] + p["a"] / p["b"]  # noqa: E731
    assert names(twice, keys) == {"{a,b}": ["a", "b"]}
    # The weight of a site is quantized, not folded.
    assert names(lambda p, x: x @ (p["w"] * p["a"] * p["b"]), keys) == {}


def test_what_mixes_elements_or_depends_on_the_batch_is_left_alone():
    keys = vectors("a", "b", "c")
    assert names(lambda p, x: (x @ p["w"]) * (jnp.sum(p["a"]) + jnp.sum(p["b"])), keys) == {}
    spread = lambda p, x: (x @ p["w"]) * jnp.broadcast_to(p["a"], x.shape) / p["b"]  # noqa: E731
    both = lambda p, x: (x @ p["w"]) * (jnp.broadcast_to(p["a"], x.shape) * p["b"])  # noqa: E731
    for function in (spread, both):
        assert names(function, keys) == {}
        graph = jr.trace(function, keys, jnp.ones((4, 3)))
        ranges = jr.calibrate(graph, keys, [jnp.ones((4, 3))])
        model = jr.quantize(graph, keys, jr.uniform(jr.tabulate(graph), "w8a8"), ranges)
        for count in (1, 4):
            x = jnp.ones((count, 3))
            np.testing.assert_allclose(model(x), graph.apply(keys, x), rtol=0.02)

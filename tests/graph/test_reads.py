"""Who reads a value besides sites, and what they find where values are shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random
from test_interpret import rerun

from jaxrmils import trace

PARAMS = {name: random(5, 5, seed=i) for i, name in enumerate("abc")}
X = random(4, 5, seed=9)


def plus_one(call):
    """Every site's activation is one larger."""
    operands = list(call.operands())
    for index in call.site.activations:
        operands[index] = operands[index] + 1
    return call.bind(*operands), None


def block(p, x):
    return jnp.sin(x) + x @ p["a"] + 2 * x


def block_shared(p, x):
    return jnp.sin(x) + (x + 1) @ p["a"] + 2 * (x + 1)


def two_sites(p, x):
    return x @ p["a"] + x @ p["b"] + 3 * x


def two_sites_shared(p, x):
    return (x + 1) @ p["a"] + (x + 1) @ p["b"] + 3 * (x + 1)


def chain(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def chain_shared(p, x):
    return (jnp.tanh((x + 1) @ p["a"]) + 1) @ p["b"]


def returned(p, x):
    h = jnp.tanh(x)
    return h @ p["a"], h


def returned_shared(p, x):
    h = jnp.tanh(x) + 1
    return h @ p["a"], h


def scanned(p, x):
    return jax.lax.scan(lambda h, _: (h + jnp.tanh(h @ p["a"]), None), x, length=3)[0]


def scanned_shared(p, x):
    def body(h, _):
        return (h + 1) + jnp.tanh((h + 1) @ p["a"]), None

    return jax.lax.scan(body, x, length=3)[0]


def inside_jit(p, x):
    return jax.jit(lambda h: h + h @ p["a"])(x) + x


def inside_jit_shared(p, x):
    return (x + 1) + (x + 1) @ p["a"] + x


def jit_behind(p, x):
    return x @ p["a"] + jax.jit(lambda h: h @ p["b"] - h)(x)


def jit_behind_shared(p, x):
    return (x + 1) @ p["a"] + ((x + 2) @ p["b"] - (x + 2))


def branches(p, x):
    first = x @ p["a"]
    return first + jax.lax.cond(x[0, 0] > -9, lambda h: jnp.sin(h), lambda h: h @ p["b"], x)


def branches_shared(p, x):
    return (x + 1) @ p["a"] + jnp.sin(x + 1)


CASES = {
    "block": (block, block_shared, ("a",)),
    "two sites": (two_sites, two_sites_shared, ("a",)),
    "chain": (chain, chain_shared, ()),
    "returned": (returned, returned_shared, ("a",)),
    "scanned": (scanned, scanned_shared, ("a",)),
    "inside jit": (inside_jit, inside_jit_shared, ("a",)),
    "jit behind": (jit_behind, jit_behind_shared, ("a", "b")),
    "branches": (branches, branches_shared, ("a",)),
    "under remat": (jax.checkpoint(block), block_shared, ("a",)),
}


@pytest.mark.parametrize("name", CASES)
def test_later_readers_find_what_the_first_site_makes(name):
    apply, by_hand, sites = CASES[name]
    used = {k: v for k, v in PARAMS.items() if k in ("a", "b")}
    graph = trace(apply, used, X, shortcuts="codes")
    assert graph.shortcut_sites == sites
    found = rerun(graph, used, X, plus_one)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, by_hand(used, X))


@pytest.mark.parametrize("name", CASES)
def test_without_sharing_others_find_the_value_itself(name):
    apply, by_hand, sites = CASES[name]
    used = {k: v for k, v in PARAMS.items() if k in ("a", "b")}
    graph = trace(apply, used, X)
    assert graph.shortcut_sites == sites
    found = jax.tree.leaves(rerun(graph, used, X, plus_one)[0])
    shared = jax.tree.leaves(by_hand(used, X))
    same = [np.allclose(a, b, rtol=1e-5) for a, b in zip(found, shared, strict=True)]
    assert all(same) == (not sites)


def test_float32_operations_beside_the_site_store_nothing():
    def handler(call):
        call.bind_float32(call.operand(0) + 5, call.operand(1))
        return call.bind(*call.operands()), None

    graph = trace(block, PARAMS, X, shortcuts="codes")
    np.testing.assert_array_equal(rerun(graph, PARAMS, X, handler)[0], block(PARAMS, X))


def test_bfloat16_values_stay_bfloat16():
    params = {k: v.astype(jnp.bfloat16) for k, v in PARAMS.items()}
    graph = trace(two_sites, params, X.astype(jnp.bfloat16), shortcuts="codes")

    def handler(call):
        return call.bind_wide(call.operand(0).astype(jnp.float32) + 1, call.operand(1)), None

    found = rerun(graph, params, X.astype(jnp.bfloat16), handler)[0]
    assert found.dtype == jnp.bfloat16
    expected = two_sites_shared(PARAMS, X)
    np.testing.assert_allclose(np.float32(found), expected, atol=0.05 * np.abs(expected).max())


def test_graphs_of_either_kind_differ():
    float_graph, codes = (trace(block, PARAMS, X, shortcuts=s) for s in ("float", "codes"))
    assert float_graph.fingerprint != codes.fingerprint
    assert float_graph.fingerprint == trace(block, PARAMS, X).fingerprint


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="shortcuts is 'int8'; expected one of float, codes"):
        trace(block, PARAMS, X, shortcuts="int8")


def test_indices_that_are_read_again_are_no_shortcut():
    def embed(p, x):
        return p["a"][x].sum(axis=1) @ p["b"] + x.sum(axis=1, keepdims=True).astype(jnp.float32)

    used = {"a": PARAMS["a"], "b": PARAMS["b"]}
    graph = trace(embed, used, jnp.zeros((4, 3), jnp.int32), shortcuts="codes")
    assert {site.kind for site in graph.sites} == {"gather", "dot"}
    assert graph.shortcut_sites == ()

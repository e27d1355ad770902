"""Names, weights, loops and coverage of what tracing finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import assert_all_covered
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, linen, matrices, model, random

from jaxrmils.graph import interpret, tabulate, trace
from jaxrmils.graph.expression import Apply, Leaf, Output, evaluate, peel
from jaxrmils.graph.naming import Namer, joined, leaf_names


def graph_of(name):
    return trace(*model(name))


def names_of(graph):
    return [site.name for site in graph.sites]


ATTENTION = ["query/kernel", "key/kernel", "value/kernel", "dot_0", "dot_1", "out/kernel"]
NAMES = {
    "cnn": ["Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"],
    "separable_cnn": [*(f"Conv_{i}/kernel" for i in range(4)), "Dense_0/kernel"],
    "nnx_mlp": ["first/kernel", *(f"layers/{i}/kernel" for i in range(12)), "last/kernel"],
    "transformer": [
        *(f"MultiHeadDotProductAttention_0/{part}" for part in ATTENTION),
        "up/kernel",
        "down/kernel",
    ],
    "nnx_transformer": [*(f"attention/{part}" for part in ATTENTION), "up/kernel", "down/kernel"],
    "tied_embedding": ["Embed_0/embedding", "Dense_0/kernel", "Embed_0/embedding@1"],
    "scanned_stack": ["layers/Dense_0/kernel"],
    "remat_stack": ["layers/Dense_0/kernel"],
    "nnx_stack": ["layers/kernel"],
    "plain": ["right", "left", "einsum/0", "einsum/1"],
    "cond_parameter": ["first", "no", "no@1", "yes"],
    "cond_data": ["no", "yes", "last"],
    "custom_rules": ["jvp", "vjp"],
    "experts": ["experts", "dot_0", "dot_1"],
}
NAMES["bfloat16_transformer"] = NAMES["transformer"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_paths_of_the_params_tree(name):
    assert names_of(graph_of(name)) == NAMES[name]


@pytest.mark.parametrize("name", MODELS)
def test_names_do_not_depend_on_the_batch_size(name):
    apply, params, inputs = model(name)
    structs = [
        jax.tree.map(lambda x, b=b: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), inputs)
        for b in (1, 4, 7)
    ]
    one, four, seven = (trace(apply, params, each) for each in structs)
    assert one.sites == four.sites == seven.sites
    assert one.fingerprint == four.fingerprint == seven.fingerprint


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_is_covered(name):
    apply, params, inputs = model(name)
    graph = trace(apply, params, inputs)
    assert_all_covered(graph, apply, params, inputs)
    assert graph.coverage.count("site") == len(graph.sites) == len(graph.coverage.entries)
    text = graph.coverage.summary()
    dots = sum(site.kind != "gather" for site in graph.sites)
    assert text.startswith(f"{dots} of {dots} dots and convolutions can be quantized")


@pytest.mark.parametrize("name", MODELS)
def test_table_counts_every_leaf(name):
    graph = graph_of(name)
    table = tabulate(graph)
    assert table.size_bits({}) == table.float_bits == sum(table.leaf_bits)
    assert [row.name for row in table.layers] == list(graph.layers)
    everything = {row.name: (8, 8) for row in table.layers}
    assert table.size_bits(dict.fromkeys(everything, (4, 8))) < table.size_bits(everything)


def test_tied_table_is_one_weight_with_two_uses():
    graph = graph_of("tied_embedding")
    weight = graph.weights["Embed_0/embedding"]
    assert weight.uses == ("Embed_0/embedding", "Embed_0/embedding@1")
    assert weight.channel_axes == (0,)
    lookup, output = graph.layers["Embed_0/embedding"]
    assert (lookup.kind, output.kind) == ("gather", "dot")
    assert output.weight.permutation == (1, 0)
    assert lookup.activations == () and output.activations == (0,)
    assert not tabulate(graph).layer["Embed_0/embedding"].is_lookup


def test_scanned_stack_has_a_leading_layer_axis():
    graph = graph_of("scanned_stack")
    (site,) = graph.sites
    weight = graph.weights[site.name]
    assert weight.shape == (3, 8, 8) and weight.channel_axes == (0, 2)
    assert site.stacked_lengths == (3,)
    assert site.operands[0].shape == (1, 8)
    assert tabulate(graph).layers[0].activations[0].grids == 3


def test_recurrence_has_one_weight_and_one_grid():
    graph = graph_of("lstm")
    for row in tabulate(graph).layers:
        assert [a.grids for a in row.activations] == [1]
    site = graph.site["LSTMCell_0/hi/kernel"]
    assert [(loop.length, loop.stacked) for loop in site.loops] == [(6, False)]
    assert graph.weights[site.layer].shape == (4, 4)
    assert site.macs == 6 * 4 * 4
    joined_weight = graph.weights["OptimizedLSTMCell_0/{hf,hg,hi,ho}/kernel"]
    assert joined_weight.shape == (4, 16) and len(joined_weight.leaves) == 4


def test_depthwise_convolutions():
    graph = graph_of("separable_cnn")
    depthwise, doubled = graph.site["Conv_1/kernel"], graph.site["Conv_3/kernel"]
    assert graph.weights["Conv_1/kernel"].shape == (3, 3, 1, 4)
    assert graph.weights["Conv_1/kernel"].channel_axes == (3,)
    assert depthwise.macs == 4 * 4 * 4 * 9
    assert doubled.macs == 2 * 2 * 16 * 9


def test_weights_on_either_side_and_their_channels():
    graph = graph_of("plain")
    operand = {s.name: s.weight.operand for s in graph.sites}
    assert operand == {"right": 1, "left": 0, "einsum/0": 1, "einsum/1": 0}
    channels = {n: w.channel_axes for n, w in graph.weights.items()}
    assert channels == {"right": (1,), "left": (0,), "einsum/0": (0,), "einsum/1": (0,)}


def test_batch_axes_of_a_weight_are_channels():
    graph = graph_of("experts")
    assert graph.weights["experts"].channel_axes == (0, 2)
    assert [s.activations for s in graph.sites][1:] == [(0, 1), (0, 1)]


def test_vmapped_layers():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=1,
                axis_size=3,
            )
            return many(5, name="members")(x)

    graph = trace(*linen(Ensemble(), random(4, 6)))
    (site,) = graph.sites
    assert site.name == "members/kernel"
    assert graph.weights[site.name].shape == (3, 6, 5)
    assert graph.weights[site.name].channel_axes == (0, 2)


def test_constants_make_equal_weights():
    """The same scaling at two calls is the same weight; another scaling is another one."""

    def apply(params, x):
        x = jnp.tanh(x @ (params["w"] * 0.5))
        x = jnp.tanh(x @ (params["w"] * 0.5))
        return x @ (params["w"] * 0.25) @ params["w"][:, :6]

    graph = trace(apply, {"w": random(6, 6)}, random(4, 6))
    assert len(graph.weights) == 3
    assert [s.weight.name for s in graph.sites][:2] == ["w", "w"]
    assert len(set(names_of(graph))) == 4


def test_constants_inside_jit_tell_weights_apart():
    def scaled(number):
        constant = np.full((6,), number, np.float32)
        return jax.jit(lambda w: w * constant)

    def apply(params, x):
        return x @ scaled(1.0)(params["w"]) @ scaled(2.0)(params["w"])

    assert len(trace(apply, {"w": random(6, 6)}, random(4, 6)).weights) == 2


# What stays float, and why


def reasons(apply, params, inputs):
    graph = trace(apply, params, inputs)
    assert_all_covered(graph, apply, params, inputs)
    return [(e.status, e.reason) for e in graph.coverage.entries if e.status != "site"]


def test_while_loops_are_reported():
    def apply(params, x):
        def more(state):
            return jnp.sum(jnp.abs(state)) < 10.0

        return jax.lax.while_loop(more, lambda x: 2.0 * x @ params["w"], x)

    ((status, reason),) = reasons(apply, matrices("w"), random(4, 6))
    assert status == "float" and "while loop" in reason


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_ragged_dots_are_reported(wrap):
    def apply(params, x):
        groups = jnp.full((2,), x.shape[0], jnp.int32)
        flat = jnp.concatenate([x, x])
        return wrap(jax.lax.ragged_dot)(flat, params["w"], groups).reshape(x.shape[0], -1)

    ((status, reason),) = reasons(apply, {"w": random(2, 6, 6)}, random(4, 6))
    assert status == "float" and "ragged_dot" in reason


def test_products_of_parameters_are_folded():
    def apply(params, x):
        return x @ (params["a"] @ params["b"])

    graph = trace(apply, matrices("a", "b"), random(4, 6))
    assert names_of(graph) == ["{a,b}"]
    assert reasons(apply, matrices("a", "b"), random(4, 6))[0][0] == "folded"


def test_unused_dots():
    def apply(params, x):
        jax.jit(lambda x: x @ params["w"])(x)
        return x + 1.0

    assert reasons(apply, matrices("w"), random(4, 6)) == [("unused", "its result is not read")]


def test_closed_over_constants():
    constant = np.eye(6, dtype=np.float32)
    ((status, reason),) = reasons(
        lambda p, x: x @ constant + p["b"], {"b": jnp.ones(6)}, random(4, 6)
    )
    assert status == "float" and "pass it in params" in reason


def test_kernels_that_depend_on_the_inputs():
    def apply(params, x):
        kernel = jnp.mean(x, axis=0)[:, :, None] * params["w"]
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    ((status, reason),) = reasons(apply, {"w": jnp.ones((8, 3, 2))}, random(4, 8, 3))
    assert (status, reason) == ("float", "its kernel depends on the inputs")


def test_integer_dots():
    def apply(params, x):
        return (x.astype(jnp.int32) @ params["w"]).astype(jnp.float32)

    ((status, reason),) = reasons(apply, {"w": jnp.ones((6, 6), jnp.int32)}, random(4, 6))
    assert status == "float" and "int32" in reason


def test_custom_rules_are_noted_and_kept_where_there_is_no_site():
    assert all("custom" in site.note for site in graph_of("custom_rules").sites)

    @jax.custom_vjp
    def integers(x, w):
        return (x.astype(jnp.int32) @ w.astype(jnp.int32)).astype(jnp.float32)

    integers.defvjp(lambda x, w: (integers(x, w), w), lambda w, g: (g @ w.T, None))

    def apply(params, x):
        return integers(jnp.tanh(x @ params["w"]), params["v"])

    graph = trace(apply, matrices("w", "v"), random(4, 6))
    assert names_of(graph) == ["w"]

    def gradient(run):
        return jax.grad(lambda x: jnp.sum(run(x)))(random(4, 6))

    leaves = jax.tree.leaves(matrices("w", "v"))
    again = gradient(
        lambda x: interpret(graph, lambda c: (c.bind(*c.operands()), None), leaves, x)[0]
    )
    np.testing.assert_allclose(again, gradient(lambda x: apply(matrices("w", "v"), x)), rtol=1e-6)
    assert np.any(again)


# Naming and expressions


def test_leaf_names():
    tree = {"params": {"a": {"value": 1.0, "query": 2.0}}, "batch_stats": {"m": 3.0}}
    assert leaf_names(tree) == ("batch_stats/m", "a/query", "a/value")
    assert leaf_names([1.0, (2.0,)]) == ("0", "1/0")
    assert leaf_names(1.0) == ("param",)
    assert leaf_names({"params": {"a": 1.0}, "a": 2.0}) == ("a", "a@1")


def test_namer_never_repeats():
    namer = Namer()
    given = [namer.use(n) for n in ["a", "a", "a@1", "a"]] + [namer.number("a"), namer.use("a_0")]
    assert len(set(given)) == len(given)
    assert given[:2] == ["a", "a@1"]


paths = st.lists(
    st.lists(st.sampled_from(["a", "b", "ab", "kernel"]), min_size=1, max_size=4).map("/".join),
    min_size=1,
    max_size=5,
)


@given(paths)
def test_joined_names_can_be_expanded(names):
    name = joined(names)
    head, brace, rest = name.partition("{")
    if not brace:
        assert {name} == set(names)
        return
    middle, _, tail = rest.partition("}")
    assert {f"{head}{part}{tail}" for part in middle.split(",")} == set(names)
    assert joined(reversed(names)) == name


@settings(deadline=None, max_examples=20)
@given(st.lists(st.permutations(range(3)), max_size=4))
def test_peel_takes_transposes_off(permutations):
    def transposed(x):
        for permutation in permutations:
            x = jax.lax.transpose_p.bind(x, permutation=tuple(permutation))
        return x

    array = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    expression = Leaf(0)
    for eqn in jax.make_jaxpr(transposed)(array).jaxpr.eqns:
        expression = Output(Apply(eqn, (expression,)), 0)
    root, permutation = peel(expression)
    assert isinstance(root, Leaf)
    expected = np.asarray(evaluate(expression, [array]))
    found = array if permutation is None else array.transpose(permutation)
    np.testing.assert_array_equal(found, expected)

"""A run with a handler that changes nothing is the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, loss, matrices, model, random, resized

from jaxrmils.graph import MissingLeafError, TraceError, interpret, trace


def identity(call):
    return call.bind(*call.operands()), None


def rerun(graph, params, inputs, handler=identity, **kwargs):
    return interpret(graph, handler, jax.tree.leaves(params), inputs, **kwargs)


def assert_identical(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (actual, expected)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("name", MODELS)
def test_identity_handler_gives_the_model_and_its_gradient(name):
    apply, params, inputs = model(name)
    graph = trace(apply, params, inputs)

    def value(run):
        def function(params, inputs):
            outputs = run(params, inputs)
            targets = jnp.zeros(jax.tree.leaves(inputs)[0].shape[:1])
            return jnp.sum(loss(outputs, targets)), outputs

        return jax.jit(jax.value_and_grad(function, has_aux=True))

    (total, outputs), gradient = value(apply)(params, inputs)
    (again, reruns), regradient = value(lambda p, x: rerun(graph, p, x)[0])(params, inputs)
    if "separable" in name:  # its depthwise convolutions are summed in another order
        np.testing.assert_allclose(reruns, outputs, rtol=1e-5, atol=1e-6)
    else:
        assert_identical((again, reruns), (total, outputs))
    # In bfloat16, XLA chooses for itself where to round sums of a gradient.
    tolerance = 2e-2 if "bfloat16" in name else 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * (1e-12 + float(jnp.max(jnp.abs(b))))
        ),
        regradient,
        gradient,
    )
    assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["cnn", "transformer", "tied_embedding", "lstm", "cond_data"])
@pytest.mark.parametrize("batch", [1, 7])
def test_other_batch_sizes(name, batch):
    apply, params, inputs = model(name)
    graph = trace(apply, params, inputs)
    inputs = resized(inputs, batch)
    expected = jax.jit(apply)(params, inputs)
    assert_identical(jax.jit(lambda p, x: rerun(graph, p, x)[0])(params, inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_records_lead_with_the_loops_of_their_site(name):
    apply, params, inputs = model(name)
    graph = trace(apply, params, inputs)

    def handler(call):
        return call.bind(*call.operands()), jnp.sum(call.operand(0).astype(jnp.float32))

    one = resized(inputs, 1)
    _, records = jax.eval_shape(lambda p, x: rerun(graph, p, x, handler), params, one)
    shapes = {name: record.shape for name, record in records.items()}
    assert shapes == {s.name: tuple(loop.length for loop in s.loops) for s in graph.sites}


@pytest.mark.parametrize("name", MODELS)
def test_weight_values_are_the_operands(name):
    apply, params, inputs = model(name)
    graph = trace(apply, params, inputs)

    def handler(call):
        if call.site.weight is None:
            return call.bind(*call.operands()), None
        used = call.operand(call.site.weight.operand)
        return call.bind(*call.operands()), (used, call.view(call.weight).astype(used.dtype))

    values = jax.jit(graph.weight_values)(params)
    assert {n: v.shape for n, v in values.items()} == {n: w.shape for n, w in graph.weights.items()}
    _, records = jax.jit(lambda p, x, w: rerun(graph, p, x, handler, weights=w))(
        params, resized(inputs, 1), values
    )
    assert records
    for site, (used, given) in records.items():
        if "cond" in name and not np.any(used):
            continue  # The branch that was not taken.
        np.testing.assert_array_equal(used, given, err_msg=site)


def test_weights_that_the_handler_replaces_need_no_leaf():
    apply, params, inputs = model("scanned_stack")
    graph = trace(apply, params, inputs)
    values = graph.weight_values(params)
    leaves = [
        None if name.endswith("kernel") else leaf
        for name, leaf in zip(graph.leaf_names, jax.tree.leaves(params), strict=True)
    ]

    def handler(call):
        return call.bind(call.operand(0), call.weight), None

    outputs, _ = interpret(graph, handler, leaves, inputs, weights=values)
    np.testing.assert_allclose(outputs, apply(params, inputs), rtol=1e-6)
    with pytest.raises(MissingLeafError, match="parameter layers/Dense_0/kernel is needed"):
        interpret(graph, identity, leaves, inputs)


def test_missing_leaf_is_named():
    graph = trace(
        lambda p, x: x @ p["w"] + p["b"],
        {"w": jnp.ones((3, 2)), "b": jnp.ones(2)},
        jnp.ones((2, 3)),
    )
    with pytest.raises(MissingLeafError, match="parameter b is needed"):
        interpret(graph, identity, [None, jnp.ones((3, 2))], jnp.ones((2, 3)))


def test_absent_records_of_a_branch():
    apply, params, inputs = model("cond_parameter")
    graph = trace(apply, params, inputs)

    def handler(call):
        return call.bind(*call.operands()), jnp.max(jnp.abs(call.operand(0)))

    _, records = rerun(graph, params, inputs, handler, absent=lambda s: jnp.full(s.shape, -1.0))
    assert float(records["no"]) == float(records["no@1"]) == -1
    assert float(records["yes"]) > 0
    _, records = rerun(graph, params, inputs, handler)
    assert float(records["no"]) == 0


def test_other_structure_of_inputs_is_refused():
    apply, params, inputs = model("plain")
    graph = trace(apply, params, inputs)
    with pytest.raises(TraceError, match="structure"):
        rerun(graph, params, {"x": inputs})


def test_sites_that_change_with_the_input_shape_are_refused():
    def apply(params, x):
        x = x @ params["a"]
        return x @ params["b"] if x.shape[0] > 2 else x

    params = matrices("a", "b")
    graph = trace(apply, params, random(2, 6))
    with pytest.raises(TraceError, match=r"other sites at this input shape.*'b'"):
        rerun(graph, params, random(4, 6))


# Loops, calls and dtypes


def check(apply, params, inputs):
    """Identity under jit, stacked weights taken from outside; returns the graph."""
    graph = trace(apply, params, inputs)
    expected = jax.jit(apply)(params, inputs)
    assert_identical(jax.jit(lambda p, x: rerun(graph, p, x)[0])(params, inputs), expected)

    def handler(call):
        operands = list(call.operands())
        if call.site.weight:
            operands[call.site.weight.operand] = call.view(call.weight)
        return call.bind(*operands), None

    weights = graph.weight_values(params)
    replaced, _ = rerun(graph, params, inputs, handler, weights=weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), replaced, expected)
    return graph


def test_one_stack_in_two_scans():
    def apply(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        x, _ = jax.lax.scan(step, x, params["w"])
        x, _ = jax.lax.scan(step, x, params["w"], reverse=True)
        return x

    graph = check(apply, {"w": random(3, 6, 6)}, random(4, 6))
    assert [s.name for s in graph.sites] == ["w", "w@1"]
    assert [s.weight.loops for s in graph.sites] == [(1,), (2,)]
    assert graph.weights["w"].shape == (3, 6, 6)
    assert graph.weights["w"].channel_axes == (0, 2)
    assert graph.weights["w"].uses == ("w", "w@1")


def test_nested_scans_with_a_shared_layer():
    def apply(params, x):
        def outer(x, stack):
            def inner(x, w):
                return jnp.tanh(x @ w @ params["shared"]), None

            return jax.lax.scan(inner, x, stack)

        return jax.lax.scan(outer, x, params["w"])[0]

    graph = check(apply, {"w": random(2, 3, 6, 6), "shared": random(6, 6)}, random(4, 6))
    w, shared = graph.sites
    assert graph.weights["w"].shape == (2, 3, 6, 6)
    assert graph.weights["w"].channel_axes == (0, 1, 3)
    assert graph.weights["shared"].shape == (6, 6)
    assert w.stacked_lengths == shared.stacked_lengths == (2, 3)
    assert w.macs == 2 * 3 * 6 * 6


def test_stack_indexed_by_a_scanned_number():
    def apply(params, x):
        return jax.lax.scan(lambda x, i: (jnp.tanh(x @ params["w"][i]), None), x, jnp.arange(3))[0]

    graph = check(apply, {"w": random(3, 6, 6)}, random(4, 6))
    (site,) = graph.sites
    assert site.stacked_lengths == (3,)
    assert graph.weights["w"].shape == (3, 6, 6)


def test_scan_with_reverse_unroll_and_weak_carry():
    def apply(params, x):
        def step(carry, w):
            x, total = carry
            x = jnp.tanh(x @ w)
            return (x, total + jnp.sum(x)), jnp.max(x, axis=1)

        (x, total), ys = jax.lax.scan(step, (x, 0.0), params["w"], reverse=True, unroll=2)
        return x + total, ys.T

    check(apply, {"w": random(4, 6, 6)}, random(4, 6))


def test_results_nobody_reads():
    def apply(params, x):
        @jax.jit
        def both(x):
            return x @ params["a"], x @ params["b"]

        def step(x, w):
            return x @ w, x @ params["dead"]

        x, _ = jax.lax.scan(step, both(x)[0], params["stack"])
        return x

    params = {**matrices("a", "b", "dead"), "stack": random(2, 6, 6)}
    graph = check(apply, params, random(4, 6))
    assert [s.name for s in graph.sites] == ["a", "stack"]
    assert graph.coverage.count("unused") == 2


def test_checkpoint_policies():
    def apply(params, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(lambda x: jnp.tanh(x @ params["w"]) @ params["w"], policy=policy)(x)

    graph = check(apply, matrices("w"), random(4, 6))
    assert [s.name for s in graph.sites] == ["w", "w@1"]


def test_jit_that_returns_a_weight():
    """The weight is known although the call that makes it also reads the inputs."""

    @jax.jit
    def prepare(w, x):
        return 2.0 * w, x + 1.0

    def apply(params, x):
        w, x = prepare(params["w"], x)
        return x @ w

    (site,) = check(apply, matrices("w"), random(4, 6)).sites
    assert site.name == "w" and site.weight is not None


def test_literals_and_weak_types_pass_through_calls():
    def apply(params, x):
        scaled = jax.jit(lambda x, factor: (x @ params["w"]) * factor)(x, 2)
        return jax.lax.cond(
            params["gate"] > 0, lambda: scaled @ params["w"], lambda: jnp.zeros_like(scaled)
        )

    params = {"w": random(6, 6, dtype=jnp.bfloat16), "gate": 1.0}
    graph = check(apply, params, random(4, 6, dtype=jnp.bfloat16))
    assert [s.name for s in graph.sites] == ["w", "w@1"]


def test_python_numbers_in_params_stay_weak():
    def apply(params, x):
        return (x * params["factor"]) @ params["w"]

    params = {"w": random(6, 6, dtype=jnp.bfloat16), "factor": 0.5}
    check(apply, params, random(4, 6, dtype=jnp.bfloat16))


def test_keys_and_integers_in_params():
    def apply(params, x):
        return x @ params["w"] + params["step"].astype(jnp.float32)

    params = {**matrices("w"), "key": jax.random.key(0), "step": jnp.int32(3)}
    check(apply, params, random(4, 6))


def test_numpy_doubles_in_params():
    params = {"w": np.asarray(random(6, 6), np.float64)}
    graph = check(lambda p, x: x @ p["w"], params, random(4, 6))
    assert graph.weights["w"].dtype == graph.weight_values(params)["w"].dtype == "float32"
    trace(lambda p, x: x @ p["w"], params, np.ones((4, 6)))


def test_dropped_results_and_effects():
    def apply(params, x):
        jax.debug.callback(lambda x: None, x[0, 0])
        values, _ = jax.lax.top_k(x @ params["w"], 2)
        return values

    check(apply, matrices("w"), random(4, 6))


def test_long_params_only_chains():
    def apply(params, x):
        w = params["w"]
        for _ in range(1500):
            w = w - 0.001 * w
        return x @ w

    graph = trace(apply, matrices("w"), random(4, 6))
    values = jax.eval_shape(graph.weight_values, matrices("w"))
    assert values["w"].shape == (6, 6)


def test_shared_params_only_subexpressions():
    """Spectral normalisation reads every step several times."""

    def apply(params, x):
        w, u = params["w"], jnp.ones(6)
        for _ in range(20):
            v = w @ u
            u = v / jnp.sqrt(jnp.sum(v * v))
        return x @ (w / jnp.sum(u * (w @ u)))

    graph = check(apply, matrices("w"), random(4, 6))
    assert [s.name for s in graph.sites] == ["w"]
    assert graph.coverage.count("folded") == 21


def test_a_function_is_read_anew_by_every_trace():
    class Scaled:
        factor = 2.0

        def __call__(self, p, x):
            return self.factor * (x @ p["w"])

    model, params, x = Scaled(), {"w": jnp.eye(3)}, jnp.ones((4, 3))
    trace(model, params, x)
    model.factor = 5.0
    graph = trace(model, params, x)
    for batch in (x[:1], x):
        np.testing.assert_array_equal(rerun(graph, params, batch)[0], 5 * batch)


def test_a_shape_is_traced_once():
    calls = []

    def apply(params, x):
        calls.append(x.shape)
        return x @ params["w"]

    params = {"w": random(5, 3)}
    graph = trace(apply, params, random(2, 5))
    calls.clear()
    for batch in (4, 4, 1, 7, 4):
        rerun(graph, params, random(batch, 5, seed=batch))
    assert calls == [(4, 5), (7, 5)]
    # Tracing depends on more than shapes.
    seen = []

    def handler(call):
        seen.append(call.eqn.params["precision"])
        return call.bind(*call.operands()), None

    with jax.default_matmul_precision("highest"):
        rerun(graph, params, random(4, 5), handler)
    rerun(graph, params, random(4, 5), handler)
    assert seen[0] is not None and seen[1] is None
    calls.clear()
    for batch in range(10, 20):
        rerun(graph, params, random(batch, 5))
    rerun(graph, params, random(19, 5))
    rerun(graph, params, random(10, 5))
    assert len(calls) == 11  # the last few are kept

"""Models on native kernels; for what surrounds the kernels, XLA stands in for these."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_kernels
from models import random, resized
from plans import plan_of, quantized
from stages import traced

import jaxrmils as jr
from jaxrmils.graph import compat
from jaxrmils.graph.functions import FUNCTIONS
from jaxrmils.lowering import in_parts, native_model, native_sites
from jaxrmils.lowering.native import kernels
from jaxrmils.lowering.pending_product import clamp_of
from jaxrmils.lowering.sites import LoweringError

MISSING = kernels.available()


def put_stand_ins(patched):
    for module in (native_model, native_sites):
        patched.setattr(module, "kernels", reference_kernels)


@pytest.fixture(autouse=True)
def stand_in(request, monkeypatch):
    if "real" not in request.keywords:
        put_stand_ins(monkeypatch)


@pytest.fixture
def emitted(monkeypatch):
    """What the kernels are asked for: their name, and what follows the product."""
    found = []

    def watched(name):
        run = getattr(reference_kernels, name)

        def kernel(x, other, epilogue, **options):
            residual = None if epilogue.residual is None else str(epilogue.residual.dtype)
            clamp = (epilogue.low, epilogue.high)
            found.append((name, residual, clamp, epilogue.grid is not None))
            return run(x, other, epilogue, **options)

        return kernel

    for name in ("batched_dot", "conv", "depthwise", "dot"):
        monkeypatch.setattr(reference_kernels, name, watched(name))
    return found


def close(found, expected):
    """Equal but for last digits, which may move a value that lies half-way between two codes."""
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        scale = np.abs(two).max()
        assert np.mean(np.abs(one - two) > 1e-5 * scale) < 0.02
        assert np.abs(one - two).max() < 0.05 * scale


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cnn", "int8"),
        ("cnn", "mixed"),
        ("separable_cnn", "w4a8"),
        ("nnx_transformer", "mixed"),
        ("bfloat16_transformer", "int8"),
        ("scanned_stack", "int8"),
        ("tied_embedding", "int8"),
        ("cond_data", "int8"),
        ("remat_stack", "int8"),
    ],
)
def test_outputs_are_those_of_the_quantized_model(name, kind):
    graph, _, inputs = traced(name)
    model = quantized(name, kind)
    found = jr.native(model)
    x = resized(inputs, 3)
    close(jax.jit(found.apply)(found.params, x), jax.jit(model.apply)(model.params, x))
    # Every site either has a kernel or a reason.
    kernels = {site for w in found.params.weights.values() for site in w.packed}
    assert kernels | set(found.reasons) == {site.name for site in graph.sites}
    assert not kernels & set(found.reasons)


X = random(4, 9, 9, 3, seed=9)
PARAMS = {
    "stem": 0.3 * random(3, 3, 3, 8, seed=0),
    "mean": 0.1 * random(8, seed=1),
    "factor": 1 + 0.1 * random(8, seed=2),
    "deep": 0.3 * random(3, 3, 1, 8, seed=3),
    "a": 0.3 * random(1, 1, 8, 8, seed=4),
    "b": 0.3 * random(3, 3, 8, 8, seed=5),
    "bias": 0.1 * random(8, seed=6),
    "out": random(8, 5, seed=8),
}


def conv(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def net(p, x):
    """A stem with normalization and pooling, a depthwise convolution, a residual block."""
    h = (conv(x, p["stem"]) - p["mean"][None, None, None]) * p["factor"][None, None, None]
    h = jax.nn.relu(h)
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = jax.nn.relu6(conv(h, p["deep"], groups=8) + p["bias"][None, None, None])
    h = jax.nn.relu(h + conv(jnp.clip(conv(h, p["a"]), -2.0, 1.5), p["b"]))
    return jnp.mean(h, axis=(1, 2)) @ p["out"]


def made(function, params, inputs, shortcuts="float", format="w8a8", **options):
    graph = jr.trace(function, params, inputs, shortcuts=shortcuts)
    ranges = jr.calibrate(graph, params, [inputs], estimator="minmax")
    plan = jr.uniform(jr.tabulate(graph), format, **options)
    return jr.quantize(graph, params, plan, ranges)


@pytest.mark.parametrize("format", ["w8a8", "w4a8"])
@pytest.mark.parametrize("shortcuts", ["float", "codes"])
def test_every_product_is_computed_once_with_all_that_follows(shortcuts, format, emitted):
    model = made(net, PARAMS, X, shortcuts, format)
    found = jr.native(model)
    emitted.clear()
    assert not found.reasons
    close(jax.jit(found.apply)(found.params, X), model(X))
    infinite, shares = math.inf, shortcuts == "codes"
    assert emitted == [
        ("conv", None, (0.0, infinite), True),  # pooled in codes
        ("depthwise", None, (0.0, 6.0), shares),  # in float too, for the shortcut
        ("conv", None, (-2.0, 1.5), True),
        ("conv", "int8" if shares else "float32", (0.0, infinite), False),  # averaged in float
        ("dot", None, (-infinite, infinite), False),
    ]


@pytest.mark.real
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("shortcuts", ["float", "codes"])
def test_the_kernels_give_what_their_stand_ins_give(shortcuts, monkeypatch):
    model = made(net, PARAMS, X, shortcuts, "w4a8")
    found = jr.native(model)
    with monkeypatch.context() as patched:
        put_stand_ins(patched)
        expected = [jax.jit(jr.native(model).apply)(jr.native(model).params, x) for x in (X, X[:1])]
    for x, outputs in zip((X, X[:1]), expected, strict=True):
        np.testing.assert_allclose(jax.jit(found.apply)(found.params, x), outputs, rtol=1e-6)
    both = jax.vmap(lambda x: found.apply(found.params, x))(jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(both[0], expected[0], rtol=1e-6)


def test_it_works_under_vmap():
    found = jr.native(made(net, PARAMS, X))
    batches = jnp.stack([X, 2 * X])
    both = jax.vmap(lambda x: found.apply(found.params, x))(batches)
    for one, x in zip(both, batches, strict=True):
        close(one, found(x))


def test_large_batches_run_in_parts():
    model = made(net, PARAMS, X)
    whole, parts = jr.native(model, at_once=None), jr.native(model, at_once=3)
    x = random(7, *X.shape[1:], seed=10)
    np.testing.assert_array_equal(parts(x), whole(x))
    assert "while" in jax.jit(parts.apply).lower(parts.params, x).as_text()
    assert "while" not in jax.jit(parts.apply).lower(parts.params, x[:3]).as_text()
    stacked = jnp.stack([x, 2 * x])
    both = [jax.vmap(lambda x, m=m: m.apply(m.params, x))(stacked) for m in (whole, parts)]
    np.testing.assert_allclose(*both, rtol=1e-5)
    with pytest.raises(LoweringError, match="at_once is 0; expected a number of examples from 1"):
        jr.native(model, at_once=0)


def test_parts_are_as_large_as_temporaries_allow(monkeypatch):
    model = made(net, PARAMS, X)
    assert jr.native(model).at_once > 100
    monkeypatch.setattr(in_parts, "TEMPORARY_BYTES", 20_000)
    assert 1 <= jr.native(model).at_once < 20
    # Examples of a batch that has outputs of its own can't be told apart.
    total = made(lambda p, x: (net(p, x), net(p, x).sum()), PARAMS, X)
    assert jr.native(total).at_once is None
    found, expected = jr.native(total)(X), total(X)
    close(found, expected)


def test_what_several_operations_read_is_computed_once(emitted):
    def mish(p, x):
        h = x @ p["a"] + p["bias"][None]
        return (h * jnp.tanh(jax.nn.softplus(h))) @ p["b"]

    params = {"a": random(8, 8), "b": random(8, 8, seed=2), "bias": random(8, seed=3)}
    model = made(mish, params, random(6, 8, seed=4))
    found = jr.native(model)
    emitted.clear()
    close(found(random(6, 8, seed=5)), model(random(6, 8, seed=5)))
    assert [(name, codes) for name, *_, codes in emitted] == [("dot", False)] * 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_smooth_activations_are_taken_along(name, emitted, monkeypatch):
    function, asked = FUNCTIONS[name], []

    def smooth(p, x):
        h = function(x @ p["a"] + p["bias"][None])
        return h @ p["b"]

    def in_float(p, x):  # read twice, and once behind a clamp
        h = function(x @ p["a"] + p["bias"][None])
        return h @ p["b"], h, function(jax.nn.relu(x @ p["a"])) @ p["b"]

    run = reference_kernels.dot
    monkeypatch.setattr(
        reference_kernels, "dot", lambda x, w, e: asked.append(e.function) or run(x, w, e)
    )
    params = {"a": random(8, 8), "b": random(8, 8, seed=2), "bias": random(8, seed=3)}
    for apply, expected in ((smooth, [name, None]), (in_float, [None] * 4)):
        model = made(apply, params, random(6, 8, seed=4))
        found = jr.native(model, at_once=None)
        asked.clear()
        x = random(6, 8, seed=5)
        close(found.apply(found.params, x), model(x))
        assert asked == expected


@pytest.mark.real
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_convolution_and_a_smooth_activation(name):
    def smooth(p, x):
        h = FUNCTIONS[name](conv(x, p["stem"]) * p["factor"][None, None, None])
        h = FUNCTIONS[name](conv(h, p["deep"], groups=8) + p["bias"][None, None, None])
        return conv(h, p["b"])

    model = made(smooth, PARAMS, X)
    close(jr.native(model)(X), model(X))


def test_heads_are_split_in_codes(emitted):
    def scores(p, x):
        q, k = ((x @ p[n] + p["bias"][None, None]).reshape(-1, 4, 2, 4) for n in "qk")
        return jnp.einsum("bthd,bshd->bhts", q, k)

    params = {"q": random(8, 8), "k": random(8, 8, seed=2), "bias": random(8, seed=3)}
    x = random(3, 4, 8, seed=4)
    graph = jr.trace(scores, params, x)
    ranges = jr.calibrate(graph, params, [x], estimator="minmax")
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "w8a8"), ranges)
    found = jr.native(model)
    emitted.clear()
    close(found(x), model(x))
    assert [(name, codes) for name, *_, codes in emitted] == [
        ("dot", True),
        ("dot", True),
        ("batched_dot", False),
    ]
    assert not found.reasons


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.real)])
def test_attention_stays_in_codes_but_for_its_softmax(real, request):
    if real and MISSING is not None:
        pytest.skip(str(MISSING))

    def attention(p, x):
        q, k, v = ((x @ p[n]).reshape(-1, 4, 2, 4) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 2, axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(-1, 4, 8) @ p["o"]

    params = {n: random(8, 8, seed=i) for i, n in enumerate("qkvo")}
    model = made(attention, params, random(3, 4, 8, seed=4))
    found = jr.native(model)
    assert not found.reasons
    if real:
        x = random(5, 4, 8, seed=5)
        close(found(x), model(x))
        assert jax.jit(found.apply).lower(found.params, x).as_text().count("@jaxrmils_") == 6
        return
    emitted = request.getfixturevalue("emitted")
    close(found.apply(found.params, random(5, 4, 8, seed=5)), model(random(5, 4, 8, seed=5)))
    assert [(name, codes) for name, *_, codes in emitted] == [
        ("dot", True),
        ("dot", True),
        ("batched_dot", False),  # to the softmax
        ("dot", True),
        ("batched_dot", True),  # transposed and reshaped in codes
        ("dot", False),
    ]


@pytest.mark.parametrize(
    ("equation", "reason"),
    [("bij,bkj->bik", None), ("bijl,bkjl->bik", "of which not one dim each is contracted")],
)
def test_forms_of_products_of_activations(equation, reason):
    def product(p, x):
        return jnp.einsum(equation, jnp.tanh(x), x * p["a"][(None,) * (x.ndim - 1)])

    x = random(3, 4, 5, *[6] * (len(equation.split(",")[0]) - 3), seed=4)
    model = made(product, {"a": random(x.shape[-1])}, x)
    found = jr.native(model)
    assert [reason in each for each in found.reasons.values()] == ([True] if reason else [])
    close(found(x), model(x))


def test_sums_differences_and_quotients_by_channel_are_taken_along(emitted):
    def arithmetic(p, x):
        y = (2.0 - x @ p["w"]) / p["b"][None] * 3.0
        y = p["b"][None] - y  # and what is behind a clamp is not
        return jnp.minimum(jnp.maximum(y, -1.0), 2.0) * p["b"][None]

    params = {"w": random(8, 4), "b": 1 + 0.3 * random(4, seed=2)}
    model = made(arithmetic, params, random(6, 8, seed=4))
    found = jr.native(model)
    emitted.clear()
    close(found(random(6, 8, seed=5)), model(random(6, 8, seed=5)))
    assert emitted == [("dot", None, (-1.0, 2.0), False)]


def test_two_products_are_added_and_a_product_to_itself_is_not_lost(emitted):
    def sums(p, x):
        y = x @ p["a"]
        return jax.nn.relu(y + x @ p["b"]), (y + y) @ p["c"]

    params = {n: random(8, 8, seed=i) for i, n in enumerate("abc")}
    model = made(sums, params, random(6, 8, seed=4))
    found = jr.native(model)
    emitted.clear()
    close(found(random(6, 8, seed=5)), model(random(6, 8, seed=5)))
    assert ("dot", "float32", (0.0, math.inf), False) in emitted and len(emitted) == 3


def test_readers_with_other_grids_or_roundings_get_their_own_codes():
    def two(p, x):
        y = jax.nn.relu(x @ p["a"])
        return y @ p["b"], y @ p["c"]

    params = {n: random(8, 8, seed=i) for i, n in enumerate("abc")}
    x = random(6, 8, seed=4)
    graph = jr.trace(two, params, x)
    ranges = jr.calibrate(graph, params, [x])
    plan = jr.uniform(jr.tabulate(graph), "w8a8")
    up = dataclasses.replace(plan.layers["c"], rounding=("ceil",))
    plan = dataclasses.replace(plan, layers={**plan.layers, "c": up})
    model = jr.quantize(graph, params, plan, ranges)
    close(jr.native(model)(x), model(x))


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("scanned_stack", "int8", "inside a scan"),
        ("tied_embedding", "int8", "a lookup"),
        ("bfloat16_transformer", "int8", "bfloat16 results"),
        ("plain", "w8", "float activations"),
    ],
)
def test_reasons_name_what_stays_with_xla(name, kind, reason):
    assert reason in jr.native(quantized(name, kind)).reasons.values()


def test_weights_of_kernels_are_held_once():
    found = jr.native(made(net, PARAMS, X))
    assert all(weight.quantized is None for weight in found.params.weights.values())


def test_what_depends_on_parameters_alone_is_computed_once():
    found = jr.native(made(net, PARAMS, X))
    assert set(found.params.vectors) == set(found.params.weights)
    normalized = found.params.vectors["stem"]
    assert normalized.scale.shape == normalized.offset.shape == normalized.correction.shape == (8,)
    # What nothing else reads is gone, and what something reads is not.
    assert found.unread == {"bias", "factor", "mean"} and not found.params.leaves
    assert not any(w.scales or w.sums for w in found.params.weights.values())
    kept = made(lambda p, x: jnp.tanh(net(p, x)) + p["bias"][None, :5], PARAMS, X)
    assert set(jr.native(kept).params.leaves) == {"bias"}
    close(jr.native(kept)(X), kept(X))


def test_calls_are_compiled_and_hold_small_parameters():
    found = jr.native(made(net, PARAMS, X))
    close(found(X), found.apply(found.params, X))
    assert found._compiled is found._compiled
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native_model, "PART_OF_PROGRAM", 10)
        large = jr.native(made(net, PARAMS, X))
        close(large(X[:2]), found(X[:2]))
        assert large._compiled.args == (large.params,)


def test_kernels_that_run_twice_or_in_branches_compute_it_themselves():
    def both(p, x):
        y = x @ p["a"]
        return y @ p["b"], jax.lax.cond(x.sum() > -1e9, lambda: x @ p["c"], lambda: x)

    params = {n: random(8, 8, seed=i) for i, n in enumerate("abc")}
    model = made(both, params, random(6, 8, seed=4))
    found = jr.native(model)
    assert {"a", "b"} <= set(found.params.vectors) and "c" not in found.params.vectors
    close(found(random(6, 8, seed=5)), model(random(6, 8, seed=5)))


def test_other_backends_and_missing_kernels_are_refused(monkeypatch):
    model = quantized("cnn", "int8")
    monkeypatch.setattr(reference_kernels, "available", lambda: "no C++ compiler")
    with pytest.raises(LoweringError, match=r"can't be used here: no C\+\+ compiler"):
        jr.native(model)
    with pytest.raises(LoweringError, match=r"for 'tpu'.*backend='cpu'"):
        jr.native(quantized("cnn", "int8", "tpu"))


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (jax.nn.relu, (0.0, math.inf)),
        (jax.nn.relu6, (0.0, 6.0)),
        (lambda x: jnp.clip(x, -1, 3), (-1.0, 3.0)),
        (lambda x: jnp.minimum(x, 2.0), (-math.inf, 2.0)),
        (jax.jit(lambda x: jnp.minimum(jax.nn.relu(x), -1.0)), (-1.0, -1.0)),
        (lambda x: jax.lax.clamp(-0.5, x, 2.0), (-0.5, 2.0)),
        (jax.nn.gelu, None),
        (jax.nn.hard_tanh, None),
        (jax.jit(lambda x: jnp.maximum(x, x)), None),
        (jax.jit(lambda x: jnp.maximum(-x, 0.0)), None),
    ],
)
def test_clamps_are_recognized(function, bounds):
    (eqn,) = jax.jit(function).trace(jnp.ones((2, 3))).jaxpr.eqns[-1:]
    assert isinstance(eqn, compat.JaxprEqn)
    assert clamp_of(eqn) == bounds if bounds else clamp_of(eqn) is None


def test_the_mixed_plans_are_what_they_are_for():
    assert len({layer.format for layer in plan_of("cnn", "mixed").layers.values()}) > 2

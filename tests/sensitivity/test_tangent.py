"""One-pass contributions against materialised gradients of an independent construction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, model
from stages import TARGETS, calibrated, float64, traced

from jaxrmils import assign, contributions
from jaxrmils.graph import interpret
from jaxrmils.numerics import code_range
from jaxrmils.sensitivity import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    ScoreError,
    weight_noise,
)

EPSILON = 2.0**-23

# Without loops an eps argument per operand is enough; loops are written out by hand below.
STRAIGHT = [
    "cnn",
    "separable_cnn",
    "nnx_transformer",
    "tied_embedding",
    "plain",
    "cond_data",
    "custom_rules",
    "experts",
]
LOOPS = ["scanned_stack", "remat_stack", "lstm"]


@functools.cache
def one_pass(name):
    graph, params, inputs = traced(name)
    ranges, noise = calibrated(name), weight_noise(graph, params)
    run = jax.jit(lambda p, n, x: contributions(graph, p, x, TARGETS, loss, ranges, noise=n))
    return run(params, noise, inputs), noise


def numpy_noise(h, grid, candidate):
    """Q(h) - h from the grid's definition: float32 quotient, then float64."""
    h = np.asarray(h, np.float32)
    scale, zero_point = np.float64(grid.scale), np.asarray(grid.zero_point)
    quotient = (h / np.float32(grid.scale)).astype(np.float64)
    tolerance = 2.0**-14
    steps = {
        "nearest": np.rint(quotient),
        "floor": np.floor(quotient + tolerance),
        "ceil": np.ceil(quotient - tolerance),
    }[candidate.rounding]
    codes = np.clip(steps + zero_point, *code_range(candidate.bits, grid.symmetric))
    return (codes - zero_point) * scale - h.astype(np.float64)


def assert_columns_close(actual, expected, tolerance, magnitude=0.0):
    """Errors relative to the largest magnitude of each column of [batch, ...].

    Args:
        actual: from the one pass.
        expected: the reference.
        tolerance: relative error.
        magnitude: sum of the magnitudes of the terms that cancel. The two compilations round them
            in float32, so a few of its units are allowed: sums may be zero by symmetry.
    """
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape
    allowed = tolerance * np.abs(expected).max(axis=0) + 4 * EPSILON * np.max(magnitude)
    assert np.all(np.abs(actual - expected) <= allowed + 1e-12)


def example_gradients(function, eps, inputs):
    """d loss / d eps for every example alone, and what `function` recorded."""

    def one(eps, example, target):
        batch = jax.tree.map(lambda x: x[None], example)
        outputs, records = function(eps, batch)
        return loss(outputs, target[None])[0], records

    return jax.jit(jax.vmap(jax.grad(one, has_aux=True), in_axes=(None, 0, 0)))(
        eps, inputs, TARGETS
    )


def check_activations(result, ranges, gradients, values, tolerance):
    """Materialised gradients [batch, ...] against the one-pass numbers."""
    for site, by_position in gradients.items():
        for position, gradient in enumerate(by_position):
            g = float64(gradient)
            axes = tuple(range(1, g.ndim))
            h, grids = values[site][position], ranges.grids[site][position]
            expected = [
                (g * numpy_noise(jnp.asarray(h, jnp.float32), grids[c.bits], c)).sum(axes)
                for c in ACTIVATION_CANDIDATES
            ]
            actual = result.activations[site][:, position]
            size = np.abs(g * float64(h)).sum(axes)
            assert_columns_close(actual, np.stack(expected, axis=1), tolerance, size)
            sums = result.gradient_sum[site][:, position]
            assert_columns_close(sums, g.sum(axes), tolerance, np.abs(g).sum(axes))
            squares = result.gradient_square[site][:, position]
            assert_columns_close(squares, (g**2).sum(axes), tolerance)


def activation_gradients(name):
    graph, params, inputs = traced(name)
    eps = {
        site.name: [jnp.zeros(site.operands[i].shape, site.operands[i].dtype)
                    for i in site.activations]
        for site in graph.sites
        if site.activations
    }  # fmt: skip

    def function(eps, batch):
        def handler(call):
            operands = list(call.operands())
            for position, index in enumerate(call.site.activations):
                operands[index] = operands[index] + eps[call.site.name][position]
            record = [operands[i] for i in call.site.activations]
            return call.bind_highest(*operands), record or None

        return interpret(graph, handler, jax.tree.leaves(params), batch)

    gradients, values = example_gradients(function, eps, inputs)
    # A record has an axis for the one iteration that `lax.map` makes of one example.
    values = {
        site: [v.reshape(g.shape) for v, g in zip(values[site], by_position, strict=True)]
        for site, by_position in gradients.items()
    }
    return gradients, values


@pytest.mark.parametrize("name", STRAIGHT)
def test_activations_equal_brute_force(name):
    gradients, values = activation_gradients(name)
    result, _ = one_pass(name)
    assert set(result.activations) == set(gradients)
    check_activations(result, calibrated(name), gradients, values, 1e-5)


def test_bfloat16_keeps_its_dtype_and_contracts_in_float32():
    name = "bfloat16_transformer"
    gradients, values = activation_gradients(name)
    dtypes = {g.dtype for by_position in gradients.values() for g in by_position}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    result, _ = one_pass(name)
    assert {x.dtype for x in jax.tree.leaves(result)} == {np.dtype(np.float32)}
    # Two compilations round the same bfloat16 gradients differently: 2^-8 an operation, which
    # cancels in sums of signed terms.
    check_activations(result, calibrated(name), gradients, values, 0.15)


# Loops by hand: one eps for every iteration


def stack_by_hand(params, eps, x):
    layers = params["params"]["layers"]["Dense_0"]
    values = []
    for i in range(3):
        h = x + eps["layers/Dense_0/kernel"][0][i]
        values.append(h)
        x = jnp.tanh(h @ layers["kernel"][i] + layers["bias"][i])
    return x, {"layers/Dense_0/kernel": [jnp.stack(values)]}


def gates(cell, inputs, hidden, carry):
    """One LSTM step; inputs and hidden by gate."""
    c, _ = carry
    value = {
        gate: inputs[gate] @ cell[f"i{gate}"]["kernel"]
        + hidden[gate] @ cell[f"h{gate}"]["kernel"]
        + cell[f"h{gate}"]["bias"]
        for gate in "ifgo"
    }
    i, f, o = (jax.nn.sigmoid(value[gate]) for gate in "ifo")
    c = f * c + i * jnp.tanh(value["g"])
    return c, o * jnp.tanh(c)


def lstm_by_hand(params, eps, x):
    params = params["params"]
    records = {site: [] for site in eps}

    def read(site, step, value):
        noisy = value + eps[site][0][step]
        records[site].append(noisy)
        return noisy

    def run(x, cell, sites_of):
        carry, outputs = (jnp.zeros((1, 4)), jnp.zeros((1, 4))), []
        for step in range(x.shape[1]):
            inputs, hidden = sites_of(step, x[:, step], carry[1])
            carry = gates(cell, inputs, hidden, carry)
            outputs.append(carry[1])
        return jnp.stack(outputs, axis=1)

    def shared(step, x, h):
        x = read("OptimizedLSTMCell_0/{if,ig,ii,io}/kernel", step, x)
        h = read("OptimizedLSTMCell_0/{hf,hg,hi,ho}/kernel", step, h)
        return dict.fromkeys("ifgo", x), dict.fromkeys("ifgo", h)

    def separate(step, x, h):
        inputs = {gate: read(f"LSTMCell_0/i{gate}/kernel", step, x) for gate in "ifgo"}
        return inputs, {gate: read(f"LSTMCell_0/h{gate}/kernel", step, h) for gate in "ifgo"}

    x = run(x, params["OptimizedLSTMCell_0"], shared)
    x = run(x[:, ::-1], params["LSTMCell_0"], separate)
    dense = params["Dense_0"]
    outputs = read("Dense_0/kernel", 0, x[:, -1]) @ dense["kernel"] + dense["bias"]
    return outputs, {site: [jnp.stack(values)] for site, values in records.items()}


def layer(grids, i):
    return jax.tree.map(lambda leaf: leaf[i], grids)


@pytest.mark.parametrize("name", ["scanned_stack", "remat_stack"])
def test_stacked_layers_equal_brute_force(name):
    _, params, inputs = traced(name)
    site = "layers/Dense_0/kernel"
    eps = {site: [jnp.zeros((3, 1, 8))]}
    function = functools.partial(stack_by_hand, params)
    np.testing.assert_allclose(function(eps, inputs)[0], model(name)[0](params, inputs), atol=1e-6)
    gradients, values = example_gradients(function, eps, inputs)
    result, _ = one_pass(name)
    grids = calibrated(name).grids[site][0]
    assert grids[8].scale.shape == (3,)
    g, h = float64(gradients[site][0]), values[site][0]
    for k, candidate in enumerate(ACTIVATION_CANDIDATES):
        by_layer = [
            (g[:, i] * numpy_noise(h[:, i], layer(grids[candidate.bits], i), candidate)).sum((1, 2))
            for i in range(3)
        ]
        assert_columns_close(result.activations[site][:, 0, k], sum(by_layer), 1e-5)
    assert_columns_close(result.gradient_sum[site][:, 0], g.sum((1, 2, 3)), 1e-5)
    assert_columns_close(result.gradient_square[site][:, 0], (g**2).sum((1, 2, 3)), 1e-5)


def test_recurrence_equals_brute_force():
    graph, params, inputs = traced("lstm")
    eps = {
        site.name: [jnp.zeros((6 if site.loops else 1, *site.operands[0].shape))]
        for site in graph.sites
    }
    function = functools.partial(lstm_by_hand, params)
    np.testing.assert_allclose(
        function(eps, inputs[:1])[0], model("lstm")[0](params, inputs[:1]), atol=1e-6
    )
    gradients, values = example_gradients(function, eps, inputs)
    result, _ = one_pass("lstm")
    assert set(result.activations) == set(eps)
    check_activations(result, calibrated("lstm"), gradients, values, 1e-5)


# Weights


def check_weight(name, weight, contraction, tolerance):
    """The sum over a weight's uses against contractions [batch, candidates]."""
    graph, _, _ = traced(name)
    result, _ = one_pass(name)
    uses = [float64(result.weights[site]) for site in graph.weights[weight].uses]
    assert_columns_close(sum(uses), contraction, tolerance)


def contract(gradient, deltas):
    g = float64(gradient)
    return np.stack([(g * float64(d)[None]).sum(tuple(range(1, g.ndim))) for d in deltas], axis=1)


@pytest.mark.parametrize("name", [*STRAIGHT, *LOOPS, "bfloat16_transformer"])
def test_weights_equal_parameter_gradients(name):
    graph, params, inputs = traced(name)
    apply = model(name)[0]

    def one(params, example, target):
        batch = jax.tree.map(lambda x: x[None], example)
        return loss(apply(params, batch), target[None])[0]

    # The model itself, without the interpreter.
    gradient = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))(params, inputs, TARGETS)
    leaves = jax.tree.leaves(gradient)
    _, noise = one_pass(name)
    tolerance = 0.15 if name.startswith("bfloat16") else 1e-5
    for weight in graph.weights.values():
        deltas = noise[weight.name]
        if len(weight.leaves) == 1:
            shape = jax.tree.leaves(params)[weight.leaves[0]].shape
            g = leaves[weight.leaves[0]]
            if shape != weight.shape:  # A reshape of the leaf.
                g = g.reshape(g.shape[0], *weight.shape)
        else:  # The LSTM's gates, side by side in the order of the leaves' use.
            order = "ifgo"
            kind = weight.name.split("{")[1][0]
            cell = gradient["params"]["OptimizedLSTMCell_0"]
            g = jnp.concatenate([cell[f"{kind}{gate}"]["kernel"] for gate in order], axis=-1)
        check_weight(name, weight.name, contract(g, deltas), tolerance)


def test_tied_weight_has_a_contribution_for_every_use():
    graph, _, _ = traced("tied_embedding")
    uses = graph.weights["Embed_0/embedding"].uses
    result, _ = one_pass("tied_embedding")
    assert uses == ("Embed_0/embedding", "Embed_0/embedding@1")
    assert all(np.abs(result.weights[use]).max() > 0 for use in uses)


def test_weight_noise_is_the_quantized_weight_minus_the_weight():
    graph, params, _ = traced("cnn")
    kernel = np.asarray(params["params"]["Conv_1"]["kernel"])
    for candidate, noise in zip(
        WEIGHT_CANDIDATES, weight_noise(graph, params)["Conv_1/kernel"], strict=True
    ):
        qmax = 2 ** (candidate.bits - 1) - 1
        scale = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True) / np.float32(qmax)
        expected = np.rint(kernel / scale) * scale - kernel
        np.testing.assert_allclose(noise, expected, atol=1e-7)


# The function itself


def test_the_loss_is_the_float_models():
    apply, params, inputs = model("cnn")
    expected = loss(apply(params, inputs), TARGETS)
    np.testing.assert_allclose(one_pass("cnn")[0].loss, expected, rtol=1e-5)


def test_without_weight_candidates():
    graph, params, inputs = traced("plain")
    result = contributions(
        graph, params, inputs, TARGETS, loss, calibrated("plain"), weight_candidates=()
    )
    assert result.weights == {} and set(result.activations) == {s.name for s in graph.sites}


def test_a_mean_loss_is_refused():
    graph, params, inputs = traced("plain")
    with pytest.raises(ScoreError, match=r"returned shape \(\) .* one value per example"):
        contributions(
            graph,
            params,
            inputs,
            TARGETS,
            lambda outputs, targets: jnp.mean(loss(outputs, targets)),
            calibrated("plain"),
        )


def test_ranges_of_another_model_are_refused():
    graph, params, inputs = traced("plain")
    with pytest.raises(ScoreError, match="another model"):
        contributions(graph, params, inputs, TARGETS, loss, calibrated("custom_rules"))


@pytest.mark.parametrize("name", ["cnn", "tied_embedding"])
def test_one_jitted_step_with_assign(name):
    graph, params, inputs = traced(name)
    ranges = calibrated(name)

    @jax.jit
    def step(params, inputs, targets):
        result = contributions(graph, params, inputs, targets, loss, ranges)
        return result, assign(graph, result, ranges, mu=0.05)

    result, tree = step(params, inputs, TARGETS)
    expected, _ = one_pass(name)
    for actual, wanted in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert_columns_close(actual, wanted, 1e-5)
    unjitted = assign(graph, expected, ranges, mu=0.05)
    assert jax.tree.structure(tree) == jax.tree.structure(unjitted)
    for actual, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(unjitted), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-6)

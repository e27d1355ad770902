"""Losses without their slope, against divergences in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrmils as jr
from jaxrmils.evaluation import SimulatedModel
from jaxrmils.numerics import quantize_weight
from jaxrmils.policies import Simulator
from jaxrmils.policies import simulation as policy_simulation
from jaxrmils.sensitivity import divergence
from jaxrmils.zoo import cross_entropy

COUNT = 64


def kl(logits, others):
    """KL of softmaxes, in float64."""
    own, other = (
        z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        for z in (np.float64(v) - np.float64(v).max(-1, keepdims=True) for v in (logits, others))
    )
    return (np.exp(own) * (own - other)).sum(-1)


def pairs(seed, spread=2.0, moved=0.5):
    rng = np.random.default_rng(seed)
    outputs = rng.normal(0, spread, (COUNT, 5)).astype(np.float32)
    return outputs, outputs + moved * rng.normal(size=outputs.shape).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 4), st.floats(0.05, 3))
def test_of_cross_entropy_it_is_the_kl_divergence_whatever_the_label(seed, spread, moved):
    outputs, quantized = pairs(seed, spread, moved)
    for label in (0, 3):
        labels = jnp.full(COUNT, label)
        found = divergence(cross_entropy, outputs)(jnp.asarray(quantized), labels)
        np.testing.assert_allclose(found, kl(outputs, quantized), rtol=1e-3, atol=1e-5)
        assert np.min(found) > -1e-5


def test_of_squares_it_is_the_squared_difference_and_of_linear_losses_nothing():
    outputs, quantized = pairs(0)

    def squares(o, t):
        return jnp.sum((o - t) ** 2, axis=1)

    found = divergence(squares, outputs)(jnp.asarray(quantized), jnp.ones((COUNT, 5)))
    np.testing.assert_allclose(found, ((quantized - outputs) ** 2).sum(axis=1), rtol=1e-3)

    def linear(o, t):
        return -jnp.take_along_axis(o, t[:, None], axis=1)[:, 0]

    found = divergence(linear, outputs)(jnp.asarray(quantized), jnp.zeros(COUNT, int))
    np.testing.assert_allclose(found, 0, atol=1e-5)


def test_outputs_are_pytrees_and_what_is_not_floating_has_no_slope():
    first, moved = pairs(1)
    outputs = {"x": (jnp.asarray(first),), "ids": jnp.arange(COUNT), "y": jnp.float32(first[:, 0])}
    others = {"x": (jnp.asarray(moved),), "ids": jnp.arange(COUNT), "y": jnp.float32(moved[:, 0])}

    def loss(o, t):
        return cross_entropy(o["x"][0], t) + 0.5 * o["y"] ** 2 + jnp.float32(o["ids"])

    found = divergence(loss, outputs)(others, jnp.zeros(COUNT, int))
    expected = kl(first, moved) + 0.5 * (moved[:, 0] - first[:, 0]) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)


def test_in_half_precision_it_is_float32():
    outputs, quantized = (jnp.asarray(v, jnp.bfloat16) for v in pairs(2))
    found = divergence(cross_entropy, outputs)(quantized, jnp.zeros(COUNT, int))
    assert found.dtype == jnp.float32
    expected = kl(np.float32(outputs), np.float32(quantized))
    assert np.abs(found - expected).mean() < 0.1 * expected.mean()


def network():
    shapes = {"a": (6, 16), "b": (16, 16), "c": (16, 5)}
    keys = jax.random.split(jax.random.key(1), 4)
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=False)}
    x = jax.random.normal(keys[3], (COUNT, 6))
    graph = jr.trace(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x[:4])
    return graph, params, x, jr.calibrate(graph, params, [x])


@pytest.mark.parametrize("name", ["w8a8", "w4a4"])
def test_simulated_and_attributed_without_the_luck_of_labels(name):
    graph, params, x, ranges = network()
    logits, plan = graph.apply(params, x), jr.uniform(jr.tabulate(graph), name)
    labels = jnp.zeros(COUNT, int)
    model = SimulatedModel(graph, params, ranges, cross_entropy)
    quantized = model.run([(x, labels)], plan, keep_outputs=True).outputs
    expected = kl(logits, quantized)
    changes, simulator = [], Simulator(graph, cross_entropy, points=4)
    for seed in range(6):
        # Labels by the model's own probabilities: of the change, only the divergence is expected.
        labels = jax.random.categorical(jax.random.key(seed), logits)
        simulation = simulator.on(params, ranges, [(x, labels)])
        changes.append(simulation.change(plan).mean())
        beyond = simulation.divergences()
        np.testing.assert_allclose(beyond.change(plan), expected, rtol=0.01, atol=1e-6)
        shares = beyond.attribute(plan)
        np.testing.assert_allclose(shares.change, expected, rtol=0.01, atol=1e-6)
        tolerance = 0.05 * np.abs(expected).mean()
        assert np.abs(sum(shares.layers.values()) - expected).mean() < tolerance
        # With all of the slope it is the change.
        whole = simulation.divergences(1.0).attribute(plan)
        change, layers = simulation.change(plan), simulation.attribute(plan).layers
        np.testing.assert_allclose(whole.change, change, atol=1e-5)
        part = simulation.divergences(0.25)
        mixed = 0.75 * beyond.change(plan) + 0.25 * change
        np.testing.assert_allclose(part.change(plan), mixed, atol=1e-5)
        for each, share in whole.layers.items():
            np.testing.assert_allclose(share, layers[each], atol=1e-5)
            mixed = 0.75 * shares.layers[each] + 0.25 * share
            np.testing.assert_allclose(part.attribute(plan).layers[each], mixed, atol=1e-5)
        # And the change itself is attributed as ever.
        assert (
            np.abs(simulation.attribute(plan).residual).mean()
            < 0.1 * np.abs(simulation.change(plan)).mean()
        )
    error = np.std(changes, ddof=1) / np.sqrt(len(changes))
    assert abs(np.mean(changes) - expected.mean()) < 5 * error
    assert np.std(changes) > 10 * 0.01 * expected.mean()


def test_scaled_noise_shows_the_second_order():
    graph, params, x, ranges = network()
    plan = jr.uniform(jr.tabulate(graph), "w4a8")
    labels = jnp.zeros(COUNT, int)
    simulation = Simulator(graph, cross_entropy, points=3).on(params, ranges, [(x, labels)])
    beyond = simulation.divergences()
    for part in (simulation, beyond):
        found = part.attribute(plan, scale=0.5)
        assert np.abs(found.residual).mean() < 0.02 * np.abs(found.change).mean()
    near, nearer = (
        {n: v.mean() / scale**2 for n, v in beyond.attribute(plan, scale=scale).layers.items()}
        for scale in (0.1, 0.05)
    )
    for name, share in near.items():
        assert share == pytest.approx(nearer[name], rel=0.15, abs=0.02 * max(near.values()))
    # The outputs' first order in the weights' noise, by jvp, and half its square in the metric of
    # softmax: activations' noise is a few per cent of it here.
    delta = {
        n: quantize_weight(w, bits=4, channel_axes=(1,)).dequantize() - w for n, w in params.items()
    }
    logits, moved = jax.jvp(lambda p: graph.apply(p, x), (params,), (delta,))
    p = np.float64(jax.nn.softmax(logits))
    moved = np.float64(moved)
    second = 0.5 * ((p * moved**2).sum(1) - (p * moved).sum(1) ** 2)
    assert sum(near.values()) == pytest.approx(second.mean(), rel=0.25)


def counted(simulator, *names):
    """How often each of a simulator's programs runs."""
    counts = dict.fromkeys(names, 0)
    for name in names:
        program = getattr(simulator, name)

        def run(*arguments, name=name, program=program, **settings):
            counts[name] += 1
            return program(*arguments, **settings)

        simulator.__dict__[name] = run
    return counts


def test_float_outputs_are_made_once_and_a_pass_gives_change_and_divergence():
    graph, params, x, ranges = network()
    simulator = Simulator(graph, cross_entropy)
    counts = counted(simulator, "outputs", "losses", "slopes", "secants")
    halves = [(x[:40], jnp.zeros(40, int)), (x[40:], jnp.ones(COUNT - 40, int))]
    simulation = simulator.on(params, ranges, halves)
    for name in ("w8a8", "w4a8"):
        plan = jr.uniform(jr.tabulate(graph), name)
        for slope in (0.0, 0.25):
            beyond = simulation.divergences(slope)
            share = beyond.attribute(plan)
            np.testing.assert_allclose(share.change, beyond.change(plan), atol=1e-5)
            assert (share.float_loss == 0).all()
        simulation.change(plan)
    assert counts == {"outputs": 2, "losses": 2, "slopes": 4, "secants": 8}


def test_float_outputs_that_are_not_kept_change_nothing(monkeypatch):
    graph, params, x, ranges = network()
    plan, data = jr.uniform(jr.tabulate(graph), "w4a8"), [(x, jnp.zeros(COUNT, int))]
    found = []
    for most in (10**9, 4 * 5 * COUNT - 1):
        monkeypatch.setattr(policy_simulation, "OUTPUTS_BYTES", most)
        simulator = Simulator(graph, cross_entropy)
        counts = counted(simulator, "losses", "slopes")
        beyond = simulator.on(params, ranges, data).divergences(0.25)
        change = beyond.simulation.change(plan)
        found.append((beyond.change(plan), beyond.attribute(plan).layers, change))
        beyond.simulation.change(plan)
        assert counts == {"losses": 2, "slopes": 1}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)


def test_outputs_without_a_row_for_every_example():
    graph, params, x, ranges = network()
    plan, labels = jr.uniform(jr.tabulate(graph), "w4a8"), jnp.zeros(COUNT, int)
    expected = Simulator(graph, cross_entropy).on(params, ranges, [(x, labels)]).divergences()
    beside = jr.trace(lambda p, x: (graph.apply(p, x), jnp.sum(p["c"])), params, x[:4])
    simulator = Simulator(beside, lambda o, t: cross_entropy(o[0], t))
    found = simulator.on(params, jr.calibrate(beside, params, [x]), [(x, labels)]).divergences()
    plan = jr.uniform(jr.tabulate(beside), "w4a8")
    np.testing.assert_allclose(found.change(plan), expected.change(plan), rtol=1e-4, atol=1e-6)
    shares = found.attribute(plan)
    np.testing.assert_allclose(shares.change, expected.change(plan), rtol=1e-4, atol=1e-6)


def test_without_noise_there_is_none_in_half_precision_either():
    graph, params, x, _ = network()
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    graph = jr.trace(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x[:4])
    ranges = jr.calibrate(graph, params, [x])
    simulation = Simulator(graph, cross_entropy).on(params, ranges, [(x, jnp.zeros(COUNT, int))])
    plan = jr.uniform(jr.tabulate(graph), "float")
    np.testing.assert_array_equal(simulation.divergences().change(plan), 0)


def test_a_slope_that_is_not_finite_is_named():
    graph, params, x, ranges = network()

    def loss(outputs, targets):  # Its slope is infinite at 0, where the first float output is.
        return jnp.sqrt(jnp.abs(outputs[:, 0] - targets))

    plan, targets = jr.uniform(jr.tabulate(graph), "w4a8"), graph.apply(params, x)[:, 0]
    beyond = Simulator(graph, loss).on(params, ranges, [(x, targets)]).divergences()
    with pytest.raises(jr.sensitivity.ScoreError, match=r"slope of the loss .* of example"):
        beyond.change(plan)

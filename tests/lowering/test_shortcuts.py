"""Shortcuts that read codes: the network that is meant, scored, simulated and run in integers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, random

import jaxrmils as jr
from jaxrmils.artifacts import ArtifactError
from jaxrmils.evaluation.simulate import SimulatedModel
from jaxrmils.numerics import fake_quant
from jaxrmils.policies import PlanError
from jaxrmils.sensitivity import Candidate, ScoreError, contributions

SHAPES = {"stem": (3, 3, 3, 8), "a": (3, 3, 8, 8), "b": (3, 3, 8, 8), "c": (3, 3, 8, 8)}
PARAMS = {name: 0.3 * random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
PARAMS |= {"down": 0.5 * random(1, 1, 8, 8, seed=7), "out": random(8, 5, seed=8)}
X, TARGETS = random(6, 8, 8, 3, seed=9), jnp.linspace(-1, 1, 6)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def by_hand(p, x, q):
    """Two residual blocks behind a max-pooling; `q(site, value)` is what a site reads."""
    h = jax.nn.relu(conv(q("stem", x), p["stem"]))
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = q("a", h)
    h = jax.nn.relu(h + conv(q("b", jax.nn.relu(conv(h, p["a"]))), p["b"]))
    h = jax.nn.relu(conv(q("c", h), p["c"]) + conv(q("down", h), p["down"]))
    return q("out", jnp.mean(h, axis=(1, 2))) @ p["out"]


def net(p, x):
    return by_hand(p, x, lambda site, value: value)


@functools.cache
def made(shortcuts="codes"):
    graph = jr.trace(net, PARAMS, X, shortcuts=shortcuts)
    return graph, jr.calibrate(graph, PARAMS, [X], estimator="minmax")


@functools.cache
def quantized(shortcuts="codes", format="w8a8", backend="cpu"):
    graph, ranges = made(shortcuts)
    plan = jr.uniform(jr.tabulate(graph), format)
    return jr.quantize(graph, PARAMS, plan, ranges, backend=backend)


def simulated_by_hand(model):
    """Fake quantization in the hand-written network, on the model's grids and weights."""

    @jax.jit
    def run(params, x):
        weights = {name: w.tensor.dequantize() for name, w in params.weights.items()}
        return by_hand(weights, x, lambda site, value: fake_quant(value, params.grids[site][0]))

    return run(model.params, X)


def test_the_shortcuts_that_are_found():
    assert made()[0].shortcut_sites == ("a",)  # The second block's shortcut is a site itself.


@pytest.mark.parametrize(("format", "backend"), [("w8a8", "cpu"), ("w4a8", "cpu"), ("w8a8", "tpu")])
def test_the_integer_model_is_the_network_that_is_meant(format, backend):
    model = quantized("codes", format, backend)
    expected = simulated_by_hand(model)
    other = jax.jit(quantized("float", format).apply)(quantized("float", format).params, X)
    run = jax.jit(model.apply, static_argnames="mode")
    for mode in ("integer", "simulate"):
        found = run(model.params, X, mode=mode)
        # A code may move by one where it was between two; the shortcut's noise is much larger.
        distance = np.abs(found - expected).mean()
        assert distance < 0.1 * np.abs(found - other).mean()


@pytest.mark.parametrize("site", ["a", "b"])
def test_the_tangent_counts_both_ways(site):
    graph, ranges = made()
    candidate = Candidate(8, "nearest")
    found = jax.jit(
        lambda p, x, y: (
            contributions(
                graph,
                p,
                x,
                y,
                loss,
                ranges,
                activation_candidates=(candidate,),
                weight_candidates=(),
            ).activations
        )
    )(PARAMS, X, TARGETS)

    seen = {}
    by_hand(PARAMS, X, lambda name, value: seen.setdefault(name, value))

    def total(eps):
        return jnp.sum(loss(by_hand(PARAMS, X, lambda n, v: v + eps if n == site else v), TARGETS))

    noise = fake_quant(seen[site], ranges.grids[site][0][8]) - seen[site]
    expected = jnp.sum(jax.jit(jax.grad(total))(jnp.zeros_like(noise)) * noise, axis=(1, 2, 3))
    np.testing.assert_allclose(found[site][:, 0, 0], expected, rtol=1e-3, atol=1e-6)


def test_the_secant_shares_out_the_whole_change():
    graph, ranges = made()
    plan = jr.uniform(jr.tabulate(graph), "w8a8")
    shares = jr.attribute(graph, PARAMS, plan, [(X, TARGETS)], loss, ranges)
    model = SimulatedModel(graph, PARAMS, ranges, loss)
    change = model.run([(X, TARGETS)], plan).loss - model.run([(X, TARGETS)]).loss
    hand = loss(simulated_by_hand(quantized()), TARGETS) - loss(net(PARAMS, X), TARGETS)
    np.testing.assert_allclose(change, hand, atol=0.02 * np.abs(hand).max())
    np.testing.assert_allclose(shares.change, change, atol=1e-5)
    assert np.abs(shares.residual).mean() < 0.05 * np.abs(change).mean()


def test_scores_and_ranges_of_the_other_kind_are_refused():
    graph, ranges = made("float")
    codes = made()[0]
    with pytest.raises(ScoreError, match="another model"):
        contributions(codes, PARAMS, X, TARGETS, loss, ranges)
    with pytest.raises(PlanError, match="another model"):
        jr.quantize(codes, PARAMS, jr.uniform(jr.tabulate(graph)), ranges)


def test_less_is_kept_in_float():
    sizes = {}
    for shortcuts in ("float", "codes"):
        model = quantized(shortcuts)
        text = jax.jit(model.apply).lower(model.params, X).compile().as_text()
        entry = text[text.index("ENTRY") :]
        sizes[shortcuts] = entry.count("f32[6,4,4,8]")
    assert sizes["codes"] < sizes["float"]


def test_on_disk(tmp_path):
    model = quantized()
    jr.save_model(model, tmp_path / "m")
    loaded = jr.load_model(tmp_path / "m", net)
    assert loaded.graph.shortcuts == "codes"
    np.testing.assert_array_equal(loaded(X), model(X))
    manifest = tmp_path / "m" / "manifest.json"
    document = json.loads(manifest.read_text())
    for value, words in (("int8", "shortcuts is 'int8'"), ("float", "another model")):
        manifest.write_text(json.dumps({**document, "shortcuts": value}))
        with pytest.raises(ArtifactError, match=words):
            jr.load_model(tmp_path / "m", net)

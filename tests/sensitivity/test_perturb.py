"""Switches against models whose operands are quantized by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, model
from stages import TARGETS, calibrated, traced

from jaxrmils.graph import interpret
from jaxrmils.numerics import fake_quant, quantize_weight
from jaxrmils.sensitivity import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    Candidate,
    ScoreError,
    all_off,
    perturbed_losses,
)


@functools.cache
def compiled(name):
    graph, params, inputs = traced(name)
    ranges = calibrated(name)
    run = jax.jit(lambda a, w: perturbed_losses(graph, params, inputs, TARGETS, loss, ranges, a, w))
    return run, all_off(graph, ranges)


def identity(x):
    return x


def plain_by_hand(params, x, on):
    """The "plain" model with a change of each operand; `on` holds functions by name."""
    change = lambda name, value: on.get(name, identity)(value)  # noqa: E731
    weight = lambda name, value: on.get(f"w:{name}", identity)(value)  # noqa: E731
    x = jnp.tanh(change("right", x) @ weight("right", params["right"]))
    x = jnp.tanh(weight("left", params["left"]) @ change("left", x.T)).T
    first, second = params["einsum"]
    x = jnp.tanh(jnp.einsum("bi,ji->bj", change("einsum/0", x), weight("einsum/0", first)))
    return jnp.einsum("ij,bj->bi", weight("einsum/1", second), change("einsum/1", x))


# The axis of each weight that is not summed over.
CHANNELS = {"right": 1, "left": 0, "einsum/0": 0, "einsum/1": 0}


def test_everything_off_is_the_float_model():
    run, (activations, weights) = compiled("plain")
    apply, params, inputs = model("plain")
    expected = loss(apply(params, inputs), TARGETS)
    np.testing.assert_allclose(run(activations, weights), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("site", CHANNELS)
def test_one_activation_on(site):
    run, (activations, weights) = compiled("plain")
    _, params, inputs = model("plain")
    grids = calibrated("plain").grids[site][0]
    for k, candidate in enumerate(ACTIVATION_CANDIDATES):
        found = run({**activations, site: jnp.array([k + 1])}, weights)
        on = {site: lambda x, c=candidate: fake_quant(x, grids[c.bits], c.rounding)}
        expected = loss(plain_by_hand(params, inputs, on), TARGETS)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", CHANNELS)
def test_one_weight_on(name):
    run, (activations, weights) = compiled("plain")
    _, params, inputs = model("plain")
    for k, candidate in enumerate(WEIGHT_CANDIDATES):
        found = run(activations, {**weights, name: jnp.int32(k + 1)})
        quantized = functools.partial(
            quantize_weight, bits=candidate.bits, channel_axes=(CHANNELS[name],)
        )
        on = {f"w:{name}": lambda w, q=quantized: q(w).dequantize()}
        expected = loss(plain_by_hand(params, inputs, on), TARGETS)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def test_all_on_together():
    run, (activations, weights) = compiled("plain")
    _, params, inputs = model("plain")
    grids = calibrated("plain").grids
    on = {s: lambda x, g=grids[s][0][8]: fake_quant(x, g, "floor") for s in CHANNELS}
    for name, axis in CHANNELS.items():
        on[f"w:{name}"] = lambda w, a=axis: quantize_weight(
            w, bits=4, channel_axes=(a,)
        ).dequantize()
    found = run(dict.fromkeys(activations, jnp.array([2])), dict.fromkeys(weights, jnp.int32(2)))
    np.testing.assert_allclose(
        found, loss(plain_by_hand(params, inputs, on), TARGETS), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("position", [0, 1])
def test_the_operands_of_an_activation_dot_switch_apart(position):
    run, (activations, weights) = compiled("experts")
    graph, params, inputs = traced("experts")
    site = next(s for s in graph.sites if s.weight is None)
    grid = calibrated("experts").grids[site.name][position][4]

    def handler(call):
        operands = list(call.operands())
        if call.site.name == site.name:
            operands[position] = fake_quant(operands[position], grid)
        return call.bind(*operands), None

    outputs, _ = interpret(graph, handler, jax.tree.leaves(params), inputs)
    nearest4 = ACTIVATION_CANDIDATES.index(Candidate(4)) + 1
    switches = {**activations, site.name: activations[site.name].at[position].set(nearest4)}
    found = np.asarray(run(switches, weights))
    np.testing.assert_allclose(found, loss(outputs, TARGETS), rtol=2e-6, atol=1e-7)
    assert np.abs(found - np.asarray(run(activations, weights))).max() > 1e-5


def test_a_tied_weight_switches_in_all_its_uses():
    run, (activations, weights) = compiled("tied_embedding")
    apply, params, inputs = model("tied_embedding")
    table = params["params"]["Embed_0"]["embedding"]
    quantized = quantize_weight(table, bits=4, channel_axes=(0,)).dequantize()
    changed = {"params": {**params["params"], "Embed_0": {"embedding": quantized}}}
    found = run(activations, {**weights, "Embed_0/embedding": jnp.int32(2)})
    np.testing.assert_allclose(found, loss(apply(changed, inputs), TARGETS), rtol=2e-6, atol=1e-7)


def test_ranges_of_another_model_are_refused():
    graph, params, inputs = traced("plain")
    ranges = calibrated("experts")
    with pytest.raises(ScoreError, match="another model"):
        perturbed_losses(graph, params, inputs, TARGETS, loss, ranges, {}, {})

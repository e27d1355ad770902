"""Weights with a scale for every group along the contracted dim, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss

import jaxrmils as jr
from jaxrmils.artifacts import (
    load_model,
    load_plan,
    load_scores,
    save_model,
    save_plan,
    save_scores,
)
from jaxrmils.artifacts.portable import export_for, portable
from jaxrmils.graph import group_axis
from jaxrmils.numerics import quantize_weight
from jaxrmils.policies import LayerPlan, PlanError, Simulator, candidates_for, check_plan, predict
from jaxrmils.sensitivity import Candidate, weight_noise


def numpy_groups(w, axis, group, bits=4):
    """Codes and the scale of every element: group by group, in float32."""
    w = np.moveaxis(np.asarray(w), axis, -1)
    codes, scales = np.zeros(w.shape, np.int8), np.ones(w.shape, np.float32)
    limit = np.float32(2 ** (bits - 1) - 1)
    for start in range(0, w.shape[-1], group):
        part = w[..., start : start + group]
        scale = np.abs(part).max(-1, keepdims=True) / limit
        scale = np.where(scale >= np.finfo(np.float32).smallest_normal, scale, np.float32(1))
        codes[..., start : start + group] = np.clip(np.round(part / scale), -limit, limit)
        scales[..., start : start + group] = scale
    return tuple(np.moveaxis(x, -1, axis) for x in (codes, scales))


@pytest.mark.parametrize(
    ("shape", "channels"), [((7, 5), (1,)), ((7, 5), (0,)), ((2, 6, 3), (0, 2)), ((2, 3, 4), (2,))]
)
def test_every_group_has_its_scale(shape, channels):
    w = np.random.default_rng(len(channels)).normal(size=shape).astype(np.float32)
    w.flat[:4] = 0
    axis = max(a for a in range(len(shape)) if a not in channels)
    perm = tuple(range(len(shape)))[::-1]
    cases = [(4, 2), (8, 2), (4, 8), (8, 1)]

    @jax.jit
    def run(w):
        made = [quantize_weight(w, bits=b, channel_axes=channels, group=g) for b, g in cases]
        return [(q, q.codes(), q.dequantize(), q.transpose(perm).dequantize()) for q in made]

    for (bits, group), (q, found, restored, transposed) in zip(cases, run(w), strict=True):
        codes, scales = numpy_groups(w, axis, group, bits)
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_array_equal(restored, codes.astype(np.float32) * scales)
        np.testing.assert_array_equal(transposed, np.asarray(restored).transpose(perm))
        count = np.prod(shape) // shape[axis] * -(-shape[axis] // group)
        assert q.packed == (bits == 4) and q.scale.size == count
        assert q.size_bits == bits * w.size + 32 * count


def test_groups_need_an_axis():
    with pytest.raises(ValueError, match="an axis that groups can run along"):
        quantize_weight(jnp.ones((2, 3)), bits=4, channel_axes=(0, 1), group=2)


def model():
    """A lookup, a scanned stack, a kernel that contracts two dims, and a convolution."""
    rng = np.random.default_rng(0)
    shapes = {
        "table": (11, 70),
        "stack": (2, 70, 70),
        "heads": (2, 35, 40),
        "conv": (3, 40, 8),
    }
    params = {
        n: (rng.normal(size=s) / np.sqrt(s[-2])).astype(np.float32) for n, s in shapes.items()
    }

    def apply(params, ids):
        h = jnp.take(params["table"], ids, axis=0, mode="clip")
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])[0]
        h = h.reshape(*h.shape[:-1], 2, 35)
        h = jnp.einsum("btij,ijo->bto", h, params["heads"])
        h = jax.lax.conv_general_dilated(
            h, params["conv"], (1,), "SAME", None, None, ("NWC", "WIO", "NWC")
        )
        return jnp.mean(jnp.tanh(h), axis=1)

    ids = rng.integers(0, 11, (4, 6)).astype(np.int32)
    return jr.trace(apply, params, ids), params, ids


GRAPH, PARAMS, IDS = model()
TABLE = jr.tabulate(GRAPH)
PLAN = jr.uniform(TABLE, "w4g32")
AXES = {"table": 1, "stack": 1, "heads": 1, "conv": None}


def written_out():
    """The parameters as they are stored, dequantized by numpy."""
    found = {}
    for name, w in PARAMS.items():
        if name == "conv":
            scale = np.abs(w).max((0, 1)) / np.float32(7)
            found[name] = np.round(np.asarray(w) / scale) * scale
        else:
            codes, scales = numpy_groups(w, AXES[name], 32)
            found[name] = codes * scales
    return found


def test_a_model_is_the_float_model_of_its_codes(tmp_path):
    assert {n: group_axis(GRAPH, n) for n in PARAMS} == AXES
    assert {n: p.format for n, p in PLAN.layers.items()} == {
        n: "w4" if n == "conv" else "w4g32" for n in PARAMS
    }
    quantized = jr.quantize(GRAPH, PARAMS, PLAN, None)
    restored = jax.jit(lambda weights: {n: w.tensor.dequantize() for n, w in weights.items()})
    jax.tree.map(np.testing.assert_array_equal, restored(quantized.params.weights), written_out())
    expected = jax.jit(GRAPH.apply)(written_out(), IDS)
    np.testing.assert_allclose(quantized(IDS), expected, rtol=1e-5, atol=1e-6)
    tensors = [w.tensor for w in quantized.params.weights.values()]
    assert (
        quantized.size_bits == sum(t.size_bits for t in tensors) == TABLE.size_bits(PLAN.formats())
    )
    assert TABLE.layer_bits("heads", 4, 32) == 4 * 2 * 35 * 40 + 32 * 2 * 2 * 40

    save_model(quantized, tmp_path / "model")
    save_plan(PLAN, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == PLAN
    for options in ({}, {"unpacked": True}, {"backend": "tpu"}):
        loaded = load_model(tmp_path / "model", GRAPH.apply, **options)
        jax.tree.map(np.testing.assert_array_equal, restored(loaded.params.weights), written_out())
    parts = portable(loaded)  # The one whose codes are held for TPU.
    exported, _ = export_for(parts, "cpu", None)
    np.testing.assert_allclose(exported.call(parts.arrays, IDS), expected, rtol=1e-5, atol=1e-6)


def test_noise_scores_and_simulation(tmp_path):
    candidate = Candidate(4, group=32)
    noise = jax.jit(lambda p: weight_noise(GRAPH, p, (candidate, Candidate(4))))(PARAMS)
    for name, w in written_out().items():
        np.testing.assert_allclose(noise[name][0], w - np.asarray(PARAMS[name]), atol=1e-7)
    np.testing.assert_array_equal(*noise["conv"])  # A convolution has a scale per channel.
    noise = jax.device_get(noise)

    params = {n: PARAMS[n] for n in ("table", "heads")}

    def apply(params, ids):
        h = jnp.take(params["table"], ids, axis=0, mode="clip")
        h = jnp.mean(jnp.tanh(h), axis=1).reshape(-1, 2, 35)
        return jnp.einsum("bij,ijo->bo", h, params["heads"])

    graph = jr.trace(apply, params, IDS)
    table = jr.tabulate(graph)
    plan, targets = jr.uniform(table, "w4g32"), np.zeros(4, np.float32)
    ranges = jr.calibrate(graph, params, [IDS], estimator="minmax")
    wanted = candidates_for(["w4g32"])
    assert wanted.weights == (Candidate(8), Candidate(4), candidate)
    scores = jr.score(
        graph,
        params,
        [(IDS, targets)],
        loss,
        ranges,
        weight_candidates=wanted.weights,
        activation_candidates=(),
    )
    save_scores(scores, tmp_path)
    predicted = predict(load_scores(tmp_path), plan)
    gradients = jax.jit(jax.jacrev(lambda p: loss(graph.apply(p, IDS), targets)))(params)
    for name, values in predicted.items():
        expected = np.sum((np.asarray(gradients[name]) * noise[name][0]).reshape(4, -1), axis=1)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)

    simulation = Simulator(graph, loss).on(params, ranges, [(IDS, targets)])
    both = np.concatenate(
        [jr.quantize(graph, params, plan, None)(IDS), jax.jit(graph.apply)(params, IDS)]
    )
    change = np.subtract(*jax.jit(loss)(both, np.zeros(8, np.float32)).reshape(2, 4))
    np.testing.assert_allclose(simulation.change(plan), change, atol=1e-5)
    assert np.abs(change).min() > 1e-4
    # Of a table that an older version saved, nothing is guessed.
    old = dataclasses.replace(
        scores,
        table=dataclasses.replace(
            table, layers=tuple(dataclasses.replace(row, group_length=None) for row in table.layers)
        ),
    )
    assert jr.uniform(old.table, "w4g32").layers == plan.layers
    with pytest.raises(ValueError, match="an older version saved it"):
        old.table.size_bits(plan.formats())
    with pytest.raises(PlanError, match=r"w4g64 .* weight_candidates with int4 nearest by 64"):
        predict(scores, jr.uniform(table, "w4g64"))


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("conv", LayerPlan(4, weight_group=32), "not convolutions"),
        ("heads", LayerPlan(4, weight_group=-1), "expected a positive number"),
        ("heads", LayerPlan(4, 8, ("nearest",), weight_group=32), "with float activations"),
        ("heads", LayerPlan(weight_group=32), "for integer weights"),
    ],
)
def test_plans_that_cannot_be(name, layer, message):
    with pytest.raises(PlanError, match=message):
        check_plan(jr.Plan({**PLAN.layers, name: layer}, PLAN.fingerprint), TABLE)

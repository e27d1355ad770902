"""Activations with a grid for every row: integers, simulation and scores, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import loss
from stages import TARGETS, traced

import jaxrmils as jr
from jaxrmils.artifacts import load_model, load_plan, save_model, save_plan
from jaxrmils.artifacts.portable import export_for, portable
from jaxrmils.graph import interpret
from jaxrmils.lowering.sites import exact_kernel, integer_kernel, run_quantized
from jaxrmils.numerics import dequantize, row_params, switched_quant
from jaxrmils.policies import (
    LayerPlan,
    PlanError,
    Simulator,
    budget,
    candidates_for,
    check_plan,
    layer_options,
    predict,
    sqnr_costs,
)
from jaxrmils.sensitivity import ACTIVATION_CANDIDATES, DYNAMIC_CANDIDATES, Candidate
from jaxrmils.sensitivity.contraction import grid_of, noise

ROW = Candidate(8, dynamic=True)


def numpy_grid(x, axis):
    """Scale and zero point of every row, in float32."""
    lo = np.minimum(x.min(axis, keepdims=True), np.float32(0))
    hi = np.maximum(x.max(axis, keepdims=True), np.float32(0))
    scale = (hi - lo) / np.float32(255)
    scale = np.where(scale >= np.finfo(np.float32).smallest_normal, scale, np.float32(1))
    return scale, np.clip(np.round(np.float32(-128) - lo / scale), -128, 127).astype(np.int64)


def numpy_steps(x, axis):
    """Codes minus zero points in int64, and scales."""
    scale, zero = numpy_grid(x, axis)
    codes = np.clip(np.round(x / scale) + zero.astype(np.float32), -128, 127).astype(np.int64)
    return codes - zero, scale


rows = st.lists(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4),
    min_size=3,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from([0, 1]))
def test_grids_of_rows(values, axis):
    x = np.asarray(values, np.float32).reshape(3, 4)
    scale, zero = numpy_grid(x, axis)
    found = row_params(jnp.asarray(x), bits=8, axes=(axis,))
    np.testing.assert_array_equal(found.scale, scale)
    live = scale != 1  # A row of subnormal numbers has no grid of its own.
    np.testing.assert_array_equal(np.asarray(found.zero_point)[live], zero[live])


@functools.cache
def dots(seed=0):
    """A dot with a weight, and a product of two activations that is contracted over tokens."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {"w": jax.random.normal(keys[0], (12, 6))}
    x = jax.random.normal(keys[1], (4, 5, 12)) * jnp.exp2(jnp.arange(5.0))[:, None]

    def apply(params, x):
        h = x @ params["w"]
        return jnp.einsum("bij,bik->bjk", h, x)

    return jr.trace(apply, params, x), params, x


@pytest.mark.parametrize("format_", ["w8a8d", "w4a8d"])
def test_a_model_is_numpys_and_needs_no_ranges(format_):
    graph, params, x = dots()
    plan = jr.uniform(jr.tabulate(graph), format_)
    assert list(plan.counts()) == [format_, "a8d"]
    model = jr.quantize(graph, params, plan, None)
    assert not model.params.grids

    w = model.params.weights["w"].tensor
    inputs, input_scale = numpy_steps(np.asarray(x), 2)
    products = inputs @ np.asarray(w.codes(), np.int64)
    h = products.astype(np.float32) * (input_scale * np.asarray(w.scale))
    left, left_scale = numpy_steps(h, 1)
    right, right_scale = numpy_steps(np.asarray(x), 1)
    products = np.einsum("bij,bik->bjk", left, right).astype(np.float32)
    expected = products * (left_scale.swapaxes(1, 2) * right_scale)
    run = jax.jit(model.apply, static_argnames="mode")
    np.testing.assert_array_equal(run(model.params, x), expected)
    np.testing.assert_array_equal(run(model.params, x, mode="simulate"), expected)
    np.testing.assert_array_equal(run(model.params, x[1:2]), expected[1:2])  # None sees another.


def site_records(graph, params, inputs):
    """Per dot of a model, in one program: both kernels, codes and simulated operands."""
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "w8a8d"), None)
    candidates, state = (*ACTIVATION_CANDIDATES, ROW), jr.calibrate(graph, params, [inputs]).grids

    def handler(call):
        tensor, sums = None, None
        if call.weight is not None:
            tensor, sums = call.weight.tensor, call.weight.sums.get(call.site.name)
        count = len(call.site.activations)
        rest = (tensor, sums, (8,) * count, ("nearest",) * count)
        integer, codes = run_quantized(call, integer_kernel("cpu"), *rest)
        exact, _ = run_quantized(call, exact_kernel, *rest)
        record = {"integer": integer, "exact": exact, "restored": [], "simulated": [], "noisy": []}
        for position, index in enumerate(call.site.activations):
            x = call.operand(index)
            wide, static = x.astype(jnp.float32), call.state[position]
            grids = [grid_of(call, index, x, static, c) for c in candidates]
            chosen = switched_quant(wide, grids, [c.rounding for c in candidates], jnp.int32(7))
            record["restored"].append(dequantize(codes[position], grids[-1]))
            record["simulated"].append(chosen)
            record["noisy"].append((noise(x, grids[-1], ROW), wide))
        return integer, record

    def run(params, inputs):
        leaves = [params.leaves.get(leaf) for leaf in graph.leaf_names]
        found = interpret(graph, handler, leaves, inputs, weights=params.weights, state=state)
        return found[1]

    return jax.device_get(jax.jit(run)(model.params, inputs))


@pytest.mark.parametrize("model", [dots, functools.partial(traced, "scanned_stack")])
def test_the_simulation_is_what_integers_give(model):
    records = site_records(*model())
    assert len(records) == len(model()[0].sites)
    for record in records.values():
        np.testing.assert_array_equal(record["integer"], record["exact"])
        for restored, simulated, (eps, wide) in zip(
            record["restored"], record["simulated"], record["noisy"], strict=True
        ):
            np.testing.assert_array_equal(simulated, restored)
            np.testing.assert_allclose(wide + eps, restored, rtol=1e-6, atol=1e-6)


def test_a_plan_is_simulated_and_attributed():
    graph, params, x = dots()
    ranges, targets = jr.calibrate(graph, params, [x]), jnp.zeros(4)
    plan = jr.uniform(jr.tabulate(graph), "w8a8d")
    simulation = Simulator(graph, loss, points=1).on(params, ranges, [(x, targets)])
    measured = loss(jr.quantize(graph, params, plan, None)(x), targets)
    change = measured - loss(graph.apply(params, x), targets)
    np.testing.assert_allclose(simulation.change(plan), change, rtol=1e-3)
    shares = simulation.attribute(plan)
    assert set(shares.layers) == set(graph.layers)
    np.testing.assert_allclose(shares.change, change, rtol=1e-3)
    static = jr.uniform(jr.tabulate(graph), "w8a8")
    simulation.change(static)
    # Static plans and the float model have one program, dynamic plans another.
    assert simulation.simulator.losses._cache_size() == 2


@functools.cache
def dynamic_scores():
    graph, params, x = dots()
    ranges, targets = jr.calibrate(graph, params, [x]), jnp.zeros(4)
    wanted = candidates_for(["w8a8d"]).activations
    assert wanted == (*ACTIVATION_CANDIDATES, *DYNAMIC_CANDIDATES)
    plain = jr.score(graph, params, [(x, targets)], loss, ranges)
    wide = jr.score(graph, params, [(x, targets)], loss, ranges, activation_candidates=wanted)
    return plain, wide


def test_scores_contract_the_noise_of_rows():
    graph, params, x = dots()
    plain, wide = dynamic_scores()
    np.testing.assert_array_equal(wide.activations[..., :-1], plain.activations)

    def run(params, x, target):
        return loss(jnp.einsum("bij,bik->bjk", x[0] @ params["w"], x[1]), target)[0]

    slope = jax.jit(jax.grad(run, argnums=1))
    for n in range(4):
        one = x[n : n + 1]
        gradient = slope(params, (one, one), jnp.zeros(1))
        for (site, position), g, axis in (
            (("w", 0), gradient[0], 2),
            ((list(graph.layers)[1], 1), gradient[1], 1),
        ):
            steps, scale = numpy_steps(np.asarray(one), axis)
            expected = np.sum(np.asarray(g) * (steps * scale - np.asarray(one)))
            found = wide.activation(site, position, ROW)[n]
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


def test_policies_take_what_was_scored():
    plain, wide = dynamic_scores()
    plan = jr.uniform(wide.table, "w8a8d")
    assert set(predict(wide, plan)) == set(wide.table.layer)
    advice = "w8a8d was not scored; score it with activation_candidates with int8 nearest by row"
    with pytest.raises(PlanError, match=advice):
        predict(plain, plan)
    formats = ("w8a8", "w8a8d", "w4a8d")
    with pytest.raises(PlanError, match=advice):
        budget(plain, jr.Limits(size_share=0.9), formats=formats)
    options = layer_options(wide, formats, "directed")
    assert [p.format for p in options["w"]] == ["float", "w8a8", "w8a8", "w8a8d", "w4a8d"]
    found = budget(wide, jr.Limits(size_share=0.21), formats=("w8a8d", "w4a8d"))
    assert found.layers["w"].format == "w4a8d"
    graph, params, x = dots()
    with pytest.raises(PlanError, match="calibrated grids for whole tensors and"):
        sqnr_costs(graph, params, [(x, x)], wide.ranges, formats=("w8a8d",))


def test_what_has_no_rows_stays_calibrated():
    params = {"conv": jnp.ones((3, 2, 2)) / 3, "dense": jnp.ones((2, 3))}
    x = jax.random.normal(jax.random.key(0), (4, 5, 2))

    def apply(params, x):
        layout = ("NWC", "WIO", "NWC")
        h = jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", None, None, layout)
        return h @ params["dense"]

    graph = jr.trace(apply, params, x)
    table = jr.tabulate(graph)
    plan = jr.uniform(table, "w8a8d")
    assert {n: p.format for n, p in plan.layers.items()} == {"conv": "w8a8", "dense": "w8a8d"}
    check_plan(plan, table)
    for layer, message in (
        (LayerPlan(8, 8, ("nearest",), dynamic=True), "only dots have"),
        (LayerPlan(8, 4, ("nearest",), dynamic=True), "dynamic activations have 8 bits"),
    ):
        with pytest.raises(PlanError, match=message):
            check_plan(jr.Plan({**plan.layers, "conv": layer}, plan.fingerprint), table)
    with pytest.raises(PlanError, match="calibrated grid, but there are no ranges"):
        jr.quantize(graph, params, plan, None)
    # A convolution's column of scores is that of its calibrated grid.
    ranges = jr.calibrate(graph, params, [x])
    wanted = {"activation_candidates": (ROW, Candidate(8)), "weight_candidates": ()}
    scores = jr.score(graph, params, [(x, TARGETS)], loss, ranges, **wanted)
    conv, dense = (scores.activation_rows.index((name, 0)) for name in ("conv", "dense"))
    by_row, whole = scores.activations[..., 0], scores.activations[..., 1]
    np.testing.assert_array_equal(by_row[:, conv], whole[:, conv])
    assert (by_row[:, dense] != whole[:, dense]).any()


def test_files(tmp_path):
    graph, params, x = dots()
    plan = jr.uniform(jr.tabulate(graph), "w4a8d")
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    static = jr.uniform(jr.tabulate(graph), "w4a8")
    save_plan(static, tmp_path / "static.json")
    assert "dynamic" not in (tmp_path / "static.json").read_text()
    model = jr.quantize(graph, params, plan, None)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", graph.apply)
    assert loaded.plan == plan
    np.testing.assert_array_equal(loaded(x), model(x))
    parts = portable(model)
    exported, _ = export_for(parts, "cpu", None)
    np.testing.assert_array_equal(*jax.tree.leaves((exported.call(parts.arrays, x), model(x))))
    stored = jr.quantize(graph, params, static, jr.calibrate(graph, params, [x]))
    assert stored.size_bits - model.size_bits == 3 * (32 + 8)  # Grids are not stored.

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
def dots():
    """A dot whose weight comes first, and a product of two activations, contracted over tokens."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 12)).astype(np.float32)}
    x = (rng.normal(size=(4, 5, 12)) * np.exp2(np.arange(5))[:, None]).astype(np.float32)

    def apply(params, x):
        h = jax.lax.dot_general(params["w"], x, (((1,), (2,)), ((), ())))
        return jnp.einsum("jbi,bik->bjk", h, x)

    return jr.trace(apply, params, x), params, x


@functools.cache
def ranges_of(model):
    graph, params, x = model()
    return jr.calibrate(graph, params, [x], estimator="minmax")


@functools.cache
def quantized(format_):
    """The dots in a format, without ranges, and their outputs."""
    graph, params, x = dots()
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), format_), None)
    return model, np.asarray(model(x))


@pytest.mark.parametrize("format_", ["w8a8d", "w4a8d"])
def test_a_model_is_numpys_and_needs_no_ranges(format_):
    _, _, x = dots()
    model, outputs = quantized(format_)
    assert list(model.plan.counts()) == [format_, "a8d"]
    assert not model.params.grids

    w = model.params.weights["w"].tensor
    inputs, input_scale = numpy_steps(x, 2)
    products = inputs @ np.asarray(w.codes(), np.int64).T
    h = products.astype(np.float32) * (input_scale * np.asarray(w.scale).T)
    left, left_scale = numpy_steps(h, 1)
    right, right_scale = numpy_steps(x, 1)
    products = np.einsum("bij,bik->bjk", left, right).astype(np.float32)
    expected = products * (left_scale.swapaxes(1, 2) * right_scale)
    np.testing.assert_array_equal(outputs, expected)
    if format_ == "w4a8d":
        simulate = jax.jit(lambda params, x: model.apply(params, x, mode="simulate"))
        np.testing.assert_array_equal(simulate(model.params, x), expected)
    others = x[::-1].copy()
    others[1] = x[1]
    np.testing.assert_array_equal(model(others)[1], expected[1])  # None sees another.


def site_records(traced_model):
    """Per dot of a model, in one program: both kernels, codes and simulated operands."""
    graph, params, inputs = traced_model()
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "w8a8d"), None)
    candidates = (Candidate(8), Candidate(4, "floor"), ROW)
    state = ranges_of(traced_model).grids

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
            chosen = switched_quant(wide, grids, [c.rounding for c in candidates], jnp.int32(3))
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
    records = site_records(model)
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
    model, outputs = quantized("w8a8d")
    plan, batches = model.plan, [(x, np.zeros(4, np.float32))]
    simulation = Simulator(graph, loss, points=1).on(params, ranges_of(dots), batches)
    simulation = simulation.holding(["w8a8d"])
    both = np.concatenate([outputs, jax.jit(graph.apply)(params, x)])
    change = np.subtract(*jax.jit(loss)(both, np.zeros(8, np.float32)).reshape(2, 4))
    np.testing.assert_allclose(simulation.change(plan), change, rtol=1e-3)
    shares = simulation.attribute(plan)
    assert set(shares.layers) == set(graph.layers)
    np.testing.assert_allclose(shares.change, change, rtol=1e-3)
    assert np.abs(simulation.change(jr.uniform(jr.tabulate(graph), "w8a8"))).max() > 0
    assert simulation.simulator.losses._cache_size() == 1  # One program, whatever the plan.
    assert simulation.holding(["w4a8d", "w8a8"]) is simulation


@functools.cache
def dynamic_scores():
    graph, params, x = dots()
    known = (graph, params, [(x, np.zeros(4, np.float32))], loss, ranges_of(dots))
    wanted = candidates_for(["w8a8d"]).activations
    assert wanted == (*ACTIVATION_CANDIDATES, *DYNAMIC_CANDIDATES)
    plain = jr.score(*known, activation_candidates=(Candidate(8),))
    return plain, jr.score(*known, activation_candidates=wanted)


def test_scores_contract_the_noise_of_rows():
    graph, params, x = dots()
    plain, wide = dynamic_scores()
    np.testing.assert_allclose(wide.activations[..., 0], plain.activations[..., 0], rtol=1e-4)

    def run(params, x, target):
        return loss(jnp.einsum("bij,bik->bjk", x[0] @ params["w"].T, x[1]), target)[0]

    slope = jax.jit(jax.grad(run, argnums=1))
    for n in range(4):
        one = x[n : n + 1]
        gradient = slope(params, (one, one), np.zeros(1, np.float32))
        for (site, position), g, axis in (
            (("w", 0), gradient[0], 2),
            ((list(graph.layers)[1], 1), gradient[1], 1),
        ):
            steps, scale = numpy_steps(one, axis)
            expected = np.sum(np.asarray(g) * (steps * scale - one))
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
    with pytest.raises(PlanError, match="formats is 'w8a8d'; expected some"):
        candidates_for("w8a8d")
    graph, params, x = dots()
    with pytest.raises(PlanError, match="calibrated grids for whole tensors and"):
        sqnr_costs(graph, params, [(x, x)], wide.ranges, formats=("w8a8d",))


def test_what_has_no_rows_stays_calibrated():
    params = {"conv": np.full((3, 2, 2), 1 / 3, "f"), "dense": np.ones((2, 3), "f")}
    x = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)

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
    ranges = jr.calibrate(graph, params, [x], estimator="minmax")
    wanted = {"activation_candidates": (ROW, Candidate(8)), "weight_candidates": ()}
    scores = jr.score(graph, params, [(x, TARGETS)], loss, ranges, **wanted)
    conv, dense = (scores.activation_rows.index((name, 0)) for name in ("conv", "dense"))
    by_row, whole = scores.activations[..., 0], scores.activations[..., 1]
    np.testing.assert_array_equal(by_row[:, conv], whole[:, conv])
    assert (by_row[:, dense] != whole[:, dense]).any()


def test_files(tmp_path):
    graph, params, x = dots()
    model, outputs = quantized("w4a8d")
    plan = model.plan
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    static = jr.uniform(jr.tabulate(graph), "w4a8")
    save_plan(static, tmp_path / "static.json")
    assert "dynamic" not in (tmp_path / "static.json").read_text()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", graph.apply)
    assert loaded.plan == plan
    np.testing.assert_array_equal(loaded(x), outputs)
    parts = portable(model)
    exported, _ = export_for(parts, "cpu", None)
    np.testing.assert_array_equal(*(exported.call(parts.arrays, x), outputs))
    stored = jr.quantize(graph, params, static, ranges_of(dots))
    assert stored.size_bits - model.size_bits == 3 * (32 + 8)  # Grids are not stored.

"""Other backends, zero ranges and refusals of `quantize`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random
from plans import plan_of, quantized
from stages import calibrated, table_of, traced

from jaxrmils import calibrate, quantize, tabulate, trace, uniform
from jaxrmils.graph import TraceError
from jaxrmils.lowering import LoweringError, QuantizedModel
from jaxrmils.policies import PlanError

# Other backends, without them


def operand_types(name, kind, backend):
    """Operand and result types of dots and convolutions in the lowered program."""
    built = quantized(name, kind, backend)
    _, _, inputs = traced(name)
    lowered = jax.jit(built.apply).trace(built.params, inputs).lower(lowering_platforms=(backend,))
    types = []
    for line in lowered.as_text().splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            signature = line.rsplit(" : ", 1)[1]
            types.append(tuple(t.split("x")[-1] for t in signature.split("tensor<")[1:]))
    return sorted({tuple(t.split(">")[0] for t in each) for each in types})


@pytest.mark.parametrize("backend", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["cnn", "transformer", "scanned_stack"])
def test_lowering_for_accelerators_keeps_integers(name, backend):
    assert operand_types(name, "int8", backend) == [("i8", "i8", "i32")]
    assert operand_types(name, "w4a8", backend) == [("i8", "i8", "i32")]
    both4 = operand_types(name, "int4", backend)
    if backend == "cuda":
        assert both4 == [("i8", "i8", "i32")]
    else:  # Native int4 dots; convolutions widen.
        assert ("i4", "i4", "i32") in both4 and {t[2] for t in both4} == {"i32"}
    assert all(t[2] != "i32" for t in operand_types(name, "w8", backend))


def test_int4_is_stored_natively_on_tpu():
    built = quantized("plain", "w4a8", "tpu")
    assert all(w.tensor.values.dtype == jnp.int4 for w in built.params.weights.values())
    on_cpu = quantized("plain", "w4a8")
    assert built.size_bits == on_cpu.size_bits
    for name, stored in built.params.weights.items():
        packed = on_cpu.params.weights[name].tensor
        np.testing.assert_array_equal(stored.tensor.codes(), packed.codes())


# Zero ranges


def dense(w, x, kind, estimator="minmax"):
    params = {"w": jnp.asarray(w, jnp.float32)}
    graph = trace(lambda p, x: x @ p["w"], params, x)
    ranges = calibrate(graph, params, [x], estimator=estimator)
    return quantize(graph, params, uniform(tabulate(graph), kind), ranges)


@pytest.mark.parametrize("kind", ["int8", "int4", "w4"])
def test_an_all_zero_channel_gives_zeros(kind):
    w = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    w[:, 2] = 0
    x = random(4, 5)
    out = np.asarray(dense(w, x, kind)(x))
    assert np.all(np.isfinite(out)) and np.all(out[:, 2] == 0)
    assert np.abs(out - np.asarray(x) @ w).max() < (0.05 if kind == "int8" else 1.0)


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_a_constant_activation_is_exact(value, estimator):
    w = np.array([[127.0, -127.0], [1.0, 64.0]], np.float32)  # on their grids in int8
    x = jnp.full((4, 2), value)
    out = np.asarray(dense(w, x, "int8", estimator)(x))
    np.testing.assert_allclose(out, np.asarray(x) @ w, rtol=1e-2, atol=1e-6)


def test_all_zero_weights_and_inputs():
    out = np.asarray(dense(np.zeros((3, 2)), jnp.zeros((4, 3)), "int4")(jnp.zeros((4, 3))))
    np.testing.assert_array_equal(out, 0)


# Errors


def test_plans_and_ranges_of_another_model_are_refused():
    graph, params, _ = traced("plain")
    plan, ranges = plan_of("plain", "int8"), calibrated("plain")
    with pytest.raises(PlanError, match="plan was made for another model"):
        quantize(graph, params, plan_of("custom_rules", "int8"), ranges)
    with pytest.raises(PlanError, match="ranges were calibrated on another model"):
        quantize(graph, params, plan, calibrated("custom_rules"))
    with pytest.raises(TraceError, match="params do not fit"):
        quantize(graph, {**params, "left": jnp.ones((6, 7))}, plan, ranges)


def test_an_unreached_site_must_stay_float():
    graph, params, _ = traced("cond_parameter")
    with pytest.raises(PlanError, match="site no is planned in int8, but no calibration example"):
        quantize(
            graph, params, uniform(table_of("cond_parameter"), "int8"), calibrated("cond_parameter")
        )
    assert isinstance(quantized("cond_parameter", "int8"), QuantizedModel)


def test_an_unknown_mode_is_refused():
    built = quantized("plain", "int8")
    with pytest.raises(ValueError, match="mode 'exact'"):
        built.apply(built.params, traced("plain")[2], mode="exact")


def test_a_sum_that_could_overflow_names_its_site():
    struct = jax.ShapeDtypeStruct
    built = dense(np.ones((4, 2)), random(4, 4), "int8")
    long = 70_000
    graph = trace(
        lambda p, x: x @ p["w"],
        {"w": struct((long, 2), jnp.float32)},
        struct((2, long), jnp.float32),
    )
    wide = dataclasses.replace(built, graph=graph)
    weight = built.params.weights["w"]
    tensor = dataclasses.replace(weight.tensor, values=jnp.ones((long, 2), jnp.int8))
    params = dataclasses.replace(
        built.params, weights={"w": dataclasses.replace(weight, tensor=tensor)}
    )
    with pytest.raises(LoweringError, match=r"site w: K = 70000 .* can overflow int32"):
        jax.eval_shape(wide.apply, params, struct((2, long), jnp.float32))

"""Quantized models as Flax modules compute what the models compute."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError
from models import random
from plans import quantized
from stages import traced

from jaxrmils import as_linen, as_nnx, calibrate, quantize, tabulate, trace, uniform
from jaxrmils.graph import TraceError
from jaxrmils.lowering.modules import QuantizedVariable
from jaxrmils.lowering.named_params import at_rest, for_backend, from_named, named_arrays


def equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


CASES = [("plain", "int8"), ("plain", "w4a8"), ("cnn", "mixed"), ("tied_embedding", "w4")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_modules_equal_the_model(name, kind):
    model, inputs = quantized(name, kind), traced(name)[2]
    module = as_linen(model)
    variables = module.model_variables()
    assert set(variables) == {"quantized"}
    equal(module.apply(variables, inputs), model(inputs))
    expected = jax.jit(model.apply)(model.params, inputs)
    equal(jax.jit(module.apply)(variables, inputs), expected)
    other = as_nnx(model)
    equal(other(inputs), model(inputs))
    equal(nnx.jit(lambda m, x: m(x))(other, inputs), expected)


def test_init_returns_the_models_own_arrays():
    model, inputs = quantized("plain", "w4a8"), traced("plain")[2]
    module = as_linen(model)
    variables = module.init(jax.random.key(0), inputs)
    wanted = module.model_variables()["quantized"]
    assert set(variables["quantized"]) == set(wanted)
    assert all(variables["quantized"][name] is array for name, array in wanted.items())
    assert "weights/right/values" in wanted and wanted["weights/right/values"].dtype == jnp.uint8
    assert len(repr(module)) < 100


def test_outputs_come_from_the_given_variables_not_from_the_model():
    model, inputs = quantized("plain", "int8"), traced("plain")[2]
    module = as_linen(model)
    arrays = module.model_variables()["quantized"]
    zeroed = ("weights/einsum/1/values", "sums/einsum/1")
    arrays |= {name: jnp.zeros_like(arrays[name]) for name in zeroed}
    assert not np.asarray(module.apply({"quantized": arrays}, inputs)).any()
    other = as_nnx(model)
    for name in zeroed:
        variable = other.arrays[name]
        variable.set_value(jnp.zeros_like(variable.get_value()))
    assert not np.asarray(other(inputs)).any()
    assert np.asarray(model(inputs)).any()


def test_missing_variables_are_named():
    model, inputs = quantized("plain", "int8"), traced("plain")[2]
    module = as_linen(model)
    with pytest.raises(ScopeCollectionNotFound, match="quantized"):
        module.apply({}, inputs)
    arrays = module.model_variables()["quantized"]
    del arrays["grids/right/0/scale"]
    with pytest.raises(ScopeVariableNotFoundError, match="grids/right/0/scale"):
        module.apply({"quantized": arrays}, inputs)


def test_nnx_split_merge_state_and_update():
    model, inputs = quantized("plain", "w4a8"), traced("plain")[2]
    module = as_nnx(model)
    definition, state = nnx.split(module, QuantizedVariable)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(model.params))
    assert not jax.tree.leaves(nnx.state(module, nnx.Param))
    run = jax.jit(lambda state, x: nnx.merge(definition, state)(x))
    equal(run(state, inputs), jax.jit(model.apply)(model.params, inputs))
    halved = jax.tree.map(lambda x: x / 2 if x.dtype == jnp.float32 else x, state)
    changed = nnx.clone(module)
    nnx.update(changed, halved)
    assert (np.asarray(changed(inputs)) != np.asarray(model(inputs))).any()
    equal(module(inputs), model(inputs))


def test_a_quantized_module_inside_another():
    model, inputs = quantized("plain", "int8"), traced("plain")[2]

    class Head(nn.Module):
        body: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(self.body(x))

    module = Head(as_linen(model))
    variables = meta.unbox(module.init(jax.random.key(0), inputs))
    assert set(variables) == {"params", "quantized"} and set(variables["quantized"]) == {"body"}
    expected = nn.Dense(2).apply({"params": variables["params"]["Dense_0"]}, model(inputs))
    equal(module.apply(variables, inputs), expected)


def test_arguments_are_passed_as_the_float_module_takes_them():
    def apply(params, inputs):
        left, right = inputs["left"], inputs["right"]
        return left @ params["w"] + right

    params, inputs = {"w": random(6, 3)}, {"left": random(4, 6), "right": random(4, 3)}
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs])
    model = quantize(graph, params, uniform(tabulate(graph), "int8"), ranges)
    module = as_linen(model)
    variables = module.model_variables()
    equal(module.apply(variables, left=inputs["left"], right=inputs["right"]), model(inputs))
    equal(module.apply(variables, inputs), model(inputs))
    equal(as_nnx(model)(**inputs), model(inputs))
    with pytest.raises(TraceError, match="1 positional and 1 keyword"):
        module.apply(variables, inputs["left"], right=inputs["right"])

    def pair(params, inputs):
        return inputs[0] @ params["w"] + inputs[1]

    both = (inputs["left"], inputs["right"])
    graph = trace(pair, params, both)
    model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [both]))
    equal(as_nnx(model)(*both), model(both))


@pytest.mark.parametrize("name", ["plain", "scanned_stack"])
def test_named_arrays_come_back(name):
    for backend in ("cpu", "tpu"):
        params = quantized(name, "w4a8", backend).params
        equal(from_named(params, named_arrays(params)), params)
        packed = at_rest(params)
        equal(packed, quantized(name, "w4a8", "cpu").params)
        equal(for_backend(packed, backend), params)


def test_modules_keep_shardings_on_a_mesh_of_eight_devices():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    script = Path(__file__).parent / "sharded_modules_job.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

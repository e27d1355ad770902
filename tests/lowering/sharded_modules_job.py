"""Run by `test_modules.py` in a process with eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrmils as jr


def apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def main():
    assert len(jax.devices()) == 8
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (16, 32)), "b": jax.random.normal(keys[1], (32, 8))}
    x = jax.random.normal(keys[2], (8, 16))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    specs = {"a": P(None, "model"), "b": P("model", None)}
    sharded = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    graph = jr.trace(apply, params, x)
    ranges = jr.calibrate(graph, params, [x])
    plan = jr.uniform(jr.tabulate(graph), "w4a8")
    single = jr.quantize(graph, params, plan, ranges)
    expected = jax.jit(single.apply)(single.params, x)

    model = jr.quantize(graph, sharded, plan, ranges)
    codes = model.params.weights["a"].tensor.values
    assert codes.dtype == jnp.uint8 and codes.sharding.spec == P(None, "model"), codes.sharding

    module = jr.as_linen(model)
    variables = module.model_variables()
    assert variables["quantized"]["weights/a/values"].sharding == codes.sharding
    outputs = jax.jit(module.apply)(variables, batch)
    np.testing.assert_array_equal(outputs, expected)
    assert outputs.sharding.spec == P("data")

    other = jr.as_nnx(model)
    assert other.arrays["weights/a/values"].get_value().sharding == codes.sharding
    outputs = nnx.jit(lambda m, x: m(x))(other, batch)
    np.testing.assert_array_equal(outputs, expected)
    assert outputs.sharding.spec == P("data")

    # Another sharding, given to a model that had none.
    plain = jr.as_linen(single)
    rows = NamedSharding(mesh, P(("data", "model")))

    def place(array):
        fits = array.ndim > 1 and array.shape[0] % 8 == 0
        return jax.device_put(array, rows if fits else NamedSharding(mesh, P()))

    variables = jax.tree.map(place, plain.model_variables())
    assert variables["quantized"]["weights/a/values"].sharding == rows
    np.testing.assert_array_equal(jax.jit(plain.apply)(variables, batch), expected)


if __name__ == "__main__":
    main()

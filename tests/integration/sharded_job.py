"""Run by `test_sharded.py` in a process with four virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrmils as jr


def apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def loss(outputs, targets):
    return jnp.mean((outputs - targets[:, None]) ** 2, axis=-1)


def main():
    assert len(jax.devices()) == 4
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (16, 32)), "b": jax.random.normal(keys[1], (32, 8))}
    x, y = jax.random.normal(keys[2], (8, 16)), jnp.zeros(8)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    specs = {"a": P(None, "model"), "b": P("model", None)}
    sharded = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    graph = jr.trace(apply, params, x)
    ranges = jr.calibrate(graph, params, [x])
    score = jax.jit(lambda p, x: jr.contributions(graph, p, x, y, loss, ranges))
    for one, many in zip(
        jax.tree.leaves(score(params, x)), jax.tree.leaves(score(sharded, batch)), strict=True
    ):
        np.testing.assert_allclose(one, many, atol=2e-5 * float(jnp.abs(one).max()) + 1e-7)
    plan = jr.uniform(jr.tabulate(graph), "w4a8")
    single = jr.quantize(graph, params, plan, ranges)
    model = jr.quantize(graph, sharded, plan, ranges)
    outputs = jax.jit(model.apply)(model.params, batch)
    np.testing.assert_array_equal(outputs, jax.jit(single.apply)(single.params, x))
    assert outputs.sharding.spec == P("data")


if __name__ == "__main__":
    main()

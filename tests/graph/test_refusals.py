"""Models and data that are refused, with a message that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from models import CNN, NnxMLP, cnn, matrices, model, nnx_mlp, random

from jaxrmils import calibrate
from jaxrmils.graph import TraceError, from_linen, from_nnx, trace
from jaxrmils.graph.checks import check_examples_independent


def refuses(match, apply, params, inputs):
    with pytest.raises(TraceError, match=match):
        trace(apply, params, inputs)


def dot(params, x):
    return x @ params["w"]


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=deterministic))


def test_linen_dropout():
    module = Dropped()
    params = module.init(jax.random.key(0), random(4, 6), True)
    key = jax.random.key(1)
    refuses(
        "draws random numbers.*deterministic=True",
        lambda p, x: module.apply(p, x, False, rngs={"dropout": key}),
        params,
        random(4, 6),
    )
    trace(lambda p, x: module.apply(p, x, True), params, random(4, 6))


def test_nnx_dropout():
    module = NnxMLP(nnx.Rngs(0))
    module.train()
    refuses("draws random numbers.*model.eval", *from_nnx(module), random(4, 6))


def test_random_numbers_in_a_loop():
    def apply(params, x):
        def step(i, x):
            return x + jax.random.normal(jax.random.fold_in(params["key"], i), x.shape)

        return jax.lax.fori_loop(0, 3, step, x @ params["w"])

    refuses(
        "draws random numbers", apply, {**matrices("w"), "key": jax.random.key(0)}, random(4, 6)
    )


@pytest.mark.parametrize("name", ["mutable", "rngs"])
def test_training_arguments_of_linen(name):
    with pytest.raises(TraceError, match=f"{name}.*evaluation mode"):
        from_linen(Dropped(), {"params": {}}, **{name: {"dropout": 1}})


def test_variables_without_params():
    with pytest.raises(TraceError, match=r"'kernel'.*none is 'params'"):
        from_linen(nn.Dense(2), {"kernel": jnp.ones((3, 2))})


def training_cnn():
    _, params, inputs = cnn()

    def apply(params, x):
        return CNN().apply(params, x, train=True, mutable=["batch_stats"])[0]

    return apply, params, inputs


def training_nnx():
    module = NnxMLP(nnx.Rngs(0))
    module.train()
    module.dropout.deterministic = True
    return (*from_nnx(module), random(4, 6))


@pytest.mark.parametrize("make", [training_cnn, training_nnx])
def test_batch_statistics_in_training_mode(make):
    apply, params, inputs = make()
    with pytest.raises(TraceError, match=r"other examples of its batch.*evaluation mode"):
        check_examples_independent(apply, params, inputs)
    graph = trace(
        apply, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    )
    with pytest.raises(TraceError, match="other examples of its batch"):
        calibrate(graph, params, [inputs[:1], inputs], estimator="minmax")


@pytest.mark.parametrize("name", ["cnn", "bfloat16_transformer"])
def test_evaluation_mode_passes(name):
    check_examples_independent(*model(name))


def test_mean_over_the_batch():
    refuses(
        r"no per-example output.*\[\(\)\].*logits of every example",
        lambda p, x: jnp.mean(dot(p, x)),
        matrices("w"),
        random(4, 6),
    )


def test_squeezed_batch_axis():
    refuses(
        r"\[\(6,\)\] for a batch of 1.*squeeze",
        lambda p, x: jnp.squeeze(dot(p, x)),
        matrices("w"),
        random(4, 6),
    )


def test_no_output():
    refuses("returned no arrays", lambda p, x: None, matrices("w"), random(4, 6))


def test_params_of_another_linen_model():
    apply, params, inputs = cnn()
    shapes = {
        **params,
        "params": {
            **params["params"],
            "Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        },
    }
    refuses("kernel.*Dense_0.*[Dd]o the params belong", apply, shapes, inputs)
    missing = {"params": {}, "batch_stats": params["batch_stats"]}
    refuses("Conv_0.*[Dd]o the params belong", apply, missing, inputs)


def test_params_of_another_nnx_model():
    apply, params, inputs = nnx_mlp()
    other = {**params, "first": {**params["first"], "kernel": jnp.ones((5, 8))}}
    refuses(r"first/kernel is float32\[5, 8\], float32\[6, 8\] was expected", apply, other, inputs)
    missing = {k: v for k, v in params.items() if k != "first"}
    refuses("missing such as.*first/bias", apply, missing, inputs)


def test_calibrating_with_other_params():
    graph = trace(dot, matrices("w"), random(4, 6))
    with pytest.raises(TraceError, match=r"w is float32\[3, 6\], float32\[6, 6\] was expected"):
        calibrate(graph, {"w": jnp.ones((3, 6))}, [random(4, 6)])
    with pytest.raises(TraceError, match=r"w is bfloat16.*float32\[6, 6\] was expected"):
        calibrate(graph, {"w": jnp.ones((6, 6), jnp.bfloat16)}, [random(4, 6)])
    with pytest.raises(TraceError, match=r"unknown such as.*'extra'"):
        calibrate(graph, {**matrices("w"), "extra": jnp.ones(1)}, [random(4, 6)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(bad):
    params = matrices("w", "v")
    refuses(
        "params: v holds 1 NaN", dot, {**params, "v": params["v"].at[0, 0].set(bad)}, random(4, 6)
    )
    refuses(
        "inputs: param holds 1 NaN|inputs.*holds 1 NaN", dot, params, random(4, 6).at[0, 0].set(bad)
    )


def test_shapes_of_inputs():
    def apply(params, inputs):
        return inputs["x"] @ params["w"] + inputs["y"]

    refuses("no examples", dot, matrices("w"), jnp.ones((0, 6)))
    refuses(
        "disagree about the batch size.*'x': 4.*'y': 3",
        apply,
        matrices("w"),
        {"x": random(4, 6), "y": random(3, 6)},
    )
    refuses("input y is a scalar", apply, matrices("w"), {"x": random(4, 6), "y": 1.0})
    refuses("no arrays", dot, matrices("w"), {})

"""Small reference models for tests: each factory gives `(apply, params, inputs)`.

Shapes are cheap and the batch is 4. `MODELS` holds all factories by name, `loss` a per-example
loss that works for every output.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxrmils.graph import from_linen, from_nnx

BATCH = 4


def random(*shape, seed=1, dtype=jnp.float32):
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def loss(outputs, targets):
    """Per-example loss [batch]: weighted squares and cubes of whatever the outputs are.

    Args:
        outputs: any pytree of arrays with a leading batch axis.
        targets: [batch], any numbers.
    """
    total = jnp.zeros(targets.shape, jnp.float32)
    for leaf in jax.tree.leaves(outputs):
        flat = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
        weights = jnp.cos(1.0 + jnp.arange(flat.shape[1], dtype=jnp.float32))[None]
        shifted = flat - targets.astype(jnp.float32)[:, None]
        total += jnp.mean(weights * jnp.tanh(shifted) + 0.1 * shifted**2, axis=1)
    return total


def standard_promotion(apply):
    """`apply` with the usual dtype promotion, which Flax's bfloat16 layers rely on."""

    @functools.wraps(apply)
    def wrapped(params, inputs):
        with jax.numpy_dtype_promotion("standard"):
            return apply(params, inputs)

    return wrapped


def linen(module, inputs, **kwargs):
    """A Linen model with its initial variables."""
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.jit(module.init)(jax.random.key(0), inputs)
    apply, params = from_linen(module, variables, **kwargs)
    return standard_promotion(apply), params, inputs


# Convolutions


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def with_statistics(params):
    """Batch statistics that are not those of a fresh model."""
    statistics = jax.tree.map(
        lambda x: 0.5 * x + 0.1 + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)),
        params["batch_stats"],
    )
    return {**params, "batch_stats": statistics}


def cnn():
    apply, params, inputs = linen(CNN(), random(BATCH, 8, 8, 3))
    return apply, with_statistics(params), inputs


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, padding=[(1, 1), (1, 1)])(x))
        x = nn.relu6(nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False)(x))
        x = nn.Conv(8, (1, 1))(x)
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, feature_group_count=8)(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


def separable_cnn():
    return linen(Separable(), random(BATCH, 8, 8, 3))


# Transformers and MLPs


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(12)])
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.last(x)


def nnx_mlp():
    module = NnxMLP(nnx.Rngs(0))
    module.norm.mean[...] = random(8, seed=2)
    module.norm.var[...] = 0.5 + random(8, seed=3) ** 2
    module.eval()
    return (*from_nnx(module), random(BATCH, 6))


class Block(nn.Module):
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.Dense(16, dtype=self.dtype, name="up")(y)
        return x + nn.Dense(8, dtype=self.dtype, name="down")(nn.gelu(y))


def transformer():
    return linen(Block(), random(BATCH, 5, 8))


def bfloat16_transformer():
    apply, params, inputs = linen(Block(dtype=jnp.bfloat16), random(BATCH, 5, 8))
    return apply, params, inputs.astype(jnp.bfloat16)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, in_features=8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


def nnx_transformer():
    module = NnxBlock(nnx.Rngs(0))
    module.eval()
    return (*from_nnx(module), random(BATCH, 5, 8))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8)
        return embed.attend(jnp.tanh(nn.Dense(8)(embed(ids))))


def tied_embedding():
    return linen(Tied(), jnp.arange(3 * BATCH).reshape(BATCH, 3) % 11)


# Loops


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8)(x)), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="layers")(x, None)[0]


def scanned_stack():
    return linen(Stack(), random(BATCH, 8))


def remat_stack():
    return linen(Stack(remat=True), random(BATCH, 8))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return jnp.tanh(layer(x))

        return forward(self.layers, x)


def nnx_stack():
    return (*from_nnx(NnxStack(nnx.Rngs(0))), random(BATCH, 8))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(4))(x)
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(4), reverse=True)(x)[:, -1])


def lstm():
    return linen(Recurrent(), random(BATCH, 6, 8))


# Plain functions


def matrices(*names, size=6):
    return {n: random(size, size, seed=10 + i) * 0.4 for i, n in enumerate(names)}


def plain():
    def apply(params, x):
        x = jnp.tanh(x @ params["right"])
        x = jnp.tanh(params["left"] @ x.T).T
        x = jnp.tanh(jnp.einsum("bi,ji->bj", x, params["einsum"][0]))
        return jnp.einsum("ij,bj->ib", params["einsum"][1], x).T

    weights = matrices("right", "left", "a", "b")
    params = {
        "right": weights["right"],
        "left": weights["left"],
        "einsum": [weights["a"], weights["b"]],
    }
    return apply, params, random(BATCH, 6)


def cond_parameter():
    """The branch depends on a scalar parameter."""

    def apply(params, x):
        x = x @ params["first"]
        return jax.lax.cond(
            params["gate"] > 0,
            lambda x: jnp.tanh(x @ params["yes"]),
            lambda x: x @ params["no"] @ params["no"],
            x,
        )

    return apply, {**matrices("first", "yes", "no"), "gate": jnp.float32(1)}, random(BATCH, 6)


def cond_data():
    """Every example chooses its branch."""

    def apply(params, x):
        def one(x):
            return jax.lax.cond(
                x[0] > 0,
                lambda: jnp.tanh(x @ params["yes"]),
                lambda: x @ params["no"],
            )

        return jax.lax.map(one, x) @ params["last"]

    return apply, matrices("yes", "no", "last"), random(BATCH, 6)


def custom_rules():
    """A custom_jvp and a custom_vjp that hold a dot; their rules are the true derivatives."""

    @jax.custom_jvp
    def jvp_dot(x, w):
        return x @ w

    @jvp_dot.defjvp
    def jvp_rule(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return x @ w, dx @ w + x @ dw

    @jax.custom_vjp
    def vjp_dot(x, w):
        return x @ w

    vjp_dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    def apply(params, x):
        return vjp_dot(jnp.tanh(jvp_dot(x, params["jvp"])), params["vjp"])

    return apply, matrices("jvp", "vjp"), random(BATCH, 6)


def experts():
    """A batch axis in the weight, and grouped queries."""

    def apply(params, x):
        y = jnp.tanh(jnp.einsum("bek,ekn->ben", x, params["experts"]))
        queries = y.reshape(y.shape[0], 2, 2, -1)
        scores = jnp.einsum("bkgd,btd->bkgt", queries, x)
        return jnp.einsum("bkgt,btd->bkgd", jax.nn.softmax(scores), x)

    return apply, {"experts": random(4, 6, 6, seed=5) * 0.4}, random(BATCH, 4, 6)


MODELS = {
    "cnn": cnn,
    "separable_cnn": separable_cnn,
    "nnx_mlp": nnx_mlp,
    "transformer": transformer,
    "nnx_transformer": nnx_transformer,
    "bfloat16_transformer": bfloat16_transformer,
    "tied_embedding": tied_embedding,
    "scanned_stack": scanned_stack,
    "remat_stack": remat_stack,
    "nnx_stack": nnx_stack,
    "lstm": lstm,
    "plain": plain,
    "cond_parameter": cond_parameter,
    "cond_data": cond_data,
    "custom_rules": custom_rules,
    "experts": experts,
}


@functools.cache
def model(name):
    """A model by name, made once."""
    return MODELS[name]()


def resized(inputs, batch):
    """The inputs at another batch size."""
    return jax.tree.map(
        lambda x: jnp.asarray(np.resize(np.asarray(x), (batch, *x.shape[1:]))), inputs
    )

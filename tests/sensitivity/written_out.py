"""Reference models written out without the interpreter, for one example, as numpy can check them.

A model is `forward(at, params, x)`: it calls `at(site, operation, *operands, reduced=axis)` for
every site, with the axis over which its weight (the last operand) has no scales of its own, or
None where it has no weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
from models import loss
from stages import TARGETS, calibrated, float64, traced

from jaxrmils.numerics import code_range


def plain(at, p, x):
    x = jnp.tanh(at("right", lambda x, w: x @ w, x, p["right"], reduced=0))
    x = jnp.tanh(at("left", lambda x, w: w @ x.T, x, p["left"], reduced=1)).T
    x = jnp.tanh(at("einsum/0", lambda x, w: x @ w.T, x, p["einsum"][0], reduced=1))
    return at("einsum/1", lambda x, w: w @ x.T, x, p["einsum"][1], reduced=1).T


def scanned_stack(at, p, x):
    dense = p["params"]["layers"]["Dense_0"]
    for i in range(3):
        name = f"layers/Dense_0/kernel:{i}"
        y = at(name, lambda x, w: x @ w, x, dense["kernel"][i], reduced=0)
        x = jnp.tanh(y + dense["bias"][i])
    return x


def tied_embedding(at, p, ids):
    table, dense = p["params"]["Embed_0"]["embedding"], p["params"]["Dense_0"]
    x = at("Embed_0/embedding", lambda ids, w: w[ids], ids, table, reduced=1)
    y = at("Dense_0/kernel", lambda x, w: x @ w, x, dense["kernel"], reduced=0) + dense["bias"]
    return at("Embed_0/embedding@1", lambda x, w: x @ w.T, jnp.tanh(y), table, reduced=1)


def experts(at, p, x):
    product = lambda x, w: jnp.einsum("bek,ekn->ben", x, w)  # noqa: E731
    y = jnp.tanh(at("experts", product, x, p["experts"], reduced=1))
    queries = y.reshape(1, 2, 2, -1)
    scores = at("dot_0", lambda q, x: jnp.einsum("bkgd,btd->bkgt", q, x), queries, x)
    mix = lambda p, x: jnp.einsum("bkgt,btd->bkgd", p, x)  # noqa: E731
    return at("dot_1", mix, jax.nn.softmax(scores), x)


FORWARD = {f.__name__: f for f in (plain, scanned_stack, tied_embedding, experts)}


def recurrence(params, x):
    """A weight that every step of a loop reads."""

    def step(h, x):
        return jnp.tanh(x + h @ params["w"]), None

    return jax.lax.scan(step, x[:, 0], x.swapaxes(0, 1))[0]


def unrolled(params, x):
    """The same with a site for every step."""
    h = x[:, 0]
    for i in range(x.shape[1]):
        h = jnp.tanh(x[:, i] + h @ params["w"])
    return h


def tape(name, shift_operands=False):
    """Per example: `{site: (operation, operands, reduced, gradients, values)}`, numpy arrays.

    Args:
        name: the model's.
        shift_operands: gradients with respect to the activation operands, a list, and not to the
            output.
    """
    _, params, inputs = traced(name)
    forward = FORWARD[name]

    def run(eps, x, target):
        seen = {}

        def at(site, operation, *operands, reduced=None):
            operands = list(operands)
            if shift_operands:
                shifts = eps.get(site) or [jnp.zeros(x.shape, x.dtype) for x in operands]
                operands = [o + s for o, s in zip(operands, shifts, strict=True)]
            y = operation(*operands)
            seen[site] = (operation, operands, reduced, y)
            return y if shift_operands else y + eps.get(site, jnp.zeros_like(y))

        outputs = forward(at, params, x[None])
        return loss(outputs, target[None])[0], seen

    examples = []
    for x, target in zip(inputs, TARGETS, strict=True):
        seen = run({}, x, target)[1]
        index = 1 if shift_operands else 3
        eps = jax.tree.map(jnp.zeros_like, {site: s[index] for site, s in seen.items()})
        gradient = jax.grad(lambda e, x=x, t=target: run(e, x, t)[0], allow_int=True)(eps)
        examples.append({s: (*v[:3], gradient[s]) for s, v in seen.items()})
    return examples


def weight_noise_by_hand(w, reduced, bits):
    """Q(w) - w in float64; float32 quotients, as the package has them."""
    limit = code_range(bits, symmetric=True)[1]
    w = np.asarray(w, np.float32)
    scale = (np.abs(w).max(axis=reduced, keepdims=True) / np.float32(limit)).astype(np.float32)
    codes = np.clip(np.rint(w / scale), -limit, limit)
    return codes.astype(np.float64) * scale - w


def activation_noise_by_hand(h, grid):
    """Q(h) - h in float64."""
    h = np.asarray(h, np.float32)
    codes = np.rint(h / np.float32(grid.scale)) + float(grid.zero_point)
    codes = np.clip(codes, *code_range(grid.bits, grid.symmetric))
    return (codes - float(grid.zero_point)) * float(grid.scale) - h


def grid_of(name, site, position, bits):
    """The grid of an operand; `site:i` is layer i of a stack."""
    base, _, layer = site.partition(":")
    grid = calibrated(name).grids[base][position][bits]
    return jax.tree.map(lambda x: x[int(layer)], grid) if layer else grid


def changed_output(name, site, entry, bits):
    """Y_f - Y in float64 for (weight bits, activation bits)."""
    operation, operands, reduced, _ = entry
    quantized, position = [], 0
    for i, x in enumerate(operands):
        if reduced is not None and i == len(operands) - 1:
            noise = weight_noise_by_hand(x, reduced, bits[0]) if bits[0] < 32 else 0.0
        elif jnp.issubdtype(x.dtype, jnp.integer):
            quantized.append(np.asarray(x))
            continue
        else:
            grid = grid_of(name, site, position, bits[1]) if bits[1] < 32 else None
            noise = activation_noise_by_hand(x, grid) if grid is not None else 0.0
            position += 1
        quantized.append(float64(x) + noise)
    exact = [
        np.asarray(x) if jnp.issubdtype(x.dtype, jnp.integer) else float64(x) for x in operands
    ]
    with jax.enable_x64(True):
        return np.asarray(operation(*quantized)) - np.asarray(operation(*exact))

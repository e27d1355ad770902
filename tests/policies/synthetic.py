"""Scores with numbers that were chosen, for a model of two dense layers and a product of two."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from models import matrices, random

from jaxrmils import calibrate, tabulate, trace
from jaxrmils.sensitivity import ACTIVATION_CANDIDATES, WEIGHT_CANDIDATES, Scores

LAYERS = ("first", "second", "dot_0")


def apply(params, x):
    y = jnp.tanh(x @ params["first"])
    y = jnp.tanh(y @ params["second"])
    return jnp.einsum("bij,bkj->bik", y, x)


@functools.cache
def setup():
    """`(graph, ranges)`."""
    params, x = matrices("first", "second"), random(4, 3, 6)
    graph = trace(apply, params, x)
    return graph, calibrate(graph, params, [x], estimator="minmax")


def steps(row, bits):
    """The step of an operand's grid."""
    site, position = rows()[row]
    return float(setup()[1].grids[site][position][bits].scale)


def rows():
    """The operands: one of each dense layer, two of the product."""
    return (("first", 0), ("second", 0), ("dot_0", 0), ("dot_0", 1))


def scores(activations=None, weights=None, square=None, shift=None, count=8):
    """Scores that are zero except for what is given.

    Args:
        activations: `{(row, candidate index): values [count]}`.
        weights: `{(weight row, candidate index): values [count]}`.
        square: `{row: value}` for |p|^2, 1 for the others.
        shift: float32 [count, 4, 2], the shift probe.
        count: number of examples.
    """
    graph, ranges = setup()
    columns = np.zeros((count, 4, len(ACTIVATION_CANDIDATES)), np.float32)
    for (row, k), values in (activations or {}).items():
        columns[:, row, k] = values
    weight_columns = np.zeros((count, 2, len(WEIGHT_CANDIDATES)), np.float32)
    for (row, k), values in (weights or {}).items():
        weight_columns[:, row, k] = values
    squares = np.ones((count, 4), np.float32)
    for row, value in (square or {}).items():
        squares[:, row] = value
    return Scores(
        table=tabulate(graph),
        ranges=ranges,
        loss=np.ones(count, np.float32),
        activations=columns,
        weights=weight_columns,
        gradient_sum=np.zeros((count, 4), np.float32),
        gradient_square=squares,
        shift=shift,
        activation_rows=rows(),
        weight_rows=("first", "second"),
        activation_candidates=ACTIVATION_CANDIDATES,
        weight_candidates=WEIGHT_CANDIDATES,
    )


def without(scores, **changes):
    """The scores with other fields."""
    return dataclasses.replace(scores, **changes)

"""The stages of the reference models, run once per test session and shared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from models import BATCH, loss, model

from jaxrmils import calibrate, score, tabulate, trace

TARGETS = jnp.linspace(-0.5, 0.5, BATCH)


@functools.cache
def traced(name):
    """`(graph, params, inputs)` of a reference model."""
    apply, params, inputs = model(name)
    return trace(apply, params, inputs), params, inputs


@functools.cache
def calibrated(name, symmetric=False):
    """Ranges from half of the inputs, so that the other half is clipped here and there."""
    graph, params, inputs = traced(name)
    few = jax.tree.map(lambda x: x[: BATCH // 2], inputs)
    if name == "cond_data":  # Both branches must be reached.
        few = inputs
    return calibrate(graph, params, [few], estimator="minmax", symmetric=symmetric)


# Where scores hold the shift probe, which takes as long to compile as the rest.
SHIFTED = ("plain", "experts", "scanned_stack")


@functools.cache
def scored(name):
    """Scores over the inputs."""
    graph, params, inputs = traced(name)
    batches = [(inputs, TARGETS)]
    return score(graph, params, batches, loss, calibrated(name), shift_probe=name in SHIFTED)


@functools.cache
def table_of(name):
    """The model's table."""
    return tabulate(traced(name)[0])


def unreached(name):
    """Layers with a site that no calibration example reached: they have no range."""
    graph, reached = traced(name)[0], calibrated(name).grids
    return sorted({s.layer for s in graph.sites if s.activations and s.name not in reached})


def float64(x):
    """An array of any float dtype in numpy's float64."""
    return np.asarray(jnp.asarray(x, jnp.float32), np.float64)

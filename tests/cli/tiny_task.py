"""A task that needs no training: a random network whose labels are mostly its own answers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.data import Dataset, Task, make_splits
from jaxrmils.graph import from_linen
from jaxrmils.zoo import cross_entropy


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(5)(x)


def build(config, progress, net=None):
    net = net or Net()
    rng = np.random.default_rng(config.seed)
    inputs = rng.normal(size=(400, 12)).astype(np.float32)
    variables = net.init(jax.random.key(config.seed), jnp.zeros((1, 12)))
    apply, params = from_linen(net, variables)
    labels = np.asarray(jnp.argmax(apply(params, inputs), axis=-1), np.int32)
    splits = make_splits(400, ranges=60, selection=100, confirmation=60, test=150, seed=config.seed)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return Task("tiny", apply, params, shapes, cross_entropy, Dataset(inputs, labels), splits)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(16)(x))
        h = h + nn.Dense(16)(h)
        return nn.Dense(5)(h)


def residual(config, progress):
    return build(config, progress, Residual())


def judged(config, progress):
    task = build(config, progress)

    def metrics(outputs, indices):
        rank = np.argsort(np.argsort(-np.asarray(outputs), axis=1), axis=1)
        own = rank[np.arange(len(indices)), task.dataset.targets[indices]]
        return {"Acc@1": own < 1, "1/rank": 1 / (1 + own)}

    return dataclasses.replace(task, metrics=metrics)


def broken_data(config, progress):
    task = build(config, progress)
    inputs = task.dataset.inputs.copy()
    inputs[3, 2] = np.nan
    return Task(
        "broken",
        task.apply,
        task.params,
        task.shapes,
        task.loss,
        Dataset(inputs, task.dataset.targets),
        task.splits,
    )


def not_a_task(config, progress):
    return 3

"""The demo's network on real digits: what is predicted is what is measured."""

import numpy as np
import pytest
import tangent_accuracy

import jaxrmils as jr
from jaxrmils.cli.defaults import base_config
from jaxrmils.cli.pipeline import batches, trace_task
from jaxrmils.evaluation import measure_layers
from jaxrmils.policies import predict
from jaxrmils.zoo import mnist_cnn_task


@pytest.fixture(scope="module")
def task():
    return mnist_cnn_task(base_config())


@pytest.fixture(scope="module")
def params(task):
    return task.load_params()


def test_single_int8_operands_are_predicted(task, params):
    rows = tangent_accuracy.measure(task, 125, params)
    for row in rows:
        if row["candidate"] != "int8 nearest":
            continue
        if row["site"] == "Conv_0/kernel input":  # Pixels k / 255 are on the int8 grid.
            assert row["mean_absolute_change"] < 1e-6 and abs(row["predicted"]) < 1e-6
            continue
        assert row["correlation"] >= 0.99, row
        assert row["mean_error"] <= 0.1, row


def test_single_int8_sites_are_predicted(task, params):
    graph = trace_task(task)
    ranges = jr.calibrate(graph, params, [x for x, _ in batches(task.split("ranges"), 125)])
    data = batches(task.split("selection"), 125)
    scores = jr.score(graph, params, data, task.loss, ranges)
    plan = jr.uniform(scores.table, "int8")
    predicted = predict(scores, plan)
    for name, change in measure_layers(graph, params, plan, ranges, data, task.loss).items():
        assert np.corrcoef(predicted[name], change)[0, 1] >= 0.99, name
        assert abs(predicted[name].mean() - change.mean()) <= 0.1 * np.abs(change).mean(), name

"""Hugging Face's Flax BERT, as it is, through the whole job."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrmils as jr
from jaxrmils.lowering import check_integer_sites
from jaxrmils.policies import predict

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:transformers", "ignore:.*:FutureWarning:transformers"
)


def span_loss(outputs, targets):
    """Cross-entropy of start and end positions, per example."""
    start, end = (jax.nn.log_softmax(logits) for logits in outputs)
    rows = jnp.arange(targets.shape[0])
    return -(start[rows, targets[:, 0]] + end[rows, targets[:, 1]]) / 2


@pytest.fixture(scope="module")
def job():
    from flax_bert import flax_bert

    apply, params, inputs = flax_bert()
    targets = np.array([[0, 2], [1, 3], [2, 2], [4, 6]], np.int32)
    graph = jr.trace(apply, params, inputs)
    ranges = jr.calibrate(graph, params, [inputs], estimator="minmax")
    scores = jr.score(graph, params, [(inputs, targets)], span_loss, ranges)
    return graph, params, inputs, targets, ranges, scores


def test_int8_runs_in_integers_and_stays_close(job):
    graph, params, inputs, targets, ranges, scores = job
    plan = jr.uniform(scores.table, "int8")
    model = jr.quantize(graph, params, plan, ranges)
    kinds = check_integer_sites(model, inputs)
    planned = {site.name for site in graph.sites if site.activations}
    assert planned <= set(kinds)
    change = span_loss(model(inputs), targets) - scores.loss
    assert np.abs(change).max() < 0.05


def test_a_single_int8_layer_is_predicted(job):
    graph, params, inputs, targets, ranges, scores = job
    plan = jr.uniform(scores.table, "int8").only("qa_outputs/kernel")
    predicted = predict(scores, plan)["qa_outputs/kernel"]
    model = jr.quantize(graph, params, plan, ranges)
    change = np.asarray(span_loss(model(inputs), targets) - scores.loss)
    np.testing.assert_allclose(predicted, change, atol=0.02 * np.abs(change).max())


def test_embeddings_are_quantized_and_counted(job):
    graph, params, _, _, ranges, scores = job
    floats = {name: "float" for name in scores.table.layer if "embedding" not in name}
    model = jr.quantize(graph, params, jr.uniform(scores.table, "w4", force=floats), ranges)
    word = "bert/embeddings/word_embeddings/embedding"
    assert word in model.params.weights and word not in model.params.leaves
    assert model.params.weights[word].tensor.packed
    table = params["bert"]["embeddings"]["word_embeddings"]["embedding"]
    steps = model.params.weights[word].tensor.scale
    error = np.abs(model.params.weights[word].tensor.dequantize() - table)
    assert (error <= np.asarray(steps) / 2 * (1 + 1e-5)).all()
    saved = scores.table.float_bits - model.size_bits
    assert saved == sum((32 - 4) * t.size - 32 * t.shape[0] for t in _tables(params))


def _tables(params):
    embeddings = params["bert"]["embeddings"]
    return [embeddings[f"{kind}_embeddings"]["embedding"] for kind in ("word", "token_type")]


def test_rmils_makes_a_valid_plan(job):
    graph, params, inputs, _, ranges, scores = job
    plan = jr.rmils(graph, scores, mu=1e-4)
    assert any(not layer.is_float for layer in plan.layers.values())
    outputs = jr.quantize(graph, params, plan, ranges)(inputs)
    assert all(bool(jnp.isfinite(o).all()) for o in outputs)

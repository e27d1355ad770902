"""Hugging Face's Flax BERT is read like any other function."""

import jax
import numpy as np
import pytest
from counting import assert_all_covered

from jaxrmils.graph import interpret, trace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:transformers", "ignore:.*:FutureWarning:transformers"
)


@pytest.fixture(scope="module")
def bert():
    from flax_bert import flax_bert

    return flax_bert()


@pytest.fixture(scope="module")
def graph(bert):
    return trace(*bert)


def layer(number):
    attention = [f"self/{part}/kernel" for part in ("query", "key", "value")]
    parts = [f"attention/{part}" for part in [*attention, "self/dot_0", "self/dot_1"]]
    parts += ["attention/output/dense/kernel", "intermediate/dense/kernel", "output/dense/kernel"]
    return [f"bert/encoder/layer/{number}/{part}" for part in parts]


def test_names(graph):
    tables = [f"bert/embeddings/{t}_embeddings/embedding" for t in ("word", "token_type")]
    expected = [*tables, *layer(0), *layer(1), "qa_outputs/kernel"]
    assert [site.name for site in graph.sites] == expected
    assert [site.kind for site in graph.sites][:2] == ["gather", "gather"]


def test_coverage(graph, bert):
    assert_all_covered(graph, *bert)


def test_identity_handler(graph, bert):
    apply, params, inputs = bert

    def run(params, inputs):
        handler = lambda call: (call.bind(*call.operands()), None)  # noqa: E731
        return interpret(graph, handler, jax.tree.leaves(params), inputs)[0]

    expected = jax.jit(apply)(params, inputs)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(params, inputs), expected)

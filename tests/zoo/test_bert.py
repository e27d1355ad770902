"""The port gives the original's outputs, and every dot of it is found."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import assert_all_covered
from reference_bert import TINY, TINY_CLASSES, tensor_for, tiny_tokens

import jaxrmils as jr
from jaxrmils.zoo import (
    BERT_BASE,
    MINILM_L6,
    BertConfig,
    BertEncoder,
    BertForClassification,
    BertForEmbedding,
    BertForSpans,
    import_bert,
    span_cross_entropy,
)
from jaxrmils.zoo.importing import WeightError

CONFIG = BertConfig(
    hidden_size=TINY["hidden_size"],
    layers=TINY["num_hidden_layers"],
    heads=TINY["num_attention_heads"],
    intermediate_size=TINY["intermediate_size"],
    vocabulary_size=TINY["vocab_size"],
    max_length=TINY["max_position_embeddings"],
)
REAL = tiny_tokens()["attention_mask"] > 0


@functools.cache
def fixtures():
    """Tensor names, shapes and outputs of PyTorch's tiny models."""
    return json.loads((Path(__file__).parent / "fixtures" / "bert_tiny.json").read_text())


def state_dict(kind):
    return {name: tensor_for(name, shape) for name, shape in fixtures()[kind]["tensors"].items()}


def expected(kind, output):
    return np.array(fixtures()[kind]["outputs"][output], np.float32)


@functools.cache
def spans():
    """`(apply, params)` of the tiny span model."""
    module = BertForSpans(CONFIG)
    return jr.from_linen(module, import_bert(state_dict("spans"), module))


def assert_close(found, reference):
    np.testing.assert_allclose(found, reference, rtol=0, atol=2e-5)


def test_span_logits_are_the_originals():
    apply, params = spans()
    for found, name in zip(
        apply(params, tiny_tokens()), ("start_logits", "end_logits"), strict=True
    ):
        assert found.dtype == jnp.float32
        assert_close(found[REAL], expected("spans", name)[REAL])


def test_class_logits_are_the_originals():
    module = BertForClassification(CONFIG, TINY_CLASSES)
    # A bare encoder with its pooler, and a head that was added to it.
    state = {name.removeprefix("bert."): tensor for name, tensor in state_dict("classes").items()}
    variables = import_bert(state, module)
    assert_close(module.apply(variables, **tiny_tokens()), expected("classes", "logits"))


def test_embedding_is_the_originals_from_a_bare_encoder_with_buffers_and_pooler():
    encoder = {
        name.removeprefix("bert."): tensor
        for name, tensor in state_dict("classes").items()
        if not name.startswith("classifier")
    }
    encoder["embeddings.position_ids"] = np.arange(16)[None]
    module = BertForEmbedding(CONFIG)
    found = module.apply(import_bert(encoder, module), **tiny_tokens())
    assert_close(found, expected("classes", "embedding"))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("features", ["first", "mean"])
def test_classes_without_pooler(features):
    state = state_dict("classes")
    module = BertForClassification(CONFIG, TINY_CLASSES, features)
    variables = import_bert(state, module)
    assert "pooler" not in variables["params"]
    if features == "mean":
        vectors = expected("classes", "embedding")
    else:
        encoder = {"params": variables["params"]["bert"]}
        vectors = BertEncoder(CONFIG).apply(encoder, **tiny_tokens())[:, 0]
    reference = vectors @ state["classifier.weight"].T + state["classifier.bias"]
    assert_close(module.apply(variables, **tiny_tokens()), reference)


def test_other_names_by_rename_in_half_precision():
    short = {
        name.replace("bert.", "b.").replace("qa_outputs.", "h."): tensor.astype(np.float16)
        for name, tensor in state_dict("spans").items()
    }
    # As the first releases of the weights call them.
    for old, new in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        short = {name.replace(old, new): tensor for name, tensor in short.items()}
    variables = import_bert(
        short, BertForSpans(CONFIG), rename=[("^b[.]", "bert."), ("^h[.]", "qa_outputs.")]
    )
    _, full = spans()
    for found, exact in zip(jax.tree.leaves(variables), jax.tree.leaves(full), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, exact.astype(np.float16).astype(np.float32))


def test_nothing_is_dropped_or_invented():
    state = state_dict("spans")
    with pytest.raises(WeightError, match=r"no place.*\n.*extra\.weight"):
        import_bert({**state, "extra.weight": np.zeros(3, np.float32)}, BertForSpans(CONFIG))
    del state["bert.encoder.layer.1.output.LayerNorm.bias"]
    with pytest.raises(WeightError, match=r"missing.*\n.*bert\.layer_1\.output_LayerNorm\.bias"):
        import_bert(state, BertForSpans(CONFIG))


def test_padding_changes_nothing():
    apply, params = spans()
    tokens = tiny_tokens()
    alone = {name: array[1:2, :5] for name, array in tokens.items()}
    noisy = {**tokens, "input_ids": np.where(REAL, tokens["input_ids"], 17)}
    for padded, single in zip(apply(params, noisy), apply(params, alone), strict=True):
        np.testing.assert_allclose(padded[1, :5], single[0], rtol=0, atol=1e-5)


def test_trace_finds_every_dot_and_lookup():
    graph = jr.trace(*spans(), tiny_tokens())
    assert_all_covered(graph, *spans(), tiny_tokens())
    assert all(entry.status == "site" for entry in graph.coverage.entries if entry.op != "gather")
    lookups = {site.name for site in graph.sites if site.kind == "gather"}
    tables = {f"bert/embeddings/{t}_embeddings/embedding" for t in ("word", "token_type")}
    assert lookups == tables
    assert all(not site.activations for site in graph.sites if site.kind == "gather")
    both = [site for site in graph.sites if site.kind == "dot" and site.weight is None]
    assert [site.name for site in both] == [
        f"bert/layer_{number}/attention/dot_{dot}" for number in range(2) for dot in range(2)
    ]
    assert all(site.activations == (0, 1) for site in both)
    # Six dense layers in each of two layers, and the head.
    assert sum(site.kind == "dot" for site in graph.sites) == len(both) + 2 * 6 + 1


def test_sizes_of_the_published_encoders():
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    for config, millions in ((BERT_BASE, 108.89), (MINILM_L6, 22.57)):
        module = BertForEmbedding(config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens, tokens)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert round(count / 1e6, 2) == millions


def test_span_loss_is_the_mean_of_both_cross_entropies():
    start, end = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = {"start": np.array([0, 4, 2]), "end": np.array([1, 4, 3])}

    def cross_entropy(logits, labels):
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(3), labels]

    reference = cross_entropy(start, targets["start"]) + cross_entropy(end, targets["end"])
    found = span_cross_entropy((jnp.asarray(start), jnp.asarray(end)), targets)
    np.testing.assert_allclose(found, reference / 2, rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="hidden_size is 10 and heads 4"):
        BertConfig(hidden_size=10, heads=4)
    apply, params = spans()
    long = jax.tree.map(lambda array: np.tile(array, (1, 2)), tiny_tokens())
    with pytest.raises(ValueError, match="18 tokens long and the position table has 16"):
        apply(params, long)
    with pytest.raises(ValueError, match="features is 'max'"):
        module = BertForClassification(CONFIG, 2, "max")
        jax.eval_shape(module.init, jax.random.key(0), **tiny_tokens())

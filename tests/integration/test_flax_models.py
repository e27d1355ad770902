"""Hugging Face's Flax models as they are: traced, scored, quantized, without a port."""

import functools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import standard_promotion

import jaxrmils as jr

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", USE_TF="0", USE_TORCH="0")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as hf


def vit():
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return hf.FlaxViTForImageClassification(config), {"pixel_values": (3, 8, 8)}


def resnet():
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return hf.FlaxResNetForImageClassification(config), {"pixel_values": (3, 16, 16)}


def gpt2():
    config = hf.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    return hf.FlaxGPT2LMHeadModel(config), {"input_ids": (12,)}


# Dots and convolutions that are sites: projections, attention's products, patches, heads.
MODELS = {"vit": (vit, 1 + 2 * 8 + 1), "resnet": (resnet, 7), "gpt2": (gpt2, 2 * 6 + 1)}


@functools.cache
def prepared(name):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        model, shapes = MODELS[name][0]()
    rng = np.random.default_rng(0)
    inputs = {
        key: rng.integers(0, 40, (8, *shape))
        if key == "input_ids"
        else rng.normal(size=(8, *shape)).astype(np.float32)
        for key, shape in shapes.items()
    }
    inputs = {k: v.astype(np.int32) if k == "input_ids" else v for k, v in inputs.items()}

    @standard_promotion
    def apply(params, inputs):
        return model(**inputs, params=params, train=False).logits

    return jr.trace(apply, model.params, inputs), apply, model.params, inputs


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_found(name):
    graph, *_ = prepared(name)
    assert len([s for s in graph.sites if s.kind != "gather"]) == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_int8_runs_and_stays_close(name):
    graph, apply, params, inputs = prepared(name)
    ranges = jr.calibrate(graph, params, [inputs])
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "int8"), ranges)
    expected = np.asarray(apply(params, inputs))
    found = np.asarray(jax.jit(model.apply)(model.params, inputs))
    assert found.shape == expected.shape
    error = np.abs(found - expected).mean()
    assert 0 < error < 0.1 * np.abs(expected - expected.mean()).mean()
    assert model.size_bits < 0.6 * model.sizes.float_bits
    assert jnp.isfinite(found).all()

"""A tiny Hugging Face BERT with random weights, made without any network access."""

import functools
import os

import jax.numpy as jnp
import numpy as np
from models import standard_promotion

BATCH, LENGTH, VOCABULARY = 4, 7, 100


@functools.cache
def flax_bert():
    """`(apply, params, inputs)` of a two-layer `FlaxBertForQuestionAnswering`."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", USE_TF="0", USE_TORCH="0")
    from transformers import BertConfig, FlaxBertForQuestionAnswering

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model = FlaxBertForQuestionAnswering(config, seed=0, input_shape=(1, LENGTH))

    def apply(params, inputs):
        outputs = model(**inputs, params=params, train=False)
        return outputs.start_logits, outputs.end_logits

    rng = np.random.default_rng(0)
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[1, 5:] = 0
    inputs = {
        "input_ids": jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH)), jnp.int32),
        "attention_mask": jnp.asarray(mask),
        "token_type_ids": jnp.asarray(rng.integers(0, 2, (BATCH, LENGTH)), jnp.int32),
    }
    return standard_promotion(apply), model.params, inputs

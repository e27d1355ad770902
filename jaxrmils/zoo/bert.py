"""BERT encoders in Flax Linen, with heads for span answers, classes and sentence vectors.

Devlin et al., BERT, https://arxiv.org/abs/1810.04805: normalisation after every residual sum, the
exact GELU, an additive attention mask. `import_bert` reads checkpoints of Hugging Face's `Bert*`
models and sentence-transformers, and the outputs are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrmils.zoo.importing import StateDict, Variables, import_params
from jaxrmils.zoo.training import cross_entropy

# Original names to this module's; a checkpoint of the bare encoder has no `bert.`.
TENSOR_NAMES = (
    (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
    (r"^bert\.pooler\.dense\.", "pooler."),
    (r"^bert\.encoder\.layer\.(\d+)\.", r"bert.layer_\1."),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.output\.dense\.", ".attention_output."),
    (r"\.attention\.output\.LayerNorm\.", ".attention_LayerNorm."),
    (r"\.(intermediate|output)\.dense\.", r".\1."),
    (r"\.output\.LayerNorm\.", ".output_LayerNorm."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
# 0, 1, 2, ..., saved by old versions.
POSITION_BUFFER = r"(.*\.)?embeddings\.position_ids"
POOLER = r"(.*\.)?pooler\.dense\.(weight|bias)"


@dataclass(frozen=True)
class BertConfig:
    """Sizes of an encoder; the defaults are those of BERT-base, uncased.

    Args:
        hidden_size: width of a token's vector, a multiple of `heads`.
        layers: number of layers.
        heads: attention heads of a layer.
        intermediate_size: width of the feed-forward part.
        vocabulary_size: rows of the word table.
        max_length: rows of the position table, the longest input in tokens.
        token_types: rows of the token type table.
        layer_norm_epsilon: what is added to the variance in every normalisation.

    Raises:
        ValueError: `hidden_size` is no multiple of `heads`.

    >>> MINILM_L6.layers, MINILM_L6.hidden_size, BERT_BASE.hidden_size
    (6, 384, 768)
    """

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocabulary_size: int = 30522
    max_length: int = 512
    token_types: int = 2
    layer_norm_epsilon: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and heads {self.heads}; "
                "expected a multiple of the number of heads"
            )


BERT_BASE = BertConfig()
MINILM_L6 = BertConfig(hidden_size=384, layers=6, intermediate_size=1536)


class BertEmbeddings(nn.Module):
    """Words, positions and token types, summed and normalised."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "batch length"], token_type_ids: Int[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        """float32 `[batch, length, hidden]` for int32 tokens and token types `[batch, length]`."""
        config = self.config
        length = input_ids.shape[1]
        if length > config.max_length:
            raise ValueError(
                f"the input is {length} tokens long and the position table has "
                f"{config.max_length} rows; cut or split the texts"
            )
        words = nn.Embed(config.vocabulary_size, config.hidden_size, name="word_embeddings")
        types = nn.Embed(config.token_types, config.hidden_size, name="token_type_embeddings")
        positions = nn.Embed(config.max_length, config.hidden_size, name="position_embeddings")
        # Positions are always 0, 1, 2, ...: a slice of the table, not a lookup.
        hidden = words(input_ids) + types(token_type_ids) + positions.embedding[:length]
        return _layer_norm(config, "LayerNorm")(hidden)


class BertSelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, without the output projection."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch length hidden"], bias: Float[Array, "batch 1 1 length"]
    ) -> Float[Array, "batch length hidden"]:
        """float32 `[batch, length, hidden]`; `bias` is added to the attention scores."""
        size = self.config.hidden_size

        def heads(name: str) -> Array:
            projected = nn.Dense(size, name=name)(hidden)
            return projected.reshape(*hidden.shape[:2], self.config.heads, -1)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        weights = jax.nn.softmax(scores + bias, axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(hidden.shape)


class BertLayer(nn.Module):
    """Attention and a feed-forward part, each followed by a residual sum and a normalisation."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch length hidden"], bias: Float[Array, "batch 1 1 length"]
    ) -> Float[Array, "batch length hidden"]:
        """float32 `[batch, length, hidden]`; `bias` is added to the attention scores."""
        config = self.config
        attended = BertSelfAttention(config, name="attention")(hidden, bias)
        attended = nn.Dense(config.hidden_size, name="attention_output")(attended)
        hidden = _layer_norm(config, "attention_LayerNorm")(hidden + attended)
        inner = nn.Dense(config.intermediate_size, name="intermediate")(hidden)
        outer = nn.Dense(config.hidden_size, name="output")(jax.nn.gelu(inner, approximate=False))
        return _layer_norm(config, "output_LayerNorm")(hidden + outer)


class BertEncoder(nn.Module):
    """Tokens to one vector each.

    >>> tiny = BertConfig(hidden_size=8, layers=1, heads=2, intermediate_size=16, vocabulary_size=9)
    >>> tokens = jnp.array([[2, 5, 3]])
    >>> encoder = BertEncoder(tiny)
    >>> variables = encoder.init(jax.random.key(0), tokens, tokens * 0 + 1, tokens * 0)
    >>> encoder.apply(variables, tokens, tokens * 0 + 1, tokens * 0).shape
    (1, 3, 8)
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"],
    ) -> Float[Array, "batch length hidden"]:
        """Vectors of all tokens.

        Args:
            input_ids: int32 `[batch, length]`, tokens in `[0, vocabulary_size)`.
            attention_mask: int32 `[batch, length]`, 1 for a token and 0 for padding.
            token_type_ids: int32 `[batch, length]`, 0 for the first text and 1 for the second.

        Returns:
            float32 `[batch, length, hidden_size]`; what stands at padding means nothing.

        Raises:
            ValueError: the input is longer than the position table.
        """
        hidden = BertEmbeddings(self.config, name="embeddings")(input_ids, token_type_ids)
        hidden_from = jnp.finfo(hidden.dtype).min
        bias = jnp.where(
            attention_mask[:, None, None, :] > 0, jnp.zeros((), hidden.dtype), hidden_from
        )
        for number in range(self.config.layers):
            hidden = BertLayer(self.config, name=f"layer_{number}")(hidden, bias)
        return hidden


class BertForSpans(nn.Module):
    """Where in the text the answer starts and ends (`BertForQuestionAnswering`).

    Its arguments are those of `BertEncoder`; as inputs of `jaxrmils` a dict
    `{"input_ids", "attention_mask", "token_type_ids"}` of int32 `[batch, length]`.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"],
    ) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
        """`(start, end)` logits, float32 `[batch, length]` each, padding included."""
        encoder = BertEncoder(self.config, name="bert")
        hidden = encoder(input_ids, attention_mask, token_type_ids)
        logits = nn.Dense(2, name="qa_outputs")(hidden)
        return logits[..., 0], logits[..., 1]


class BertForEmbedding(nn.Module):
    """One vector for a text: the mean over its tokens, scaled to length 1.

    As sentence-transformers' all-MiniLM-L6-v2 does it; Reimers and Gurevych,
    https://arxiv.org/abs/1908.10084.

    Args:
        normalize: scale vectors to Euclidean length 1.
    """

    config: BertConfig
    normalize: bool = True

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"],
    ) -> Float[Array, "batch hidden"]:
        """float32 `[batch, hidden_size]`; arguments as for `BertEncoder`."""
        encoder = BertEncoder(self.config, name="bert")
        hidden = encoder(input_ids, attention_mask, token_type_ids)
        return mean_of_tokens(hidden, attention_mask, normalize=self.normalize)


class BertForClassification(nn.Module):
    """Class logits of a text (`BertForSequenceClassification`).

    Args:
        num_classes: number of classes.
        features: what the classifier reads: `"pooler"`, the first token's vector through BERT's
            dense layer and tanh; `"first"`, that vector as it is; `"mean"`, the text's vector of
            `BertForEmbedding`, scaled to length 1.
    """

    config: BertConfig
    num_classes: int
    features: Literal["pooler", "first", "mean"] = "pooler"

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"],
    ) -> Float[Array, "batch classes"]:
        """Logits, float32 `[batch, num_classes]`; arguments as for `BertEncoder`."""
        encoder = BertEncoder(self.config, name="bert")
        hidden = encoder(input_ids, attention_mask, token_type_ids)
        if self.features == "mean":
            pooled = mean_of_tokens(hidden, attention_mask, normalize=True)
        elif self.features == "first":
            pooled = hidden[:, 0]
        elif self.features == "pooler":
            pooled = jnp.tanh(nn.Dense(self.config.hidden_size, name="pooler")(hidden[:, 0]))
        else:
            raise ValueError(f"features is {self.features!r}; expected 'pooler', 'first' or 'mean'")
        return nn.Dense(self.num_classes, name="classifier")(pooled)


def mean_of_tokens(
    hidden: Float[Array, "batch length hidden"],
    attention_mask: Int[Array, "batch length"],
    *,
    normalize: bool,
) -> Float[Array, "batch hidden"]:
    """Mean over the tokens that are not padding.

    Args:
        hidden: float `[batch, length, hidden]`.
        attention_mask: int32 `[batch, length]`, 1 for a token and 0 for padding.
        normalize: scale the means to Euclidean length 1.

    Returns:
        `[batch, hidden]` in the dtype of `hidden`; 0 for a row without tokens.

    >>> hidden = jnp.array([[[3.0, 4.0], [9.0, 9.0]]])
    >>> mean_of_tokens(hidden, jnp.array([[1, 0]]), normalize=True)
    Array([[0.6, 0.8]], dtype=float32)
    """
    mask = attention_mask.astype(hidden.dtype)[..., None]
    mean = (hidden * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1e-9)
    if not normalize:
        return mean
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def import_bert(
    state_dict: StateDict, module: nn.Module, *, rename: Sequence[tuple[str, str]] = ()
) -> Variables:
    """A checkpoint's tensors as the variables of one of this file's modules.

    Every tensor is used once, except for the `position_ids` buffer and, where the module has no
    pooler, the pooler's two tensors. A head that the checkpoint lacks is added by the caller:
    `{**encoder, "classifier.weight": ..., "classifier.bias": ...}`.

    Args:
        state_dict: names to tensors, as `load_state_dict` returns them, named as in Hugging Face's
            `BertForQuestionAnswering`, `BertForSequenceClassification` or `BertModel`; any
            floating dtype.
        module: a `BertForSpans`, `BertForClassification` or `BertForEmbedding`.
        rename: `(pattern, replacement)` pairs for `re.sub` that lead to these names, where the
            checkpoint has others: `[("^b[.]", "bert."), ("^h[.]", "qa_outputs.")]`.

    Returns:
        `{"params": ...}`, float32 NumPy arrays.

    Raises:
        WeightError: a tensor has no place, a place stays empty, or a shape differs; lists them.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens, tokens)
    ignore = [POSITION_BUFFER] if "pooler" in shapes["params"] else [POSITION_BUFFER, POOLER]
    return import_params(state_dict, shapes, rename=(*rename, *TENSOR_NAMES), ignore=ignore)


def span_cross_entropy(outputs: tuple[Array, Array], targets: dict[str, Array]) -> Array:
    """Loss in nats of each example: mean of the start's and the end's cross-entropy.

    Args:
        outputs: `(start, end)` logits, `[batch, length]` each, of `BertForSpans`.
        targets: `{"start", "end"}`, the answer's first and last token, integers `[batch]`.

    Returns:
        `[batch]`, in the logits' dtype.

    >>> logits = jnp.zeros((1, 4))
    >>> span_cross_entropy((logits, logits), {"start": jnp.array([1]), "end": jnp.array([2])})
    Array([1.3862944], dtype=float32)
    """
    start, end = outputs
    return (cross_entropy(start, targets["start"]) + cross_entropy(end, targets["end"])) / 2


def _layer_norm(config: BertConfig, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that the original keeps.
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, use_fast_variance=False, name=name)

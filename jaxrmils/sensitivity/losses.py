"""Losses without labels, and losses of tokens with masks, grouped by sequence.

Without labels a model is held against its own float outputs. Such a loss has its minimum at the
float model, so its tangent is zero there and tells nothing; the secant does (`secant`), since it
integrates the gradient along the way to the quantized network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph
from jaxrmils.graph.checks import check_finite
from jaxrmils.graph.naming import leaf_names
from jaxrmils.numerics.calibration import check_params
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity.tangent import Loss, ScoreError

LabelFree = Literal["kl", "squared"]
LABEL_FREE: tuple[LabelFree, ...] = get_args(LabelFree)


def kl_divergence(logits: Any, float_logits: Any) -> Any:
    """KL(softmax(float_logits) || softmax(logits)) along the last axis, in nats.

    Args:
      logits: float [..., classes].
      float_logits: the float model's, of the same shape.

    Returns:
      float32 [...].

    >>> float(kl_divergence(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0]]))[0])
    0.0
    """
    log_p = jax.nn.log_softmax(float_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def squared_error(outputs: Any, float_outputs: Any) -> Any:
    """Squared difference, summed along the last axis.

    Args:
      outputs: float [..., n].
      float_outputs: the float model's, of the same shape.

    Returns:
      float32 [...].
    """
    difference = outputs.astype(jnp.float32) - float_outputs.astype(jnp.float32)
    return jnp.sum(difference**2, axis=-1)


def token_cross_entropy(logits: Any, labels: Any) -> Any:
    """-log softmax(logits)[label] of every token; NaN for a label outside the classes.

    Args:
      logits: float [..., classes].
      labels: integers [...]; tokens that are masked may hold anything (see `per_sequence`).

    Returns:
      float32 [...], in nats.
    """
    inside = (labels >= 0) & (labels < logits.shape[-1])
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(
        log_probabilities, jnp.where(inside, labels, 0)[..., None], axis=-1
    )[..., 0]
    return jnp.where(inside, -chosen, jnp.nan)


def label_free(kind: LabelFree = "kl") -> Loss:
    """A loss against the float model's own outputs.

    Args:
      kind: "kl" for logits, "squared" for outputs of any kind.

    Returns:
      `loss(outputs, targets) -> [batch]`, where targets are the float model's outputs (see
      `with_float_outputs`), a pytree like the outputs. Axes between the first and the last (tokens,
      pixels) are averaged, leaves are summed.

    Raises:
      ScoreError: an unknown kind.

    >>> loss = label_free("squared")
    >>> print(loss(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])))
    [4.]
    """
    if kind not in LABEL_FREE:
        raise ScoreError(f"label-free loss {kind!r}; expected one of {', '.join(LABEL_FREE)}")
    each = kl_divergence if kind == "kl" else squared_error

    def loss(outputs: Any, targets: Any) -> Any:
        def one(output: Any, target: Any) -> Any:
            if output.shape != target.shape:
                raise ScoreError(
                    f"outputs have shape {output.shape} but targets {target.shape}; the targets of "
                    "a label-free loss are the float model's outputs (with_float_outputs)"
                )
            if kind == "kl" and (output.ndim < 2 or output.shape[-1] < 2):
                raise ScoreError(
                    f"KL divergence needs the logits of 2 or more classes; found outputs of shape "
                    f"{output.shape}: use 'squared'"
                )
            if output.ndim < 2:
                output, target = output[:, None], target[:, None]
            values = each(output, target)
            return jnp.mean(values.reshape(values.shape[0], -1), axis=1)

        parts = jax.tree.leaves(jax.tree.map(one, outputs, targets))
        return sum(parts[1:], parts[0])

    return loss


def per_sequence(token_loss: Callable[[Any, Any], Any], *, tokens: float) -> Loss:
    """A loss of sequences from a loss of their tokens, with a mask or weights.

    A sequence's loss is sum_t w_t l_t / tokens, with `tokens` the mean weight of a sequence. So the
    mean over sequences is the weighted mean over all tokens, long sequences counting more, and the
    unit of every interval is the sequence: tokens of one sequence are not independent.

    Args:
      token_loss: `token_loss(outputs, targets) -> [batch, tokens]`, as `token_cross_entropy` or
        `kl_divergence`.
      tokens: mean total weight of a sequence over the data, from `mean_weight`.

    Returns:
      `loss(outputs, targets) -> [batch]`, where targets are a dict with "targets" for `token_loss`
      and "weights" [batch, tokens]: 0 for tokens that don't count. Their loss may be NaN, as that
      of a label of -100, but not its derivative: 0 times NaN is NaN.

    Raises:
      ScoreError: `tokens` is not positive.

    >>> loss = per_sequence(token_cross_entropy, tokens=2.0)
    >>> targets = {"targets": jnp.array([[0, -100]]), "weights": jnp.array([[1.0, 0.0]])}
    >>> print(loss(jnp.zeros((1, 2, 4)), targets).round(3))
    [0.693]
    """
    if not tokens > 0:
        raise ScoreError(f"tokens is {tokens}; the mean weight of a sequence is above 0")

    def loss(outputs: Any, targets: Any) -> Any:
        weights = targets["weights"]
        values = token_loss(outputs, targets["targets"])
        if values.shape != weights.shape:
            raise ScoreError(
                f"the token loss has shape {values.shape} but weights have {weights.shape}"
            )
        counts = weights > 0
        values = jnp.where(counts, values, jnp.zeros_like(values))
        products = values * jnp.where(counts, weights, 0).astype(values.dtype)
        return jnp.sum(products.reshape(products.shape[0], -1), axis=1) / tokens

    return loss


def mean_weight(batches: Iterable[tuple[Any, Any]]) -> float:
    """Mean total weight of a sequence, for `per_sequence`.

    Args:
      batches: `(inputs, targets)` batches whose targets hold "weights" [batch, tokens].

    Raises:
      ScoreError: no sequences, negative or non-finite weights, or none above 0.

    >>> mean_weight([(None, {"weights": np.array([[1, 1, 0], [1, 0, 0]])})])
    1.5
    """
    total, count = 0.0, 0
    for number, (_, targets) in enumerate(batches):
        weights = np.asarray(targets["weights"], np.float64)
        if not np.all(np.isfinite(weights) & (weights >= 0)):
            raise ScoreError(f"batch {number}: weights must be finite and not negative")
        total += float(weights.sum())
        count += weights.shape[0]
    if count == 0 or total == 0:
        raise ScoreError("the weights of all tokens are 0; nothing would count")
    return total / count


def with_float_outputs(
    graph: Graph,
    params: Any,
    batches: Sequence[tuple[Any, Any]],
    *,
    progress: Progress = silent,
) -> list[tuple[Any, Any]]:
    """The same inputs with the float model's outputs as targets.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches; targets are ignored.
      progress: see `jaxrmils.progress`.

    Returns:
      `(inputs, outputs)` batches, for a loss of `label_free`.

    Raises:
      ScoreError: no data, or an output that is not finite.
      TraceError: params or inputs that do not fit.
    """
    result = list(float_outputs(graph, params, batches, progress=progress))
    if not result:
        raise ScoreError("the data holds no batches")
    return result


def float_outputs(
    graph: Graph,
    params: Any,
    batches: Sequence[tuple[Any, Any]],
    *,
    progress: Progress = silent,
) -> Iterator[tuple[Any, Any]]:
    """The batches of `with_float_outputs` one by one, so that not all inputs lie in memory."""
    check_params(graph, params)
    apply = jax.jit(graph.apply)
    for number, (inputs, _) in enumerate(progress(batches, "float outputs", len(batches))):
        check_finite(inputs, f"batch {number}", leaf_names(inputs))
        outputs = jax.device_get(apply(params, inputs))
        for name, leaf in zip(leaf_names(outputs), jax.tree.leaves(outputs), strict=True):
            if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
                raise ScoreError(
                    f"batch {number}: the float model's output {name or 'array'} holds NaN or "
                    "infinite values; finite ones were expected"
                )
        yield inputs, outputs

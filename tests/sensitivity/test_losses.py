"""Losses without labels and losses of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random
from scipy import special, stats
from stages import calibrated, traced

import jaxrmils as jr
from jaxrmils.sensitivity import ScoreError
from jaxrmils.sensitivity.losses import (
    kl_divergence,
    label_free,
    mean_weight,
    per_sequence,
    squared_error,
    token_cross_entropy,
    with_float_outputs,
)


def test_kl_is_scipys_entropy():
    logits, reference = random(5, 7), 3 * random(5, 7) + 1
    expected = [
        stats.entropy(special.softmax(p), special.softmax(q))
        for p, q in zip(np.float64(reference), np.float64(logits), strict=True)
    ]
    np.testing.assert_allclose(kl_divergence(logits, reference), expected, rtol=1e-5)


def test_label_free_losses_average_tokens_and_sum_leaves():
    outputs = {"a": random(4, 3, 5), "b": random(4, 2)}
    targets = {"a": random(4, 3, 5) + 1, "b": random(4, 2) - 1}
    expected = squared_error(outputs["a"], targets["a"]).mean(axis=1)
    expected = expected + squared_error(outputs["b"], targets["b"])
    np.testing.assert_allclose(label_free("squared")(outputs, targets), expected, rtol=1e-6)
    one_number = label_free("squared")(random(4), random(4) + 1)
    assert one_number.shape == (4,)
    with pytest.raises(ScoreError, match="expected one of kl, squared"):
        label_free("l2")
    with pytest.raises(ScoreError, match="2 or more classes"):
        label_free("kl")(random(4, 1), random(4, 1))
    with pytest.raises(ScoreError, match="but targets"):
        label_free("squared")(random(4, 3), random(4, 1))


def test_a_label_free_loss_is_attributed_by_the_secant_alone():
    graph, params, inputs = traced("nnx_transformer")
    ranges, loss = calibrated("nnx_transformer"), label_free("squared")
    data = with_float_outputs(graph, params, [(inputs, None)])
    scores = jr.score(graph, params, data, loss, ranges)
    plan = jr.uniform(scores.table, "int4")
    found = jr.attribute(graph, params, plan, data, loss, ranges)
    joint = found.change.mean()
    assert joint > 0
    assert abs(sum(jr.predict(scores, plan).values()).mean()) < 1e-4 * joint
    shares = sum(np.abs(share) for share in found.layers.values())
    assert np.abs(found.residual).sum() < 0.01 * shares.sum()
    model = jr.quantize(graph, params, plan, ranges)
    difference = np.float64(model(inputs)) - np.float64(graph.apply(params, inputs))
    per_example = (difference**2).sum(axis=-1).reshape(len(difference), -1).mean(axis=1)
    np.testing.assert_allclose(found.quantized_loss, per_example, rtol=2e-3)


def test_sequences_add_up_to_the_mean_over_tokens():
    logits, labels = random(6, 5, 4), np.arange(30).reshape(6, 5) % 4
    weights = np.float32(np.arange(30).reshape(6, 5) % 3)
    labels[weights == 0] = -100
    batches = [
        (None, {"targets": labels[i : i + 2], "weights": weights[i : i + 2]}) for i in (0, 2, 4)
    ]
    loss = per_sequence(token_cross_entropy, tokens=mean_weight(batches))
    found = loss(logits, {"targets": jnp.asarray(labels), "weights": jnp.asarray(weights)})
    log_p = special.log_softmax(np.float64(logits), axis=-1)
    tokens = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    assert found.shape == (6,)
    np.testing.assert_allclose(found.mean(), np.average(tokens, weights=weights), rtol=1e-5)


def test_masked_tokens_reach_neither_loss_nor_gradient():
    logits = random(2, 3, 4)
    weights = jnp.array([[1.0, 0.5, 0.0]] * 2)
    targets = {"targets": jnp.array([[0, 1, 9]] * 2), "weights": weights}
    loss = per_sequence(token_cross_entropy, tokens=1.5)
    value, gradient = jax.value_and_grad(lambda x: loss(x, targets).sum())(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 2], 0)
    assert np.abs(gradient[:, :2]).min() > 0


def test_a_label_outside_the_classes_is_no_number():
    found = token_cross_entropy(jnp.zeros((1, 3, 4)), jnp.array([[3, 4, -1]]))
    np.testing.assert_array_equal(np.isnan(found), [[False, True, True]])


@pytest.mark.parametrize(
    ("weights", "message"),
    [([[1.0, -1.0]], "not negative"), ([[jnp.nan, 1.0]], "finite"), ([[0.0, 0.0]], "nothing")],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ScoreError, match=message):
        mean_weight([(None, {"weights": np.array(weights)})])


def test_bad_arguments_are_refused():
    with pytest.raises(ScoreError, match="above 0"):
        per_sequence(token_cross_entropy, tokens=0.0)
    loss = per_sequence(token_cross_entropy, tokens=1.0)
    with pytest.raises(ScoreError, match="weights have"):
        loss(jnp.zeros((2, 3, 4)), {"targets": jnp.zeros((2, 3), int), "weights": jnp.ones((2, 4))})
    graph, params, _ = traced("plain")
    with pytest.raises(ScoreError, match="no batches"):
        with_float_outputs(graph, params, [])
    with pytest.raises(ScoreError, match="nothing would count"):
        mean_weight([])

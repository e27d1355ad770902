"""Fitted temperatures against optima that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.evaluation import EvaluationError, fit_temperature
from jaxrmils.evaluation.temperature import HIGHEST, LOWEST, unfit_for_temperature, unfit_outputs
from jaxrmils.zoo import cross_entropy


def two_classes(scale, right=0.8, n=100):
    """Logits of equal confidence, of which a share is right: best at scale / T = log odds."""
    logits = scale * np.eye(2, dtype=np.float32)[np.zeros(n, int)]
    return logits, np.asarray(np.arange(n) >= right * n, np.int32)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 20.0])
def test_the_temperature_turns_confidence_into_the_odds(scale):
    found = fit_temperature(*two_classes(scale), cross_entropy)
    assert found.value == pytest.approx(scale / np.log(4), rel=2e-3)
    entropy = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    assert found.loss_after == pytest.approx(entropy, abs=1e-5)
    assert found.loss_before >= found.loss_after and not found.at_bound


def test_a_loss_without_a_minimum_is_said_to_be_so():
    sure = fit_temperature(*two_classes(1.0, right=1.0), cross_entropy)
    assert sure.at_bound and LOWEST <= sure.value < 2 * LOWEST
    wrong = fit_temperature(*two_classes(1.0, right=0.0), cross_entropy)
    assert wrong.at_bound and HIGHEST / 2 < wrong.value <= HIGHEST


def test_a_calibrated_model_keeps_its_loss():
    found = fit_temperature(*two_classes(np.float32(np.log(4))), cross_entropy)
    assert found.value == pytest.approx(1, abs=2e-3)
    assert found.loss_after <= found.loss_before


def test_the_better_of_two_minima_is_found():
    def two_valleys(z, y):
        log_t = -jnp.log(z[:, 0])
        return jnp.minimum((log_t + 1) ** 2 + 0.5, (log_t - 2) ** 2)

    found = fit_temperature(np.ones((3, 2), np.float32), np.zeros(3, np.int32), two_valleys)
    assert np.log(found.value) == pytest.approx(2, abs=0.01)


def test_a_broken_loss_is_refused():
    with pytest.raises(EvaluationError, match="NaN or infinite at T = 1"):
        fit_temperature(*two_classes(1.0), lambda z, y: cross_entropy(z, y) * jnp.nan)


def test_only_losses_of_softmax_are_fit():
    logits = np.asarray(jax.random.normal(jax.random.key(0), (20, 4)))
    targets = np.arange(20, dtype=np.int32) % 4
    assert unfit_for_temperature(logits, targets, cross_entropy) == ""
    smoothed = lambda z, y: 0.9 * cross_entropy(z, y) - 0.1 * jax.nn.log_softmax(z).mean(-1)  # noqa: E731
    assert unfit_for_temperature(logits, targets, smoothed) == ""
    squares = lambda z, y: jnp.sum((z - jax.nn.one_hot(y, 4)) ** 2, axis=-1)  # noqa: E731
    assert "constant is added" in unfit_for_temperature(logits, targets, squares)


def spans(outputs, targets):
    return cross_entropy(outputs[0], targets["start"]) + cross_entropy(outputs[1], targets["end"])


def test_losses_of_several_softmaxes_are_fit_as_well():
    keys = jax.random.split(jax.random.key(1))
    outputs = tuple(np.asarray(jax.random.normal(key, (20, 6))) for key in keys)
    targets = {"start": np.argmax(outputs[0], axis=1), "end": np.arange(20) % 6}
    assert unfit_for_temperature(outputs, targets, spans) == ""
    one = lambda z, y: cross_entropy(z[0], y["start"]) + jnp.mean(z[1] ** 2, axis=1)  # noqa: E731
    assert "constant is added" in unfit_for_temperature(outputs, targets, one)
    distance = lambda z, y: jnp.sum((z[0] - z[1]) ** 2, axis=1)  # noqa: E731
    assert "constant is added" in unfit_for_temperature(outputs, targets, distance)
    found = fit_temperature(outputs, targets, spans)
    grid = np.exp(np.linspace(-3, 3, 601))
    losses = [
        sum(-jax.nn.log_softmax(z / t)[np.arange(20), y].mean() for z, y in pairs)
        for t in np.float32(grid)
        if (pairs := list(zip(outputs, targets.values(), strict=True)))
    ]
    assert found.loss_after == pytest.approx(float(min(losses)), abs=1e-4)
    assert found.value == pytest.approx(grid[np.argmin(losses)], rel=0.01) and not found.at_bound


def test_outputs_that_are_too_many_or_no_floats_are_left_alone():
    shape = lambda size, dtype: jax.ShapeDtypeStruct((1, size), dtype)  # noqa: E731
    assert unfit_outputs({"a": shape(50_000, jnp.bfloat16), "b": shape(50_000, jnp.float32)}) == ""
    many = unfit_outputs((shape(50_000, jnp.float32), shape(50_001, jnp.float32)))
    assert "100,001 numbers for an example" in many
    assert "returns int32" in unfit_outputs((shape(3, jnp.float32), shape(3, jnp.int32)))

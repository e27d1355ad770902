import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.data import DataError, Dataset
from jaxrmils.zoo import MnistCNN, cross_entropy, evaluate_classifier, train_classifier


def stripes(n, seed=0):
    """Images whose class is the bright row's position: learnt in a few steps."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.int32)
    images = rng.uniform(0, 0.3, (n, 28, 28, 1)).astype(np.float32)
    images[np.arange(n), 4 + 2 * labels] = 1.0
    return Dataset(images, labels, None, "stripes")


def test_layers_and_dtypes():
    variables = MnistCNN().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert set(variables) == {"params"}
    assert list(variables["params"]) == ["Conv_0", "Conv_1", "Dense_0", "Dense_1"]
    logits = MnistCNN().apply(variables, jnp.zeros((3, 28, 28, 1)))
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32


def test_cross_entropy_is_minus_log_probability():
    logits = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 200.0]])
    losses = cross_entropy(logits, jnp.array([0, 2]))
    np.testing.assert_allclose(losses, [np.log(1 + np.e + np.e**2), 0.0], rtol=1e-6)


def test_training_learns_and_reports_progress():
    seen = []
    variables = train_classifier(
        MnistCNN(), stripes(320), epochs=8, batch_size=32, progress=lambda *step: seen.append(step)
    )
    assert [step for step, _, _ in seen] == list(range(1, 81))
    assert {steps for _, steps, _ in seen} == {80}
    assert seen[-1][2] < 0.2 < seen[0][2]
    held_out = stripes(101, seed=1)
    losses, correct = evaluate_classifier(MnistCNN(), variables, held_out, batch_size=50)
    assert losses.shape == correct.shape == (101,)
    assert losses.dtype == np.float32 and correct.dtype == np.bool_
    assert correct.mean() > 0.95


def test_same_seed_same_variables():
    first, again = (
        train_classifier(MnistCNN(), stripes(64), epochs=1, batch_size=32, seed=5) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_labels_outside_the_classes():
    dataset = stripes(40)
    with pytest.raises(DataError, match="expected 0 to 2 for 3 classes"):
        train_classifier(MnistCNN(num_classes=3), dataset, epochs=1, batch_size=8)


def test_batch_larger_than_the_data():
    with pytest.raises(DataError, match="batch_size is 64 but there are only 40"):
        train_classifier(MnistCNN(), stripes(40), epochs=1, batch_size=64)


def test_no_epoch():
    with pytest.raises(DataError, match="epochs is 0"):
        train_classifier(MnistCNN(), stripes(40), epochs=0, batch_size=8)


def test_a_module_with_state_is_refused():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Dense(10)(nn.BatchNorm(use_running_average=True)(images).mean((1, 2)))

    with pytest.raises(DataError, match=r"Normalized keeps state \['batch_stats'\]"):
        train_classifier(Normalized(), stripes(40), epochs=1, batch_size=8)


def test_divergence_is_an_error():
    with pytest.raises(DataError, match="lower learning_rate"):
        train_classifier(MnistCNN(), stripes(64), epochs=2, batch_size=8, learning_rate=1e30)


def test_missing_optax_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match=r"jaxrmils\[demo\]"):
        train_classifier(MnistCNN(), stripes(40), epochs=1, batch_size=8)

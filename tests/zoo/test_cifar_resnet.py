from functools import partial

import jax
import numpy as np
import pytest
from parity import assert_all_kernels_are_sites, assert_original_logits, parameter_count

from jaxrmils.zoo import CifarResNet


# The numbers that pytorch_resnet_cifar10 prints.
@pytest.mark.parametrize(
    ("name", "count"), [("cifar_resnet20", 269722), ("cifar_resnet56", 853018)]
)
def test_parameter_count(name, count):
    assert parameter_count(name) == count


def test_original_logits():
    assert_original_logits("cifar_resnet20")


def test_every_kernel_is_a_site():
    assert_all_kernels_are_sites("cifar_resnet20")


def test_training_updates_the_statistics_and_evaluation_does_not():
    module = CifarResNet(1)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda s: rng.uniform(0.1, 0.3, s.shape).astype(np.float32), shapes)
    run = jax.jit(partial(module.apply, mutable=["batch_stats"]), static_argnames="train")
    before = variables["batch_stats"]
    _, trained = run(variables, images, train=True)
    assert np.all(trained["batch_stats"]["bn1"]["mean"] != before["bn1"]["mean"])
    logits, kept = run(variables, images)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], before)
    # In evaluation an example does not depend on its batch.
    np.testing.assert_allclose(run(variables, images[:1])[0], logits[:1], rtol=1e-6)

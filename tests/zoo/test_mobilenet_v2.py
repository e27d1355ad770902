import jax
import numpy as np
import pytest
from flax.errors import InvalidRngError
from parity import assert_all_kernels_are_sites, assert_original_logits, parameter_count

from jaxrmils.zoo import reference


def test_parameter_count():
    assert parameter_count("mobilenet_v2") == 3504872  # torchvision's documentation


def test_original_logits():
    assert_original_logits("mobilenet_v2")


def test_every_kernel_is_a_site():
    assert_all_kernels_are_sites("mobilenet_v2")


def test_depthwise_kernels_have_one_input_channel():
    features = reference("mobilenet_v2").shapes()["params"]["features"]
    assert features["2"]["conv"]["1"]["0"]["kernel"].shape == (3, 3, 1, 96)


def test_training_needs_a_stream_for_dropout():
    entry = reference("mobilenet_v2")
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)

    def train(variables, images, rngs):
        return entry.module.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    with pytest.raises(InvalidRngError, match="dropout"):
        jax.eval_shape(train, entry.shapes(), images, {})
    jax.eval_shape(train, entry.shapes(), images, {"dropout": jax.random.key(0)})

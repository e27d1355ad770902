import jax
import numpy as np
import pytest
from parity import FIXTURES
from reference_logits import read_fixture
from safetensors.numpy import save_file

from jaxrmils.zoo import WeightError, reference


def test_normalization_is_the_checkpoints():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    torchvision = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for name in ("resnet18", "mobilenet_v2", "cifar_resnet20"):
        inputs = reference(name).normalization(pixels)
        assert inputs.dtype == np.float32
        np.testing.assert_allclose(inputs, torchvision, atol=1e-5)
    lite = reference("efficientnet_lite0").normalization(pixels)
    np.testing.assert_allclose(lite, (pixels.astype(float) - 127) / 128, atol=1e-6)


def test_a_checkpoint_file_is_imported(tmp_path):
    state_dict, _, _ = read_fixture(FIXTURES / "cifar_resnet20.npz")
    path = tmp_path / "weights.safetensors"
    save_file({f"module.{name}": value for name, value in state_dict.items()}, path)
    entry = reference("cifar_resnet20")
    variables = entry.from_checkpoint(path)
    jax.tree.map(np.testing.assert_array_equal, variables, entry.from_state_dict(state_dict))
    assert jax.tree.structure(variables) == jax.tree.structure(entry.shapes())
    with pytest.raises(WeightError, match="missing"):
        reference("cifar_resnet56").from_checkpoint(path)
    with pytest.raises(WeightError, match=r"linear.weight \[10, 64\], expected \[100, 64\]"):
        entry.with_classes(100).from_checkpoint(path)

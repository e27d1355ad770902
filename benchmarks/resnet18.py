"""ResNet-18 in Flax Linen, laid out as torchvision's, with random weights: a workload to time."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Width and first stride of the four stages of two blocks each."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, projected where the shape changes."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = _conv(self.width, 3, self.stride, "conv1")(x)
        y = nn.relu(_norm("bn1")(y))
        y = _norm("bn2")(_conv(self.width, 3, 1, "conv2")(y))
        if x.shape != y.shape:
            x = _conv(self.width, 1, self.stride, "downsample_conv")(x)
            x = _norm("downsample_bn")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """20 convolutions and a dense layer; batch normalization uses its running averages."""

    num_classes: int = 1000
    stages: tuple[tuple[int, int], ...] = STAGES

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits [batch, classes] of images [batch, height, width, 3]."""
        x = nn.relu(_norm("bn1")(_conv(64, 7, 2, "conv1")(x)))
        padding: Any = ((1, 1), (1, 1))  # annotated as str in Flax
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for stage, (width, stride) in enumerate(self.stages, start=1):
            x = BasicBlock(width, stride, name=f"layer{stage}_0")(x)
            x = BasicBlock(width, 1, name=f"layer{stage}_1")(x)
        return nn.Dense(self.num_classes, name="fc")(jnp.mean(x, axis=(1, 2)))


def _conv(width: int, kernel: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        width,
        (kernel, kernel),
        strides=(stride, stride),
        padding=kernel // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-5, name=name)


def initialize(model: ResNet18, size: int) -> Any:
    """Random variables for images of `size` x `size`."""
    return model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))

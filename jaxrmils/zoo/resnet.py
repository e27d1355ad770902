"""ResNet-18, -34 and -50 for ImageNet, in the layout of torchvision's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxrmils.zoo.layers import Chain, Layer, batch_norm, conv
from jaxrmils.zoo.reference_model import IMAGENET_NORMALIZATION, Reference

Images = Float[Array, "batch height width channels"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Args:
      width: output channels.
      stride: of the first convolution and the shortcut.
      norm: constructor of the normalization.
    """

    width: int
    stride: int
    norm: Layer

    @nn.compact
    def __call__(self, inputs: Images) -> Images:
        """`[batch, height, width, channels]` to `[batch, height / stride, ..., width]`."""
        hidden = conv(self.width, 3, self.stride, name="conv1")(inputs)
        hidden = nn.relu(self.norm(name="bn1")(hidden))
        hidden = conv(self.width, 3, name="conv2")(hidden)
        hidden = self.norm(name="bn2")(hidden)
        return nn.relu(hidden + _shortcut(inputs, self.width, self.stride, self.norm))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut.

    The stride is at the 3 x 3 convolution, as in torchvision ("ResNet v1.5"); the paper has it at
    the first.

    Args:
      width: channels inside; four times as many come out.
      stride: of the 3 x 3 convolution and the shortcut.
      norm: constructor of the normalization.
    """

    width: int
    stride: int
    norm: Layer

    @nn.compact
    def __call__(self, inputs: Images) -> Images:
        """`[batch, height, width, channels]` to `[batch, height / stride, ..., 4 * width]`."""
        hidden = conv(self.width, 1, name="conv1")(inputs)
        hidden = nn.relu(self.norm(name="bn1")(hidden))
        hidden = conv(self.width, 3, self.stride, name="conv2")(hidden)
        hidden = nn.relu(self.norm(name="bn2")(hidden))
        hidden = conv(4 * self.width, 1, name="conv3")(hidden)
        hidden = self.norm(name="bn3")(hidden)
        return nn.relu(hidden + _shortcut(inputs, 4 * self.width, self.stride, self.norm))


def _shortcut(inputs: Images, features: int, stride: int, norm: Layer) -> Images:
    """The inputs, projected where their shape changes; called in a block's compact method."""
    if stride == 1 and inputs.shape[-1] == features:
        return inputs
    project = partial(conv, features, 1, stride)
    return Chain((project, norm), name="downsample")(inputs)


class ResNet(nn.Module):
    """A residual network for ImageNet (He et al. 2015, https://arxiv.org/abs/1512.03385).

    Args:
      block: `BasicBlock` or `Bottleneck`.
      depths: blocks in each of the four stages.
      num_classes: outputs.

    >>> import jax, jax.numpy as jnp
    >>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    >>> shapes = jax.eval_shape(ResNet(BasicBlock, (2, 2, 2, 2)).init, jax.random.key(0), images)
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    11689512
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: Sequence[int]
    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Float[Array, "batch classes"]:
        """Class logits.

        Args:
          images: float32 `[batch, height, width, 3]`, RGB in [0, 1] with the ImageNet mean
            subtracted and divided by its deviation (`IMAGENET_NORMALIZATION`).
          train: normalize by the batch's statistics; apply with `mutable=["batch_stats"]`.

        Returns:
          float32 `[batch, num_classes]`.
        """
        norm = batch_norm(train)
        hidden = conv(64, 7, 2, name="conv1")(images)
        hidden = nn.relu(norm(name="bn1")(hidden))
        padding: Any = ((1, 1), (1, 1))  # Annotated by Flax as a string alone.
        hidden = nn.max_pool(hidden, (3, 3), strides=(2, 2), padding=padding)
        for stage, depth in enumerate(self.depths):
            strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
            blocks = [partial(self.block, 64 * 2**stage, stride, norm) for stride in strides]
            hidden = Chain(blocks, name=f"layer{stage + 1}")(hidden)
        return nn.Dense(self.num_classes, name="fc")(hidden.mean(axis=(1, 2)))


def _reference(name: str, block: type[BasicBlock] | type[Bottleneck], *depths: int) -> Reference:
    module = ResNet(block, depths)
    return Reference(name, module, 224, 32, IMAGENET_NORMALIZATION, f"torchvision {name}")


RESNETS = (
    _reference("resnet18", BasicBlock, 2, 2, 2, 2),
    _reference("resnet34", BasicBlock, 3, 4, 6, 3),
    _reference("resnet50", Bottleneck, 3, 4, 6, 3),
)

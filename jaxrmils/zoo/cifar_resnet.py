"""ResNet-20 and -56 for CIFAR-10, in the layout of akamaster's pytorch_resnet_cifar10."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrmils.zoo.layers import Chain, Layer, batch_norm, conv
from jaxrmils.zoo.reference_model import IMAGENET_NORMALIZATION, Reference

Images = Float[Array, "batch height width channels"]


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters ("option A" of the paper).

    Args:
      width: output channels.
      stride: of the first convolution; the shortcut then takes every second pixel and fills the
        new channels with zeros, half of them in front of the old ones and half behind.
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
        new = self.width - inputs.shape[-1]
        shortcut = inputs[:, :: self.stride, :: self.stride]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        return nn.relu(hidden + shortcut)


class CifarResNet(nn.Module):
    """A residual network of 6 n + 2 layers for CIFAR-10 (He et al. 2015, section 4.2).

    https://arxiv.org/abs/1512.03385; the checkpoints are those of
    https://github.com/akamaster/pytorch_resnet_cifar10.

    Args:
      blocks: blocks in each of the three stages, n.
      num_classes: outputs.

    >>> import jax
    >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    >>> shapes = jax.eval_shape(CifarResNet(3).init, jax.random.key(0), images)
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    269722
    """

    blocks: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Float[Array, "batch classes"]:
        """Class logits.

        Args:
          images: float32 `[batch, 32, 32, 3]`, RGB in [0, 1] with the *ImageNet* mean subtracted
            and divided by its deviation, as these checkpoints were trained.
          train: normalize by the batch's statistics; apply with `mutable=["batch_stats"]`.

        Returns:
          float32 `[batch, num_classes]`.
        """
        norm = batch_norm(train)
        hidden = conv(16, 3, name="conv1")(images)
        hidden = nn.relu(norm(name="bn1")(hidden))
        for stage in range(3):
            strides = [1 if stage == 0 else 2] + [1] * (self.blocks - 1)
            blocks = [partial(CifarBlock, 16 * 2**stage, stride, norm) for stride in strides]
            hidden = Chain(blocks, name=f"layer{stage + 1}")(hidden)
        return nn.Dense(self.num_classes, name="linear")(hidden.mean(axis=(1, 2)))


def _reference(name: str, blocks: int) -> Reference:
    source = f"akamaster/pytorch_resnet_cifar10 {name.removeprefix('cifar_')}"
    return Reference(name, CifarResNet(blocks), 32, 0, IMAGENET_NORMALIZATION, source)


CIFAR_RESNETS = (_reference("cifar_resnet20", 3), _reference("cifar_resnet56", 9))

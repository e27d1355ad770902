"""MobileNetV2 for ImageNet, in the layout of torchvision's checkpoint."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from jaxrmils.zoo.layers import Chain, ConvNorm, Layer, batch_norm, conv
from jaxrmils.zoo.reference_model import IMAGENET_NORMALIZATION, Reference

Images = Float[Array, "batch height width channels"]

# Table 2 of the paper: expansion, output channels, repeats, stride of the first repeat.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand (1 x 1), filter (3 x 3 depthwise), project (1 x 1), with a shortcut where it fits.

    Args:
      expansion: channels inside, in multiples of the input's; 1 leaves the expansion out.
      features: output channels.
      stride: of the depthwise convolution.
      norm: constructor of the normalization.
    """

    expansion: int
    features: int
    stride: int
    norm: Layer

    @nn.compact
    def __call__(self, inputs: Images) -> Images:
        """`[batch, height, width, channels]` to `[batch, height / stride, ..., features]`."""
        channels = inputs.shape[-1]
        hidden = self.expansion * channels
        layers = [
            partial(ConvNorm, hidden, 3, self.norm, stride=self.stride, groups=hidden),
            partial(conv, self.features, 1),
            self.norm,
        ]
        if self.expansion != 1:
            layers = [partial(ConvNorm, hidden, 1, self.norm), *layers]
        outputs = Chain(layers, name="conv")(inputs)
        if self.stride == 1 and channels == self.features:
            return inputs + outputs
        return outputs


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks (Sandler et al. 2018).

    https://arxiv.org/abs/1801.04381, width 1.0.

    Args:
      num_classes: outputs.

    >>> import jax, jax.numpy as jnp
    >>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    >>> shapes = jax.eval_shape(MobileNetV2().init, jax.random.key(0), images)
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    3504872
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Float[Array, "batch classes"]:
        """Class logits.

        Args:
          images: float32 `[batch, height, width, 3]`, RGB in [0, 1] with the ImageNet mean
            subtracted and divided by its deviation (`IMAGENET_NORMALIZATION`).
          train: normalize by the batch's statistics and drop features before the classifier; apply
            with `mutable=["batch_stats"], rngs={"dropout": key}`.

        Returns:
          float32 `[batch, num_classes]`.
        """
        norm = batch_norm(train)
        layers = [partial(ConvNorm, 32, 3, norm, stride=2)]
        for expansion, features, repeats, first in STAGES:
            strides = [first] + [1] * (repeats - 1)
            layers += [partial(InvertedResidual, expansion, features, s, norm) for s in strides]
        layers.append(partial(ConvNorm, 1280, 1, norm))
        hidden = Chain(layers, name="features")(images).mean(axis=(1, 2))
        dropout = partial(nn.Dropout, 0.2, deterministic=not train)
        return Chain((dropout, partial(nn.Dense, self.num_classes)), name="classifier")(hidden)


MOBILENET_V2 = Reference(
    "mobilenet_v2",
    MobileNetV2(),
    224,
    32,
    IMAGENET_NORMALIZATION,
    "torchvision mobilenet_v2",
)

"""EfficientNet-Lite0 to -Lite4 for ImageNet, in the layout of efficientnet-lite-pytorch."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from jaxrmils.data.images import Normalization
from jaxrmils.zoo.layers import Chain, Layer, batch_norm, conv
from jaxrmils.zoo.reference_model import Reference

Images = Float[Array, "batch height width channels"]

# Table 1 of the paper: kernel size, stride of the first repeat, expansion, channels, repeats.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class MBConv(nn.Module):
    """Expand (1 x 1), filter (depthwise), project (1 x 1), with a shortcut where it fits.

    Args:
      kernel_size: of the depthwise convolution.
      stride: of the depthwise convolution, padded as TensorFlow's "SAME" does it: where the
        padding is odd, the larger half is at the bottom and right.
      expansion: channels inside, in multiples of the input's; 1 leaves the expansion out.
      features: output channels.
      norm: constructor of the normalization.
    """

    kernel_size: int
    stride: int
    expansion: int
    features: int
    norm: Layer

    @nn.compact
    def __call__(self, inputs: Images) -> Images:
        """`[batch, height, width, channels]` to `[batch, height / stride, ..., features]`."""
        channels = inputs.shape[-1]
        width = self.expansion * channels
        hidden = inputs
        if self.expansion != 1:
            hidden = conv(width, 1, name="_expand_conv")(hidden)
            hidden = nn.relu6(self.norm(name="_bn0")(hidden))
        hidden = conv(
            width,
            self.kernel_size,
            self.stride,
            groups=width,
            padding="SAME",
            name="_depthwise_conv",
        )(hidden)
        hidden = nn.relu6(self.norm(name="_bn1")(hidden))
        hidden = conv(self.features, 1, name="_project_conv")(hidden)
        hidden = self.norm(name="_bn2")(hidden)
        if self.stride == 1 and channels == self.features:
            return inputs + hidden
        return hidden


class EfficientNetLite(nn.Module):
    """EfficientNet without squeeze-and-excite, with relu6 (Tan and Le 2019).

    https://arxiv.org/abs/1905.11946; the Lite variants are those of
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, whose stem and
    head are not scaled. Without stochastic depth.

    Args:
      width: multiplies the channels between stem and head; the product is rounded to eights.
      depth: multiplies the repeats of all stages but the first and the last; rounded up.
      dropout: rate before the classifier, in training.
      num_classes: outputs.

    >>> import jax, jax.numpy as jnp
    >>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    >>> shapes = jax.eval_shape(EfficientNetLite(1.0, 1.0).init, jax.random.key(0), images)
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    4652008
    """

    width: float
    depth: float
    dropout: float = 0.2
    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Float[Array, "batch classes"]:
        """Class logits.

        Args:
          images: float32 `[batch, height, width, 3]`, RGB, `(pixel - 127) / 128` of pixels from 0
            to 255.
          train: normalize by the batch's statistics and drop features before the classifier; apply
            with `mutable=["batch_stats"], rngs={"dropout": key}`.

        Returns:
          float32 `[batch, num_classes]`.
        """
        norm = batch_norm(train, epsilon=1e-3, momentum=0.99)
        hidden = conv(32, 3, 2, padding="SAME", name="_conv_stem")(images)
        hidden = nn.relu6(norm(name="_bn0")(hidden))
        hidden = Chain(self._blocks(norm), name="_blocks")(hidden)
        hidden = conv(1280, 1, name="_conv_head")(hidden)
        hidden = nn.relu6(norm(name="_bn1")(hidden)).mean(axis=(1, 2))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return nn.Dense(self.num_classes, name="_fc")(hidden)

    def _blocks(self, norm: Layer) -> list[Layer]:
        blocks: list[Layer] = []
        for index, (kernel_size, first, expansion, channels, repeats) in enumerate(STAGES):
            if 0 < index < len(STAGES) - 1:
                repeats = math.ceil(self.depth * repeats)
            features = scaled_channels(channels, self.width)
            strides = [first] + [1] * (repeats - 1)
            blocks += [partial(MBConv, kernel_size, s, expansion, features, norm) for s in strides]
        return blocks


def scaled_channels(channels: int, width: float) -> int:
    """`width * channels` rounded to a multiple of 8, never down by more than a tenth.

    >>> [scaled_channels(channels, 1.1) for channels in (16, 24, 40)]
    [16, 24, 48]
    """
    scaled = width * channels
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _reference(number: int, width: float, depth: float, size: int, dropout: float) -> Reference:
    return Reference(
        f"efficientnet_lite{number}",
        EfficientNetLite(width, depth, dropout),
        size,
        32,
        Normalization(mean=(127.0,), std=(128.0,)),
        f"efficientnet-lite-pytorch efficientnet-lite{number}",
    )


EFFICIENTNET_LITES = (
    _reference(0, 1.0, 1.0, 224, 0.2),
    _reference(1, 1.0, 1.1, 240, 0.2),
    _reference(2, 1.1, 1.2, 260, 0.3),
    _reference(3, 1.2, 1.4, 280, 0.3),
    _reference(4, 1.4, 1.8, 300, 0.3),
)

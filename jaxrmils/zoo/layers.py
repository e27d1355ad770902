"""Pieces that the reference networks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn

Layer = Callable[..., nn.Module]


def batch_norm(train: bool, *, epsilon: float = 1e-5, momentum: float = 0.9) -> Layer:
    """BatchNorm that reads its stored statistics, or in training updates them.

    Args:
      train: normalize by the batch's own statistics and update the stored ones.
      epsilon: added to the variance.
      momentum: weight of the old statistics in an update (PyTorch's is one minus this).

    Returns:
      A constructor of `flax.linen.BatchNorm`, to be called with a name.
    """
    return partial(nn.BatchNorm, use_running_average=not train, epsilon=epsilon, momentum=momentum)


class Chain(nn.Module):
    """Layers applied in order and named "0", "1", ..., as in PyTorch's `Sequential`.

    Args:
      layers: constructors of modules, each called with its name.

    >>> import jax, jax.numpy as jnp
    >>> chain = Chain((partial(nn.Dense, 4), partial(nn.Dense, 2)))
    >>> sorted(chain.init(jax.random.key(0), jnp.zeros((1, 3)))["params"])
    ['0', '1']
    """

    layers: Sequence[Layer]

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """The last layer's output."""
        for index, layer in enumerate(self.layers):
            inputs = layer(name=str(index))(inputs)
        return inputs


class ConvNorm(nn.Module):
    """A convolution without bias ("0"), BatchNorm ("1") and relu6, on NHWC.

    Padding is PyTorch's: `(kernel_size - 1) // 2` on every side, also at stride 2.

    Args:
      features: output channels.
      kernel_size: height and width of the kernel.
      norm: constructor of the normalization.
      stride: of both axes.
      groups: convolution groups; as many as channels for a depthwise convolution.
    """

    features: int
    kernel_size: int
    norm: Layer
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """`[batch, height, width, channels]` to `[batch, height / stride, ..., features]`."""
        layer = conv(self.features, self.kernel_size, self.stride, groups=self.groups, name="0")
        return nn.relu6(self.norm(name="1")(layer(inputs)))


def conv(
    features: int,
    kernel_size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    padding: int | str | None = None,
    name: str | None = None,
) -> nn.Conv:
    """A square convolution without bias on NHWC.

    Args:
      features: output channels.
      kernel_size: height and width of the kernel.
      stride: of both axes.
      groups: convolution groups.
      padding: as `flax.linen.Conv` takes it; by default `(kernel_size - 1) // 2` on every side.
      name: of the module.

    >>> conv(8, 3, stride=2).padding
    1
    """
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=(kernel_size - 1) // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=False,
        name=name,
    )

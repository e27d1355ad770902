"""A small digit classifier: big enough to quantize, small enough to train in seconds."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float


class MnistCNN(nn.Module):
    """Two convolutions and two dense layers; 105,866 parameters for 28 x 28 x 1 images.

    No batch normalization, so `apply(variables, images)` needs no state and mixes no examples.

    >>> import jax, jax.numpy as jnp
    >>> variables = MnistCNN().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    105866
    """

    num_classes: int = 10

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Class logits.

        Args:
            images: float32 `[batch, height, width, channels]`, values in [0, 1].

        Returns:
            float32 `[batch, num_classes]`.
        """
        hidden = nn.relu(nn.Conv(16, (3, 3))(images))
        hidden = nn.max_pool(hidden, (2, 2), strides=(2, 2))
        hidden = nn.relu(nn.Conv(32, (3, 3))(hidden))
        hidden = nn.max_pool(hidden, (2, 2), strides=(2, 2))
        hidden = hidden.reshape((hidden.shape[0], -1))
        hidden = nn.relu(nn.Dense(64)(hidden))
        return nn.Dense(self.num_classes)(hidden)

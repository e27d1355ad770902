"""A reference network: the module, what its images must look like, and where its weights go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrmils.data.images import Normalization
from jaxrmils.zoo.importing import StateDict, Variables, import_params, load_state_dict

# https://pytorch.org/vision/stable/models.html: of RGB pixels in [0, 1].
IMAGENET_NORMALIZATION = Normalization(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=1 / 255
)


@dataclass(frozen=True)
class Reference:
    """A published network whose published weights can be imported.

    Args:
      name: the key in the registry (`jaxrmils.zoo.reference`).
      module: a Linen module; `module.apply(variables, images)` with images
        `[batch, height, width, 3]` returns logits `[batch, classes]`.
      input_size: height and width, in pixels, that the published weights were evaluated at.
      crop_padding: pixels that `jaxrmils.data.resize_and_crop` cuts away around the crop. It
        resizes bicubically, as EfficientNet's authors do; torchvision's do bilinearly.
      normalization: from uint8 RGB pixels to inputs.
      checkpoint: whose names and layout of tensors `from_state_dict` takes.
    """

    name: str
    module: nn.Module
    input_size: int
    crop_padding: int
    normalization: Normalization
    checkpoint: str

    def shapes(self) -> Any:
        """The variables as `jax.ShapeDtypeStruct`, without computing anything."""
        images = jax.ShapeDtypeStruct((1, self.input_size, self.input_size, 3), jnp.float32)
        return jax.eval_shape(self.module.init, jax.random.key(0), images)

    def from_state_dict(self, state_dict: StateDict) -> Variables:
        """The module's variables from a state dict, float32; see `import_params`.

        Raises:
          WeightError: the state dict is not of this network.
        """
        return import_params(state_dict, self.shapes())

    def from_checkpoint(self, path: str | Path) -> Variables:
        """The module's variables from a checkpoint file; see `load_state_dict`.

        Raises:
          WeightError: the file is not of this network.
          ImportError: it is a torch file and PyTorch is not installed.
        """
        return self.from_state_dict(load_state_dict(path))

    def with_classes(self, num_classes: int) -> Reference:
        """The same network with another number of classes, for fine-tuned checkpoints.

        >>> from jaxrmils.zoo import reference
        >>> reference("resnet18").with_classes(10).shapes()["params"]["fc"]["bias"].shape
        (10,)
        """
        return replace(self, module=self.module.clone(num_classes=num_classes))

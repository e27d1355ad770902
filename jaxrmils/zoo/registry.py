"""The reference networks by name."""

from __future__ import annotations

from jaxrmils.zoo.cifar_resnet import CIFAR_RESNETS
from jaxrmils.zoo.efficientnet_lite import EFFICIENTNET_LITES
from jaxrmils.zoo.mobilenet_v2 import MOBILENET_V2
from jaxrmils.zoo.reference_model import Reference
from jaxrmils.zoo.resnet import RESNETS

_REFERENCES = {
    entry.name: entry for entry in (*RESNETS, *CIFAR_RESNETS, MOBILENET_V2, *EFFICIENTNET_LITES)
}


def reference(name: str) -> Reference:
    """A reference network by its name.

    Args:
      name: one of `reference_names()`.

    Returns:
      The network; `reference(name).from_checkpoint(path)` imports published weights.

    Raises:
      ValueError: there is no such network; lists those there are.

    >>> reference("resnet18").input_size
    224
    """
    if name not in _REFERENCES:
        raise ValueError(
            f"there is no reference network {name!r}; expected one of {', '.join(_REFERENCES)}"
        )
    return _REFERENCES[name]


def reference_names() -> tuple[str, ...]:
    """Every name that `reference` takes.

    >>> len(reference_names())
    11
    """
    return tuple(_REFERENCES)

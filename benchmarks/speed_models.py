"""The networks of `integer_speed.py`: module, variables, and random inputs of any batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.zoo import (
    BERT_BASE,
    BertConfig,
    BertEncoder,
    ResNet,
    import_bert,
    load_state_dict,
    reference,
)
from jaxrmils.zoo.resnet import BasicBlock

TINY_BERT = BertConfig(
    hidden_size=32, layers=1, heads=2, intermediate_size=64, vocabulary_size=50, max_length=16
)
BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Workload:
    """A network to be timed.

    Attributes:
        name: as on the command line.
        module: a Linen module.
        variables: its float32 variables.
        make_inputs: batch size to random inputs: float32 images `[batch, size, size, 3]`, or a dict
            of int32 `[batch, length]`.
    """

    name: str
    module: nn.Module
    variables: Any
    make_inputs: Callable[[int], Any]

    def apply(self, variables: Any, inputs: Any) -> Any:
        """The outputs, as a pure function."""
        return apply_module(self.module, variables, inputs)

    @property
    def is_bert(self) -> bool:
        """Whether the inputs are tokens."""
        return isinstance(self.module, BertEncoder)


def apply_module(module: nn.Module, variables: Any, inputs: Any, **options: Any) -> Any:
    """`module.apply` on images, or on a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return module.apply(variables, **inputs, **options)
    return module.apply(variables, inputs, **options)


def images(size: int) -> Callable[[int], Any]:
    """Batch size to normal random images, float32 `[batch, size, size, 3]`."""
    return lambda batch: (
        np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)
    )


def texts(config: BertConfig, length: int) -> Callable[[int], Any]:
    """Batch size to random tokens without padding, each int32 `[batch, length]`."""

    def make(batch: int) -> dict[str, Any]:
        shape = (batch, length)
        tokens = np.random.default_rng(0).integers(0, config.vocabulary_size, shape, np.int32)
        values = (tokens, np.ones(shape, np.int32), np.zeros(shape, np.int32))
        return dict(zip(BERT_INPUTS, values, strict=True))

    return make


def _zoo(name: str) -> tuple[nn.Module, Callable[[int], Any]]:
    entry = reference(name)
    return entry.module, images(entry.input_size)


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, Callable[[int], Any]]]] = {
    "resnet18": lambda: _zoo("resnet18"),
    "efficientnet_lite0": lambda: _zoo("efficientnet_lite0"),
    "mobilenet_v2": lambda: _zoo("mobilenet_v2"),
    "bert_base": lambda: (BertEncoder(BERT_BASE), texts(BERT_BASE, 128)),
    "tiny_resnet": lambda: (ResNet(BasicBlock, (1, 1), num_classes=10), images(32)),
    "tiny_bert": lambda: (BertEncoder(TINY_BERT), texts(TINY_BERT, 8)),
}
BATCHES = {"bert_base": (1, 8)}


def workload(name: str, weights: Path | None = None) -> Workload:
    """A network with its weights.

    Args:
        name: a key of `NETWORKS`.
        weights: a checkpoint as `jaxrmils.zoo` imports it; random weights without one. Times hardly
            depend on them, errors do.

    Raises:
        ValueError: there is no such network.
        WeightError: the checkpoint is of another network.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; expected one of {', '.join(NETWORKS)}")
    module, make_inputs = NETWORKS[name]()
    if weights is None:
        example = jax.tree.map(jnp.asarray, make_inputs(1))
        keyed = example if isinstance(example, Mapping) else {"images": example}
        variables = jax.jit(lambda key: module.init(key, **keyed))(jax.random.key(0))
    elif isinstance(module, BertEncoder):
        variables = import_bert(load_state_dict(weights), module)
    else:
        variables = reference(name).from_checkpoint(weights)
    return Workload(name, module, jax.tree.map(jnp.asarray, variables), make_inputs)

"""What later stages need to know of a model without having it: layers, operands and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrmils.graph.trace import Graph

_SCALE_BITS = 32
_GRID_BITS = 32 + 8  # scale and zero point of an activation


class Format(NamedTuple):
    """The format of a layer's operands.

    Attributes:
      weight_bits: 8, 4, or 32 for float.
      activation_bits: 8, 4, or 32 for float.
      dynamic: whether every row of the activations has a grid of its own, made at run time.
      group: how many weights along the contracted dim share a scale; 0 for all of them.

    >>> Format(8, 8, dynamic=True)
    Format(weight_bits=8, activation_bits=8, dynamic=True, group=0)
    """

    weight_bits: int = 32
    activation_bits: int = 32
    dynamic: bool = False
    group: int = 0


@dataclass(frozen=True)
class ActivationRow:
    """One activation operand of one site.

    Attributes:
      site: the site's name.
      position: index into `site.activations`.
      size: number of elements for one example, per iteration of a loop.
      grids: how many grids it has (more than one in a scanned stack).
      iterations: how often it is read for one example (product of the loops' lengths).
    """

    site: str
    position: int
    size: int
    grids: int
    iterations: int


@dataclass(frozen=True)
class LayerRow:
    """One decision: a weight with its uses, or an activation x activation dot.

    Attributes:
      name: the layer's name.
      sites: the names of its sites.
      kinds: their kinds ("dot", "conv", "gather").
      weight_size: elements of its weight; 0 where it has none.
      weight_scales: scales that a quantized weight carries.
      weight_leaves: parameter leaves that the weight is made of.
      activations: its activation operands.
      macs: multiply-accumulates for one example.
      group_length: length of the weight's dim that groups divide (see `group_axis`); 0 where it
        can't have groups, None in tables that were saved before there were groups.
    """

    name: str
    sites: tuple[str, ...]
    kinds: tuple[str, ...]
    weight_size: int
    weight_scales: int
    weight_leaves: tuple[int, ...]
    activations: tuple[ActivationRow, ...]
    macs: int
    group_length: int | None = None

    @property
    def has_weight(self) -> bool:
        """False for an activation x activation dot."""
        return self.weight_size > 0

    def scales(self, group: int = 0) -> int:
        """Scales that its quantized weight carries, with so many weights to a group (0: none).

        Raises:
          ValueError: groups in a table that was saved before there were any.
        """
        if not group or self.group_length == 0:
            return self.weight_scales
        if self.group_length is None:
            raise ValueError(
                f"the table does not know the groups of {self.name}: an older version saved it; "
                "tabulate or score the model again"
            )
        return self.weight_size // self.group_length * math.ceil(self.group_length / group)

    @property
    def has_rows(self) -> bool:
        """Whether all its activations enter dots, whose rows can have grids of their own."""
        return bool(self.activations) and "conv" not in self.kinds

    @property
    def has_groups(self) -> bool:
        """Whether its weight can have a scale for every group."""
        return self.has_weight and "conv" not in self.kinds and self.group_length != 0

    @property
    def is_lookup(self) -> bool:
        """True for an embedding table that is only looked up: its weight alone is quantized."""
        return self.has_weight and not self.activations


@dataclass(frozen=True)
class ModelTable:
    """A model's layers and the bits of its parameters.

    Attributes:
      layers: in the order in which they first run.
      leaf_names: names of the parameter leaves.
      leaf_bits: size of every leaf in bits, as it is in the float model.
      float_leaves: leaves that stay in float whatever the plan (biases, norms, ...).
      fingerprint: the graph's.
    """

    layers: tuple[LayerRow, ...]
    leaf_names: tuple[str, ...]
    leaf_bits: tuple[int, ...]
    float_leaves: tuple[int, ...]
    fingerprint: str

    @cached_property
    def layer(self) -> Mapping[str, LayerRow]:
        """The layers by name."""
        return {row.name: row for row in self.layers}

    @property
    def float_bits(self) -> int:
        """Size of the float model in bits."""
        return sum(self.leaf_bits)

    def size_bits(self, formats: Mapping[str, Format | tuple[int, int]]) -> int:
        """Size of a quantized model in bits, scales, zero points and float layers counted.

        Args:
          formats: per layer its format, or (weight bits, activation bits), 32 for float; missing
            means float. Grids that are made at run time are not stored.
        """
        kept, total = set(self.float_leaves), 0
        for row in self.layers:
            given = formats.get(row.name, Format())
            format_ = given if isinstance(given, Format) else Format(*given)
            bits = format_.weight_bits
            if row.has_weight and bits == 32:
                kept |= set(row.weight_leaves)
            elif row.has_weight:
                total += bits * row.weight_size + _SCALE_BITS * row.scales(format_.group)
            if format_.activation_bits < 32 and not format_.dynamic:
                total += _GRID_BITS * sum(a.grids for a in row.activations)
        return total + sum(self.leaf_bits[i] for i in kept)

    def layer_bits(self, name: str, weight_bits: int, group: int = 0) -> int:
        """Size in bits of one layer's weight at the given width (32: as in the float model)."""
        row = self.layer[name]
        if not row.has_weight:
            return 0
        if weight_bits == 32:
            return sum(self.leaf_bits[i] for i in row.weight_leaves)
        return weight_bits * row.weight_size + _SCALE_BITS * row.scales(group)


def group_axis(graph: Graph, name: str) -> int | None:
    """The axis of a weight along which groups of scales run: the last that is no channel.

    Of a dot's kernel that is its (last) contracted dim, of an embedding table the row.

    Args:
      graph: from `trace`.
      name: the weight's.

    Returns:
      None where a convolution reads the weight, or all axes are channels.
    """
    weight = graph.weights[name]
    shared = [axis for axis in range(len(weight.shape)) if axis not in weight.channel_axes]
    if not shared or any(graph.site[use].kind == "conv" for use in weight.uses):
        return None
    return shared[-1]


def tabulate(graph: Graph) -> ModelTable:
    """The table of a graph.

    Leaves that no site reads and that are no arrays of numbers (PRNG keys) count as they are.
    """
    layers = []
    read: set[int] = set()
    for name, sites in graph.layers.items():
        weight = graph.weights.get(name)
        if weight:
            read |= set(weight.leaves)
        rows = tuple(
            ActivationRow(
                site=site.name,
                position=position,
                size=site.operands[index].size,
                grids=math.prod(site.stacked_lengths),
                iterations=math.prod(loop.length for loop in site.loops),
            )
            for site in sites
            for position, index in enumerate(site.activations)
        )
        layers.append(
            LayerRow(
                name=name,
                sites=tuple(site.name for site in sites),
                kinds=tuple(site.kind for site in sites),
                weight_size=weight.size if weight else 0,
                weight_scales=math.prod(weight.shape[a] for a in weight.channel_axes)
                if weight
                else 0,
                weight_leaves=weight.leaves if weight else (),
                activations=rows,
                macs=sum(site.macs for site in sites),
                group_length=_group_length(graph, name),
            )
        )
    leaves = jax.tree.leaves(graph.params)
    unread = set(range(len(leaves))) - read
    return ModelTable(
        layers=tuple(layers),
        leaf_names=graph.leaf_names,
        leaf_bits=tuple(_bits(leaf) for leaf in leaves),
        float_leaves=tuple(sorted(unread | graph.traced.float_leaves)),
        fingerprint=graph.fingerprint,
    )


def _group_length(graph: Graph, name: str) -> int:
    axis = group_axis(graph, name) if name in graph.weights else None
    return 0 if axis is None else graph.weights[name].shape[axis]


def _bits(leaf: Any) -> int:
    if not jnp.issubdtype(leaf.dtype, jnp.number):
        return 32 * math.prod(leaf.shape)
    info = jnp.finfo if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo
    return int(info(leaf.dtype).bits) * math.prod(leaf.shape)

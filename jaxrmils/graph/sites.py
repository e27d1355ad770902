"""What tracing finds: sites, weights, layers and the coverage of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["weight", "activation", "indices"]
Kind = Literal["dot", "conv", "gather"]


@dataclass(frozen=True)
class Loop:
    """A `scan` around a site.

    Attributes:
      number: identity of the loop within its trace; outer loops have smaller numbers.
      length: number of iterations.
      stacked: True where the scan slices parameters (a stack of layers: every iteration
        has ranges and scales of its own), False for a recurrence (one scale for all).
    """

    number: int
    length: int
    stacked: bool


@dataclass(frozen=True)
class Operand:
    """One input of a site, as it is for a single example (leading batch axis of 1)."""

    role: Role
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightUse:
    """How a site reads a weight.

    Attributes:
      name: the weight's name in `Graph.weights`.
      operand: position of the weight among the site's operands.
      permutation: the operand is `transpose(weight, permutation)`; None for as it is.
      loops: numbers of the loops around the site that slice the weight, outermost first; its
        leading axes.
    """

    name: str
    operand: int
    permutation: tuple[int, ...] | None
    loops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """One `dot_general`, `conv_general_dilated` or embedding `gather` that can be quantized.

    Attributes:
      name: unique and stable between traces with other batch sizes: the weight's path in the
        params tree (`Conv_0/kernel`, a second use is `Conv_0/kernel@1`), or for an
        activation x activation dot its Flax scope (`Attention_0/dot_0`).
      kind: "dot", "conv" or "gather".
      layer: the decision it belongs to: the weight's name, or its own where it has none.
      operands: its inputs, in the operation's order.
      weight: which weight it reads, None for an activation x activation dot.
      scope: Flax name stack at the operation ("" where the model has none).
      loops: the scans around it, outermost first.
      macs: multiply-accumulates for one example, loops included.
      note: what a user should know ("custom derivative rule replaced by the true one").
    """

    name: str
    kind: Kind
    layer: str
    operands: tuple[Operand, ...]
    weight: WeightUse | None
    scope: str
    loops: tuple[Loop, ...]
    macs: int
    note: str = ""

    @property
    def activations(self) -> tuple[int, ...]:
        """Positions of the operands that are activations."""
        return tuple(i for i, o in enumerate(self.operands) if o.role == "activation")

    @property
    def stacked_lengths(self) -> tuple[int, ...]:
        """Lengths of the scans over stacked parameters around the site."""
        return tuple(loop.length for loop in self.loops if loop.stacked)


@dataclass(frozen=True)
class Weight:
    """A tensor computed from parameters alone that one or more sites multiply by.

    Attributes:
      name: the path of its parameter leaf (`Dense_0/kernel`); several leaves that are
        concatenated give `LSTM/{hf,hg,hi,ho}/kernel`.
      leaves: positions of those leaves in the flattened params tree.
      shape: its shape, with a leading axis for every stacked loop.
      dtype: its dtype.
      channel_axes: the axes that have scales of their own (all others share one), by every
        use: output channels for dot and conv, rows for an embedding table, stacked loops.
      uses: the names of the sites that read it.
    """

    name: str
    leaves: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    channel_axes: tuple[int, ...]
    uses: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Status = Literal["site", "float", "folded", "unused"]


@dataclass(frozen=True)
class CoverageEntry:
    """What became of one dot, convolution or embedding lookup of the jaxpr.

    Attributes:
      op: the primitive's name.
      scope: where it is (Flax name stack or the enclosing primitive).
      status: "site" (can be quantized), "float" (stays float, see reason), "folded"
        (depends on parameters alone, computed once), "unused" (its result is not read).
      reason: the site's name, or why it is not one.
    """

    op: str
    scope: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Every dot and convolution of a model, quantizable or not and why; quantizable lookups too.

    >>> coverage = Coverage((CoverageEntry("dot_general", "Dense_0", "site", "Dense_0/kernel"),))
    >>> coverage.summary()
    '1 of 1 dots and convolutions can be quantized'
    """

    entries: tuple[CoverageEntry, ...]

    def count(self, status: Status) -> int:
        """How many operations have this status."""
        return sum(entry.status == status for entry in self.entries)

    def summary(self) -> str:
        """One line for people."""
        lookups = sum(entry.op == "gather" for entry in self.entries)
        sites, total = self.count("site") - lookups, len(self.entries) - lookups
        text = f"{sites} of {total} dots and convolutions can be quantized"
        rest: tuple[tuple[Status, str], ...] = (
            ("float", "stay float"),
            ("folded", "depend on parameters alone"),
            ("unused", "are not used"),
        )
        parts = [f"{self.count(s)} {words}" for s, words in rest if self.count(s)]
        if lookups:
            parts.append(f"{lookups} embedding lookups can be quantized")
        return ", ".join([text, *parts])

"""Operand formats of a layer and their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from jaxrmils.graph import Format, LayerRow
from jaxrmils.sensitivity import Candidate, CandidateSet

FLOAT_BITS = 32

FORMATS: dict[str, Format] = {
    "float": Format(32, 32),
    "w8a8": Format(8, 8),
    "w8a4": Format(8, 4),
    "w4a8": Format(4, 8),
    "w4a4": Format(4, 4),
    "w8": Format(8, 32),
    "w4": Format(4, 32),
    "w8a8d": Format(8, 8, dynamic=True),
    "w4a8d": Format(4, 8, dynamic=True),
    "w4g32": Format(4, 32, group=32),
    "w4g64": Format(4, 32, group=64),
    "w4g128": Format(4, 32, group=128),
    "int8": Format(8, 8),
    "int4": Format(4, 4),
}
"""Formats by name. "int8" and "int4" mean both operands; a "d" at the end means that every row of a
dot's activations has a grid of its own, made at run time (dynamic quantization per token); "g128"
that every 128 neighbours of a channel's weights have a scale of their own."""


class PlanError(ValueError):
    """A plan, a pattern or an option that does not fit the model."""


def parse_format(name: str) -> Format:
    """The format of a name.

    >>> parse_format("w4a8")
    Format(weight_bits=4, activation_bits=8, dynamic=False, group=0)
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise PlanError(f"unknown format {name!r}{hint} Formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def several(formats: Iterable[str]) -> Iterable[str]:
    """The formats as they are; PlanError for a single word, whose letters would be taken."""
    if isinstance(formats, str):
        raise PlanError(f"formats is {formats!r}; expected some, such as ('w8a8', 'w4a8')")
    return formats


def candidates_for(formats: Iterable[str]) -> CandidateSet:
    """The candidates that scores must hold for formats: the usual ones, and others behind them.

    Args:
      formats: names of formats.

    Raises:
      PlanError: a single word, or an unknown format.

    >>> candidates_for(["w8a8", "w4a8d"]).activations[6:]
    (Candidate(bits=8, rounding='nearest', dynamic=True),)
    """
    found = [parse_format(name) for name in several(formats)]
    return CandidateSet().holding(
        [Candidate(f.activation_bits, dynamic=True) for f in found if f.dynamic],
        [Candidate(f.weight_bits, group=f.group) for f in found if f.group],
    )


def format_name(
    weight_bits: int, activation_bits: int, dynamic: bool = False, group: int = 0
) -> str:
    """The name of a format; of an activation x activation dot only the activations count.

    >>> format_name(4, 8), format_name(32, 8, dynamic=True), format_name(4, 32, group=128)
    ('w4a8', 'a8d', 'w4g128')
    """
    weight = f"w{weight_bits}" if weight_bits < FLOAT_BITS else ""
    weight += f"g{group}" if group else ""
    activation = f"a{activation_bits}" if activation_bits < FLOAT_BITS else ""
    return weight + activation + "d" * dynamic or "float"


def fit(row: LayerRow, wanted: Format) -> Format:
    """A format as a layer can have it.

    An embedding table that is only looked up has no activations to quantize, and an
    activation x activation dot has no weight: weight-only formats leave it in float. A convolution
    has no rows: its activations get a calibrated grid where rows would have their own, and its
    weight a scale per channel where groups would have theirs.
    """
    weight = wanted.weight_bits if row.has_weight else FLOAT_BITS
    activation = FLOAT_BITS if row.is_lookup else wanted.activation_bits
    dynamic = wanted.dynamic and activation < FLOAT_BITS and row.has_rows
    has_groups = weight < FLOAT_BITS and row.has_groups
    return Format(weight, activation, dynamic, wanted.group if has_groups else 0)

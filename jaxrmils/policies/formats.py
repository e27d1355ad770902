"""Operand formats of a layer and their names."""

from __future__ import annotations

import difflib

from jaxrmils.graph import LayerRow

FLOAT_BITS = 32

FORMATS: dict[str, tuple[int, int]] = {
    "float": (32, 32),
    "w8a8": (8, 8),
    "w8a4": (8, 4),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w8": (8, 32),
    "w4": (4, 32),
    "int8": (8, 8),
    "int4": (4, 4),
}
"""(weight bits, activation bits); 32 is float. "int8" and "int4" mean both operands."""


class PlanError(ValueError):
    """A plan, a pattern or an option that does not fit the model."""


def parse_format(name: str) -> tuple[int, int]:
    """Weight and activation bits of a format's name.

    >>> parse_format("w4a8")
    (4, 8)
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise PlanError(f"unknown format {name!r}{hint} Formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def format_name(weight_bits: int, activation_bits: int) -> str:
    """The name of a format; of an activation x activation dot only the activations count.

    >>> format_name(4, 8), format_name(32, 8), format_name(32, 32)
    ('w4a8', 'a8', 'float')
    """
    weight = f"w{weight_bits}" if weight_bits < FLOAT_BITS else ""
    activation = f"a{activation_bits}" if activation_bits < FLOAT_BITS else ""
    return weight + activation or "float"


def fit(row: LayerRow, bits: tuple[int, int]) -> tuple[int, int]:
    """A format as a layer can have it.

    An embedding table that is only looked up has no activations to quantize, and an
    activation x activation dot has no weight: weight-only formats leave it in float.
    """
    weight, activation = bits
    if not row.has_weight:
        return FLOAT_BITS, activation
    if row.is_lookup:
        return weight, FLOAT_BITS
    return weight, activation

"""Integer formats, rounding names, and the scale convention.

The convention is stated here and nowhere else; the rest of the package calls `code_range`:

* **symmetric** (weights): the largest magnitude maps to `qmax`, which is 127 (int8) or 7 (int4),
  and the code -128 or -8 is unused, so that `x` and `-x` have opposite codes. Zero has code 0 and
  `scale = absmax / qmax`.
* **affine** (activations): all `2**bits` codes are used, `2**bits - 1` steps from the low end to
  the high end: `scale = (hi - lo) / (qmax - qmin)`. Zero has the code `zero_point`, an integer.

A code `q` stands for the real number `scale * (q - zero_point)`.
"""

from typing import Literal, get_args

BITS = (8, 4)
"""The integer widths, in bits, from the more to the less precise."""

Rounding = Literal["nearest", "floor", "ceil", "stochastic"]
"""How `x / scale` becomes an integer: half to even, down, up, or up with the probability of the
fractional part."""

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code of a format.

    Args:
        bits: 8 or 4.
        symmetric: True for a scale alone, False for a scale and a zero point.

    Returns:
        `(qmin, qmax)`, both inclusive.

    Raises:
        ValueError: `bits` is not one of `BITS`.

    Example:
        >>> code_range(8, symmetric=True), code_range(4, symmetric=True)
        ((-127, 127), (-7, 7))
        >>> code_range(8, symmetric=False), code_range(4, symmetric=False)
        ((-128, 127), (-8, 7))
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; the integer formats have 8 or 4 bits")
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if symmetric else -qmax - 1), qmax

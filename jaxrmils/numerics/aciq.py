"""Analytical clipping (ACIQ): Banner et al., 2018, arXiv:1810.05723.

For a density of zero mean and unit spread, clipped to [-c, c] and quantized to 2^M levels, ACIQ
takes as mean square error the clipped tails plus uniform noise over the range:

    Gauss    2 int_c^inf (x - c)^2 phi(x) dx + c^2 / (3 * 4^M)    spread: the standard deviation
    Laplace  2 exp(-c)                       + c^2 / (3 * 4^M)    spread: the mean of |x - mean|

Both are convex in c; the best clipping value is where the derivative is 0.
"""

import functools
import math
from typing import Literal

Distribution = Literal["gauss", "laplace"]


@functools.lru_cache
def clip_factor(distribution: Distribution, bits: int) -> float:
    """The c that minimizes ACIQ's mean square error, in units of the distribution's spread.

    For a one-sided tensor (after a ReLU) all levels fall on one half of the symmetric density, so
    the noise term is a quarter of the above: its best c is that of one more bit.

    Args:
        distribution: "gauss" or "laplace".
        bits: M, at least 1.

    Returns:
        The factor c.

    Raises:
        ValueError: the distribution is unknown.

    Example:
        >>> [round(clip_factor("laplace", bits), 2) for bits in (2, 3, 4, 8)]
        [2.83, 3.9, 5.03, 9.9]
        >>> [round(clip_factor("gauss", bits), 2) for bits in (2, 3, 4, 8)]
        [1.71, 2.15, 2.56, 3.92]
    """
    match distribution:
        case "gauss":
            tail = _gauss_tail
        case "laplace":
            tail = _laplace_tail
        case _:
            raise ValueError(f"distribution is {distribution!r}; expected 'gauss' or 'laplace'")
    # Half of the derivative is c / (3 * 4^M) - tail(c), which increases: bisection.
    low, high = 0.0, 30.0
    while (middle := (low + high) / 2) not in (low, high):
        if middle / (3 * 4**bits) < tail(middle):
            low = middle
        else:
            high = middle
    return middle


def _gauss_tail(c: float) -> float:
    """2 int_c^inf (x - c) phi(x) dx = 2 (phi(c) - c Q(c))."""
    density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return 2 * density - c * math.erfc(c / math.sqrt(2))


def _laplace_tail(c: float) -> float:
    """int_c^inf (x - c) exp(-x) dx = exp(-c)."""
    return math.exp(-c)

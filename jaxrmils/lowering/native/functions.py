"""Smooth activations as tables, which kernels read in registers.

    f(x) = max(x, 0) + h(|x|)

holds for GELU, in both of its forms, and for SiLU: x F(x) with F(-x) = 1 - F(x). h is
-|x| F(-|x|), small, smooth, and as good as 0 from some `reach` on. Between 0 and there it is a
polynomial on each of 16 intervals of the same width, as many as float32 vectors have lanes, so that
a coefficient is looked up by one instruction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.polynomial import polynomial
from scipy import special

INTERVALS = 16


class _Shape(NamedTuple):
    """F, where h is taken to end, and the polynomials' degree."""

    distribution: Callable[[np.ndarray], np.ndarray]
    reach: float
    degree: int


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


_SHAPES: Mapping[str, _Shape] = MappingProxyType(
    {
        "gelu": _Shape(special.ndtr, 6.0, 5),
        "gelu_tanh": _Shape(_gelu_tanh, 6.0, 5),
        "silu": _Shape(special.expit, 20.0, 7),
    }
)


@functools.cache
def function_table(name: str | None) -> np.ndarray:
    """The polynomials' coefficients in a variable that goes from -0.5 to 0.5 on every interval.

    Args:
        name: of `jaxrmils.graph.functions.FUNCTIONS`; None for no function.

    Returns:
        float32 [degree + 1, 16], ascending powers; no rows for no function.

    Raises:
        ValueError: unknown name.

    >>> function_table("gelu").shape
    (6, 16)
    """
    if name is None:
        return np.zeros((0, INTERVALS), np.float32)
    shape = _shape(name)
    points = np.arange(shape.degree + 1)
    nodes = np.cos(np.pi * (points + 0.5) / len(points)) / 2  # Chebyshev's
    width = shape.reach / INTERVALS
    columns = []
    for interval in range(INTERVALS):
        x = (interval + 0.5 + nodes) * width
        columns.append(polynomial.polyfit(nodes, -x * shape.distribution(-x), shape.degree))
    return np.stack(columns, axis=1).astype(np.float32)


def reach(name: str | None) -> float:
    """From where on f(x) is max(x, 0), in magnitude.

    >>> reach("silu")
    20.0
    """
    return 0.0 if name is None else _shape(name).reach


def _shape(name: str) -> _Shape:
    if name not in _SHAPES:
        raise ValueError(f"function {name!r}; kernels know {', '.join(_SHAPES)}")
    return _SHAPES[name]

"""The last results that fit into a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from jaxrmils.policies.attribution import PlanAttribution

T = TypeVar("T", np.ndarray, PlanAttribution)


class Kept(Generic[T]):
    """The last results, by plan: refinements at several budgets start from the same plans.

    Args:
      most: bytes of all their arrays. The last result is kept, however large.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes, self.found = most, 0, dict[Any, T]()

    def of(self, key: Any, make: Callable[[], T]) -> T:
        """The result of a plan, made if it is not kept."""
        if key in self.found:
            found = self.found.pop(key)
        else:
            found = make()
            self.bytes += _array_bytes(found)
        self.found[key] = found
        while self.bytes > self.most and len(self.found) > 1:
            self.bytes -= _array_bytes(self.found.pop(next(iter(self.found))))
        return found


def _array_bytes(result: np.ndarray | PlanAttribution) -> int:
    if isinstance(result, np.ndarray):
        return result.nbytes
    shares = sum(share.nbytes for share in result.layers.values())
    return shares + result.float_loss.nbytes + result.quantized_loss.nbytes

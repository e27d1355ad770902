"""Results that are not computed yet, so that what follows can be computed along with them.

A handler may return one at a site. The interpreter offers it the operations that read it; whoever
needs it as an array calls `value`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from jaxrmils.graph import compat


class Pending(abc.ABC):
    """A result that is not computed yet."""

    @abc.abstractmethod
    def value(self) -> Any:
        """The array; computed once."""

    @abc.abstractmethod
    def followed_by(self, eqn: compat.JaxprEqn, inputs: Sequence[Any], position: int) -> Any:
        """The result of an equation that reads it, itself pending; None if it can't wait for that.

        Args:
          eqn: the equation, with one result.
          inputs: its operands; None for literals, and pending ones among them.
          position: where this one stands among them.
        """

    def applied(self, name: str) -> Any:
        """A function of it, itself pending; None if it can't wait for that.

        Args:
          name: of `jaxrmils.graph.functions.FUNCTIONS`.
        """
        return None


def settled(value: Any) -> Any:
    """An array, computed now if it is pending."""
    return value.value() if isinstance(value, Pending) else value

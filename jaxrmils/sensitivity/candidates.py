"""The formats that are scored."""

from __future__ import annotations

from dataclasses import dataclass

from jaxrmils.numerics import Rounding


@dataclass(frozen=True, order=True)
class Candidate:
    """A width and a rounding direction.

    >>> str(Candidate(8, "floor"))
    'int8 floor'
    """

    bits: int
    rounding: Rounding = "nearest"

    def __str__(self) -> str:
        return f"int{self.bits} {self.rounding}"


ACTIVATION_CANDIDATES: tuple[Candidate, ...] = tuple(
    Candidate(bits, rounding) for bits in (8, 4) for rounding in ("nearest", "floor", "ceil")
)
WEIGHT_CANDIDATES: tuple[Candidate, ...] = (Candidate(8), Candidate(4))

"""The formats that are scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxrmils.numerics import Rounding


@dataclass(frozen=True, order=True, repr=False)
class Candidate:
    """A width and a rounding direction.

    Attributes:
      bits: 8 or 4.
      rounding: its direction.
      dynamic: of a dot's activation, whether every row has a grid of its own, made at run time.
        A convolution's activation has its calibrated grid either way.
      group: of a weight, how many neighbours share a scale, 0 for a channel; see `weight_params`.
        A convolution's weight has a scale per channel either way.

    >>> str(Candidate(8, "floor")), str(Candidate(8, dynamic=True)), str(Candidate(4, group=128))
    ('int8 floor', 'int8 nearest by row', 'int4 nearest by 128')
    """

    bits: int
    rounding: Rounding = "nearest"
    dynamic: bool = False
    group: int = 0

    def __str__(self) -> str:
        by = " by row" * self.dynamic + (f" by {self.group}" if self.group else "")
        return f"int{self.bits} {self.rounding}{by}"

    def __repr__(self) -> str:
        # Without what is not set: unfinished jobs are known by it.
        rest = ", dynamic=True" * self.dynamic + (f", group={self.group}" if self.group else "")
        return f"Candidate(bits={self.bits!r}, rounding={self.rounding!r}{rest})"


ACTIVATION_CANDIDATES: tuple[Candidate, ...] = tuple(
    Candidate(bits, rounding) for bits in (8, 4) for rounding in ("nearest", "floor", "ceil")
)
WEIGHT_CANDIDATES: tuple[Candidate, ...] = (Candidate(8), Candidate(4))
DYNAMIC_CANDIDATES: tuple[Candidate, ...] = (Candidate(8, dynamic=True),)
"""What `score` needs in addition for formats such as "w8a8d"."""


@dataclass(frozen=True)
class CandidateSet:
    """What switches mean: k + 1 is candidate k.

    Attributes:
      activations: of activation switches.
      weights: of weight switches.

    >>> CandidateSet().holding(activations=[Candidate(8, dynamic=True)]).activations[6:]
    (Candidate(bits=8, rounding='nearest', dynamic=True),)
    """

    activations: tuple[Candidate, ...] = ACTIVATION_CANDIDATES
    weights: tuple[Candidate, ...] = WEIGHT_CANDIDATES

    def holding(
        self, activations: Iterable[Candidate] = (), weights: Iterable[Candidate] = ()
    ) -> CandidateSet:
        """This set with what it lacks of others behind, sorted; itself if it lacks none."""
        return CandidateSet(
            (*self.activations, *sorted(set(activations) - set(self.activations))),
            (*self.weights, *sorted(set(weights) - set(self.weights))),
        )

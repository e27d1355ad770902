"""What a budget limits, and what formats and times a backend has."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping

from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.plan import LayerPlan


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a plan may use at most; None does not limit. Any mix may be given.

    Attributes:
      size_bytes: of the stored model: weights, scales, zero points, and what stays float.
      size_share: the same as a share of the float model, in (0, 1].
      weight_bits: average over the elements of all layers' weights; a float weight counts 32,
        whatever its dtype, and scales do not count.
      activation_bits: average over the elements that enter sites for one example, every iteration
        of a loop counted; float counts 32.
      bops: bit operations for one example: MACs x weight bits x activation bits.
      bops_share: the same as a share of 32 x 32 bits everywhere, in (0, 1].
      latency: seconds, as a `LatencyTable` predicts them.

    Raises:
      PlanError: a limit that is not a positive finite number, a share above 1, or more than 32
        bits.

    >>> Limits(size_share=0.2, activation_bits=8).given()
    {'size_share': 0.2, 'activation_bits': 8}
    >>> Limits(size_share=20)
    Traceback (most recent call last):
    ...
    jaxrmils.policies.formats.PlanError: the limit size_share is 20; expected a number above 0 ...
    """

    size_bytes: float | None = None
    size_share: float | None = None
    weight_bits: float | None = None
    activation_bits: float | None = None
    bops: float | None = None
    bops_share: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            highest = _HIGHEST.get(name, math.inf)
            try:
                is_sound = not isinstance(value, bool) and 0 < value <= highest
            except TypeError:
                is_sound = False
            if not is_sound or not math.isfinite(value):
                top = "" if highest == math.inf else f" and at most {highest}"
                raise PlanError(
                    f"the limit {name} is {value!r}; expected a number above 0{top}: {UNITS[name]}"
                )

    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def named(cls, limits: Mapping[str, float]) -> Limits:
        """Limits by name, as a config file has them; PlanError for a name that is unknown."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in limits:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                raise PlanError(f"unknown limit {name!r}{hint} Limits: {', '.join(known)}")
        return cls(**limits)


UNITS: Mapping[str, str] = {
    "size_bytes": "bytes of the stored model",
    "size_share": "a share of the float model's size",
    "weight_bits": "average bits of a weight element",
    "activation_bits": "average bits of an activation element",
    "bops": "bit operations for one example",
    "bops_share": "a share of the bit operations in 32 x 32 bits",
    "latency": "seconds",
}
"""What each limit counts."""

_HIGHEST = {"size_share": 1, "bops_share": 1, "weight_bits": 32, "activation_bits": 32}


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Seconds that every layer takes in every format, measured or estimated elsewhere.

    The latency of a plan is predicted as `overhead` plus the sum over layers: right where layers
    run one after another and each one's time does not depend on its neighbours' formats.

    Attributes:
      seconds: per layer, by `LayerPlan` (for one choice of roundings) or by its format's name as
        `LayerPlan.format` has it ("float", "w8a8", "w8", and "a8" for a product of activations).
      backend: where it was taken.
      source: how it was taken, in words.
      overhead: seconds that the rest of the model takes.

    Raises:
      PlanError: seconds that are negative or not finite.

    >>> table = LatencyTable({"a": {"float": 2e-3, "w8a8": 1e-3}}, "cpu", "timed", overhead=1e-4)
    >>> table.of("a", LayerPlan(8, 8, ("nearest",)))
    0.001
    """

    seconds: Mapping[str, Mapping[LayerPlan | str, float]]
    backend: str
    source: str
    overhead: float = 0.0

    def __post_init__(self) -> None:
        entries = [
            (f"{n} {_text(k)}", s) for n, own in self.seconds.items() for k, s in own.items()
        ]
        for where, value in [("the overhead", self.overhead), *entries]:
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(
                    f"the latency table says {value} seconds for {where}; expected a finite number "
                    "that is not negative"
                )

    def of(self, name: str, layer: LayerPlan) -> float:
        """Seconds of one layer; PlanError where the table has no entry."""
        if name not in self.seconds:
            raise PlanError(
                f"the latency table has no layer {name!r} (it has {len(self.seconds)} layers, for "
                f"{self.backend}, {self.source}); measure it, or drop the latency limit"
            )
        own = self.seconds[name]
        for key in (layer, layer.format):
            if key in own:
                return own[key]
        raise PlanError(
            f"the latency table has no {layer.format!r} for layer {name!r}, only "
            f"{', '.join(map(_text, own))}; measure it, or take it out of the allowed formats"
        )


def _text(key: LayerPlan | str) -> str:
    return key if isinstance(key, str) else f"{key.format} {'/'.join(key.rounding)}".strip()


_WEIGHTS = ("w8", "w4", "w4g32", "w4g64", "w4g128")
CAPABILITIES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("float", "w8a8", "w4a8", "w8a8d", "w4a8d", *_WEIGHTS),
    "cuda": ("float", "w8a8", "w4a8", "w8a8d", "w4a8d", *_WEIGHTS),
    "tpu": ("float", "w8a8", "w4a8", "w8a8d", "w4a8d", "w4a4", *_WEIGHTS),
}
"""Formats that gain something on a backend.

Four-bit codes of activations are multiplied as int8 unless both operands have four bits on TPU: a
loss in accuracy for nothing, since activations are not stored. Four-bit weights are two to a byte
everywhere: smaller, and no faster where they are unpacked to int8 (CPU, CUDA, and TPU in w4a8).
Weight-only formats are multiplied in float.
"""

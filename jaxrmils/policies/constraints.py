"""What a user demands of a plan: layers to skip and formats to force, by glob."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxrmils.graph import Format, ModelTable
from jaxrmils.policies.formats import FLOAT_BITS, PlanError, fit, parse_format
from jaxrmils.policies.plan import FLOAT_LAYER, LayerPlan


@dataclass(frozen=True)
class Constraints:
    """Skipped layers and forced formats.

    Attributes:
      skip: globs of layer names that stay float.
      force: format by glob; the first pattern that matches a layer counts.

    >>> Constraints(skip=("Dense_*",), force={"Conv_0/*": "w8a8"}).skip
    ('Dense_*',)
    """

    skip: Sequence[str] = ()
    force: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, table: ModelTable) -> dict[str, LayerPlan]:
        """The layers whose decision is fixed, with the decision.

        Raises:
          PlanError: a pattern matches no layer, a format is unknown, or a layer is both skipped
            and forced.
        """
        names = list(table.layer)
        fixed: dict[str, LayerPlan] = {}
        for pattern, format_ in self.force.items():
            bits = parse_format(format_)
            for name in matching(pattern, names):
                if name not in fixed:
                    fixed[name] = nearest_layer(table, name, bits)
        for pattern in self.skip:
            for name in matching(pattern, names):
                if not fixed.get(name, FLOAT_LAYER).is_float:
                    raise PlanError(f"layer {name} is both skipped ({pattern}) and forced")
                fixed[name] = FLOAT_LAYER
        return fixed


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a glob matches; PlanError with near matches if there are none."""
    found = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3)
        raise PlanError(
            f"the pattern {pattern!r} matches no layer; near matches: {', '.join(near) or 'none'}. "
            f"The model has {len(names)} layers, `jaxrmils inspect` lists them."
        )
    return found


def nearest_layer(table: ModelTable, name: str, wanted: Format) -> LayerPlan:
    """A layer in a format with all roundings to nearest."""
    row = table.layer[name]
    own = fit(row, wanted)
    count = len(row.activations) if own.activation_bits < FLOAT_BITS else 0
    return LayerPlan.of(own, ("nearest",) * count)

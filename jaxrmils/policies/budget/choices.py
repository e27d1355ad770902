"""Which plans are allowed: the options of every layer, after formats, skips and forces."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxrmils.graph import Format, ModelTable
from jaxrmils.policies.budget.groups import Groups, resolve_groups
from jaxrmils.policies.budget.limits import CAPABILITIES, LatencyTable
from jaxrmils.policies.constraints import Constraints, matching
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import FLOAT_BITS, FORMATS, PlanError, fit, parse_format, several
from jaxrmils.policies.plan import LayerPlan

FLOAT = Format(FLOAT_BITS, FLOAT_BITS)


@dataclass(frozen=True)
class Rules:
    """What a plan may hold; see `budget`.

    Attributes:
      formats: the formats to choose from besides float; None for all that have a cost.
      skip: globs of layers that stay float.
      force: format by glob.
      groups: layers that share a format.
      capabilities: a backend's name, or the formats that may be used.
      latency: predicts seconds.
    """

    formats: Sequence[str] | None = None
    skip: Sequence[str] = ()
    force: Mapping[str, str] = field(default_factory=dict)
    groups: Groups = ()
    capabilities: str | Sequence[str] | None = None
    latency: LatencyTable | None = None

    def allowed(self) -> dict[Format, str]:
        """The formats to choose from, float first, by their bits.

        Raises:
          PlanError: an unknown format or backend, or none besides float.
        """
        names = FORMATS if self.formats is None else tuple(several(self.formats))
        capable = self.capable()
        found = {FLOAT: "float"}
        for name in names:
            bits = parse_format(name)
            if capable is None or bits in capable:
                found.setdefault(bits, name)
        if len(found) == 1 and not self.force:
            among = "" if capable is None else f" that {self._capabilities_text()} allow"
            raise PlanError(f"formats {tuple(names)} hold none besides float{among}; add some")
        return found

    def capable(self) -> set[Format] | None:
        """The formats that the capabilities name; None for no restriction."""
        if self.capabilities is None:
            return None
        if isinstance(self.capabilities, str):
            if self.capabilities not in CAPABILITIES:
                near = difflib.get_close_matches(self.capabilities, CAPABILITIES, n=1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise PlanError(
                    f"unknown backend {self.capabilities!r}{hint} Capabilities are known for "
                    f"{', '.join(CAPABILITIES)}; or pass the allowed formats"
                )
            return {parse_format(name) for name in CAPABILITIES[self.capabilities]}
        return {parse_format(name) for name in self.capabilities} | {FLOAT}

    def _capabilities_text(self) -> str:
        if isinstance(self.capabilities, str):
            return f"the capabilities of {self.capabilities}"
        return "the capabilities"

    def fixed(self, table: ModelTable) -> dict[str, Format]:
        """The layers with a fixed format, and its bits.

        Raises:
          PlanError: as `Constraints.resolve`, or a forced format beyond the capabilities.
        """
        capable = self.capable()
        for pattern, name in self.force.items():
            if capable is not None and parse_format(name) not in capable:
                raise PlanError(
                    f"{pattern!r} is forced to {name}, which {self._capabilities_text()} do not "
                    "allow; force another format or drop the capabilities"
                )
            matching(pattern, list(table.layer))
        found = Constraints(self.skip, self.force).resolve(table)
        return {name: p.bits for name, p in found.items()}


@dataclass(frozen=True)
class Choices:
    """The options of every layer, and which layers must agree.

    Attributes:
      options: per layer, in the model's order.
      costs: of the options.
      groups: the layers of each group.
      formats: the formats that a group can agree on, by their bits.
    """

    options: Mapping[str, tuple[LayerPlan, ...]]
    costs: Mapping[str, tuple[float, ...]]
    groups: tuple[tuple[str, ...], ...]
    formats: Mapping[Format, str]


def choices(table: ModelTable, costs: Costs, rules: Rules) -> Choices:
    """The options that the rules leave of a table of costs.

    Raises:
      PlanError: costs of another model or that are not finite, a forced format without a cost, or
        rules that contradict each other.
    """
    _check_costs(table, costs)
    allowed, fixed = rules.allowed(), rules.fixed(table)
    if rules.formats is not None:
        _check_formats(table, costs, allowed)
    else:
        kinds = {(p.dynamic, p.weight_group) for own in costs.options.values() for p in own}
        kinds |= {(False, 0)}
        allowed = {f: name for f, name in allowed.items() if (f.dynamic, f.group) in kinds}
    options = {}
    for row in table.layers:
        known = list(costs.options[row.name])
        bits = {fixed[row.name]} if row.name in fixed else {fit(row, each) for each in allowed}
        kept = tuple(p for p in known if p.bits in bits)
        if not kept:
            has = ", ".join(dict.fromkeys(p.format for p in known))
            raise PlanError(
                f"layer {row.name} is forced to a format that the objective {costs.objective!r} "
                f"has no cost for; it has {has}. Make the costs with that format too"
            )
        options[row.name] = kept
    agreed = dict(allowed)
    for name in rules.force.values():
        agreed.setdefault(parse_format(name), name)
    groups = resolve_groups(table, rules.groups)
    for group in groups:
        _check_group(table, group, options, agreed)
    values = {name: tuple(costs.options[name][p] for p in own) for name, own in options.items()}
    return Choices(options, values, groups, agreed)


def _check_costs(table: ModelTable, costs: Costs) -> None:
    if list(costs.options) != list(table.layer):
        odd = set(costs.options) ^ set(table.layer)
        raise PlanError(
            f"the costs are another model's (or in another order): {len(costs.options)} layers "
            f"for {len(table.layer)}; in one of them only: {sorted(odd)[:3]}"
        )
    for name, own in costs.options.items():
        if not any(layer.is_float for layer in own):
            raise PlanError(f"layer {name} has no cost for float; every layer needs one")
        for layer, cost in own.items():
            if not math.isfinite(cost):
                raise PlanError(
                    f"layer {name}: {layer.format} costs {cost}; expected a finite number. Leave "
                    "out options that can't be taken"
                )


def _check_formats(table: ModelTable, costs: Costs, allowed: Mapping[Format, str]) -> None:
    """PlanError for a format that some layer could have and none has a cost for."""
    for bits, name in allowed.items():
        able = [row.name for row in table.layers if fit(row, bits) != FLOAT]
        wanted = {layer: fit(table.layer[layer], bits) for layer in able}
        known = (p.bits == wanted[layer] for layer in able for p in costs.options[layer])
        if able and not any(known):
            raise PlanError(
                f"no layer has a cost for {name} (objective {costs.objective!r}); make the costs "
                "with that format too, or take it out of the formats"
            )


def _check_group(
    table: ModelTable,
    group: tuple[str, ...],
    options: Mapping[str, tuple[LayerPlan, ...]],
    formats: Mapping[Format, str],
) -> None:
    """PlanError if no format is possible in all layers of a group."""
    possible = {n: {p.bits for p in options[n]} for n in group}
    if any(all(fit(table.layer[n], b) in possible[n] for n in group) for b in formats):
        return
    have = "; ".join(
        f"{n}: {', '.join(dict.fromkeys(p.format for p in options[n]))}" for n in group[:4]
    )
    raise PlanError(f"no format is possible in all layers of the group {group[:4]}: {have}")

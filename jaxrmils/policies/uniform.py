"""One format for all layers: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxrmils.graph import ModelTable
from jaxrmils.policies.constraints import Constraints, nearest_layer
from jaxrmils.policies.formats import parse_format
from jaxrmils.policies.plan import Plan


def uniform(
    table: ModelTable,
    format: str = "int8",
    *,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
) -> Plan:
    """Every layer in one format, rounded to nearest.

    Args:
      table: from `tabulate(graph)`.
      format: "int8", "int4", "float", or any of `jaxrmils.policies.FORMATS`.
      skip: globs of layers that stay float.
      force: format by glob, for exceptions.

    Returns:
      The plan.

    Raises:
      PlanError: unknown format, or a pattern that matches nothing.
    """
    fixed = Constraints(skip, force or {}).resolve(table)
    bits = parse_format(format)
    layers = {name: fixed.get(name) or nearest_layer(table, name, bits) for name in table.layer}
    settings = {"name": "uniform", "format": format, "skip": list(skip), "force": force or {}}
    return Plan(layers, table.fingerprint, settings)

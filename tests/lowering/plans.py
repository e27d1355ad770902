"""Plans and integer models for the reference models."""

import functools
import itertools

from stages import calibrated, table_of, traced, unreached

from jaxrmils import Plan, quantize, uniform
from jaxrmils.graph import Format
from jaxrmils.policies import LayerPlan, check_plan
from jaxrmils.policies.formats import FLOAT_BITS, fit, parse_format

FORMATS = ("int8", "w4a8", "int4", "w8", "w4", "mixed")
_MIXTURE = ("w8a8", "w4a8", "float", "w4a4", "w8a4", "w4", "w8")
_DIRECTIONS = ("floor", "ceil", "nearest")


@functools.cache
def plan_of(name, kind):
    """A plan in one format, or "mixed": formats and rounding directions in turns."""
    table = table_of(name)
    if kind != "mixed":
        return uniform(table, kind, skip=unreached(name))
    layers, directions = {}, itertools.cycle(_DIRECTIONS)
    for row, format in zip(table.layers, itertools.cycle(_MIXTURE)):
        own = Format() if row.name in unreached(name) else fit(row, parse_format(format))
        count = len(row.activations) if own.activation_bits < FLOAT_BITS else 0
        layers[row.name] = LayerPlan.of(own, tuple(itertools.islice(directions, count)))
    plan = Plan(layers, table.fingerprint, {"name": "mixed"})
    check_plan(plan, table)
    return plan


@functools.cache
def quantized(name, kind, backend="cpu"):
    """The integer model."""
    graph, params, _ = traced(name)
    return quantize(graph, params, plan_of(name, kind), calibrated(name), backend=backend)


def integer_site_names(name, kind):
    """The sites whose operands are all integers."""
    plan = plan_of(name, kind)
    return {
        site.name
        for site in traced(name)[0].sites
        if site.activations and plan.layers[site.layer].activation_bits < FLOAT_BITS
    }

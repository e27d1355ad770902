"""Counts the dots and convolutions of a function without the package."""

import jax
from models import resized

OPERATIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def count_operations(jaxpr):
    """Dots and convolutions of a jaxpr, found without the package."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name in OPERATIONS
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else [value]:
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    count += count_operations(item)
    return count


def assert_all_covered(graph, apply, params, inputs):
    closed = jax.make_jaxpr(apply)(params, resized(inputs, 1))
    entries = [e for e in graph.coverage.entries if e.op != "gather"]
    assert len(entries) == count_operations(closed.jaxpr)
    assert all(e.reason for e in entries)
    found = [e.reason for e in graph.coverage.entries if e.status == "site"]
    assert found == [site.name for site in graph.sites]

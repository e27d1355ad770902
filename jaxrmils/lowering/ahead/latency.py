"""Seconds of every layer in every format from a TPU compiler's estimates, as `budget` reads them.

Cycles (`programs.py`) divided by the device's clock (`Target.clock`): no device has run anything.
An instruction that holds operations of several sites is divided evenly among them, so that layers
can be summed. What belongs to no site is the table's overhead.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import jax

from jaxrmils.graph import Graph, tabulate
from jaxrmils.lowering.ahead.costs import Comparison, site_costs
from jaxrmils.lowering.ahead.programs import ProgramCost
from jaxrmils.lowering.ahead.targets import find_target
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.policies import FORMATS, LatencyTable, uniform
from jaxrmils.progress import Progress, silent

FLOAT = "float32"


def estimated_latency(
    graph: Graph,
    target: str,
    inputs: Any,
    *,
    formats: Sequence[str] = ("w8a8", "w4a8", "w4a4"),
    symmetric: bool = False,
    clock: float | None = None,
    progress: Progress = silent,
) -> LatencyTable:
    """Compiles uniform models for a TPU that is not here and makes a latency table of them.

    Args:
      graph: from `trace`.
      target: "tpu:v5e" or another TPU of `targets()`.
      inputs: a batch of the size that is to be served, or its shapes.
      formats: besides float32.
      symmetric: whether activations have no zero points, as in `calibrate`.
      clock: cycles a second; by default the target's.
      progress: draws a bar.

    Returns:
      The table for `budget(latency=)`; its source names the clock.

    Raises:
      LoweringError: unknown target, one whose compiler estimates no cycles, or it refuses a format.
      PlanError: an unknown format.
      ImportError: the compiler is not installed.
    """
    if not formats:
        raise LoweringError("formats is empty; expected some besides float, such as ('w8a8',)")
    find_target(target)
    plan = uniform(tabulate(graph), formats[0])
    options = {"symmetric": symmetric, "beside": (FLOAT, *formats), "progress": progress}
    found = site_costs(graph, plan, target, inputs, **options)
    batch = jax.tree.leaves(inputs)[0].shape[0]
    return latency_table(found, graph, batch_size=batch, clock=clock)


def latency_table(
    comparison: Comparison, graph: Graph, *, batch_size: int, clock: float | None = None
) -> LatencyTable:
    """The latency table of programs that were compiled side by side.

    Args:
      comparison: from `site_costs`, with float32 and uniform plans beside the plan.
      graph: the same.
      batch_size: of the programs, for the record.
      clock: cycles a second; by default the target's.

    Raises:
      LoweringError: no float32 or no format beside the plan, one that was refused, no estimates, or
        no clock.
    """
    clock = clock or find_target(comparison.target).clock
    programs = {n: p for n, p in comparison.programs.items() if n in (FLOAT, *FORMATS)}
    _check(comparison, programs, clock)
    table = tabulate(graph)
    seconds: dict[str, dict[Any, float]] = {name: {} for name in graph.layers}
    rests = []
    for name, program in programs.items():
        plan = uniform(table, "float" if name == FLOAT else name)
        cycles = layer_cycles(program, graph)
        rests.append(max(0.0, (program.cycles or 0) - sum(cycles.values())))
        for layer, value in cycles.items():
            seconds[layer].setdefault(plan.layers[layer].format, value / clock)
    return LatencyTable(
        seconds,
        find_target(comparison.target).platform,
        f"estimated by the compiler for {comparison.target}, batches of {batch_size}, its cycles "
        f"at an assumed clock of {clock / 1e9:.4g} GHz; nothing was run",
        overhead=statistics.median(rests) / clock,
    )


def layer_cycles(program: ProgramCost, graph: Graph) -> dict[str, float]:
    """Estimated cycles of every layer; 0 for one that the compiler left nothing of."""
    found = dict.fromkeys(graph.layers, 0.0)
    for name, sites in graph.layers.items():
        costs = [program.sites[site.name] for site in sites if site.name in program.sites]
        found[name] = sum((c.divided or 0.0) + (c.overhead or 0) for c in costs)
    return found


def _check(comparison: Comparison, programs: dict[str, ProgramCost], clock: float) -> None:
    refused = {n: why for n, why in comparison.refused.items() if n in (FLOAT, *FORMATS)}
    if refused:
        name, reason = next(iter(refused.items()))
        raise LoweringError(
            f"no latency table for {comparison.target}: {name} could not be compiled ({reason}); "
            "leave that format out"
        )
    if FLOAT not in programs or len(programs) < 2:
        raise LoweringError(
            f"a latency table needs {FLOAT} and a format such as w8a8 beside the plan; found "
            f"{', '.join(programs) or 'neither'}"
        )
    if any(program.cycles is None for program in programs.values()):
        raise LoweringError(
            f"the compiler for {comparison.target} estimates no cycles, so there is no latency "
            "table; take a TPU, such as tpu:v5e, or measure with `jaxrmils profile`"
        )
    if not clock > 0:
        raise LoweringError(
            f"the clock of {comparison.target} is {clock} Hz; expected cycles a second above 0"
        )

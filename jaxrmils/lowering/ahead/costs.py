"""A plan beside the float model and uniform plans, compiled for a device that is not here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, tabulate
from jaxrmils.lowering.ahead.abstract_models import (
    abstract_model,
    float_graph,
    has_symmetric_grids,
    labelled_apply,
)
from jaxrmils.lowering.ahead.programs import ProgramCost, program_cost
from jaxrmils.lowering.ahead.stablehlo import operand_words
from jaxrmils.lowering.ahead.targets import compile_for, find_target
from jaxrmils.lowering.hlo import planned_sites
from jaxrmils.lowering.quantized_model import QuantizedModel
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.policies import Plan, uniform
from jaxrmils.progress import Progress, silent

THIS_PLAN = "this plan"
FLOATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BESIDE = (*FLOATS, "int8", "int4")


@dataclass(frozen=True)
class Comparison:
    """Programs for one device side by side.

    Attributes:
      target: the device.
      programs: what the compiler says of each, by name; the plan's is `THIS_PLAN`.
      refused: why a program beside the plan could not be made, by name.
    """

    target: str
    programs: Mapping[str, ProgramCost]
    refused: Mapping[str, str]

    @property
    def plan(self) -> ProgramCost:
        """The plan's own program."""
        return self.programs[THIS_PLAN]


def site_costs(
    graph: Graph,
    plan: Plan,
    target: str,
    inputs: Any,
    *,
    symmetric: bool = False,
    beside: Sequence[str] = BESIDE,
    progress: Progress = silent,
) -> Comparison:
    """Compiles a plan, the float model and uniform plans for a device and reads what they became.

    Neither parameters nor data nor the device are needed, only the compiler (`targets()`). All
    cycles are a TPU compiler's estimates, not measurements.

    Args:
      graph: from `trace`.
      plan: for this graph.
      target: "tpu:v5e" or another that is compiled.
      inputs: a batch, or its shapes.
      symmetric: whether activations have no zero points, as in `calibrate`.
      beside: of "float32", "bfloat16" (floating parameters and inputs cast, the model traced
        again), and formats such as "int8" and "w4a8" for uniform plans.
      progress: draws a bar.

    Returns:
      The programs. One beside the plan that can't be made is in `refused` with its reason.

    Raises:
      LoweringError: unknown target, or its compiler refuses the plan.
      PlanError: the plan is for another model, or an unknown format is asked for.
      ImportError: its compiler is not installed.
    """
    find_target(target)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    plans = {n: uniform(tabulate(graph), n) for n in beside if n not in FLOATS}
    plans = {THIS_PLAN: plan, **plans}

    def compiled(name: str) -> ProgramCost:
        if name in FLOATS:
            return _float_cost(graph, target, inputs, FLOATS[name])
        model = abstract_model(graph, plans[name], _platform(target), symmetric=symmetric)
        return program_cost(compile_for(target, model.apply, model.params, inputs))

    programs: dict[str, ProgramCost] = {}
    refused: dict[str, str] = {}
    names = [THIS_PLAN, *beside]
    for name in progress(names, f"compiling for {target}", len(names)):
        same = [other for other in programs if name in plans and _same(plans, name, other)]
        if same:
            programs[name] = programs[same[0]]
            continue
        try:
            programs[name] = compiled(name)
        except ValueError as error:
            if name == THIS_PLAN:
                raise
            refused[name] = str(error)
    return Comparison(target, programs, refused)


def _same(plans: Mapping[str, Plan], name: str, other: str) -> bool:
    return other in plans and plans[name].layers == plans[other].layers


def _platform(target: str) -> Any:
    return find_target(target).platform


def _float_cost(graph: Graph, target: str, inputs: Any, dtype: Any) -> ProgramCost:
    cast = float_graph(graph, dtype)
    pairs = zip(jax.tree.leaves(inputs), jax.tree.leaves(cast.example), strict=True)
    shapes = [jax.ShapeDtypeStruct(x.shape, one.dtype) for x, one in pairs]
    batch = jax.tree.unflatten(jax.tree.structure(inputs), shapes)
    apply: Callable[[Any, Any], Any] = labelled_apply(cast)
    return program_cost(compile_for(target, apply, cast.params, batch))


def check_compiled(graph: Graph, plan: Plan, cost: ProgramCost, target: str) -> None:
    """Makes sure that a compiled program multiplies integer codes at every planned site.

    Args:
      graph: from `trace`.
      plan: what was compiled.
      cost: of `program_cost`.
      target: named in the message.

    Raises:
      LoweringError: a planned site is missing, or its matrix unit gets other operands; the message
        names the sites and what they multiply.
    """
    planned = planned_sites(graph, plan)
    wrong = []
    for name in planned:
        site = cost.sites.get(name)
        if site is None or not site.is_integer:
            wrong.append(f"{name} ({operand_words(list(site.operands) if site else [])})")
    if wrong:
        raise LoweringError(
            f"{len(wrong)} of {len(planned)} planned sites do not multiply integer codes in the "
            f"program compiled for {target}: {', '.join(wrong[:10])}. Leave them in float in the "
            "plan"
        )


def check_target(model: QuantizedModel, inputs: Any, target: str) -> ProgramCost:
    """Compiles an integer model for a device that is not here and checks its planned sites.

    Args:
      model: from `quantize` or `load_model`, for any backend; values are not read.
      inputs: a batch, or its shapes.
      target: "tpu:v5e" or another that is compiled.

    Returns:
      What the compiler says of the program.

    Raises:
      LoweringError: as in `check_compiled` and `compile_for`.
      ImportError: its compiler is not installed.
    """
    cost = site_costs(
        model.graph, model.plan, target, inputs, symmetric=has_symmetric_grids(model), beside=()
    ).plan
    check_compiled(model.graph, model.plan, cost, target)
    return cost

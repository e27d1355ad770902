"""The compiled passes of the objectives of `measured_costs.py`.

Compiled once for a network, a loss and formats: parameters and ranges are data. What a pass takes
of memory can be asked of the compiler before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.policies.formats import parse_format
from jaxrmils.sensitivity import Loss, weight_noise
from jaxrmils.sensitivity.fisher_diagonal import fisher_diagonal as _fisher_diagonal
from jaxrmils.sensitivity.hessian_trace import probe_forms
from jaxrmils.sensitivity.output_noise import NEAREST
from jaxrmils.sensitivity.output_noise import operand_power as _operand_power
from jaxrmils.sensitivity.output_noise import output_power as _output_power
from jaxrmils.sensitivity.output_noise import squared_output as _squared_output

noise_of = jax.jit(weight_noise, static_argnames=("graph", "candidates"))
squared_output = jax.jit(_squared_output, static_argnames=("graph", "loss", "formats"))
output_power = jax.jit(_output_power, static_argnames=("graph", "formats"))
operand_power = jax.jit(_operand_power, static_argnames=("graph",))
fisher_diagonal = jax.jit(_fisher_diagonal, static_argnames=("graph", "loss"))

Lowering = Callable[[Any, Any], Sequence[Any]]


def lowerings(
    graph: Graph, params: Any, loss: Loss, ranges: Ranges, formats: Sequence[str]
) -> Mapping[str, Lowering]:
    """What lowers an objective's programs for shapes of inputs and targets.

    Args:
      graph: from `trace`.
      params: the float parameters.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      formats: names of formats, on which the outputs' noise depends.

    Returns:
      By objective, without "measured", whose pass is a simulation.

    Raises:
      PlanError: an unknown format.
    """
    bits = tuple((f.weight_bits, f.activation_bits) for f in map(parse_format, formats))
    noise = jax.eval_shape(lambda p: weight_noise(graph, p, NEAREST), params)

    def hessian_trace(x: Any, y: Any) -> Sequence[Any]:
        counts = jax.ShapeDtypeStruct((jax.tree.leaves(x)[0].shape[0],), jnp.float32)
        known = (graph, params, x, y, loss, jax.random.key(0), counts)
        probes = [probe_forms.lower(*known, of_weights) for of_weights in (True, False)]
        return [*probes, operand_power.lower(graph, params, x, ranges)]

    return {
        "squared_output": lambda x, y: [
            squared_output.lower(graph, params, x, y, loss, ranges, bits, noise=noise)
        ],
        "fisher": lambda x, y: [
            fisher_diagonal.lower(graph, params, x, y, loss, ranges, noise=noise)
        ],
        "hessian_trace": hessian_trace,
        "sqnr": lambda x, y: [output_power.lower(graph, params, x, ranges, bits, noise=noise)],
    }

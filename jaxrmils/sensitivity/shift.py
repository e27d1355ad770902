"""The shift probe: the secant of moving a whole layer input by one quantization step.

    m = (l(h + s 1) - l(h)) / s

with s the step of the layer's grid at a given width. It estimates p . 1 over a finite step, so
unlike the tangent it depends on the width. It costs one forward pass per operand and width
(Compression for Better, arXiv 2412.06868); elements that quantization leaves alone, such as the
zeros behind a ReLU, are shifted like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, SiteCall, interpret
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.sensitivity.tangent import Loss, check_ranges


def shift_secants(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    *,
    bits: Sequence[int] = (8, 4),
) -> dict[str, Any]:
    """Per-example secants of a one-step shift of every activation operand.

    Args:
      graph: from `trace`.
      params: the parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`; they give the steps.
      bits: the widths whose steps are taken.

    Returns:
      Per site, float32 [batch, operands, len(bits)]: loss change per unit of shift. In a scanned
      stack every layer is shifted by its own step, and their mean divides the change.

    Raises:
      ScoreError: the ranges are another model's.
    """
    check_ranges(graph, ranges)
    leaves = jax.tree.leaves(params)
    rows = [
        (site, position) for site, stats in ranges.stats.items() for position in range(len(stats))
    ]
    steps = {
        (site, position): [ranges.grids[site][position][b].scale for b in bits]
        for site, position in rows
    }

    def losses(selected: Any) -> Any:
        """Loss with operand `selected // len(bits)` shifted; -1 shifts nothing."""

        def handler(call: SiteCall) -> tuple[Any, Any]:
            operands = list(call.operands())
            for position, index in enumerate(call.site.activations):
                if (call.site.name, position) not in steps:
                    continue
                number = rows.index((call.site.name, position)) * len(bits)
                for offset in range(len(bits)):
                    grid = call.state[position][bits[offset]]
                    on = (selected == number + offset).astype(jnp.float32)
                    shift = (on * grid.scale).astype(operands[index].dtype)
                    operands[index] = operands[index] + shift
            return call.bind_highest(*operands), None

        outputs, _ = interpret(graph, handler, leaves, inputs, state=ranges.grids)
        return loss(outputs, targets).astype(jnp.float32)

    # All in one loop: the base must round like the rest, since steps are small divisors.
    values = jax.lax.map(losses, jnp.arange(-1, len(rows) * len(bits), dtype=jnp.int32))
    changes = (values[1:] - values[0]).reshape(len(rows), len(bits), -1)
    result: dict[str, list[Any]] = {}
    for number, (site, position) in enumerate(rows):
        per_bits = [
            changes[number, i] / jnp.mean(steps[site, position][i]) for i in range(len(bits))
        ]
        result.setdefault(site, []).append(jnp.stack(per_bits, axis=-1))
    return {site: jnp.stack(parts, axis=1) for site, parts in result.items()}

"""How many examples fit into memory, of the programs that will run, as they are compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.numerics.placement import to_host
from jaxrmils.policies.cost_programs import Lowering, lowerings
from jaxrmils.policies.measured_costs import DEFAULT_FORMATS
from jaxrmils.policies.simulation import Simulator
from jaxrmils.sensitivity import (
    CandidateSet,
    Loss,
    ScoreError,
    all_off,
    weight_noise,
)
from jaxrmils.sensitivity.batch_size import SIZES, fitting_batch_size
from jaxrmils.sensitivity.scores import Scoring

Step = Literal[
    "score", "attribute", "refine", "simulate", "squared_output", "fisher", "hessian_trace", "sqnr"
]
STEPS: tuple[Step, ...] = get_args(Step)
_USUAL = CandidateSet()


def batch_size_for(
    memory_bytes: float,
    graph: Graph,
    params: Any,
    loss: Loss,
    ranges: Ranges,
    inputs: Any,
    targets: Any,
    *,
    steps: Sequence[Step] = ("score",),
    points: int = 2,
    candidates: CandidateSet = _USUAL,
    formats: Sequence[str] = DEFAULT_FORMATS,
    sizes: Sequence[int] = SIZES,
) -> int:
    """The largest batch whose compiled programs fit into memory.

    Two sizes near that of `fitting_batch_size` are compiled. Memory grows linearly with the batch,
    nearly, which says where to look; the size is taken once it is seen to fit and the next one not.
    Nothing is run, and every compilation takes what the program's first call takes.

    Args:
      memory_bytes: of the device, for all that a program needs: parameters, the noise of the
        weights, the batch, temporary memory and results.
      graph: from `trace`.
      params: the float parameters.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`, at whatever batch size.
      inputs: examples, or their shapes; how many does not matter.
      targets: likewise.
      steps: what will run: "score", "attribute" (also `lossless`), "refine", "simulate" (their
        forward passes alone, and the objective "measured"), or the pass of an objective:
        "squared_output", "fisher", "hessian_trace", "sqnr".
      points: quadrature points of an attribution.
      candidates: what is scored and simulated, as `candidates_for` makes it of formats.
      formats: names of those whose costs an objective's pass finds.
      sizes: to choose from.

    Returns:
      The size, for one device.

    Raises:
      ScoreError: an unknown step, no sizes, the smallest does not fit, or the backend does not tell
        the memory of its programs.
      PlanError: an unknown format.

    >>> import jaxrmils as jr
    >>> params, x = {"w": jnp.ones((100, 100))}, jnp.ones((4, 100))
    >>> graph = jr.trace(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    >>> squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    >>> ranges = jr.calibrate(graph, params, [x])
    >>> sizes = {"sizes": (64, 16, 4), "steps": ("simulate",)}
    >>> batch_size_for(2e5, graph, params, squares, ranges, x, x, **sizes)
    16
    """
    unknown = [step for step in steps if step not in STEPS]
    if unknown or not steps or not sizes:
        raise ScoreError(f"steps {steps} and sizes {sizes}; expected some, steps of {STEPS}")
    programs = {
        **_programs(graph, params, loss, ranges, points, candidates),
        **lowerings(graph, params, loss, ranges, formats),
    }
    known: dict[int, int] = {}

    def needed(size: int) -> int:
        if size not in known:
            batch = jax.tree.map(lambda leaf: _struct(leaf, size), (inputs, targets))
            lowered = [each for step in steps for each in programs[step](*batch)]
            known[size] = max(map(_bytes, lowered))
        return known[size]

    ordered = sorted(set(sizes))
    limit = int(min(memory_bytes, 2**62))
    guess = fitting_batch_size(graph, params, loss, inputs, targets, memory_bytes=max(limit, 1))
    at = _nearest(ordered, guess)
    other = at - 1 if at else min(1, len(ordered) - 1)
    if other != at:
        each = (needed(ordered[at]) - needed(ordered[other])) / (ordered[at] - ordered[other])
        room = ordered[at] + (limit - needed(ordered[at])) / each if each > 0 else ordered[-1]
        at = max((i for i, size in enumerate(ordered) if size <= room), default=0)
    while at and needed(ordered[at]) > limit:
        at -= 1
    while at + 1 < len(ordered) and needed(ordered[at + 1]) <= limit:
        at += 1
    if needed(ordered[at]) > limit:
        raise ScoreError(
            f"a batch of {ordered[at]} takes {needed(ordered[at]):,} bytes, parameters and the "
            f"noise of the weights included, and memory_bytes is {limit:,}; expected more memory"
        )
    return ordered[at]


def _nearest(ordered: Sequence[int], size: int) -> int:
    return min(range(len(ordered)), key=lambda i: abs(ordered[i] - size))


def _programs(
    graph: Graph,
    params: Any,
    loss: Loss,
    ranges: Ranges,
    points: int,
    candidates: CandidateSet,
) -> Mapping[str, Lowering]:
    """What lowers each step for shapes of inputs and targets."""
    kinds = (candidates.activations, candidates.weights)
    scoring = Scoring(graph, params, loss, ranges, *kinds)
    simulator = Simulator(graph, loss, points)
    noise = jax.eval_shape(lambda p: weight_noise(graph, p, candidates.weights), params)
    grids, off = to_host(ranges), to_host(all_off(graph, ranges))
    model = (params, noise, grids)

    def attribute(x: Any, y: Any, slope: Any = None) -> Sequence[Any]:
        count = jax.tree.leaves(x)[0].shape[0]
        float_loss = jax.ShapeDtypeStruct((count,), jnp.float32)
        batch = (x, y, float_loss, np.float32(1.0), slope)
        return [simulator.secants.lower(*model, off, *batch, candidates=candidates)]

    return {
        "score": lambda x, y: [jax.jit(scoring.step).lower(*model, x, y)],
        "attribute": attribute,
        "refine": lambda x, y: attribute(x, y, np.float32(0.0)),
        "simulate": lambda x, y: [simulator.losses.lower(*model, off, x, y, candidates=candidates)],
    }


def _struct(leaf: Any, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)


def _bytes(lowered: Any) -> int:
    """What the compiled program needs in all."""
    found = lowered.compile().memory_analysis()
    if found is None:
        raise ScoreError(
            f"{jax.default_backend()} does not tell the memory of its programs; use "
            "`fitting_batch_size`, which goes by shapes"
        )
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total + found.generated_code_size_in_bytes - found.alias_size_in_bytes

"""What scoring costs, beside the pass that it rides on: ResNet-18, all in one run.

    python benchmarks/scoring_cost.py                # 224 x 224, batch 8; a few minutes
    python benchmarks/scoring_cost.py --quick        # one stage, 32 x 32, batch 2; a smoke test

Everything is compiled first, then timed in turns, so that a busy machine slows all alike. A ratio
is the median over rounds of the ratio within a round, with its quartiles. The unit is the bare
pass: forward and activation gradients of every example, through identity probes that return the
sum of the gradient, one number per site and example.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from resnet18 import STAGES, ResNet18, initialize
from rich.console import Console
from rich.table import Table

from jaxrmils import calibrate, contributions, from_linen, trace
from jaxrmils.graph import Graph, SiteCall, interpret
from jaxrmils.numerics import Ranges
from jaxrmils.sensitivity import (
    ACTIVATION_CANDIDATES,
    WEIGHT_CANDIDATES,
    all_off,
    perturbed_losses,
)
from jaxrmils.sensitivity.contraction import noise

BARE = "bare pass: one number per site"
PLAIN = "6 candidates, plain sums"
SCORING = "contributions: 6 activation candidates"
WITH_WEIGHTS = "contributions: and 2 weight candidates"
ONE_BY_ONE = "one candidate at one site, measured"


@dataclass(frozen=True)
class Workload:
    """A model with its data, ready to score."""

    graph: Graph
    params: Any
    inputs: Any
    targets: Any
    ranges: Ranges

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the timed functions take."""
        return self.params, self.inputs, self.targets, self.ranges


@dataclass(frozen=True)
class Timed:
    """A compiled function: seconds to trace and to compile, temporary bytes, and how to run it."""

    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int
    run: Callable[[], Any]


def cross_entropy(logits: Any, labels: Any) -> Any:
    """[batch] losses."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


def workload(size: int, batch: int, stages: int) -> Workload:
    """ResNet-18, or its first stages, with random weights and inputs."""
    model = ResNet18(stages=STAGES[:stages])
    apply, params = from_linen(model, initialize(model, size))
    inputs = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    targets = jnp.arange(batch)
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs], estimator="minmax")
    return Workload(graph, params, inputs, targets, ranges)


def probed_pass(graph: Graph, reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward of every example; `reduce(g, h, grids)` is kept at every site."""

    @jax.custom_vjp
    def probe(h: Any, slot: Any, grids: Any) -> Any:
        return h

    probe.defvjp(
        lambda h, slot, grids: (h, (h, grids)),
        lambda residual, g: (g, reduce(g, *residual), None),
    )

    def example_loss(slots: Any, params: Any, inputs: Any, target: Any, ranges: Ranges) -> Any:
        def handler(call: SiteCall) -> tuple[Any, Any]:
            operands = list(call.operands())
            for position, index in enumerate(call.site.activations):
                slot = slots[call.site.name][position]
                operands[index] = probe(operands[index], slot, call.state[position])
            return call.bind_highest(*operands), None

        leaves = jax.tree.leaves(params)
        outputs, _ = interpret(graph, handler, leaves, inputs[None], state=ranges.grids)
        return cross_entropy(outputs, target[None])[0]

    def whole(params: Any, inputs: Any, targets: Any, ranges: Ranges) -> Any:
        shapes = jax.tree.map(
            lambda grids: jax.eval_shape(reduce, *[jnp.zeros(1)] * 2, grids),
            ranges.grids,
            is_leaf=lambda x: isinstance(x, dict) and 8 in x,
        )
        slots = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        gradient = jax.value_and_grad(example_loss)
        return jax.vmap(gradient, in_axes=(None, None, 0, 0, None))(
            slots, params, inputs, targets, ranges
        )

    return whole


def one_number(g: Any, h: Any, grids: Any) -> Any:
    """The least that a backward pass can return."""
    return jnp.sum(g)


def plain_sums(g: Any, h: Any, grids: Any) -> Any:
    """The same numbers as scoring returns, written down plainly."""
    contracted = [jnp.sum(g * noise(h, grids[c.bits], c)) for c in ACTIVATION_CANDIDATES]
    return jnp.stack([*contracted, jnp.sum(g), jnp.sum(g * g)])


def compiled(function: Callable[..., Any], *turns: tuple[Any, ...]) -> Timed:
    """Compiles a function; every run takes the next of the arguments in `turns`."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*turns[0])
    traced = time.perf_counter()
    executable = lowered.compile()
    done = time.perf_counter()
    memory = executable.memory_analysis()
    assert memory is not None
    arguments = itertools.cycle(turns)
    return Timed(
        trace_seconds=traced - start,
        compile_seconds=done - traced,
        temporary_bytes=memory.temp_size_in_bytes,
        run=lambda: executable(*next(arguments)),
    )


def scoring(graph: Graph, weight_candidates: Any) -> Callable[..., Any]:
    """`contributions` as a function of what varies."""

    def function(params: Any, inputs: Any, targets: Any, ranges: Ranges) -> Any:
        return contributions(
            graph, params, inputs, targets, cross_entropy, ranges,
            weight_candidates=weight_candidates,
        )  # fmt: skip

    return function


def one_by_one(work: Workload) -> Timed:
    """One forward with one candidate on at one site, another one at every run."""
    graph = work.graph

    def function(params: Any, inputs: Any, targets: Any, ranges: Ranges, switches: Any) -> Any:
        return perturbed_losses(
            graph, params, inputs, targets, cross_entropy, ranges, switches, {},
            weight_candidates=(),
        )  # fmt: skip

    off, _ = all_off(graph, work.ranges)
    turns = [
        (*work.arguments, {**off, site: off[site] + 1 + candidate})
        for site in off
        for candidate in range(len(ACTIVATION_CANDIDATES))
    ]
    random.Random(0).shuffle(turns)
    return compiled(function, *turns)


def parameter_gradient(graph: Graph) -> Callable[..., Any]:
    """The gradient of an ordinary training step, in evaluation mode."""

    def function(variables: Any, inputs: Any, targets: Any, ranges: Ranges) -> Any:
        def mean_loss(weights: Any) -> Any:
            outputs = graph.apply({**variables, "params": weights}, inputs)
            return jnp.mean(cross_entropy(outputs, targets))

        return jax.grad(mean_loss)(variables["params"])

    return function


def compile_all(work: Workload) -> dict[str, Timed]:
    """Everything that is timed."""
    graph = work.graph
    functions = {
        "forward": lambda params, inputs, targets, ranges: graph.apply(params, inputs),
        BARE: probed_pass(graph, one_number),
        SCORING: scoring(graph, ()),
        PLAIN: probed_pass(graph, plain_sums),
        WITH_WEIGHTS: scoring(graph, WEIGHT_CANDIDATES),
        "parameter gradient": parameter_gradient(graph),
    }
    timed = {name: compiled(function, work.arguments) for name, function in functions.items()}
    return {**timed, ONE_BY_ONE: one_by_one(work)}


def time_in_turns(timed: dict[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run; each round runs everything once, in alternating order."""
    for each in timed.values():
        jax.block_until_ready(each.run())
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds):
        for name in list(timed)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(timed[name].run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> list[float]:
    """Median and quartiles of the ratio within a round."""
    ratios = np.asarray(above) / np.asarray(below)
    return [float(q) for q in np.quantile(ratios, [0.5, 0.25, 0.75])]


def summarize(work: Workload, timed: dict[str, Timed], rounds: int) -> dict[str, Any]:
    """Runs everything and gives what the JSON holds."""
    seconds = time_in_turns(timed, rounds)
    sites = sum(len(stats) for stats in work.ranges.stats.values())
    measured = sites * len(ACTIVATION_CANDIDATES)
    everything = [s * measured for s in seconds[ONE_BY_ONE]]
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "ratio_to_bare": ratio(seconds[name], seconds[BARE]),
            "trace_seconds": each.trace_seconds,
            "compile_seconds": each.compile_seconds,
            "temporary_megabytes": each.temporary_bytes / 1e6,
        }
        for name, each in timed.items()
    }
    return {
        "rows": rows,
        "activations": sites,
        "candidates_measured": measured,
        "scoring_over_bare": ratio(seconds[SCORING], seconds[BARE]),
        "plain_over_bare": ratio(seconds[PLAIN], seconds[BARE]),
        "one_by_one_over_scoring": ratio(everything, seconds[SCORING]),
        "seconds": seconds,
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on, and how to make them again."""
    return {
        "command": shlex.join(["python", "benchmarks/scoring_cost.py", *sys.argv[1:]]),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    table = Table(title="median time, and ratio to the bare pass with its quartiles")
    for column in ("", "ms", "ratio", "quartiles", "trace s", "compile s", "temporary MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        middle, low, high = row["ratio_to_bare"]
        table.add_row(
            name,
            f"{row['milliseconds']:.0f}",
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['trace_seconds']:.1f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['temporary_megabytes']:.0f}",
        )
    console.print(table)
    middle, low, high = result["one_by_one_over_scoring"]
    console.print(
        f"Measuring {result['candidates_measured']} candidates one at a time (the time of one, "
        f"multiplied): {middle:.1f} ({low:.1f} to {high:.1f}) times the cost of scoring them."
    )


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224, help="image height and width (224)")
    parser.add_argument("--batch", type=int, default=8, help="examples (8)")
    parser.add_argument("--stages", type=int, default=4, help="stages of the network (all 4)")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of everything (15)")
    parser.add_argument("--quick", action="store_true", help="1 stage, size 32, batch 2, 2 rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch, options.stages, options.rounds = 32, 2, 1, 2
    if options.output is None:
        name = f"scoring_cost_jax_{jax.__version__}.json"
        options.output = Path(__file__).parent / "results" / name
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    console = Console(width=120)
    work = workload(options.size, options.batch, options.stages)
    result = {
        **environment(),
        "size": options.size,
        "batch": options.batch,
        "stages": options.stages,
        "rounds": options.rounds,
        **summarize(work, compile_all(work), options.rounds),
    }
    show(result, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"Written: {options.output.name}")


if __name__ == "__main__":
    main()

"""Memory and time of every stage on a network of 200 sites and 2,000 examples.

    python experiments/memory.py --out experiments/results/memory

A residual network of 100 blocks, each two dense layers (64 to 256 to 64) over 16 tokens, unrolled.
The stages run one after another in a child process, whose peak resident memory is read after each;
the peak never falls, so a stage has raised it where its line is higher than the one before. Seconds
of tracing and compiling are those that jax reports. Writes JSON and markdown.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from results_file import write_table

import jaxrmils as jr

TRACE = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
COMPILE = "/jax/core/compile/backend_compile_duration"


class Residual(nn.Module):
    """Blocks of two dense layers with a shortcut, then a classifier of the mean token."""

    blocks: int
    width: int = 64
    hidden: int = 256

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits [batch, 10] of tokens [batch, tokens, width]."""
        for _ in range(self.blocks):
            y = nn.relu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y) / self.blocks**0.5
        return jnp.mean(x, axis=1)[:, :10]


@dataclass
class Run:
    """What the stages read, and what they leave for the next ones."""

    apply: Callable[..., Any]
    params: Any
    data: list[tuple[Any, Any]]
    values: dict[str, Any] = field(default_factory=dict)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """[batch] losses."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


def trace(run: Run) -> None:
    """Finds the sites."""
    run.values["graph"] = jr.trace(run.apply, run.params, run.data[0][0])


def calibrate(run: Run) -> None:
    """Ranges from the first quarter of the examples."""
    inputs = [x for x, _ in run.data[: max(1, len(run.data) // 4)]]
    run.values["ranges"] = jr.calibrate(run.values["graph"], run.params, inputs)


def score(run: Run) -> None:
    """Contributions of all examples."""
    graph, ranges = run.values["graph"], run.values["ranges"]
    run.values["scores"] = jr.score(graph, run.params, run.data, cross_entropy, ranges)


def attribute(run: Run) -> None:
    """The joint change of all layers in int4, two points."""
    graph, ranges = run.values["graph"], run.values["ranges"]
    plan = jr.uniform(run.values["scores"].table, "int4")
    run.values["attribution"] = jr.attribute(
        graph, run.params, plan, run.data, cross_entropy, ranges
    )


def lossless(run: Run) -> None:
    """A plan in int8 and int4 weights; the last fifth of the examples confirms it."""
    last = -max(1, len(run.data) // 5)
    run.values["lossless"] = jr.lossless(
        run.values["graph"],
        run.params,
        run.data[:last],
        run.data[last:],
        cross_entropy,
        run.values["ranges"],
        search=jr.Search(formats=("w8a8", "w4a8")),
    )


def verify(run: Run) -> None:
    """The integer model of that plan: layers alone, shares, controls, and the page."""
    last = -max(1, len(run.data) // 5)
    graph, ranges = run.values["graph"], run.values["ranges"]
    model = jr.quantize(graph, run.params, run.values["lossless"].plan, ranges)
    report = jr.verify(
        graph,
        run.params,
        model,
        run.data[last:],
        cross_entropy,
        ranges=ranges,
        scores=run.values["scores"],
        selection=run.data[:last],
    )
    with tempfile.TemporaryDirectory() as folder:
        jr.write_page(report, Path(folder) / "report.html")


STAGES: tuple[Callable[[Run], None], ...] = (
    trace,
    calibrate,
    score,
    attribute,
    lossless,
    verify,
)


def measure(options: argparse.Namespace) -> list[dict]:
    """Runs the stages in this process."""
    durations: dict[str, float] = {}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        durations[event] = durations.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    run = prepared(options)
    rows = [row("data and parameters", durations, 0.0)]
    for stage in STAGES:
        durations.clear()
        start = time.perf_counter()
        stage(run)
        rows.append(row(stage.__name__, durations, time.perf_counter() - start))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def prepared(options: argparse.Namespace) -> Run:
    """The network with random weights, and random examples."""
    module = Residual(options.sites // 2)
    rng = np.random.default_rng(0)
    shape = options.batch, options.tokens, module.width
    batches = -(-options.examples // options.batch)
    data = [
        (rng.normal(size=shape).astype(np.float32), rng.integers(0, 10, options.batch))
        for _ in range(batches)
    ]
    data = [(x, y.astype(np.int32)) for x, y in data]
    apply, params = jr.from_linen(module, jax.jit(module.init)(jax.random.key(0), data[0][0]))
    return Run(apply, params, data)


def row(stage: str, durations: dict[str, float], seconds: float) -> dict:
    """One line of the table."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "stage": stage,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "seconds": seconds,
        "trace_seconds": sum(durations.get(event, 0.0) for event in TRACE),
        "compile_seconds": durations.get(COMPILE, 0.0),
    }


def main() -> None:
    """Runs the stages in a child process and writes what it reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results/memory"))
    parser.add_argument("--sites", type=int, default=200)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    lines = [
        "| stage | peak memory so far (GB) | seconds | of them tracing | compiling |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['stage']} | {r['peak_gigabytes']:.2f} | {r['seconds']:.0f} "
        f"| {r['trace_seconds']:.1f} | {r['compile_seconds']:.1f} |"
        for r in rows
    ]
    write_table(options.out, rows, lines)


if __name__ == "__main__":
    main()

"""What scoring and attribution cost as things grow: examples, sites, candidates, devices.

Every point is a process of its own, whose peak resident memory is read at its end. The model is a
stack of dense layers, `sites` of them, scanned (one program whatever the depth) or unrolled (the
honest worst case: a network whose layers all differ). Time is that of the passes over the data,
without tracing and compiling, which are reported apart.

    python benchmarks/scoring_scale.py
    python benchmarks/scoring_scale.py --only attributed    # curves whose names hold the word
    python benchmarks/scoring_scale.py --quick

Rows say how a cost grows from each point to the next: `slope` is the exponent in the size, 1 for
linear. Virtual devices share the machine's cores, so their time shows overhead and no gain.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BASE = {
    "examples": 2000, "sites": 20, "candidates": 6, "devices": 1, "form": "unrolled",
    "work": "score",
}  # fmt: skip
ATTRIBUTE = {"work": "attribute"}
WIDTH, BATCH = 64, 100
POINTS: dict[str, list[dict[str, Any]]] = {
    "examples": [{"examples": n, "reduced": True} for n in (2_000, 20_000, 100_000)],
    "examples, whole matrix": [{"examples": n} for n in (2_000, 20_000, 100_000)],
    "sites, unrolled": [{"sites": n} for n in (10, 50, 200, 500)],
    "sites, scanned": [{"sites": n, "form": "scanned"} for n in (10, 50, 200, 500)],
    "candidates": [{"candidates": n} for n in (1, 2, 4, 6)],
    "devices": [{"devices": n} for n in (1, 2, 4, 8)],
    "examples, attributed": [{"examples": n, **ATTRIBUTE} for n in (2_000, 20_000, 100_000)],
    "sites, attributed, unrolled": [{"sites": n, **ATTRIBUTE} for n in (10, 50, 200)],
    "sites, attributed, scanned": [
        {"sites": n, "form": "scanned", **ATTRIBUTE} for n in (10, 50, 200, 500)
    ],
    "devices, attributed": [{"devices": n, **ATTRIBUTE} for n in (1, 2, 4, 8)],
}
QUICK = {
    "examples": [{"examples": n, "reduced": True} for n in (100, 200)],
    "sites, scanned": [{"sites": 4, "form": "scanned", "devices": 2}],
    "examples, attributed": [{"examples": n, **ATTRIBUTE} for n in (100, 200)],
}
QUICK_BASE = {**BASE, "examples": 100, "sites": 2}


class Batches:
    """Examples that exist one batch at a time."""

    def __init__(self, examples: int):
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        import numpy as np

        for start in range(0, self.examples, BATCH):
            rng = np.random.default_rng(start)
            x = rng.normal(size=(min(BATCH, self.examples - start), WIDTH)).astype(np.float32)
            yield x, x[:, 0]


def point(
    examples: int, sites: int, candidates: int, devices: int, form: str, reduced: bool, work: str
) -> Any:
    """One measurement, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import jaxrmils as jr
    from jaxrmils.sensitivity import ACTIVATION_CANDIDATES
    from jaxrmils.sensitivity.moments import score_moments

    stack = np.random.default_rng(0).normal(size=(sites, WIDTH, WIDTH)) / math.sqrt(WIDTH)
    stack = jnp.asarray(stack, jnp.float32)
    params = stack if form == "scanned" else [stack[i] for i in range(sites)]

    def apply(params: Any, x: Any) -> Any:
        if form == "scanned":
            return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    def loss(outputs: Any, targets: Any) -> Any:
        return jnp.mean((outputs - targets[:, None]) ** 2, axis=-1)

    sharding = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
    start = time.perf_counter()
    graph = jr.trace(apply, params, jax.ShapeDtypeStruct((2, WIDTH), jnp.float32))
    traced = time.perf_counter()
    few = [x for x, _ in Batches(BATCH)]
    ranges = jr.calibrate(graph, params, few, estimator="minmax", sharding=sharding)
    calibrated = time.perf_counter()
    score, first = (score_moments if reduced else jr.score), None

    def timed() -> Iterator[Any]:
        """Time begins when the second batch is asked for: the first one compiled."""
        nonlocal first
        for batch in Batches(examples + BATCH):
            yield batch
            first = first or time.perf_counter()

    if work == "attribute":
        plan = jr.uniform(jr.tabulate(graph), "w8a8")
        found = jr.attribute(graph, params, plan, timed(), loss, ranges, sharding=sharding).change
    else:
        found = score(
            graph, params, timed(), loss, ranges, sharding=sharding,
            activation_candidates=ACTIVATION_CANDIDATES[:candidates],
        )  # fmt: skip
    done = time.perf_counter()
    assert first is not None and len(found) == examples + BATCH
    return {
        "trace_seconds": traced - start,
        "calibrate_seconds": calibrated - traced,
        "compile_seconds": first - calibrated,
        "seconds": done - first,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_process(settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={settings['devices']}"
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    command = [sys.executable, __file__, "--point", json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{settings} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def slopes(name: str, rows: list[dict[str, Any]]) -> list[float | None]:
    """The exponents of the time, from each point to the next."""
    size = name.split(",")[0]
    found: list[float | None] = [None]
    for one, two in itertools.pairwise(rows):
        growth = math.log(two["seconds"] / one["seconds"])
        found.append(growth / math.log(two[size] / one[size]))
    return found


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--only", default="", help="a word of the curves' names; others are kept")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    curves = QUICK if options.quick else POINTS
    if not any(options.only in name for name in curves):
        parser.error(f"no curve holds {options.only!r}; there are {'; '.join(curves)}")
    if options.output is None:
        options.output = Path(__file__).parent / "results" / "scoring_scale.json"
    return options


def main() -> None:
    """Runs all points."""
    options = parse()
    if options.point:
        print(json.dumps(point(**options.point)))
        return
    base = QUICK_BASE if options.quick else BASE
    kept = options.only and options.output.exists()
    written = json.loads(options.output.read_text()) if kept else {}
    result: dict[str, Any] = written.get("curves", {})
    for name, points in (QUICK if options.quick else POINTS).items():
        if options.only not in name:
            continue
        rows = []
        for changed in points:
            settings = {**base, "reduced": False, **changed}
            rows.append({**settings, **in_process(settings)})
        result[name] = [
            {**row, "slope": slope} for row, slope in zip(rows, slopes(name, rows), strict=True)
        ]
        print(f"\n{name:28} {'seconds':>8} {'slope':>6} {'trace':>6} {'compile':>8} {'peak MB':>8}")
        for row in result[name]:
            slope = "" if row["slope"] is None else f"{row['slope']:.2f}"
            print(
                f"{row[name.split(',')[0]]:>28} {row['seconds']:8.2f} {slope:>6} "
                f"{row['trace_seconds']:6.1f} {row['compile_seconds']:8.1f} "
                f"{row['peak_megabytes']:8.0f}"
            )
    command = shlex.join(["python", "benchmarks/scoring_scale.py", *sys.argv[1:]])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    commands = {"command": written.get("command", command)}
    if options.only:
        commands[f"command, {options.only}"] = command
    options.output.write_text(json.dumps({**commands, "curves": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How fast integer models run, beside XLA's float32, qwix and onnxruntime on the same weights.

    python benchmarks/integer_speed.py --models resnet18 --batches 1,8
    python benchmarks/integer_speed.py --quick      # tiny networks; a smoke test

Everything is compiled first, then timed in turns in alternating order, so that a busy machine slows
all alike; what takes more than `--slow` seconds is run in the first 3 rounds only. A speedup is the
median over rounds of the ratio within a round. "error" is the relative distance of the outputs to
the float network's: all must compute the same thing. Packages that are not installed are left out,
with the reason. `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` makes page faults of large temporaries
cheaper on Linux; the value is kept with the results, as are the cores that other processes took.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from speed_models import BATCHES, NETWORKS, Workload, workload

import jaxrmils as jr
from jaxrmils.lowering.native import kernels
from jaxrmils.lowering.native_model import PART_OF_PROGRAM

FLOAT, DEPTHWISE, INT8, INT4 = "float", "depthwise", "w8a8", "w4a8"
CODES, DYNAMIC, PRODUCTS, UNPACKED = "codes", "w8a8d", "products", "unpacked"
NATIVE, NATIVE_CODES, NATIVE_PRODUCTS = "native", "native codes", "native products"
NATIVE_WHOLE, WHOLE = "native whole", "whole"
QWIX, QWIX_STATIC, ONNX = "qwix", "qwix static", "onnxruntime"
TITLES = {
    FLOAT: "XLA float32",
    DEPTHWISE: "float32, depthwise as shifted products",
    INT8: "jaxrmils w8a8",
    CODES: "jaxrmils w8a8, shortcuts in codes",
    DYNAMIC: "jaxrmils w8a8d",
    PRODUCTS: "jaxrmils w8a8, products of activations in float",
    NATIVE: "jaxrmils w8a8, native kernels",
    NATIVE_CODES: "native kernels, shortcuts in codes",
    NATIVE_PRODUCTS: "native kernels, products of activations in float",
    NATIVE_WHOLE: "native kernels, batches not in parts",
    INT4: "jaxrmils w4a8",
    UNPACKED: "jaxrmils w4a8, int4 unpacked ahead of time",
    QWIX: "qwix w8a8",
    QWIX_STATIC: "qwix w8a8, static ranges",
    ONNX: "onnxruntime int8",
}
AGAINST = (DEPTHWISE, CODES, DYNAMIC, PRODUCTS, UNPACKED, NATIVE, QWIX, ONNX)
OTHERS = (FLOAT, WHOLE)
"""What may be asked for besides."""
CALIBRATION_BATCH = 2
SLOW_ROUNDS = 3


@dataclass(frozen=True)
class Contestant:
    """Something that is timed.

    Attributes:
        run: computes the outputs; may return before they are ready.
        facts: what else the results say about it: `trace_seconds`, `compile_seconds`,
            `buffer_bytes`.
    """

    run: Callable[[], Any]
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A network with everything that does not depend on the batch size.

    Attributes:
        functions: by name, a function of variables and inputs, and its variables.
        onnx: runs onnxruntime's int8 model, or `None`.
        absent: why what is not there is not there, by name.
    """

    work: Workload
    functions: Mapping[str, tuple[Callable[[Any, Any], Any], Any]]
    onnx: Callable[[Any], Any] | None
    absent: Mapping[str, str]


def quantized(work: Workload, against: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """The models of jaxrmils, from ranges of a small random batch."""
    example = work.make_inputs(CALIBRATION_BATCH)
    graph = jr.trace(work.apply, work.variables, work.make_inputs(1))
    ranges = jr.calibrate(graph, work.variables, [example])
    formats = {INT8: "w8a8", INT4: "w4a8"}
    if DYNAMIC in against and work.is_bert:
        formats[DYNAMIC] = "w8a8d"
    if DEPTHWISE in against and has_depthwise(work):
        formats[DEPTHWISE] = "float"
    table = jr.tabulate(graph)
    plans = {name: jr.uniform(table, form) for name, form in formats.items()}
    if PRODUCTS in against and work.is_bert:
        plans[PRODUCTS] = jr.uniform(table, "w8a8", skip=["*dot_*"])
    models: dict[str, Any] = {
        name: jr.quantize(graph, work.variables, plan, ranges) for name, plan in plans.items()
    }
    if UNPACKED in against:
        models[UNPACKED] = jr.quantize(graph, work.variables, plans[INT4], ranges, unpacked=True)
    if CODES in against:
        graph = dataclasses.replace(graph, shortcuts="codes")
        ranges = jr.calibrate(graph, work.variables, [example])
        plan = jr.uniform(jr.tabulate(graph), "w8a8")
        models[CODES] = jr.quantize(graph, work.variables, plan, ranges)
    if NATIVE in against:
        kinds = {INT8: NATIVE, CODES: NATIVE_CODES, PRODUCTS: NATIVE_PRODUCTS}
        if WHOLE in against:
            models[NATIVE_WHOLE] = jr.native(models[INT8], at_once=None)
        models |= {kinds[name]: jr.native(models[name]) for name in kinds if name in models}
    return {name: (model.apply, model.params) for name, model in models.items()}


def has_depthwise(work: Workload) -> bool:
    """Whether a convolution of the network has groups."""
    program = str(jax.make_jaxpr(work.apply)(work.variables, work.make_inputs(1)))
    return re.search(r"feature_group_count=(?!1\b)", program) is not None


def prepare(work: Workload, against: frozenset[str]) -> Prepared:
    """Quantizes a network in every way that is asked for and installed."""
    absent: dict[str, str] = {}
    if NATIVE in against and (reason := kernels.available()) is not None:
        absent[NATIVE], against = reason, against - {NATIVE}
    functions = {FLOAT: (work.apply, work.variables), **quantized(work, against)}
    if DEPTHWISE in against and DEPTHWISE not in functions:
        absent[DEPTHWISE] = "no depthwise convolution"
    example = work.make_inputs(CALIBRATION_BATCH)
    if QWIX in against:
        try:
            from qwix_models import qwix_model

            functions[QWIX] = qwix_model(work, example, static=False)
            functions[QWIX_STATIC] = qwix_model(work, example, static=True)
        except ImportError as error:
            absent[QWIX] = str(error)
    onnx = None
    if ONNX in against:
        try:
            onnx = onnx_session(work, example)
        except ImportError as error:
            absent[ONNX] = str(error)
    return Prepared(work, functions, onnx, absent)


def onnx_session(work: Workload, example: Any) -> Callable[[Any], Any]:
    """onnxruntime's int8 model, after its float model was found equal to the Flax module.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: the float models differ.
    """
    from onnx_models import feeds, float_model, int8_model, session

    model = float_model(work)
    outputs = session(model.SerializeToString())(feeds(example))
    difference = error_of(outputs, jax.jit(work.apply)(work.variables, example))
    if difference > 1e-3:
        raise ValueError(f"{work.name}: the ONNX graph's outputs differ by {difference:.1e}")
    running = session(int8_model(model, example, dynamic=work.is_bert))
    return lambda inputs: running(feeds(inputs))


def compiled(
    function: Callable[[Any, Any], Any], variables: Any, inputs: Any, *, holds: bool = False
) -> Contestant:
    """Compiles a function from nothing, without what jax remembers of others.

    Args:
        function: of variables and inputs.
        variables: its own.
        inputs: a batch.
        holds: whether the program holds the variables, as calls of native models do.
    """
    jax.clear_caches()
    start = time.perf_counter()
    arguments = (inputs,) if holds else (variables, inputs)
    bound = functools.partial(function, variables) if holds else function
    lowered = jax.jit(bound).lower(*arguments)
    traced = time.perf_counter()
    executable = lowered.compile()
    done = time.perf_counter()
    facts = {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "buffer_bytes": buffer_bytes(variables),
    }
    return Contestant(lambda: executable(*arguments), facts)


def is_small(variables: Any) -> bool:
    """Whether a call of a native model has its parameters in the program."""
    return buffer_bytes(variables) <= PART_OF_PROGRAM


def buffer_bytes(variables: Any) -> int:
    """Bytes that the arrays of a tree take on their device.

    >>> buffer_bytes({"a": jnp.zeros(3), "b": jnp.zeros(5, jnp.int8)})
    17
    """
    return sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(variables))


def error_of(outputs: Any, reference: Any) -> float:
    """Relative distance of outputs.

    >>> error_of(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    0.1
    """
    outputs, reference = np.asarray(outputs), np.asarray(reference)
    return float(np.linalg.norm(outputs - reference) / np.linalg.norm(reference))


def time_in_turns(
    contestants: Mapping[str, Contestant], rounds: int, slow: float
) -> dict[str, list[float]]:
    """Seconds of every run; each round runs everything once, in alternating order.

    What takes more than `slow` seconds when it is warm is run in the first `SLOW_ROUNDS` only.
    """
    seconds: dict[str, list[float]] = {}
    limits = {}
    for name, each in contestants.items():
        jax.block_until_ready(each.run())
        start = time.perf_counter()
        jax.block_until_ready(each.run())
        is_slow = time.perf_counter() - start > slow
        limits[name], seconds[name] = min(rounds, SLOW_ROUNDS) if is_slow else rounds, []
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            if number >= limits[name]:
                continue
            start = time.perf_counter()
            jax.block_until_ready(contestants[name].run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def busy_seconds() -> tuple[float, float] | None:
    """Processor seconds spent so far by the whole machine and by this process; Linux alone."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, interrupts, soft, *_ = map(
        int, path.read_text().splitlines()[0].split()[1:]
    )
    machine = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    return machine, time.process_time()


def cores_of_others(run: Callable[[], Any]) -> tuple[Any, float | None]:
    """What a function returns, and how many cores other processes kept busy meanwhile.

    The second is `None` where it is not known.
    """
    before, start = busy_seconds(), time.perf_counter()
    result = run()
    after, elapsed = busy_seconds(), time.perf_counter() - start
    if before is None or after is None:
        return result, None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return result, max(0.0, others / elapsed)


def ratio(above: list[float], below: list[float]) -> list[float]:
    """Median and quartiles of the ratio within a round, over the rounds that both ran in.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 1.0])
    [3.0, 2.5, 3.5]
    """
    count = min(len(above), len(below))
    ratios = np.asarray(above[:count]) / np.asarray(below[:count])
    return [float(q) for q in np.quantile(ratios, [0.5, 0.25, 0.75])]


def measure(
    prepared: Prepared, batch: int, rounds: int, slow: float, console: Console
) -> dict[str, Any]:
    """One network at one batch size: a row for every contestant."""
    inputs = prepared.work.make_inputs(batch)
    placed = jax.tree.map(jnp.asarray, inputs)
    contestants = {
        name: compiled(
            function, variables, placed, holds=name.startswith(NATIVE) and is_small(variables)
        )
        for name, (function, variables) in prepared.functions.items()
    }
    if prepared.onnx is not None:
        run = prepared.onnx
        contestants[ONNX] = Contestant(lambda: run(inputs))
    reference = contestants[FLOAT].run()
    errors = {name: error_of(each.run(), reference) for name, each in contestants.items()}
    console.print(f"Compiled {prepared.work.name}, batch {batch}; timing")
    seconds, others = cores_of_others(lambda: time_in_turns(contestants, rounds, slow))
    console.print("Timed" if others is None else f"Timed; others used {others:.2f} cores")
    own = [name for name in (NATIVE_CODES, NATIVE) if name in seconds]
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "speedup_over_float": ratio(seconds[FLOAT], seconds[name]),
            "w8a8_speedup_over_this": ratio(seconds[name], seconds[INT8]),
            **({"native_speedup_over_this": ratio(seconds[name], seconds[own[0]])} if own else {}),
            "error": errors[name],
            **each.facts,
        }
        for name, each in contestants.items()
    }
    return {
        "rows": rows,
        "absent": dict(prepared.absent),
        "others_cores": others,
        "seconds": seconds,
    }


def call_overhead(calls: int) -> dict[str, float]:
    """Microseconds per call of jitted functions on a network too small to take time itself.

    `same_program` is the quantized apply on a plain list of its arrays: what remains is the cost of
    `QuantizedParams` as an argument.
    """
    example = jnp.ones((1, 8))
    variables = {f"w{layer}": jnp.eye(8) for layer in range(4)}

    def apply(variables: Any, inputs: Any) -> Any:
        for weight in variables.values():
            inputs = inputs @ weight
        return inputs

    graph = jr.trace(apply, variables, example)
    ranges = jr.calibrate(graph, variables, [example])
    model = jr.quantize(graph, variables, jr.uniform(jr.tabulate(graph), "w8a8"), ranges)
    leaves, structure = jax.tree.flatten(model.params)
    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        FLOAT: (jax.jit(apply), variables),
        INT8: (jax.jit(model.apply), model.params),
        "same_program": (
            jax.jit(lambda leaves, x: model.apply(structure.unflatten(leaves), x)),
            leaves,
        ),
    }
    contestants = {
        name: Contestant(functools.partial(function, params, example))
        for name, (function, params) in functions.items()
    }
    # In pairs: of three in turns, the middle one would never follow itself, on warm threads.
    microseconds: dict[str, float] = {}
    for pair in ((FLOAT, INT8), ("same_program", INT8)):
        seconds = time_in_turns({name: contestants[name] for name in pair}, calls, slow=1.0)
        microseconds |= {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
    return {
        **microseconds,
        "over_float": microseconds[INT8] / microseconds[FLOAT],
        "over_same_program": microseconds[INT8] / microseconds["same_program"],
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on, and how to make them again."""
    packages = ("jax", "jaxlib", "flax", "qwix", "onnx", "onnxruntime")
    present = {each.name for each in importlib.metadata.distributions()}
    return {
        "command": shlex.join(["python", "benchmarks/integer_speed.py", *sys.argv[1:]]),
        **{name: importlib.metadata.version(name) for name in packages if name in present},
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }


def show(title: str, result: Mapping[str, Any], console: Console) -> None:
    """Prints the table of a network at a batch size."""
    table = Table(title=title)
    columns = ("", "ms", "float32 / this", "this / w8a8", "quartiles", "this / native", "error")
    for column in (*columns, "trace s", "compile s", "params MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        middle, low, high = row["w8a8_speedup_over_this"]
        facts = ("-", "-", "-")
        if "compile_seconds" in row:
            facts = (
                f"{row['trace_seconds']:.1f}",
                f"{row['compile_seconds']:.1f}",
                f"{row['buffer_bytes'] / 1e6:.1f}",
            )
        table.add_row(
            TITLES[name],
            f"{row['milliseconds']:.1f}",
            f"{row['speedup_over_float'][0]:.2f}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['native_speedup_over_this'][0]:.2f}" if NATIVE in result["rows"] else "-",
            f"{row['error']:.4f}",
            *facts,
        )
    console.print(table)
    for name, reason in result["absent"].items():
        console.print(f"Left out: {TITLES[name]} ({reason})")
    rows = result["rows"]
    whole = [rows[n]["trace_seconds"] + rows[n]["compile_seconds"] for n in (INT8, INT4, FLOAT)]
    size = [rows[name]["buffer_bytes"] for name in (INT8, INT4, FLOAT)]
    console.print(
        f"Against float32: trace and compile {whole[0] / whole[2]:.2f} (w8a8), "
        f"{whole[1] / whole[2]:.2f} (w4a8); parameter buffers {size[0] / size[2]:.3f}, "
        f"{size[1] / size[2]:.3f}"
    )


def listed(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word for word in text.split(",") if word)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("resnet18", "efficientnet_lite0", "mobilenet_v2", "bert_base")
    parser.add_argument("--models", type=listed, default=names, help="names, with commas (all)")
    parser.add_argument("--batches", type=listed, help="sizes (1,8,32; of BERT 1,8)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of everything (9)")
    parser.add_argument("--slow", type=float, default=2.0, help="seconds of a slow run (2)")
    parser.add_argument(
        "--against", type=listed, default=AGAINST,
        help="any of depthwise,codes,w8a8d,products,unpacked,native,qwix,onnxruntime (all); float "
        "is always there, native kernels run what else is compared, and with whole also batches "
        "not in parts",
    )  # fmt: skip
    parser.add_argument("--weights", type=Path, help="a checkpoint, with one model (random)")
    parser.add_argument("--calls", type=int, default=2000, help="calls for the overhead (2000)")
    parser.add_argument("--quick", action="store_true", help="tiny networks, batch 2, 2 rounds")
    parser.add_argument("--output", type=Path, help="JSON file; what it holds of others is kept")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batches = ("tiny_resnet", "tiny_bert"), ("2",)
        options.rounds, options.calls = 2, 10
    for given, known in ((options.models, NETWORKS), (options.against, (*OTHERS, *AGAINST))):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    if options.weights and len(options.models) != 1:
        parser.error("--weights takes one model; name it with --models")
    if options.output is None:
        kind = "_quick" if options.quick else ""
        name = f"integer_speed{kind}_jax_{jax.__version__}.json"
        options.output = Path(__file__).parent / "results" / name
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    console = Console(width=140)
    facts = {**environment(), "rounds": options.rounds, "weights": str(options.weights or "random")}
    path = options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}

    def keep(key: str, result: Mapping[str, Any]) -> None:
        results[key] = {**facts, **result}
        path.write_text(json.dumps(results, indent=2) + "\n")

    overhead = call_overhead(options.calls)
    keep("call overhead", overhead)
    console.print(
        f"A jitted call of a tiny network: {overhead[FLOAT]:.1f} us float32, "
        f"{overhead[INT8]:.1f} us w8a8 ({overhead['over_float']:.2f} times), of which the program "
        f"itself on a plain list {overhead['same_program']:.1f} us "
        f"({overhead['over_same_program']:.2f} times)"
    )
    for name in options.models:
        prepared = prepare(workload(name, options.weights), frozenset(options.against))
        for batch in map(int, options.batches or BATCHES.get(name, (1, 8, 32))):
            result = measure(prepared, batch, options.rounds, options.slow, console)
            show(f"{name}, batch {batch}", result, console)
            keep(f"{name}, batch {batch}", result)
    console.print(f"Written: {path.name}")


if __name__ == "__main__":
    main()

"""The C++ kernels of `jaxrmils/lowering/native`, beside what XLA makes of the same operation.

    taskset -c 0 python benchmarks/native_kernels.py            # one thread, about four minutes
    python benchmarks/native_kernels.py --only depthwise dot    # cases whose names hold a word

From int8 codes to int8 codes: the product, rescaling, a ReLU6 and quantization. XLA gets the
package's own formulation in one program. Both run several times within one call, which hides what
a call costs, in alternating rounds; a number is the fastest round. GOP/s count two operations for
a multiplication and an addition, the peak is what a loop of vpdpbusd reaches on as many cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table
from scoring_cost import Timed, compiled, environment, time_in_turns

from jaxrmils.lowering.integer_conv import conv_int32, kernel_sum
from jaxrmils.lowering.integer_dot import dot_int32
from jaxrmils.lowering.native import build, kernels
from jaxrmils.numerics import QuantParams, quantize

LAYOUTS = ("NHWC", "HWIO", "NHWC")
DOT = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))
W_ZERO = 7
"""Zero point of the second activation."""
NATIVE, XLA = "native", "XLA"


@dataclass(frozen=True)
class Case:
    """One operation; a dot has two dims, a product of two activations three."""

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: int = 1

    @property
    def batched(self) -> bool:
        """Whether both are activations, [batch, m, k] and [batch, k, n]."""
        return len(self.x) == 3

    @property
    def depthwise(self) -> bool:
        """One output channel per input channel."""
        return len(self.x) == 4 and self.w[2] == 1 and self.w[3] == self.x[3]

    @property
    def out(self) -> tuple[int, ...]:
        """The result's shape."""
        if self.batched:
            return (*self.x[:2], self.w[-1])
        return (self.x[0], *(-(-n // self.stride) for n in self.x[1:-1]), self.w[-1])

    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * int(np.prod(self.out)) * int(np.prod(self.w[1 if self.batched else 0 : -1]))


def dot_case(m: int, k: int, n: int) -> Case:
    """Rows times a matrix."""
    return Case(f"dot {m} x {k} x {n}", (m, k), (k, n))


def batched_case(batch: int, m: int, k: int, n: int) -> Case:
    """Many products of two activations."""
    return Case(f"{batch} dots {m} x {k} x {n} of activations", (batch, m, k), (batch, k, n))


def conv_case(size: int, kernel: int, c: int, o: int, stride: int = 1, batch: int = 1) -> Case:
    """A square convolution, padded at its edges; depthwise where `o` is 0."""
    kind = f"conv {kernel} x {kernel}, {c} to {o}" if o else f"depthwise {kernel} x {kernel}, {c}"
    name = f"{kind} at {size}" + f" by {stride}" * (stride > 1) + f", batch {batch}" * (batch > 1)
    w = (kernel, kernel, c, o) if o else (kernel, kernel, 1, c)
    return Case(name, (batch, size, size, c), w, stride)


CASES = (
    conv_case(56, 3, 64, 64),
    conv_case(28, 3, 128, 128),
    conv_case(14, 3, 256, 256),
    conv_case(7, 3, 512, 512),
    conv_case(7, 3, 512, 512, batch=8),
    conv_case(224, 7, 3, 64, 2),
    conv_case(224, 3, 3, 32, 2),
    conv_case(112, 1, 32, 16),
    conv_case(112, 1, 16, 96),
    conv_case(56, 1, 24, 144),
    conv_case(56, 1, 144, 24),
    conv_case(14, 1, 384, 64),
    conv_case(14, 1, 64, 384),
    conv_case(7, 1, 320, 1280),
    conv_case(112, 3, 32, 0),
    conv_case(112, 3, 96, 0, 2),
    conv_case(56, 3, 144, 0),
    conv_case(14, 3, 384, 0),
    conv_case(7, 3, 960, 0),
    conv_case(14, 5, 480, 0),
    dot_case(128, 768, 3072),
    dot_case(128, 3072, 768),
    dot_case(1, 768, 3072),
    dot_case(1, 4096, 4096),
    dot_case(4, 4096, 4096),
    batched_case(12, 128, 64, 128),
    batched_case(12, 128, 128, 64),
    batched_case(12, 512, 64, 512),
    batched_case(12, 512, 512, 64),
)


def functions(case: Case) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """What is timed, of operands and a number that changes, and the operands."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, case.x), jnp.int8)
    w = jnp.asarray(rng.integers(-128, 128, case.w), jnp.int8)
    channels, zero = case.w[-1], jnp.int32(-3)
    spread = 5000 * float(np.sqrt(np.prod(case.w[1 if case.batched else 0 : -1])))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, channels) / spread, jnp.float32)
    offset = jnp.asarray(rng.normal(size=channels), jnp.float32)
    grid = QuantParams(jnp.float32(6 / 255), jnp.int32(-128), bits=8, symmetric=False)
    pads: tuple[tuple[int, int], ...] = ()
    if len(case.x) == 4:
        strides = (case.stride,) * 2
        pads = tuple(lax.padtype_to_pads(case.x[1:3], case.w[:2], strides, "SAME"))
    window: dict[str, Any] = {"strides": (case.stride,) * 2, "padding": pads, "dilation": (1, 1)}
    sums = jnp.sum(w, axis=range(w.ndim - 1), dtype=jnp.int32)
    correction = kernels.correction(sums, zero)
    packed: Any = None
    if case.batched:
        correction = jnp.zeros(channels, jnp.int32)
    elif len(case.x) == 2:
        packed = kernels.pack_dot(w)
    else:
        packed = (kernels.pack_depthwise if case.depthwise else kernels.pack_conv)(w)

    def native(i: Any, x: Any, w: Any, packed: Any) -> Any:
        epilogue = kernels.Epilogue(
            scale, offset, correction + i, low=0.0, high=6.0, grid=(grid.scale, grid.zero_point)
        )
        if case.batched:
            zeros = {"lhs_zero": zero, "rhs_zero": W_ZERO}
            return kernels.batched_dot(x, w, epilogue, **zeros, dimension_numbers=BATCHED)
        if len(case.x) == 2:
            return kernels.dot(x, packed, epilogue)
        run: Any = kernels.depthwise if case.depthwise else kernels.conv
        return run(x, packed, epilogue, x_zero=zero, **window)

    def xla(i: Any, x: Any, w: Any, packed: Any) -> Any:
        if case.batched:
            zeros = {"lhs_zero_point": zero, "rhs_zero_point": W_ZERO}
            total = dot_int32(x, w, BATCHED, **zeros)
        elif len(case.x) == 2:
            total = dot_int32(x, w, DOT, lhs_zero_point=zero, rhs_sum=sums)
        else:
            numbers = lax.conv_dimension_numbers(case.x, case.w, LAYOUTS)
            total = conv_int32(
                x,
                w,
                window_strides=window["strides"],
                padding=pads,
                lhs_dilation=(1, 1),
                rhs_dilation=(1, 1),
                dimension_numbers=numbers,
                feature_group_count=case.x[-1] if case.depthwise else 1,
                lhs_zero_point=zero,
                kernel_sum=kernel_sum(w, numbers),
            )
        y = (total + i).astype(jnp.float32) * scale + offset
        return quantize(jnp.clip(y, 0.0, 6.0), grid)

    return {NATIVE: native, XLA: xla}, (x, w, packed)


def compile_case(case: Case, repeats: int) -> dict[str, Timed]:
    """Programs that run a case several times, after a look at whether results agree."""
    found, operands = functions(case)
    results = [np.asarray(jax.jit(f)(jnp.int32(0), *operands), np.int32) for f in found.values()]
    # XLA may contract the product and the sum, which moves a few values across a half.
    if np.abs(results[0] - results[1]).max() > 1:
        raise AssertionError(f"{case.name}: results differ")

    def repeated(function: Any) -> Any:
        def once(i: Any, carry: Any, w: Any, packed: Any) -> Any:
            # A code of the input comes from the last result: the product stays in the loop.
            x, last = carry
            x = x.at[(0,) * x.ndim].set(last[(0,) * last.ndim])
            return x, function(i, x, w, packed)

        start = jnp.zeros(case.out, jnp.int8)
        return lambda x, w, packed: lax.fori_loop(
            0, repeats, lambda i, carry: once(i, carry, w, packed), (x, start)
        )

    return {name: compiled(repeated(function), operands) for name, function in found.items()}


def peak() -> float:
    """Operations per second of all cores that this process may use."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("vnni_peak.cc")
        command = [*build.find_compiler(), "-O2", "-march=native", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
    return float(done.stdout) * len(os.sched_getaffinity(0))


def measure(case: Case, rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of both, and native GOP/s."""
    once = compile_case(case, 1)
    fastest = min(time_in_turns({NATIVE: once[NATIVE]}, 3)[NATIVE])
    repeats = int(np.clip(seconds / fastest, 1, 200))
    times = time_in_turns(compile_case(case, repeats), rounds)
    best = {name: min(values) / repeats for name, values in times.items()}
    return {
        **{f"{name}_microseconds": 1e6 * value for name, value in best.items()},
        "gops": case.operations() / best[NATIVE] / 1e9,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words of the cases' names")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.002, help="of native time in a call")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    most = peak()
    title = f"peak {most / 1e9:.0f} GOP/s on {len(os.sched_getaffinity(0))} cores"
    table, rows = Table(title=title), {}
    for column in ("", "native µs", "GOP/s", "of the peak", "XLA µs", "times as fast"):
        table.add_column(column, justify="right" if column else "left")
    for case in CASES:
        if not any(word in case.name for word in args.only):
            continue
        row = rows[case.name] = measure(case, args.rounds, args.seconds)
        native, xla = row[f"{NATIVE}_microseconds"], row[f"{XLA}_microseconds"]
        cells = (f"{native:.1f}", f"{row['gops']:.0f}", f"{row['gops'] * 1e9 / most:.0%}")
        table.add_row(case.name, *cells, f"{xla:.1f}", f"{xla / native:.1f}")
        print(case.name, *cells, f"{xla:.1f}", file=sys.stderr)
    Console(width=110).print(table)
    if args.out:
        command = shlex.join(["python", "benchmarks/native_kernels.py", *sys.argv[1:]])
        result = {
            **environment(),
            "command": command,
            "cores": len(os.sched_getaffinity(0)),
            "peak_gops": most / 1e9,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

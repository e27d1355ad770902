"""Single operations in the formulations of `jaxrmils/lowering/table.py`, beside float32.

    python benchmarks/operations.py                  # about a minute on two cores
    python benchmarks/operations.py --only one dot   # the cases whose names hold a word

Every operation is followed by what follows it in a model: integer ones by scaling and quantization
to int8, float ones by a scale and a ReLU. "as written" is the same integer operation given to XLA
as the model has it. Products of two activations also start from float32 and end there, with a
calibrated grid for each operand ("from float32") or a grid for every row ("by rows"). GOP/s count
two operations for a multiplication and an addition; the peak is the fastest int8 dot of the run.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table
from scoring_cost import Timed, compiled, environment, ratio, time_in_turns

from jaxrmils.lowering import Backend, default_backend
from jaxrmils.lowering.integer_conv import conv_int32
from jaxrmils.lowering.integer_dot import dot_int32, output_scale
from jaxrmils.numerics import quantize, row_params
from jaxrmils.numerics.packing import pack_int4, unpack_int4
from jaxrmils.numerics.quant_params import from_range

LAYOUTS = ("NHWC", "HWIO", "NHWC")
FLOAT, INTEGER, WRITTEN, INT4 = "float32", "int8", "int8 as written", "int4 weights"
WHOLE, ROWS = "from float32", "by rows"


@dataclass(frozen=True)
class Case:
    """One operation: the shapes of its operands, and its numbers."""

    name: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    numbers: Any
    stride: int = 1
    groups: int = 1

    @property
    def is_dot(self) -> bool:
        """A dot, not a convolution."""
        return self.numbers is not None

    def products(self) -> int:
        """Multiplications."""
        if not self.is_dot:
            rows = self.lhs[0] * math.prod(-(-size // self.stride) for size in self.lhs[1:3])
            return rows * math.prod(self.rhs)
        (contracting, _), (batch, _) = self.numbers
        shared = math.prod(self.lhs[d] for d in (*contracting, *batch))
        return math.prod(self.lhs) * math.prod(self.rhs) // shared


def dot_case(rows: int, k: int, columns: int) -> Case:
    """A dense layer."""
    name = f"dot {rows} x {k} x {columns}"
    return Case(name, (rows, k), (k, columns), (((1,), (0,)), ((), ())))


def conv_case(
    name: str, size: int, kernel: int, channels: int, features: int, *, stride: int = 1,
    groups: int = 1, batch: int = 8,
) -> Case:  # fmt: skip
    """A square convolution."""
    lhs, rhs = (batch, size, size, channels), (kernel, kernel, channels // groups, features)
    title = f"{name} {kernel} x {kernel}, {channels} to {features} at {size}"
    return Case(title + (f" by {stride}" if stride > 1 else ""), lhs, rhs, None, stride, groups)


CASES = (
    dot_case(1, 4096, 4096),
    dot_case(1, 768, 3072),
    dot_case(32, 768, 3072),
    dot_case(1024, 768, 3072),
    dot_case(1024, 768, 1),
    Case("attention q k", (8, 12, 128, 64), (8, 12, 128, 64), (((3,), (3,)), ((0, 1), (0, 1)))),
    Case("attention p v", (8, 12, 128, 128), (8, 12, 128, 64), (((3,), (2,)), ((0, 1), (0, 1)))),
    conv_case("conv", 56, 3, 64, 64),
    conv_case("conv", 14, 3, 256, 256),
    conv_case("conv", 112, 1, 16, 96),
    conv_case("stem", 224, 7, 3, 64, stride=2),
    conv_case("stem", 32, 3, 3, 32),
    conv_case("grouped", 28, 3, 256, 256, groups=32),
    conv_case("depthwise", 56, 3, 144, 144, groups=144),
)
QUICK = (
    dot_case(1, 64, 32),
    Case("attention q k", (2, 8, 16), (2, 8, 16), (((2,), (2,)), ((0,), (0,)))),
    conv_case("stem", 8, 3, 3, 32, batch=1),
)


def functions(case: Case, backend: Backend) -> dict[str, Callable[[Any, Any], Any]]:
    """What is timed, of two operands."""
    conv: dict[str, Any] = {}
    if not case.is_dot:
        pads = lax.padtype_to_pads(case.lhs[1:3], case.rhs[:2], (case.stride,) * 2, "SAME")
        conv = {
            "window_strides": (case.stride,) * 2,
            "padding": pads,
            "lhs_dilation": (1, 1),
            "rhs_dilation": (1, 1),
            "dimension_numbers": lax.conv_dimension_numbers(case.lhs, case.rhs, LAYOUTS),
            "feature_group_count": case.groups,
        }

    def written(lhs: Any, rhs: Any, dtype: Any) -> Any:
        if case.is_dot:
            return lax.dot_general(lhs, rhs, case.numbers, preferred_element_type=dtype)
        return lax.conv_general_dilated(lhs, rhs, **conv, preferred_element_type=dtype)

    def formulated(lhs: Any, rhs: Any) -> Any:
        if case.is_dot:
            return dot_int32(lhs, rhs, case.numbers, backend=backend)
        return conv_int32(lhs, rhs, **conv, backend=backend)

    found: dict[str, Callable[[Any, Any], Any]] = {
        FLOAT: lambda lhs, rhs: jax.nn.relu(written(lhs, rhs, jnp.float32) * jnp.float32(1e-3)),
        INTEGER: lambda lhs, rhs: requantized(formulated(lhs, rhs)),
        WRITTEN: lambda lhs, rhs: requantized(written(lhs, rhs, jnp.int32)),
    }
    if case.is_dot and not case.numbers[1][0] and case.rhs[-1] > 1:
        unpack = functools.partial(unpack_int4, last_dim=case.rhs[-1])
        found[INT4] = lambda lhs, rhs: requantized(formulated(lhs, unpack(rhs)))
    if case.is_dot and case.numbers[1][0]:
        found[WHOLE] = functools.partial(of_activations, case, backend, False)
        found[ROWS] = functools.partial(of_activations, case, backend, True)
    return found


def of_activations(case: Case, backend: Backend, by_rows: bool, lhs: Any, rhs: Any) -> Any:
    """A product of two float32 activations, both quantized on the way."""
    grids, codes = [], []
    for values, axes in zip((lhs, rhs), case.numbers[0], strict=True):
        grid = from_range(jnp.float32(-127.0), jnp.float32(128.0), bits=8, symmetric=False)
        grids.append(row_params(values, bits=8, axes=axes) if by_rows else grid)
        codes.append(quantize(values, grids[-1]))
    zeros = [grid.zero_point for grid in grids]
    points = {"lhs_zero_point": zeros[0], "rhs_zero_point": zeros[1]}
    total = dot_int32(codes[0], codes[1], case.numbers, **points, backend=backend)
    scale = output_scale(grids[0].scale, grids[1].scale, case.numbers, lhs.ndim, rhs.ndim)
    return jax.nn.relu(total.astype(jnp.float32) * (scale * jnp.float32(1e-3)))


def requantized(total: Any) -> Any:
    """int8 codes of the scaled result."""
    scaled = total.astype(jnp.float32) * jnp.float32(1e-3)
    return jnp.clip(jnp.round(scaled), -128, 127).astype(jnp.int8)


def compile_case(case: Case, backend: Backend) -> dict[str, Timed]:
    """All of a case's functions, with operands."""
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.integers(-127, 128, case.lhs), jnp.int8)
    rhs = jnp.asarray(rng.integers(-7, 8, case.rhs), jnp.int8)
    operands: dict[str, tuple[Any, Any]] = dict.fromkeys((INTEGER, WRITTEN), (lhs, rhs))
    floats = (lhs.astype(jnp.float32), rhs.astype(jnp.float32))
    operands |= dict.fromkeys((FLOAT, WHOLE, ROWS), floats)
    operands[INT4] = (lhs, pack_int4(rhs))
    return {
        name: compiled(function, operands[name])
        for name, function in functions(case, backend).items()
    }


def measure(cases: Sequence[Case], rounds: int, backend: Backend) -> dict[str, Any]:
    """Milliseconds and ratios of every case."""
    rows: dict[str, Any] = {}
    for case in cases:
        seconds = time_in_turns(compile_case(case, backend), rounds)
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        rows[case.name] = {
            "milliseconds": {name: 1e3 * value for name, value in medians.items()},
            "faster": {n: ratio(seconds[FLOAT], times) for n, times in seconds.items()},
            "gops": 2 * case.products() / medians[INTEGER] / 1e9,
        }
    return rows


def show(rows: dict[str, Any], console: Console) -> None:
    """The table."""
    peak = max(row["gops"] for row in rows.values())
    names = (INTEGER, INT4, WRITTEN, WHOLE, ROWS)
    table = Table("operation", "float32 ms", *(f"{n}, times faster" for n in names), "of the peak")
    for name, row in rows.items():
        faster = [f"{row['faster'][n][0]:.2f}" if n in row["faster"] else "" for n in names]
        share = f"{100 * row['gops'] / peak:.0f} %"
        table.add_row(name, f"{row['milliseconds'][FLOAT]:.2f}", *faster, share)
    console.print(table)
    console.print(f"peak: {peak:.0f} GOP/s")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="words in the cases' names")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two small cases, as a smoke test")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; expected 1 or more")
    cases = [
        case
        for case in (QUICK if args.quick else CASES)
        if not args.only or any(word in case.name for word in args.only)
    ]
    if not cases:
        parser.error(f"no case's name holds {' or '.join(args.only)}")
    rows = measure(cases, args.rounds, default_backend())
    show(rows, Console(width=120))
    if args.out:
        command = shlex.join(["python", "benchmarks/operations.py", *sys.argv[1:]])
        record = {"environment": {**environment(), "command": command}, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

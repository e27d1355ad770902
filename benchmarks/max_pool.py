"""Max-pooling and quantization in the formulations of `jaxrmils/lowering/max_pool.py`.

    python benchmarks/max_pool.py

The pooling behind ResNet's stem, 3 x 3 by 2 of 64 channels at 112 x 112, then codes of one grid:
XLA's windowed reduction and then the quantization, as a model has it; maxima of shifted slices in
float32; and codes made first, so that slices of int8 are compared. All give the same codes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scoring_cost import compiled, environment, ratio, time_in_turns

from jaxrmils.lowering.max_pool import shifted_max_pool
from jaxrmils.numerics import QuantParams, quantize

WINDOWED, SHIFTED, CODES = "XLA's reduction, then codes", "shifted, then codes", "codes, shifted"


def functions(shape: tuple[int, ...]) -> dict[str, Callable[[Any], Any]]:
    """What is timed, of one array."""
    grid = QuantParams(jnp.float32(0.03), jnp.int32(3), bits=8, symmetric=False)
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))

    def windowed(x: Any) -> Any:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)

    (eqn,) = jax.make_jaxpr(windowed)(jax.ShapeDtypeStruct(shape, jnp.float32)).eqns
    return {
        WINDOWED: lambda x: quantize(windowed(x), grid),
        SHIFTED: lambda x: quantize(shifted_max_pool(x, eqn, -jnp.inf), grid),
        CODES: lambda x: shifted_max_pool(quantize(x, grid), eqn, -128),
    }


def measure(batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every formulation, and how much faster it is than the first."""
    shape = (batch, size, size, 64)
    x = jax.random.normal(jax.random.key(0), shape)
    timed = {name: compiled(function, (x,)) for name, function in functions(shape).items()}
    codes = [np.asarray(each.run()) for each in timed.values()]
    if any((each != codes[0]).any() for each in codes):
        raise AssertionError("formulations differ")
    seconds = time_in_turns(timed, rounds)
    return {
        name: {
            "milliseconds": 1e3 * float(np.median(values)),
            "speedup": ratio(seconds[WINDOWED], values),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=112, help="pixels (112)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    table, results = Table("batch", "formulation", "ms", "times as fast", "quartiles"), {}
    for batch in args.batches:
        results[str(batch)] = measure(batch, args.size, args.rounds)
        for name, row in results[str(batch)].items():
            middle, low, high = row["speedup"]
            cells = (f"{row['milliseconds']:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
            table.add_row(str(batch), name, *cells)
    Console(width=110).print(table)
    if args.out:
        command = shlex.join(["python", "benchmarks/max_pool.py", *sys.argv[1:]])
        document = {**environment(), "command": command, "rows": results}
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

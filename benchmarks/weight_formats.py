"""Scores of a dot's weight in several formats, in the two forms of `weight_contraction.py`.

    python benchmarks/weight_formats.py

Examples of some rows (tokens) through a weight: a product like the forward pass for every format,
or the gradient of the weight, of every example alone, block by block, and a sum over it for every
format. Both give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scoring_cost import compiled, environment, ratio, time_in_turns

from jaxrmils.sensitivity import weight_contraction as wc

WEIGHTS = ((384, 384), (384, 1536), (1536, 384))
PRODUCTS, GRADIENT = "products", "gradient"


def measure(rows: int, formats: int, tokens: int, rounds: int, width: int) -> dict[str, Any]:
    """Milliseconds of both forms for the weights together, and the second over the first."""
    arrays, shapes = [], [(i * width // 384, o * width // 384) for i, o in WEIGHTS]
    for number, (size, out) in enumerate(shapes):
        keys = jax.random.split(jax.random.key(number), formats + 2)
        examples = (max(tokens // rows, 1), rows)
        deltas = [jax.random.normal(key, (size, out)) for key in keys[2:]]
        g, h = (
            jax.random.normal(k, (*examples, n)) for k, n in zip(keys[:2], (out, size), strict=True)
        )
        arrays.append((g, h, *deltas))
    axes = (0, 0) + (None,) * formats

    def products(arrays: Any) -> Any:
        one = lambda *each: wc.by_products(jnp.matmul, *each)  # noqa: E731
        return [jax.vmap(one, in_axes=axes)(*each) for each in arrays]

    def gradient(arrays: Any) -> Any:
        return [jax.vmap(wc.by_gradient, in_axes=axes)(*each) for each in arrays]

    timed = {
        name: compiled(function, (arrays,))
        for name, function in ((PRODUCTS, products), (GRADIENT, gradient))
    }
    for first, second in zip(*(each.run() for each in timed.values()), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4 * float(jnp.abs(first).max()))
    seconds = time_in_turns(timed, rounds)
    found = {f"{name} ms": 1e3 * float(np.median(values)) for name, values in seconds.items()}
    pays = wc.gradient_pays(rows, formats)
    return {**found, "ratio": ratio(seconds[GRADIENT], seconds[PRODUCTS]), "chosen": pays}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 128])
    parser.add_argument("--formats", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--tokens", type=int, default=1600, help="rows of all examples (1600)")
    parser.add_argument("--width", type=int, default=384, help="of the narrow sides (384)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    table, results = (
        Table("rows", "formats", PRODUCTS, GRADIENT, "ratio", "quartiles", "chosen"),
        {},
    )
    for rows in args.rows:
        for formats in args.formats:
            row = measure(rows, formats, args.tokens, args.rounds, args.width)
            results[f"{rows} rows, {formats} formats"] = row
            middle, low, high = row["ratio"]
            times = [f"{row[f'{name} ms']:.1f} ms" for name in (PRODUCTS, GRADIENT)]
            cells = (f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
            chosen = GRADIENT if row["chosen"] else PRODUCTS
            table.add_row(str(rows), str(formats), *times, *cells, chosen)
    Console(width=110).print(table)
    if args.out:
        command = shlex.join(["python", "benchmarks/weight_formats.py", *sys.argv[1:]])
        document = {**environment(), "command": command, "rows": results}
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

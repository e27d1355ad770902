"""The tables of `objectives.py`: what every objective's plans do, and by how much they differ from
the refined ones, in loss and in accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrmils.statistics import Interval, mean_interval

REFINED, RANDOM, UNIFORM = "refined", "random", "uniform"
LEVEL = 0.95
_DIGITS = 9
"""Of a difference: behind them there is only how a mean was rounded."""


def markdown(rows: list[dict[str, Any]], asked: Sequence[float] = ()) -> list[str]:
    """Objectives by budgets, differences from the refined plan, and what they cost."""
    budgets = sorted({row["bits"] for row in rows})
    metric = next((key for key in rows[0] if key.endswith(" drop")), None)
    measures = {"change": "Change of the loss"} | ({metric: metric} if metric else {})
    draws = len({row["seed"] for row in rows})
    lines = []
    for key, title in measures.items():
        lines += [f"{title}, on examples that chose nothing:", "", *absolute(rows, budgets, key)]
    for key, title in measures.items():
        unit = "" if key == "change" else " in points"
        lines += [f"{title}{unit} minus that of the refined plan, paired within a draw:", ""]
        lines += [*differences(rows, budgets, key)]
    lines.append(
        f"{draws} draws; +- is Student's 95 % interval over draws. Positive differences: the "
        "refined plan is better; bold ones are beyond chance, their interval is without 0. "
        "Seconds: the objective's pass over the selection data, compilation included in the first "
        "draw; medians."
    )
    if counted := counts(rows, tuple(measures)):
        lines += ["", counted]
    passes = [row["passes"] for row in rows if "passes" in row]
    if passes:
        ratios = {
            name: np.median([each[name] / each["training gradient"] for each in passes])
            for name in ("tangent", "secant round")
        }
        lines += [
            "",
            "Without compilation, over a training step's gradient on the same examples (medians): "
            + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            + ".",
        ]
    if absent := [f"{bits:g}" for bits in asked if bits not in budgets]:
        lines += ["", f"No plan has {' or '.join(absent)} bits: int4 is the narrowest format."]
    return lines


def absolute(rows: list[dict[str, Any]], budgets: Sequence[float], key: str) -> list[str]:
    """One measure against float, and what the objectives cost."""
    lines = ["| objective | " + " | ".join(f"{b:g} bits" for b in budgets) + " | seconds |"]
    lines += ["|---|" + "---|" * (len(budgets) + 1)]
    for name in names_of(rows):
        cells = [cell(values_of(rows, name, bits, key)) for bits in budgets]
        times = [r["seconds"] for r in rows if r["objective"] == name and r["seconds"]]
        cost = f"{np.median(times):.0f}" if times else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {cost} |")
    return [*lines, ""]


def differences(rows: list[dict[str, Any]], budgets: Sequence[float], key: str) -> list[str]:
    """One measure minus that of the refined plan; what is beyond chance is bold."""
    lines = ["| objective | " + " | ".join(f"{b:g} bits" for b in budgets) + " |"]
    lines += ["|---|" + "---|" * len(budgets)]
    for name in names_of(rows):
        if name == REFINED:
            continue
        cells = []
        for bits in budgets:
            found = paired(rows, name, bits, key)
            cells.append(f"**{cell(found)}**" if beyond_chance(found) else cell(found))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def counts(rows: list[dict[str, Any]], keys: Sequence[str]) -> str:
    """In how many cells the refined plan is better or worse beyond chance; "" of a single draw."""
    names, naive = names_of(rows), (RANDOM, UNIFORM)
    parts, total = [], 0
    for own, title in (
        ([n for n in names if n not in (REFINED, *naive)], "of objectives"),
        ([n for n in names if n in naive], "of random and uniform plans"),
    ):
        found = tally(rows, own, keys)
        if cells := len(found[keys[0]]):
            total += cells
            said = (
                f"by {'the loss' if key == 'change' else key.removesuffix(' drop')} "
                f"{signs.count(1)} / {signs.count(-1)}"
                for key, signs in found.items()
            )
            parts.append(f"{cells} {title}, {', '.join(said)}")
    if not parts:
        return ""
    return (
        "Cells whose plans differ, and in how many of them the refined plan is better / worse "
        f"beyond chance: {'; '.join(parts)}. Of {total} comparisons at {100 * LEVEL:g} %, about "
        f"{total * (1 - LEVEL):.2g} are expected to be beyond chance by luck, with either measure; "
        "cells that share draws and plans are lucky together."
    )


def tally(
    rows: list[dict[str, Any]], names: Sequence[str], keys: Sequence[str]
) -> dict[str, list[int]]:
    """By measure, a sign for every cell where plans differ in any measure: 1 if the refined plan is
    better beyond chance, -1 if it is worse, 0 if neither. Cells of one draw have no interval.
    """
    signs: dict[str, list[int]] = {key: [] for key in keys}
    for name in names:
        for bits in sorted({row["bits"] for row in rows}):
            found = {key: paired(rows, name, bits, key) for key in keys}
            if len(found[keys[0]]) > 1 and any(any(each.values()) for each in found.values()):
                for key, each in found.items():
                    signs[key].append(beyond_chance(each))
    return signs


def paired(rows: list[dict[str, Any]], name: str, bits: float, key: str) -> dict[int, float]:
    """By seed, an objective's measure minus the refined plan's."""
    own, best = (values_of(rows, each, bits, key) for each in (name, REFINED))
    return {seed: round(own[seed] - best[seed], _DIGITS) + 0.0 for seed in own}


def beyond_chance(values: dict[int, float]) -> int:
    """The sign of the mean if its interval is without 0, else 0."""
    if len(values) < 2:
        return 0
    found = interval(values)
    return int(found.lower > 0) - int(found.upper < 0)


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    """Objectives in the order in which they were measured."""
    return list(dict.fromkeys(row["objective"] for row in rows))


def values_of(rows: list[dict[str, Any]], name: str, bits: float, key: str) -> dict[int, float]:
    """By seed."""
    return {
        r["seed"]: r[key] for r in rows if r["objective"] == name and r["bits"] == bits and key in r
    }


def interval(values: dict[int, float]) -> Interval:
    """Student's, over draws."""
    return mean_interval(np.asarray(list(values.values())), level=LEVEL, method="t")


def cell(values: dict[int, float]) -> str:
    """Mean and interval over draws."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{next(iter(values.values())):+.4f}"
    found = interval(values)
    return f"{found.mean:+.4f} ± {(found.upper - found.lower) / 2:.4f}"

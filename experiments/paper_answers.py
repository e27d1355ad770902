"""The answers to the paper's questions as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WEIGHTS, ACTIVATIONS = "weights", "activations"


def markdown(answers: dict[str, Any]) -> list[str]:
    """All tables of one network."""
    lines = [
        f"**{answers['network']}**: {answers['ranges']:,} examples for ranges, "
        f"{answers['selection']:,} for selection, {answers['held_out']:,} held out; held-out "
        f"float loss {answers['float_loss']:.4f} {answers['unit']}; "
        f"{answers['seconds']:.0f} s, {answers['cpu_seconds']:.0f} s of CPU.",
    ]
    first = (parts_table, orders_table, layers_table, subsets_table)
    tables = (*first, plans_table, signs_table, rules_table)
    for function in tables:
        lines += ["", *function(answers)]
    return lines


def parts_table(answers: dict[str, Any]) -> list[str]:
    """Weights against activations, all layers together."""
    rows = []
    for total in answers["part_sums"]:
        some = parts_of(answers, total["kind"], total["bits"])
        apart = sum(row["tangent"][1] > 0 or row["tangent"][2] < 0 for row in some)
        sizes = np.abs([[row["tangent"][0], row["alone"][0]] for row in some])
        rows.append(
            [
                f"{total['kind']}, int{total['bits']}",
                *(interval(total[key]) for key in ("tangent", "measured")),
                *(f"{value:.5f}" for value in np.median(sizes, axis=0)),
                f"{apart} of {len(some)}",
            ]
        )
    head = ["", "sum of tangents", "measured together", "a layer's tangent (median of sizes)"]
    head += ["a layer measured alone (median of sizes)", "tangent's interval without 0"]
    lines = ["1. First order, weights against activations.", "", *table(head, rows), ""]
    for bits in (8, 4):
        pairs = paired(answers, bits)
        larger = sum(abs(w["tangent"][0]) > abs(a["tangent"][0]) for w, a in pairs)
        ratios = [abs(w["tangent"][0] / a["tangent"][0]) for w, a in pairs if a["tangent"][0]]
        lines.append(
            f"int{bits}: the weight's tangent is the larger one in {larger} of {len(pairs)} layers "
            f"with both; its size is {np.median(ratios):.2f} times that of the activations "
            "(median)."
        )
    return lines


def orders_table(answers: dict[str, Any]) -> list[str]:
    """First and second order against each part measured alone."""
    rows = []
    for total in answers["part_sums"]:
        some = parts_of(answers, total["kind"], total["bits"])
        first, second, alone = (
            np.array([r[k][0] for r in some]) for k in ("tangent", "second", "alone")
        )
        rows.append(
            [
                f"{total['kind']}, int{total['bits']}",
                *(interval(total[key]) for key in ("tangent", "second", "alone")),
                f"{np.median(np.abs(second) / np.maximum(np.abs(first), 1e-12)):.2f}",
                f"{np.median(np.abs(alone - first)):.6f}",
                f"{np.median(np.abs(alone - first - second)):.6f}",
                correlation(first, alone),
                correlation(first + second, alone),
            ]
        )
    head = ["", "sum of tangents", "sum of second orders", "sum of layers measured alone"]
    head += ["size of second over first (median)", "error of the tangent (median)"]
    head += ["of both (median)", "correlation of the tangent with alone", "of both"]
    return ["2. Second order, every part alone.", "", *table(head, rows)]


def layers_table(answers: dict[str, Any]) -> list[str]:
    """The layers' tangents, secant shares and changes alone, and their agreement."""
    rows = []
    for total in answers["sums"]:
        some = [row for row in answers["layers"] if row["plan"] == total["plan"]]
        found = {k: np.array([r[k][0] for r in some]) for k in ("tangent", "secant", "alone")}
        rows.append(
            [
                total["plan"],
                *(interval(total[k]) for k in ("tangent", "second", "secant", "alone")),
                interval(total["measured"]),
                interval(total["held_out"]),
                *(
                    correlation(found[a], found[b])
                    for a, b in (("tangent", "alone"), ("secant", "alone"), ("tangent", "secant"))
                ),
            ]
        )
    head = ["uniform plan", "sum of tangents", "of second orders", "of secant shares"]
    head += ["of layers measured alone", "measured, selection", "measured, held out"]
    head += ["tangent and alone", "secant and alone", "tangent and secant"]
    words = "3. Sums against the joint change; correlations over layers."
    return [words, "", *table(head, rows)]


def subsets_table(answers: dict[str, Any]) -> list[str]:
    """Predictions and rankings by the size of the subset."""
    curve, rows = answers["curve"], []
    for size in dict.fromkeys(r["examples"] for r in curve["predictions"]):
        cells = [f"{size:,}"]
        for row in (r for r in curve["predictions"] if r["examples"] == size):
            cells += [spread(row["tangent"], 5), spread(row["measured"], 5)]
        for row in (r for r in curve["ranks"] if r["examples"] == size):
            cells += [spread(row[whole], 2, "") for whole in ("selection", "held_out")]
        rows.append(cells)
    plans = list(dict.fromkeys(r["plan"] for r in curve["predictions"]))
    head = ["examples", *(f"{p}, {w}" for p in plans for w in ("tangent", "measured"))]
    for kind in dict.fromkeys(r["score"] for r in curve["ranks"]):
        head += [f"rank correlation of {kind}s with all", "with held out"]
    words = "4. Subsets of the selection examples: mean ± standard deviation over subsets."
    return [words, "", *table(head, rows)]


def plans_table(answers: dict[str, Any]) -> list[str]:
    """Held-out changes of the plans that subsets chose."""
    curve, rows = answers["curve"], []
    for size in dict.fromkeys(row["examples"] for row in curve["plans"]):
        some = [row for row in curve["plans"] if row["examples"] == size]
        rows.append([f"{size:,}", *(many(row["changes"]) for row in some)])
    rows.append(["none: layers in random order", *(many(curve["random"]) for _ in some)])
    head = ["examples", *(f"by {row['score']}s" for row in some)]
    words = (
        "4b. Held-out change of plans with half of the weights in int4, where a subset says that "
        "they cost least: mean (smallest to largest) over plans."
    )
    return [words, "", *table(head, rows)]


def signs_table(answers: dict[str, Any]) -> list[str]:
    """How often signs hold."""
    rows = []
    for row in answers["signs"]:
        whole = row["from"] == 0 and row["to"] is None
        high = "" if row["to"] is None else f" to {row['to']:g}"
        mean, low, up = (100 * v for v in row["same"])
        rows.append(
            [
                f"**{row['kind']}** ({row['contributions']})" if whole else row["kind"],
                "all" if whole else f"{row['from']:g}{high}" + ("" if high else " or more"),
                f"{100 * row['share']:.0f} %",
                f"{mean:.0f} % ({low:.0f} to {up:.0f})",
                f"{100 * row['expected']:.0f} %",
            ]
        )
    head = ["contributions", "abs(z) on selection", "of them", "same sign held out", "expected"]
    return ["5. Signs on other data.", "", *table(head, rows)]


def rules_table(answers: dict[str, Any]) -> list[str]:
    """The paper's rule and plans that do not look."""
    rows = []
    for row in answers["rules"]:
        formats = ", ".join(f"{count} {name}" for name, count in sorted(row["formats"].items()))
        keys = ("tangent", "measured", "held_out_tangent", "held_out_measured")
        cells = [interval(row[key]) for key in keys]
        rows.append([row["name"], formats, f"{100 * row['size']:.0f} %", *cells])
    head = ["plan", "layers", "size", "tangent, selection", "measured, selection"]
    head += ["tangent, held out", "measured, held out"]
    return ["5b. Taking contributions that look negative.", "", *table(head, rows)]


def parts_of(answers: dict[str, Any], kind: str, bits: int) -> list[dict]:
    """The rows of one kind of part at one width."""
    return [r for r in answers["parts"] if (r["kind"], r["bits"]) == (kind, bits)]


def paired(answers: dict[str, Any], bits: int) -> list[tuple[dict, dict]]:
    """Weights and activations of the layers that have both."""
    others = {row["layer"]: row for row in parts_of(answers, ACTIVATIONS, bits)}
    some = parts_of(answers, WEIGHTS, bits)
    return [(row, others[row["layer"]]) for row in some if row["layer"] in others]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines."""
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def interval(values: Sequence[float]) -> str:
    """A mean and the ends of its interval."""
    mean, low, up = values
    return f"{mean:+.5f} [{low:+.5f}, {up:+.5f}]"


def spread(values: Sequence[float], digits: int, sign: str = "+") -> str:
    """A mean and a standard deviation."""
    mean, deviation = values
    return f"{mean:{sign}.{digits}f} ± {deviation:.{digits}f}"


def many(values: Sequence[float]) -> str:
    """The mean of some values and their ends."""
    return f"{np.mean(values):+.5f} ({min(values):+.5f} to {max(values):+.5f})"


def correlation(a: np.ndarray, b: np.ndarray) -> str:
    """Pearson's, or a dash where nothing varies."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return "-"
    return f"{np.corrcoef(a, b)[0, 1]:.2f}"

"""Draws what `paper_questions.py` wrote, one figure for every question, a column for every network.

    python experiments/paper_plots.py experiments/results/paper_questions_*.json --out docs/images

Needs Matplotlib: pip install 'jaxrmils[experiments]'. Colours are Okabe and Ito's, and every series
has a marker of its own. Bars are 95 % intervals unless the figure says otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.special import ndtr

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, ScalarFormatter

BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def main() -> None:
    """Draws all figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", help="files of paper_questions.py")
    parser.add_argument("--out", default="docs/images")
    args = parser.parse_args()
    networks = [json.loads(Path(path).read_text())["rows"][0] for path in args.results]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, draw, rows in (
        ("paper_first_order", draw_first_order, 2),
        ("paper_second_order", draw_second_order, 1),
        ("paper_layers", draw_layers, 2),
        ("paper_subsets", draw_subsets, 4),
        ("paper_signs", draw_signs, 1),
    ):
        path = out / f"{name}.png"
        figure(path, networks, draw, rows)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def figure(
    path: Path, networks: Sequence[dict], draw: Callable[[Sequence[Any], dict], None], rows: int
) -> None:
    """A grid of panels: a column for every network, filled by `draw(column, network)`."""
    with plt.rc_context(STYLE):
        width = max(7.0, 0.6 + 4.5 * len(networks))
        shape = {"figsize": (width, 0.5 + 2.6 * rows), "squeeze": False}
        fig, panels = plt.subplots(rows, len(networks), layout="constrained", **shape)
        for column, network in zip(panels.T, networks, strict=True):
            draw(column, network)
            column[0].set_title(f"{network['network']}\n{column[0].get_title()}".strip())
        handles, labels = [], []
        for panel in panels.flat:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        fig.legend(handles, labels, loc="outside lower center", ncols=int(width // 3.5))
        fig.savefig(path, dpi=80, metadata={"Software": None})
        plt.close(fig)


def draw_first_order(column: Sequence[Any], network: dict) -> None:
    """Tangents of weights and activations beside the weights measured alone."""
    order = {name: i for i, name in enumerate(dict.fromkeys(r["layer"] for r in network["parts"]))}
    for panel, bits in zip(column, (8, 4), strict=True):
        rows = [row for row in network["parts"] if row["bits"] == bits]
        for kind, key, words, colour, marker, shift in (
            ("weights", "tangent", "weights, first order", BLUE, "o", -0.25),
            ("activations", "tangent", "activations, first order", ORANGE, "s", 0.0),
            ("weights", "alone", "weights, measured alone", GREEN, "^", 0.25),
        ):
            some = [row for row in rows if row["kind"] == kind]
            x = [order[row["layer"]] + 1 + shift for row in some]
            bars(panel, x, [row[key] for row in some], words, colour, marker)
        panel.axhline(0, color=BLACK, linewidth=0.6)
        panel.set_title(f"int{bits}, nearest")
        panel.set_ylabel(f"change of the loss ({network['unit']})")
    column[-1].set_xlabel("layer, in order of execution")
    for panel in column:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_second_order(column: Sequence[Any], network: dict) -> None:
    """What the tangent misses against the second-order term, part by part."""
    panel, ends = column[0], []
    styles = {
        ("weights", 8): (BLUE, "o"),
        ("weights", 4): (GREEN, "^"),
        ("activations", 8): (ORANGE, "s"),
        ("activations", 4): (PURPLE, "D"),
    }
    for (kind, bits), (colour, marker) in styles.items():
        some = [r for r in network["parts"] if (r["kind"], r["bits"]) == (kind, bits)]
        missed = np.array([row["alone"][0] - row["tangent"][0] for row in some])
        second = [row["second"] for row in some]
        bars(panel, missed, second, f"{kind}, int{bits}", colour, marker)
        ends += [*missed, *(value[0] for value in second)]
    sizes = np.abs(ends)
    for axis in (panel.set_xscale, panel.set_yscale):
        axis("symlog", linthresh=float(np.quantile(sizes, 0.75)) or 1.0)
    straight = np.linspace(min(ends), max(ends), 400)
    panel.plot(straight, straight, color=BLACK, linewidth=0.8, label="equal")
    panel.set_xlabel(f"measured alone - first order ({network['unit']})")
    panel.set_ylabel(f"second order ({network['unit']})")


def draw_layers(column: Sequence[Any], network: dict) -> None:
    """Tangent, secant share and the layer measured alone, in both uniform plans."""
    sums = {row["plan"]: row for row in network["sums"]}
    for panel, plan in zip(column, sums, strict=True):
        rows = [row for row in network["layers"] if row["plan"] == plan]
        for key, words, colour, marker, shift in (
            ("tangent", "tangent", BLUE, "o", -0.25),
            ("secant", "secant share of the joint change", ORANGE, "s", 0.0),
            ("alone", "measured alone", GREEN, "^", 0.25),
        ):
            x = np.arange(len(rows)) + 1 + shift
            bars(panel, x, [row[key] for row in rows], words, colour, marker)
        panel.axhline(0, color=BLACK, linewidth=0.6)
        keys = ("tangent", "secant", "alone")
        found = "sums: " + ", ".join(f"{key} {sums[plan][key][0]:+.4f}" for key in keys)
        panel.set_title(f"uniform {plan}: joint change {sums[plan]['measured'][0]:+.4f}\n{found}")
        panel.set_ylabel(f"change of the loss ({network['unit']})")
    column[-1].set_xlabel("layer, in order of execution")
    for panel in column:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_subsets(column: Sequence[Any], network: dict) -> None:
    """Predictions, rankings and plans by the number of examples."""
    curve = network["curve"]
    for panel, total in zip(column[:2], network["sums"], strict=True):
        plan = total["plan"]
        rows = [row for row in curve["predictions"] if row["plan"] == plan]
        for key, words, colour, marker, shift in (
            ("tangent", "tangent, ± 1 sd over subsets", BLUE, "o", 0.97),
            ("measured", "measured on the subset, ± 1 sd over subsets", GREEN, "^", 1.03),
        ):
            x = [row["examples"] * shift for row in rows]
            values = [spread(row[key]) for row in rows]
            bars(panel, x, values, words, colour, marker, "-")
        mean, low, high = total["held_out"]
        panel.axhline(mean, color=BLACK, linewidth=0.8, label="measured, held out, 95 %")
        panel.axhspan(low, high, color=BLACK, alpha=0.12, linewidth=0)
        panel.set_title(f"uniform {plan}")
        panel.set_ylabel(f"change of the loss\n({network['unit']})")
    styles = {"tangent": (BLUE, "o", 0.97), "secant": (ORANGE, "s", 1.03)}
    for kind, (colour, marker, shift) in styles.items():
        rows = [row for row in curve["ranks"] if row["score"] == kind]
        x = [row["examples"] * shift for row in rows]
        for whole, line in (("selection", "-"), ("held_out", ":")):
            words = f"{kind}s, against {'all selection' if line == '-' else 'held-out'} examples"
            bars(column[2], x, [spread(r[whole]) for r in rows], words, colour, marker, line)
        rows = [row for row in curve["plans"] if row["score"] == kind]
        x = [row["examples"] * shift for row in rows]
        values = [(np.mean(v), min(v), max(v)) for v in (row["changes"] for row in rows)]
        words = f"plan by {kind}s, smallest to largest"
        bars(column[3], x, values, words, colour, marker, "-")
    column[2].set_ylabel("rank correlation of\nthe layers' scores, w4a8")
    lucky = curve["random"]
    column[3].axhline(np.mean(lucky), color=BLACK, linewidth=0.8, linestyle="--")
    column[3].axhspan(
        min(lucky), max(lucky), color=BLACK, alpha=0.12, linewidth=0, label="layers at random"
    )
    column[3].set_ylabel(f"held-out change,\nhalf of the weights int4\n({network['unit']})")
    for panel in column:
        panel.set_xscale("log", base=2)
        panel.set_xticks([row["examples"] for row in curve["ranks"] if row["score"] == "tangent"])
        panel.xaxis.set_major_formatter(ScalarFormatter())
    column[3].set_xlabel("selection examples")


def draw_signs(column: Sequence[Any], network: dict) -> None:
    """How often a contribution's sign holds, by its z."""
    panel = column[0]
    rows = [row for row in network["signs"] if not (row["from"] == 0 and row["to"] is None)]
    styles = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))
    kinds = dict.fromkeys(row["kind"] for row in rows)
    for number, (kind, (colour, marker)) in enumerate(zip(kinds, styles, strict=False)):
        some = [row for row in rows if row["kind"] == kind]
        x = [row["z"] + 0.05 * (number - 1) for row in some]
        values = [[100 * v for v in row["same"]] for row in some]
        bars(panel, x, values, kind, colour, marker, "-")
    x = np.linspace(0, max(row["z"] for row in rows), 100)
    wide = 100 * ndtr(x / np.sqrt(1 + network["selection"] / network["held_out"]))
    panel.plot(x, wide, color=BLACK, linestyle="--", linewidth=0.8, label="expected, see text")
    panel.axhline(50, color=BLACK, linewidth=0.6)
    panel.set_ylim(25, 103)
    panel.set_xlabel("|z| on selection examples")
    panel.set_ylabel("same sign on held-out\nexamples (%)")


def bars(
    panel: Any,
    x: Any,
    values: Sequence[Sequence[float]],
    words: str,
    colour: str,
    marker: str,
    line: str = "",
) -> None:
    """Means with bars to both ends."""
    mean, low, high = np.array(values, np.float64).reshape(-1, 3).T
    panel.errorbar(
        x,
        mean,
        yerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
        label=words,
        color=colour,
        marker=marker,
        linestyle=line or "none",
        markersize=3.5,
        linewidth=1.0,
        elinewidth=0.7,
    )


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of one standard deviation."""
    mean, deviation = values
    return mean, mean - deviation, mean + deviation


if __name__ == "__main__":
    main()

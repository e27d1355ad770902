"""How much of a plan's change is slope: divergences and slopes, where they chose and on other data.

    python experiments/slopes.py --config configs/cifar_resnet56.py \
        --config.data.files=cifar10/test.zip --config.model.weights=resnet56.safetensors

Two tables. For the plan of every objective at a budget: its change of the loss, the divergence and
the slope at the outputs (docs/refinement.md), on the selection examples and on the confirmation and
test examples, each with its standard error. And for every format: how far the refinement believes
an option's slope (k), beside the regression, over all options, of slopes on the other examples on
slopes on the selection examples, weighted by the latters' variances, which is what k should be.
Seeds from 50 on: those of the tables in experiments/objectives.py start at 100.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli import batches, load_config, make_task, trace_task, with_batch_size
from jaxrmils.data import Task, check_disjoint
from jaxrmils.policies import Costs, Limits, Simulator, layer_options, tangent_costs
from jaxrmils.policies.budget.choices import Rules
from jaxrmils.policies.budget.solve import programme_of
from jaxrmils.policies.refine_search import believed, tangents_of
from jaxrmils.progress import bars

FORMATS = ("w8a8", "w4a8")
SAVED = ("squared",)
PARTS = ("change", "divergence", "slope")


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Further options override the config: --config.data.files=FOLDER",
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=50)
    parser.add_argument("--bits", type=float, default=5)
    parser.add_argument(
        "--objectives", nargs="*", default=["squared", "squared_output", "fisher", "sqnr"]
    )
    parser.add_argument("--out", help="by default experiments/results/slopes_ and the config")
    args, overrides = parser.parse_known_args()
    if unknown := set(args.objectives) - {*SAVED, *jr.MEASURED_COSTS}:
        parser.error(f"unknown objectives {sorted(unknown)}")
    config = load_config(args.config, overrides)
    graph = simulator = None
    plans: list[dict[str, Any]] = []
    formats: list[dict[str, Any]] = []
    for seed in bars(range(args.first_seed, args.first_seed + args.draws), "draws", args.draws):
        config.seed = seed
        task = make_task(config, args.config, bars)
        check_disjoint(task.splits, task.training, task.dataset.groups)
        if graph is None or simulator is None:
            graph = trace_task(task)
            config = with_batch_size(config, graph, task)
            simulator = Simulator(graph, task.loss)
        draw = Draw(simulator, task, config.batch_size)
        plans += [{"seed": seed, **draw.plan(name, args.bits)} for name in args.objectives]
        formats += [{"seed": seed, **draw.format(name)} for name in FORMATS]
    out = Path(args.out or f"experiments/results/slopes_{Path(args.config).stem}")
    settings = {"overrides": overrides, "bits": args.bits}
    write_table(out, [*plans, *formats], markdown(plans, formats), settings=settings)


class Draw:
    """A deal of the examples: some choose, and others show what is true.

    Args:
      simulator: of the task's network.
      task: with its splits.
      size: of batches.
    """

    def __init__(self, simulator: Simulator, task: Task, size: int) -> None:
        self.task, graph = task, simulator.graph
        params = task.load_params()
        parts = {
            name: list(batches(task.split(name), size))
            for name in ("ranges", "selection", "confirmation", "test")
        }
        self.chosen = parts["selection"]
        other = parts["confirmation"] + parts["test"]
        ranges = jr.calibrate(graph, params, [inputs for inputs, _ in parts["ranges"]])
        self.scores, self.others = (
            jr.score(graph, params, data, task.loss, ranges) for data in (self.chosen, other)
        )
        self.here, self.there = (
            simulator.on(params, ranges, data) for data in (self.chosen, other)
        )

    def costs(self, name: str) -> Costs:
        """The costs of an objective."""
        if name in SAVED:
            return tangent_costs(self.scores, name, layer_options(self.scores, FORMATS))
        here, make = self.here, jr.MEASURED_COSTS[name]
        arguments = (here.simulator.graph, here.params, self.chosen, self.task.loss, here.ranges)
        return make(*arguments, formats=FORMATS)

    def plan(self, objective: str, bits: float) -> dict[str, Any]:
        """What the plan of an objective does, in parts and with standard errors."""
        limits = Limits(weight_bits=bits)
        costs = self.costs(objective)
        plan = jr.budget(self.scores, limits, objective=costs, formats=FORMATS)
        row: dict[str, Any] = {"objective": objective}
        for where, simulation in (("selection", self.here), ("other", self.there)):
            change, beyond = simulation.change(plan), simulation.divergences().change(plan)
            for key, value in zip(PARTS, (change, beyond, change - beyond), strict=True):
                row[f"{where} {key}"] = float(value.mean())
                row[f"{where} {key} error"] = float(value.std(ddof=1) / len(value) ** 0.5)
        return row

    def format(self, name: str) -> dict[str, Any]:
        """How far its slopes are believed, and how far they should be."""
        table = self.scores.table
        programme = programme_of(table, self.costs("squared"), Rules(FORMATS), 60.0)
        seen, unseen = (tangents_of(scores, programme) for scores in (self.scores, self.others))
        kept, _ = believed(seen, programme, self.task.split("selection").groups)
        own = [i for i, (_, p) in enumerate(programme.columns) if p.format == name]
        t, truth = seen[:, own].mean(axis=0), unseen[:, own].mean(axis=0)
        weights = 1 / seen[:, own].var(axis=0, ddof=1)
        slope = float((weights * t * truth).sum() / (weights * t * t).sum())
        return {"format": name, "k": float(kept[own[0]]), "regression": slope}


def markdown(plans: list[dict[str, Any]], formats: list[dict[str, Any]]) -> list[str]:
    """The two tables."""
    keys = [f"{where} {key}" for where in ("selection", "other") for key in PARTS]
    lines = ["| seed | objective | " + " | ".join(keys) + " |", "|---|---|" + "---|" * len(keys)]
    for row in plans:
        cells = [f"{row[key]:+.4f} ± {row[f'{key} error']:.4f}" for key in keys]
        lines.append(f"| {row['seed']} | {row['objective']} | {' | '.join(cells)} |")
    lines += ["", "± is the standard error over examples.", ""]
    lines += ["| seed | format | k | regression on other examples |", "|---|---|---|---|"]
    lines += [
        f"| {r['seed']} | {r['format']} | {r['k']:.2f} | {r['regression']:+.2f} |" for r in formats
    ]
    return lines


if __name__ == "__main__":
    main()

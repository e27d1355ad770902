"""Which objective chooses best at equal size: every objective, refined, random and uniform plans.

    python experiments/objectives.py --config configs/cifar_resnet56.py \
        --config.data.files=cifar10/test.zip --config.model.weights=resnet56.safetensors

Every draw deals the examples anew (`config.seed`). Plans are chosen on its selection examples, at
the same average bits of a weight with activations in int8, and measured on its confirmation and
test examples, which chose nothing. Intervals are Student's over draws; a difference from the
refined plan is paired within a draw. Seeds from 100 on are the table's: a method under development
uses others. Finished draws are kept, so that an interrupted run goes on where it was; `--only SEED`
makes single draws, so that several processes can share the work, and `--again NAME` makes the rows
of one objective again, in a table that is there too. `--render FILE.json ...` measures nothing: it
writes the tables of these files again, from their numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from objectives_table import RANDOM, REFINED, UNIFORM, markdown
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli import batches, load_config, make_task, trace_task, with_batch_size
from jaxrmils.data import Task, check_disjoint
from jaxrmils.evaluation import SimulatedModel
from jaxrmils.graph import Graph, ModelTable
from jaxrmils.policies import (
    Costs,
    InfeasibleBudgetError,
    Limits,
    Plan,
    Simulator,
    layer_options,
    refined,
    tangent_costs,
)
from jaxrmils.progress import bars

FIRST_SEED = 100
FORMATS = ("w8a8", "w4a8")
SAVED = ("signed", "upper_bound", "squared")
RANDOM_PLANS = 3
PASSES = 3
"""Batches that passes are timed on."""


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Further options override the config: --config.data.files=FOLDER",
    )
    parser.add_argument("--config")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--only", type=int, nargs="*", help="seeds: make these draws, no table")
    parser.add_argument(
        "--again",
        nargs="*",
        default=[],
        help="objectives, to make their rows again, or passes",
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[3, 4, 5, 6, 8])
    parser.add_argument("--objectives", nargs="*", default=[*SAVED, *jr.MEASURED_COSTS])
    parser.add_argument("--rounds", type=int, default=4, help="of the refinement")
    parser.add_argument("--out", help="by default experiments/results/objectives_ and the config")
    parser.add_argument("--render", nargs="+", type=Path, help="results, .json: their tables again")
    args, overrides = parser.parse_known_args()
    if args.render:
        for path in args.render:
            render(path)
        return
    if not args.config:
        parser.error("--config is needed, or --render")
    unknown = set(args.objectives) - {*SAVED, *jr.MEASURED_COSTS}
    if unknown:
        parser.error(f"unknown objectives {sorted(unknown)}; expected {SAVED} or a measured one")
    config = load_config(args.config, overrides)
    out = Path(args.out or f"experiments/results/objectives_{Path(args.config).stem}")
    settings = {key: getattr(args, key) for key in ("bits", "objectives", "rounds")}
    settings["overrides"] = overrides
    seeds = [args.first_seed + number for number in range(args.draws)]
    graph = simulator = None
    for seed in bars(args.only or seeds, "draws", len(args.only or seeds)):
        known = restored(out, seed, settings)
        if known and not set(args.again):
            continue
        known = [row for row in known if row["objective"] not in args.again]
        if {REFINED, "passes"} & set(args.again):  # Its rounds may cost something else now.
            known = [{k: v for k, v in row.items() if k != "passes"} for row in known]
        config.seed = seed
        task = make_task(config, args.config, bars)
        check_disjoint(task.splits, task.training, task.dataset.groups)
        if graph is None or simulator is None:
            graph = trace_task(task)
            config = with_batch_size(config, graph, task)
            simulator = Simulator(graph, task.loss)
        rows = list(known)
        if not known or set(args.again) - {"passes"}:
            rows += draw(config, graph, simulator, task, args, known)
        if not any("passes" in row for row in rows):
            rows[0]["passes"] = pass_seconds(config, graph, simulator, task)
        kept = kept_at(out, seed)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"settings": settings, "rows": rows}))
        for row in rows[len(known) :]:
            print(f"seed {seed}: {row}", flush=True)
    if args.only:
        return
    rows = [row for seed in seeds for row in restored(out, seed, settings)]
    write_table(out, rows, markdown(rows, args.bits), settings=settings)
    for seed in seeds:
        kept_at(out, seed).unlink(missing_ok=True)


def render(path: Path) -> None:
    """Writes the table of a result again, from its numbers."""
    found = json.loads(path.read_text())
    text = "\n".join(markdown(found["rows"], found["settings"]["bits"]))
    path.with_suffix(".md").write_text(f"`{found['command']}`\n\n{text}\n")


def kept_at(out: Path, seed: int) -> Path:
    """Where a finished draw is kept."""
    return out.with_name(f"{out.name}.{seed}.partial.json")


def restored(out: Path, seed: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A draw's rows, finished or in a table, with the same settings; none if there are none."""
    for path in (kept_at(out, seed), out.with_suffix(".json")):
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("settings") == settings:
                return [row for row in found["rows"] if row["seed"] == seed]
    return []


def draw(
    config: Any,
    graph: Graph,
    simulator: Simulator,
    task: Task,
    args: argparse.Namespace,
    known: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Every objective that is not known yet at every budget, on one deal of the examples."""
    made = {row["objective"] for row in known}
    asked = [name for name in args.objectives if name not in made]
    params, size = task.load_params(), config.batch_size
    parts = ("ranges", "selection", "confirmation", "test")
    data = {name: batches(task.split(name), size) for name in parts}
    ranges = jr.calibrate(graph, params, data["ranges"].inputs())
    clock = time.perf_counter()
    scores = jr.score(graph, params, data["selection"], task.loss, ranges)
    scored = time.perf_counter() - clock
    seconds = dict.fromkeys(SAVED, scored)
    clusters = task.split("selection").groups
    costs: dict[str, Costs] = {}
    for name in asked:
        clock = time.perf_counter()
        if name in SAVED:
            costs[name] = tangent_costs(
                scores, name, layer_options(scores, FORMATS), clusters=clusters
            )
        else:
            options: dict[str, Any] = {"simulator": simulator} if name == "measured" else {}
            make: Callable[..., Costs] = jr.MEASURED_COSTS[name]
            arguments = (graph, params, data["selection"], task.loss, ranges)
            costs[name] = make(*arguments, formats=FORMATS, progress=bars, **options)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - clock
    model = SimulatedModel(graph, params, ranges, task.loss)
    judge = Judge(model, task, data)
    simulation = simulator.on(params, ranges, data["selection"])
    rng = np.random.default_rng(config.seed)
    rows = []
    for bits in args.bits:
        limits = Limits(weight_bits=bits)
        plans: dict[str, list[Plan]] = {}
        try:
            for name, table in costs.items():
                plan = jr.budget(scores, limits, objective=table, formats=FORMATS)
                plans[name] = [plan]
            if REFINED not in made:
                clock = time.perf_counter()
                options = {"formats": FORMATS, "rounds": args.rounds, "clusters": clusters}
                plans[REFINED] = [refined(simulation, scores, limits, **options).plan]
                seconds[REFINED] = scored + time.perf_counter() - clock
            if RANDOM not in made:
                drawn = [by_chance(scores.table, rng) for _ in range(RANDOM_PLANS)]
                plans[RANDOM] = [
                    jr.budget(scores, limits, objective=each, formats=FORMATS) for each in drawn
                ]
        except InfeasibleBudgetError as error:
            print(f"{bits:g} bits: {error}", flush=True)
            continue
        if UNIFORM not in made:
            plans[UNIFORM] = [jr.uniform(scores.table, "w8a8" if bits >= 8 else "w4a8")]
        for name, chosen in plans.items():
            row = {"seed": config.seed, "bits": bits, "objective": name}
            if name == REFINED:  # Its rounds, and the uniform plans that it was compared with.
                row["refinement"] = chosen[0].policy["refinement"]
            rows.append(row | judge.mean(chosen) | {"seconds": seconds.get(name)})
    return rows


def pass_seconds(config: Any, graph: Graph, simulator: Simulator, task: Task) -> dict[str, float]:
    """Seconds per example without compilation, on some selection examples: a training step's
    gradient, the tangent's scores, and a round of refinement.
    """
    params, some = task.load_params(), list(batches(task.split("selection"), config.batch_size))
    first, *rest = some[: PASSES + 1]
    examples = sum(len(targets) for _, targets in rest)
    ranges = jr.calibrate(graph, params, [first[0]])

    def mean_loss(params: Any, inputs: Any, targets: Any) -> Any:
        return task.loss(graph.apply(params, inputs), targets).mean()

    gradient = jax.jit(jax.grad(mean_loss))

    def after_first() -> Iterator[Any]:
        """The batches; the clock starts behind the first, which compiles."""
        nonlocal clock
        yield first
        clock = time.perf_counter()
        yield from rest

    found, clock = {}, 0.0
    for inputs, targets in after_first():
        jax.block_until_ready(gradient(params, inputs, targets))
    found["training gradient"] = time.perf_counter() - clock
    jr.score(graph, params, after_first(), task.loss, ranges)
    found["tangent"] = time.perf_counter() - clock
    simulation = simulator.on(params, ranges, rest)
    known, new = (jr.uniform(jr.tabulate(graph), name) for name in FORMATS)
    for plan in (known, new):
        clock = time.perf_counter()
        # A round attributes a plan's divergence, and measures that and the change of the next.
        simulation.divergences().attribute(plan)
        simulation.divergences().change(plan)
        simulation.change(plan)
        found["secant round"] = time.perf_counter() - clock
    return {name: seconds / examples for name, seconds in found.items()}


class Judge:
    """What plans do on the examples that chose nothing; each plan is measured once."""

    def __init__(self, model: SimulatedModel, task: Task, data: Any) -> None:
        self.model, self.task, self.data = model, task, data
        self.plain = [model.run(data[name], keep_outputs=True) for name in self.parts]
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}

    parts = ("confirmation", "test")

    def mean(self, plans: Sequence[Plan]) -> dict[str, Any]:
        """The mean over plans of the loss change, of the drop of every metric, and of the size."""
        found = [self.one(plan) for plan in plans]
        return {key: float(np.mean([each[key] for each in found])) for key in found[0]}

    def one(self, plan: Plan) -> dict[str, Any]:
        """A plan's changes against float."""
        key = tuple(plan.layers.items())
        if key not in self.known:
            runs = [self.model.run(self.data[n], plan, keep_outputs=True) for n in self.parts]
            pairs = list(zip(self.plain, runs, strict=True))
            changes = np.concatenate([after.loss - before.loss for before, after in pairs])
            row = {"change": float(changes.mean())}
            if self.task.metrics is not None:
                moves: dict[str, list[np.ndarray]] = {}
                for name, (before, after) in zip(self.parts, pairs, strict=True):
                    indices = getattr(self.task.splits, name)
                    old = self.task.metrics(before.outputs, indices)
                    new = self.task.metrics(after.outputs, indices)
                    for metric in old:
                        move = np.asarray(old[metric], float) - np.asarray(new[metric], float)
                        moves.setdefault(metric, []).append(move)
                row |= {
                    f"{m} drop": 100 * float(np.concatenate(v).mean()) for m, v in moves.items()
                }
            self.known[key] = row
        return self.known[key]


def by_chance(table: ModelTable, rng: np.random.Generator) -> Costs:
    """Costs that are drawn: a random assignment within the budget."""
    options = {}
    for row in table.layers:
        plans = {name: jr.uniform(table, name).layers[row.name] for name in ("float", *FORMATS)}
        options[row.name] = {p: 0.0 if p.is_float else rng.uniform() for p in plans.values()}
    return Costs("random", "nothing", options)


if __name__ == "__main__":
    main()

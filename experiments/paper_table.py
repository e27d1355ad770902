"""The paper's table for a config: every policy on examples that chose nothing.

    python experiments/paper_table.py --config configs/cifar_resnet20.py \
        --config.data.files=cifar10/test.zip --config.model.weights=resnet20.safetensors

Every draw deals the examples anew to ranges, selection, confirmation and test (`config.seed`), and
each row is measured on that draw's test examples. Intervals of a draw are over its examples,
clustered where these come in groups; the table's are Student's over draws. Only rows that the
table does not hold yet are made: an interrupted run goes on where it was, and further draws or
values of `--mu` are added to a table that is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from paper_rows import Draw, Row, judged, markdown, tested
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli import (
    batches,
    candidates_of,
    load_config,
    make_task,
    search_of,
    trace_task,
    with_batch_size,
)
from jaxrmils.data import Task, check_disjoint
from jaxrmils.evaluation import SimulatedModel, fit_temperature
from jaxrmils.graph import Graph
from jaxrmils.policies import Plan, Simulator, parse_format
from jaxrmils.progress import bars
from jaxrmils.statistics import default_margin


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Further options override the config: --config.data.files=FOLDER",
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--mu", type=float, nargs="*", default=[0.01, 0.1])
    parser.add_argument("--points", type=int, default=1, help="quadrature points of the search")
    parser.add_argument("--out", help="by default experiments/results/ and the config's name")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    out = Path(args.out or f"experiments/results/{Path(args.config).stem}")
    kept = out.with_suffix(".partial.json")
    settings = {"overrides": overrides, "points": args.points}
    draws = restored(kept, settings) or restored(out.with_suffix(".json"), settings)
    networks = Networks(args.points)
    for seed in bars(range(args.draws), "draws", args.draws):
        config.seed = seed
        deal = Deal(config, args.config, networks)
        known = draws.get(seed, Draw(seed, (), ()))
        draws[seed] = with_rows(deal, known, args.mu)
        if draws[seed] is not known:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(document(settings, draws)))
            for row in draws[seed].rows[len(known.rows) :]:
                print(f"draw {seed}: {row.summary()}", flush=True)
    shown = ordered([draws[seed] for seed in sorted(draws)])
    found = document(settings, {draw.seed: draw for draw in shown})
    write_table(out, found.pop("rows"), markdown(shown, config), **found)
    kept.unlink(missing_ok=True)


def document(settings: dict[str, Any], draws: dict[int, Draw]) -> dict[str, Any]:
    """What is written of the draws."""
    return {
        "settings": settings,
        "tested": {str(seed): draw.units for seed, draw in draws.items()},
        "rows": [
            {"draw": seed, **dataclasses.asdict(row)}
            for seed, draw in draws.items()
            for row in draw.rows
        ],
    }


def restored(path: Path, settings: dict[str, Any]) -> dict[int, Draw]:
    """The draws of a table or an interrupted run with the same settings."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found.get("settings") != settings:
        return {}
    rows: dict[int, list[Row]] = {int(seed): [] for seed in found["tested"]}
    for fields in found["rows"]:
        rows[fields.pop("draw")].append(Row(**fields))
    return {seed: Draw(seed, found["tested"][str(seed)], rows[seed]) for seed in rows}


def with_rows(deal: Deal, known: Draw, thresholds: Sequence[float]) -> Draw:
    """A draw with the rows that it lacks; itself if it lacks none."""
    names = {row.name for row in known.rows}
    made = [make(name) for name, make in deal.makers(thresholds).items() if name not in names]
    if not made:
        return known
    return Draw(known.seed, known.units or tested(deal.task), (*known.rows, *made))


def ordered(draws: Sequence[Draw]) -> list[Draw]:
    """Draws with the rows that all of them hold, thresholds rising within a variant."""

    def place(name: str) -> tuple[str, float]:
        head, _, threshold = name.partition(", mu ")
        return head, float(threshold or 0)

    common = set.intersection(*({row.name for row in draw.rows} for draw in draws))
    names = [row.name for row in draws[0].rows if row.name in common]
    heads = list(dict.fromkeys(place(name)[0] for name in names))
    variants = [head for head in heads if head.startswith("rmils")]
    last = [head for head in heads if head.startswith("lossless")]
    heads = [head for head in heads if head not in {*variants, *last}] + variants + last
    names.sort(key=lambda name: (heads.index(place(name)[0]), place(name)[1]))
    rows = [{row.name: row for row in draw.rows} for draw in draws]
    return [
        Draw(draw.seed, draw.units, [by_name[name] for name in names])
        for draw, by_name in zip(draws, rows, strict=True)
    ]


class Networks:
    """What all draws share: the traced network and its compiled functions."""

    def __init__(self, points: int) -> None:
        self.points = points
        self.graph: Graph | None = None
        self.simulator: Simulator | None = None

    def of(self, config: Any, task: Task) -> tuple[Graph, Simulator]:
        """The graph and the simulator; sets the config's batch size."""
        if self.graph is None or self.simulator is None:
            self.graph = trace_task(task)
            print(self.graph.coverage.summary(), flush=True)
            config.batch_size = with_batch_size(config, self.graph, task).batch_size
            self.simulator = Simulator(self.graph, task.loss, points=self.points)
        return self.graph, self.simulator


class Deal:
    """One deal of the examples; what a row needs is computed when the first row asks for it."""

    def __init__(self, config: Any, name: str, networks: Networks) -> None:
        self.config, self.name, self.networks = config, name, networks

    def makers(self, thresholds: Sequence[float]) -> dict[str, Callable[[str], Row]]:
        """By name, what makes each row."""
        makers: dict[str, Callable[[str], Row]] = {
            "float": lambda name: self.row(name, self.plain),
            "float, own temperature": self.cooled_float,
            "uniform int8": self.uniform("int8"),
        }
        if any(parse_format(name).dynamic for name in self.config.policy.formats):
            makers["uniform int8, a grid per token"] = self.uniform("w8a8d")
        makers["uniform int8, ACIQ ranges"] = self.clipped
        makers["uniform int4 weights"] = self.uniform("w4a8")
        for variant in ("radical", "balanced"):
            for mu in thresholds:
                makers[f"rmils, {variant}, mu {mu:g}"] = partial(self.rmils, variant, mu)
        makers["lossless"] = lambda name: self.simulated(name, *self.lossless)
        makers["lossless, own temperature"] = self.cooled_lossless
        return makers

    @cached_property
    def task(self) -> Task:
        task = make_task(self.config, self.name, bars)
        check_disjoint(task.splits, task.training, task.dataset.groups)
        self.networks.of(self.config, task)
        return task

    @cached_property
    def graph(self) -> Graph:
        return self.networks.of(self.config, self.task)[0]

    @cached_property
    def params(self) -> Any:
        return self.task.load_params()

    @cached_property
    def data(self) -> dict[str, Any]:
        parts = ("ranges", "selection", "confirmation", "test")
        task = self.task  # sets the batch size
        return {name: batches(task.split(name), self.config.batch_size) for name in parts}

    def calibrated(self, **options: Any) -> jr.Ranges:
        return jr.calibrate(self.graph, self.params, self.data["ranges"].inputs(), **options)

    @cached_property
    def prepared(self) -> tuple[jr.Ranges, jr.Scores, float]:
        """Ranges and scores, and the seconds that they took."""
        data = self.data["selection"]
        clock = time.perf_counter()
        ranges = self.calibrated()
        wanted = candidates_of(self.config, self.graph)
        candidates = {
            "activation_candidates": wanted.activations,
            "weight_candidates": wanted.weights,
        }
        scores = jr.score(self.graph, self.params, data, self.task.loss, ranges, **candidates)
        return ranges, scores, time.perf_counter() - clock

    @cached_property
    def lossless(self) -> tuple[Plan, float]:
        """The policy's plan, and the seconds from calibration to it."""
        (ranges, scores, prepared), config, task = self.prepared, self.config, self.task
        clock = time.perf_counter()
        found = jr.lossless(
            self.graph,
            self.params,
            self.data["selection"],
            self.data["confirmation"],
            task.loss,
            ranges,
            margin=self.margin,
            alpha=config.verify.alpha,
            unit=task.unit,
            search=search_of(config.policy),
            scores=scores,
            directed=config.policy.directed,
            groups=task.split("confirmation").groups,
            selection_groups=task.split("selection").groups,
            simulator=self.networks.of(config, task)[1],
        )
        searched = prepared + time.perf_counter() - clock
        print(f"draw {config.seed}: {found.words}; {searched:.0f} s", flush=True)
        return found.plan, searched

    @cached_property
    def margin(self) -> float:
        """That of the config, or the policy's own."""
        if self.config.verify.margin:
            return self.config.verify.margin
        return default_margin(float(self.selected.loss.mean()), unit=self.task.unit)

    @cached_property
    def model(self) -> SimulatedModel:
        return SimulatedModel(self.graph, self.params, self.prepared[0], self.task.loss)

    @cached_property
    def plain(self) -> Any:
        """The float model on the test examples."""
        return self.model.run(self.data["test"], keep_outputs=True)

    @cached_property
    def selected(self) -> Any:
        """The float model on the selection examples."""
        return self.model.run(self.data["selection"], keep_outputs=True)

    def row(
        self, name: str, run: Any, plan: Plan | None = None, seconds: float | None = None
    ) -> Row:
        """A run on the test examples as a row."""
        table = self.prepared[1].table
        return judged(name, self.task, self.plain, run, table, plan, self.margin, seconds)

    def simulated(self, name: str, plan: Plan, seconds: float | None = None) -> Row:
        return self.row(name, self.tested(plan), plan, seconds)

    def tested(self, plan: Plan | None, temperature: float = 1.0) -> Any:
        """A plan, or float, on the test examples."""
        options: dict[str, Any] = {"temperature": temperature, "keep_outputs": True}
        return self.model.run(self.data["test"], plan, **options)

    def temperature(self, selected: Any) -> float:
        """What lowers the loss of a run on the selection examples most."""
        targets = self.task.split("selection").targets
        return fit_temperature(selected.outputs, targets, self.task.loss).value

    def cooled_float(self, name: str) -> Row:
        return self.row(name, self.tested(None, self.temperature(self.selected)))

    def cooled_lossless(self, name: str) -> Row:
        plan = self.lossless[0]
        selected = self.model.run(self.data["selection"], plan, keep_outputs=True)
        return self.row(name, self.tested(plan, self.temperature(selected)), plan)

    def uniform(self, format_: str) -> Callable[[str], Row]:
        return lambda name: self.simulated(name, jr.uniform(self.prepared[1].table, format_))

    def clipped(self, name: str) -> Row:
        """Uniform int8 with the ranges of ACIQ."""
        ranges = self.calibrated(estimator="aciq_laplace")
        model = SimulatedModel(self.graph, self.params, ranges, self.task.loss)
        plan = jr.uniform(self.prepared[1].table, "int8")
        return self.row(name, model.run(self.data["test"], plan, keep_outputs=True), plan)

    def rmils(self, variant: str, mu: float, name: str) -> Row:
        _, scores, seconds = self.prepared
        plan = jr.rmils(self.graph, scores, mu=mu, variant=variant)
        return self.simulated(name, plan, seconds)


if __name__ == "__main__":
    main()

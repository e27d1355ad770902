"""The paper's table for a config: every policy on examples that chose nothing.

    python experiments/paper_table.py --config configs/cifar_resnet20.py \
        --config.data.files=cifar10/test.zip --config.model.weights=resnet20.safetensors

Every draw deals the examples anew to ranges, selection, confirmation and test (`config.seed`), and
each row is measured on that draw's test examples. Intervals of a draw are over its examples,
clustered where these come in groups; the table's are Student's over draws. Finished draws are kept,
so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from paper_rows import Row, judged, markdown
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli.checks import candidates_of, search_of
from jaxrmils.cli.config import load_config
from jaxrmils.cli.pipeline import batches, make_task, trace_task, with_batch_size
from jaxrmils.data import Task, check_disjoint
from jaxrmils.evaluation.simulate import SimulatedModel
from jaxrmils.evaluation.temperature import fit_temperature
from jaxrmils.graph import Graph
from jaxrmils.policies import Simulator, parse_format
from jaxrmils.progress import bars


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
    settings = {"overrides": overrides, "mu": args.mu, "points": args.points}
    draws = restored(kept, settings)
    graph = simulator = None
    for seed in bars(range(args.draws), "draws", args.draws):
        if seed < len(draws):
            continue
        config.seed = seed
        task = make_task(config, args.config, bars)
        check_disjoint(task.splits, task.training, task.dataset.groups)
        if graph is None or simulator is None:
            graph = trace_task(task)
            print(graph.coverage.summary(), flush=True)
            config = with_batch_size(config, graph, task)
            simulator = Simulator(graph, task.loss, points=args.points)
        rows = draw(config, graph, simulator, task, args)
        draws.append([row.__dict__ for row in rows])
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"settings": settings, "draws": draws}))
        for row in rows:
            print(f"draw {seed}: {row.summary()}", flush=True)
    shown = [[Row(**row) for row in rows] for rows in draws[: args.draws]]
    write_table(out, [row for rows in draws for row in rows], markdown(shown, config))
    kept.unlink(missing_ok=True)


def restored(kept: Path, settings: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The draws of an interrupted run with the same settings."""
    if not kept.exists():
        return []
    found = json.loads(kept.read_text())
    return found["draws"] if found["settings"] == settings else []


def draw(config: Any, graph: Graph, simulator: Simulator, task: Task, args: Any) -> list[Row]:
    """All rows of one deal of the examples."""
    params, size = task.load_params(), config.batch_size
    parts = {name: task.split(name) for name in ("ranges", "selection", "confirmation", "test")}
    data = {name: batches(part, size) for name, part in parts.items()}
    margin = config.verify.margin or None
    clock = Clock()
    ranges = jr.calibrate(graph, params, data["ranges"].inputs())
    wanted = candidates_of(config, graph)
    scores = jr.score(
        graph,
        params,
        data["selection"],
        task.loss,
        ranges,
        activation_candidates=wanted.activations,
        weight_candidates=wanted.weights,
    )
    prepared = clock.seconds()
    found = jr.lossless(
        graph,
        params,
        data["selection"],
        data["confirmation"],
        task.loss,
        ranges,
        margin=margin,
        alpha=config.verify.alpha,
        unit=task.unit,
        search=search_of(config.policy),
        scores=scores,
        directed=config.policy.directed,
        groups=parts["confirmation"].groups,
        selection_groups=parts["selection"].groups,
        simulator=simulator,
    )
    searched = clock.seconds()
    print(f"draw {config.seed}: {found.words}; {searched:.0f} s", flush=True)
    model = SimulatedModel(graph, params, ranges, task.loss)
    plain = model.run(data["test"], keep_outputs=True)
    table = scores.table

    def row(name: str, run: Any, plan: Any = None, seconds: float | None = None) -> Row:
        return judged(name, task, plain, run, table, plan, found.margin, seconds)

    def simulated(name: str, plan: Any, seconds: float | None = None, by: Any = model) -> Row:
        return row(name, by.run(data["test"], plan, keep_outputs=True), plan, seconds)

    fitted = model.run(data["selection"], keep_outputs=True).outputs
    targets = parts["selection"].targets
    temperature = fit_temperature(fitted, targets, task.loss).value
    cooled = model.run(data["test"], temperature=temperature, keep_outputs=True)
    rows = [
        row("float", plain),
        row("float, own temperature", cooled),
        simulated("uniform int8", jr.uniform(table, "int8")),
    ]
    if any(parse_format(name).dynamic for name in config.policy.formats):
        rows.append(simulated("uniform int8, a grid per token", jr.uniform(table, "w8a8d")))
    aciq = jr.calibrate(graph, params, data["ranges"].inputs(), estimator="aciq_laplace")
    other = SimulatedModel(graph, params, aciq, task.loss)
    rows.append(simulated("uniform int8, ACIQ ranges", jr.uniform(table, "int8"), by=other))
    rows.append(simulated("uniform int4 weights", jr.uniform(table, "w4a8")))
    for variant in ("radical", "balanced"):
        for mu in args.mu:
            plan = jr.rmils(graph, scores, mu=mu, variant=variant)
            rows.append(simulated(f"rmils, {variant}, mu {mu:g}", plan, prepared))
    rows.append(simulated("lossless", found.plan, searched))
    cooled_plan = model.run(data["selection"], found.plan, keep_outputs=True).outputs
    value = fit_temperature(cooled_plan, targets, task.loss).value
    run = model.run(data["test"], found.plan, temperature=value, keep_outputs=True)
    rows.append(row("lossless, own temperature", run, found.plan))
    return rows


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.began


if __name__ == "__main__":
    main()

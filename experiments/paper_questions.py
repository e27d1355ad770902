"""What the paper takes for granted, asked of a network: five questions, answered with numbers.

    python experiments/paper_questions.py --config configs/cifar_resnet20.py \
        --config.data.files=cifar10/test.zip --config.model.weights=resnet20.safetensors

1. Is the weights' first-order term negligible beside the activations'?
2. How large is the second-order term, and does it explain what the tangent misses?
3. What do tangent, secant and a layer measured alone say of it, and what are their sums worth?
4. How many examples does a prediction, a ranking of layers, a plan need?
5. Does the sign of a contribution hold on other data, and what is taking negative ones worth?

Scales come from the split `ranges`, scores and plans from `selection`, and `test` is the held-out
data. All roundings are to nearest unless said. Intervals are 95 %. Writes JSON and markdown;
`paper_plots.py` draws them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paper_answers import markdown
from paper_transfer import curve, interval, rules, signs
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli import batches, load_config, make_task, trace_task, with_batch_size
from jaxrmils.data import Task, check_disjoint
from jaxrmils.graph import LayerRow, ModelTable
from jaxrmils.policies import Plan, Simulation, Simulator, plan_switches
from jaxrmils.progress import bars
from jaxrmils.sensitivity import Candidate, Curvature, Scores, all_off

KINDS = ("weights", "activations")
BITS = (8, 4)
# Per plan, the width of the weights and of the activations.
PLANS = {"int8": (8, 8), "w4a8": (4, 8)}
NEAREST = tuple(Candidate(bits) for bits in BITS)


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Further options override the config: --config.data.files=FOLDER",
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--subsets", type=int, default=50, help="selection subsets of each size")
    parser.add_argument("--measured", type=int, default=5, help="of these, with a measured plan")
    parser.add_argument("--smallest", type=int, default=64, help="examples in the smallest subset")
    parser.add_argument("--out", help="by default experiments/results/ and the config's name")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    task = make_task(config, args.config, bars)
    check_disjoint(task.splits, task.training, task.dataset.groups)
    if task.dataset.groups is not None:
        raise SystemExit("examples come in groups; subsets and intervals here are over examples")
    began = time.perf_counter(), time.process_time()
    answers = answer(config, task, args)
    answers["seconds"] = time.perf_counter() - began[0]
    answers["cpu_seconds"] = time.process_time() - began[1]
    out = Path(args.out or f"experiments/results/paper_questions_{Path(args.config).stem}")
    write_table(out, [answers], markdown(answers))


@dataclass(frozen=True, eq=False)
class Network:
    """A task's network with all that is known of it before a question is asked.

    Attributes:
      scores, truth: tangents on the selection and on the held-out examples.
      second_order: on the selection examples.
      chosen, held_out: simulations on these examples.
      shares: per plan of `PLANS`, the secant shares of the layers on the selection examples.
      true_shares: of w4a8, on the held-out examples.
    """

    scores: Scores
    truth: Scores
    second_order: Curvature
    chosen: Simulation
    held_out: Simulation
    shares: dict[str, dict[str, np.ndarray]]
    true_shares: dict[str, np.ndarray]

    @property
    def table(self) -> ModelTable:
        """The network's layers."""
        return self.scores.table


def prepare(config: Any, task: Task) -> Network:
    """Calibrates, scores and attributes the task's network."""
    graph = trace_task(task)
    print(graph.coverage.summary(), flush=True)
    params, size = task.load_params(), with_batch_size(config, graph, task).batch_size
    selection, test = (batches(task.split(name), size) for name in ("selection", "test"))
    ranges = jr.calibrate(graph, params, batches(task.split("ranges"), size).inputs())
    simulator = Simulator(graph, task.loss, points=2)
    chosen, held_out = (simulator.on(params, ranges, data) for data in (selection, test))
    uniform = {name: jr.uniform(jr.tabulate(graph), name) for name in PLANS}
    return Network(
        scores=jr.score(graph, params, selection, task.loss, ranges, progress=bars),
        truth=jr.score(graph, params, test, task.loss, ranges, progress=bars),
        second_order=jr.curvature(
            graph,
            params,
            selection,
            task.loss,
            ranges,
            activation_candidates=NEAREST,
            weight_candidates=NEAREST,
            progress=bars,
        ),
        chosen=chosen,
        held_out=held_out,
        shares={name: dict(chosen.attribute(plan, bars).layers) for name, plan in uniform.items()},
        true_shares=dict(held_out.attribute(uniform["w4a8"], bars).layers),
    )


def answer(config: Any, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """All answers as plain values."""
    net = prepare(config, task)
    parts, part_sums = part_rows(net)
    layers, sums = layer_rows(net)
    return {
        "network": config.model.name or config.task,
        "unit": task.unit,
        "selection": len(net.scores),
        "held_out": len(net.truth),
        "ranges": len(task.splits.ranges),
        "float_loss": float(net.held_out.float_loss.mean()),
        "parts": parts,
        "part_sums": part_sums,
        "layers": layers,
        "sums": sums,
        "curve": curve(net, args.smallest, args.subsets, args.measured, config.seed),
        "signs": signs(net.scores, net.truth, config.seed),
        "rules": rules(net),
    }


def part_rows(net: Network) -> tuple[list[dict], list[dict]]:
    """Every layer's weights and activations by themselves: tangent, second order, measured.

    Returns:
      A row for every part and width, and one for all parts of a kind and width together.
    """
    rows, sums = [], []
    jobs = [(kind, bits) for kind in KINDS for bits in BITS]
    for kind, bits in bars(jobs, "parts alone", len(jobs)):
        plan = jr.uniform(net.table, f"w{bits}" if kind == "weights" else f"int{bits}")
        with_part = [
            r for r in net.table.layers if (r.has_weight, r.activations)[KINDS.index(kind)]
        ]
        found: dict[str, list[np.ndarray]] = {"tangent": [], "second": [], "alone": []}
        for row in with_part:
            found["tangent"].append(term(net.scores, row, kind, bits))
            found["second"].append(term(net.second_order, row, kind, bits))
            found["alone"].append(part_change(net.chosen, plan.only(row.name), kind))
        for i, row in enumerate(with_part):
            values = {name: interval(each[i]) for name, each in found.items()}
            rows.append({"layer": row.name, "kind": kind, "bits": bits, **values})
        total = {name: interval(sum_of(each)) for name, each in found.items()}
        total["measured"] = interval(part_change(net.chosen, plan, kind))
        sums.append({"kind": kind, "bits": bits, **total})
    return rows, sums


def part_change(simulation: Simulation, plan: Plan, kind: str) -> np.ndarray:
    """float64 [N]: the change by a plan's weights or by its activations alone.

    Integer activations need integer weights, so that no plan has activations alone; here their
    weights are switched off.
    """
    if kind == "weights":
        return simulation.change(plan)
    simulator, ranges = simulation.simulator, simulation.ranges
    activations, _ = plan_switches(simulator.graph, ranges, plan)
    switches = activations, all_off(simulator.graph, ranges)[1]
    fixed = simulation.params, simulation.noise, ranges, switches
    losses = [simulator.losses(*fixed, x, y) for x, y in simulation.batches]
    return np.concatenate([np.asarray(x, np.float64) for x in losses]) - simulation.float_loss


def layer_rows(net: Network) -> tuple[list[dict], list[dict]]:
    """Every layer in the uniform plans: tangent, second order, secant share, measured alone.

    Returns:
      A row for every layer and plan, and one for all layers of a plan together.
    """
    rows, sums = [], []
    for name, widths in PLANS.items():
        plan, shares = jr.uniform(net.table, name), net.shares[name]
        found: dict[str, list[np.ndarray]] = {}
        for row in bars(net.table.layers, f"layers alone in {name}", len(net.table.layers)):
            values = {
                "tangent": plan_term(net.scores, row, widths),
                "second": plan_term(net.second_order, row, widths),
                "secant": shares[row.name],
                "alone": net.chosen.change(plan.only(row.name)),
            }
            for key, value in values.items():
                found.setdefault(key, []).append(value)
            intervals = {key: interval(value) for key, value in values.items()}
            rows.append({"layer": row.name, "plan": name, **intervals})
        total = {key: interval(sum_of(each)) for key, each in found.items()}
        total["measured"] = interval(net.chosen.change(plan))
        total["held_out"] = interval(net.held_out.change(plan))
        sums.append({"plan": name, **total})
    return rows, sums


def term(source: Scores | Curvature, row: LayerRow, kind: str, bits: int) -> np.ndarray:
    """float64 [N]: the first- or second-order term of a layer's weight or of its activations."""
    if kind == "weights":
        return np.asarray(source.weight(row.name, Candidate(bits)), np.float64)
    operands = [source.activation(a.site, a.position, Candidate(bits)) for a in row.activations]
    return sum_of(operands)


def plan_term(source: Scores | Curvature, row: LayerRow, widths: tuple[int, int]) -> np.ndarray:
    """float64 [N]: the same of a layer with weights and activations of these widths."""
    return sum_of(list(_terms(source, row, widths)))


def _terms(
    source: Scores | Curvature, row: LayerRow, widths: tuple[int, int]
) -> Iterator[np.ndarray]:
    if row.has_weight:
        yield term(source, row, "weights", widths[0])
    if row.activations:
        yield term(source, row, "activations", widths[1])


def sum_of(values: list[np.ndarray]) -> np.ndarray:
    """The sum of arrays in float64."""
    return np.sum(np.stack(values).astype(np.float64), axis=0)


if __name__ == "__main__":
    main()

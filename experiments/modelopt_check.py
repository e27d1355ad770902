"""NVIDIA ModelOpt's own search beside this library's: same network, examples, formats and size.

    python experiments/modelopt_check.py prepare runs/modelopt --config configs/cifar_resnet56.py \
        --config.data.files=cifar10/test.zip --config.model.weights=resnet56.safetensors
    python experiments/modelopt_check.py search runs/modelopt --weights resnet56.safetensors
    python experiments/modelopt_check.py judge runs/modelopt

The second command runs in an environment of its own (`pip install torch safetensors requests
huggingface_hub nvidia-modelopt`) and knows nothing of jaxrmils: `auto_quantize` gets the selection
examples, int8 activations, and per-channel weights of 8 or 4 bits. The other two run in that of
jaxrmils. `judge` takes only the assignment from ModelOpt, gives the library's objectives the size
that it reached, and measures all of them in one simulation, on the confirmation and test examples;
an interrupted run goes on where it was. For the CIFAR networks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 50
FORMATS = {8: "w8a8", 4: "w4a8"}
OBJECTIVES = ("squared_output", "squared")


def main() -> None:
    """Runs one of the three steps."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Further options of prepare override the config: --config.data.files=FOLDER",
    )
    parser.add_argument("step", choices=("prepare", "search", "judge"))
    parser.add_argument("folder", type=Path, help="what the steps pass on to each other")
    parser.add_argument("--config", help="of prepare")
    parser.add_argument("--draws", type=int, default=5, help="of prepare, and of judge")
    parser.add_argument("--first-seed", type=int, default=100, help="of prepare")
    parser.add_argument("--bits", type=float, nargs="+", default=[5, 6], help="of prepare")
    parser.add_argument("--weights", type=Path, help="of search: the checkpoint, .safetensors")
    parser.add_argument("--out", help="of judge: by default experiments/results/modelopt_check")
    args, overrides = parser.parse_known_args()
    if args.step != "prepare" and overrides:
        parser.error(f"unknown options: {' '.join(overrides)}")
    if args.step == "prepare" and not args.config:
        parser.error("prepare needs --config")
    if args.step == "search" and not args.weights:
        parser.error("search needs --weights")
    {"prepare": prepare, "search": search, "judge": judge}[args.step](args, overrides)


def prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the selection examples of every draw, and what the other steps must know."""
    from jaxrmils.cli import load_config, make_task
    from jaxrmils.progress import bars

    config = load_config(args.config, overrides)
    args.folder.mkdir(parents=True, exist_ok=True)
    seeds = [args.first_seed + number for number in range(args.draws)]
    for seed in seeds:
        config.seed = seed
        part = make_task(config, args.config, bars).split("selection")
        ((images, labels),) = part.batches(len(part))
        nchw = np.asarray(images, np.float32).transpose(0, 3, 1, 2)
        np.savez(args.folder / f"selection{seed}.npz", images=nchw, labels=np.asarray(labels))
    settings = {
        "config": args.config,
        "overrides": overrides,
        "network": config.model.name,
        "seeds": seeds,
        "bits": args.bits,
        "command": "python " + " ".join(sys.argv),
    }
    (args.folder / "settings.json").write_text(json.dumps(settings, indent=1))
    print(f"{len(seeds)} draws of {len(labels)} examples in {args.folder}; next: search")


def search(args: argparse.Namespace, _: list[str]) -> None:
    """ModelOpt's assignments; needs PyTorch and ModelOpt, not jaxrmils."""
    import modelopt.torch.quantization as mtq
    import torch
    from reference_logits import original
    from safetensors.torch import load_file

    settings = json.loads((args.folder / "settings.json").read_text())
    weights = {k.removeprefix("module."): v for k, v in load_file(args.weights).items()}
    formats = [modelopt_format(bits) for bits in FORMATS]
    everywhere = {
        "module_name_patterns": ["*"],
        "quantization_formats": formats,
        "allow_no_quant": False,
    }
    plans = []
    for seed in settings["seeds"]:
        kept = np.load(args.folder / f"selection{seed}.npz")
        images, labels = torch.from_numpy(kept["images"]), torch.from_numpy(kept["labels"]).long()
        data = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        for bits in settings["bits"]:
            network = original(settings["network"], kept["images"].shape[-1])
            network.load_state_dict(weights)
            clock = time.perf_counter()
            _, found = mtq.auto_quantize(
                network,
                constraints={"effective_bits": bits},
                quantization_formats=formats,
                data_loader=data,
                forward_step=lambda model, batch: model(batch[0]),
                loss_func=lambda out, batch: torch.nn.functional.cross_entropy(out, batch[1]),
                num_calib_steps=len(data),
                num_score_steps=len(data),
                module_search_spaces=[everywhere],
                checkpoint=str(args.folder / f"scores{seed}.pth"),
            )
            chosen = {
                name.removesuffix(".quant_recipe"): FORMATS[int(recipe.compression * 16)]
                for name, recipe in found["best"]["recipe"].items()
            }
            seconds = time.perf_counter() - clock
            plans.append({"seed": seed, "bits": bits, "formats": chosen, "seconds": seconds})
            (args.folder / "plans.json").write_text(
                json.dumps({"versions": search_versions(), "plans": plans}, indent=1)
            )
            print(f"seed {seed}, {bits:g} bits: {found['best']['constraints']}", flush=True)
    print("next: judge")


def modelopt_format(bits: int) -> dict[str, Any]:
    """A format as ModelOpt is told: weights per output channel, inputs per tensor in int8."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        ],
        "algorithm": "max",
        "effective_bits": bits,
    }


def search_versions() -> dict[str, str]:
    """What chose."""
    return {name: version(name) for name in ("nvidia-modelopt", "torch")}


def judge(args: argparse.Namespace, _: list[str]) -> None:
    """Measures ModelOpt's plans and the library's of the same size."""
    from objectives_table import markdown
    from results_file import write_table

    from jaxrmils.cli import load_config, make_task, trace_task, with_batch_size
    from jaxrmils.policies import Simulator
    from jaxrmils.progress import bars

    settings = json.loads((args.folder / "settings.json").read_text())
    document = json.loads((args.folder / "plans.json").read_text())
    config = load_config(settings["config"], settings["overrides"])
    seeds, graph, simulator = settings["seeds"][: args.draws], None, None
    kept = args.folder / "judged.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for seed in bars(seeds, "draws", len(seeds)):
        if any(row["seed"] == seed for row in rows):
            continue
        config.seed = seed
        task = make_task(config, settings["config"], bars)
        if graph is None or simulator is None:
            graph = trace_task(task)
            config = with_batch_size(config, graph, task)
            simulator = Simulator(graph, task.loss)
        found = [each for each in document["plans"] if each["seed"] == seed]
        rows += judged(config, graph, simulator, task, found)
        kept.write_text(json.dumps(rows))
    rows = [row for row in rows if row["seed"] in seeds]
    chose = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = [
        f"`{settings['command']}`; ModelOpt's plans by {chose}.",
        "",
        *markdown(rows),
    ]
    write_table(Path(args.out or "experiments/results/modelopt_check"), rows, lines)


def judged(
    config: Any, graph: Any, simulator: Any, task: Any, found: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """All plans of one draw on the examples that chose nothing."""
    from objectives import Judge

    import jaxrmils as jr
    from jaxrmils.cli import batches
    from jaxrmils.evaluation import SimulatedModel
    from jaxrmils.policies import Limits, layer_options, tangent_costs

    formats = tuple(FORMATS.values())
    given = [modelopt_plan(jr.tabulate(graph), each["formats"]) for each in found]
    params = task.load_params()
    parts = ("ranges", "selection", "confirmation", "test")
    data = {name: batches(task.split(name), config.batch_size) for name in parts}
    ranges = jr.calibrate(graph, params, data["ranges"].inputs())
    clock = time.perf_counter()
    scores = jr.score(graph, params, data["selection"], task.loss, ranges)
    seconds = {"squared": time.perf_counter() - clock}
    clock = time.perf_counter()
    costs = {
        "squared_output": jr.MEASURED_COSTS["squared_output"](
            graph, params, data["selection"], task.loss, ranges, formats=formats
        )
    }
    seconds["squared_output"] = time.perf_counter() - clock
    costs["squared"] = tangent_costs(scores, "squared", layer_options(scores, formats))
    judge = Judge(SimulatedModel(graph, params, ranges, task.loss), task, data)
    simulation = simulator.on(params, ranges, data["selection"])
    rows = []
    for each, theirs in zip(found, given, strict=True):
        bits = average_bits(scores.table, theirs)
        limits = Limits(weight_bits=bits)
        plans = {"modelopt": theirs}
        for name, table in costs.items():
            plans[name] = jr.budget(scores, limits, objective=table, formats=formats)
        clock = time.perf_counter()
        plans["refined"] = jr.refined(simulation, scores, limits, formats=formats).plan
        seconds |= {
            "refined": seconds["squared"] + time.perf_counter() - clock,
            "modelopt": each["seconds"],
        }
        for name, plan in plans.items():
            row = {"seed": each["seed"], "bits": each["bits"], "objective": name}
            reached = average_bits(scores.table, plan)
            row |= judge.mean([plan]) | {"seconds": seconds[name], "reached": reached}
            rows.append(row)
            print(row, flush=True)
    return rows


def modelopt_plan(table: Any, formats: dict[str, str]) -> Any:
    """ModelOpt's assignment as a plan.

    Raises:
      ValueError: a layer is missing or unknown.
    """
    import jaxrmils as jr

    named = {f"{name.replace('.', '/')}/kernel": format for name, format in formats.items()}
    known = {row.name for row in table.layers if row.has_weight}
    if named.keys() != known:
        raise ValueError(
            f"layers of one side only: {sorted(named.keys() ^ known)}; names are expected to be "
            "PyTorch's with '/' for '.' and '/kernel' added"
        )
    return jr.uniform(table, "w8a8", force=named)


def average_bits(table: Any, plan: Any) -> float:
    """Mean width of the quantizable layers' weight elements."""
    layers = [row for row in table.layers if row.has_weight]
    total = sum(row.weight_size * plan.layers[row.name].weight_bits for row in layers)
    return total / sum(row.weight_size for row in layers)


if __name__ == "__main__":
    main()

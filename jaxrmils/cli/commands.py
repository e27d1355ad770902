"""What each command does."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.report_files import RUN_KIND
from jaxrmils.cli import pipeline, saving
from jaxrmils.cli.batch_sizes import with_batch_size, with_recorded_size
from jaxrmils.cli.checks import candidates_of
from jaxrmils.cli.config import ConfigError, apply_overrides, load_config
from jaxrmils.cli.defaults import base_config
from jaxrmils.cli.printing import print_saved
from jaxrmils.data import DataError, Task
from jaxrmils.evaluation import (
    EvaluationError,
    Measured,
    coverage_table,
    measure,
    metric_changes,
    metric_line,
    wide_console,
)
from jaxrmils.evaluation.metrics import TOP_1
from jaxrmils.graph import Graph, TraceError, tabulate
from jaxrmils.lowering import default_backend
from jaxrmils.lowering.table import remarks, remarks_on_layers
from jaxrmils.numerics import CalibrationError, CheckpointError, format_size
from jaxrmils.policies import FORMATS, PlanError
from jaxrmils.progress import Progress, bars, silent
from jaxrmils.sensitivity import CandidateSet, ScoreError
from jaxrmils.statistics import StatisticsError, noninferiority, verdict_words
from jaxrmils.zoo import WeightError

USAGE_ERRORS = (PlanError,)
INPUT_ERRORS = (
    artifacts.ArtifactError,
    CalibrationError,
    DataError,
    EvaluationError,
    ScoreError,
    StatisticsError,
    TraceError,
    WeightError,
    ImportError,
    OSError,
)


@dataclass(frozen=True)
class Outcome:
    """What a command has to tell: its data as JSON values, and whether the verdict is lossless."""

    data: dict[str, Any]
    lossless: bool = True


def console_of(args: argparse.Namespace) -> Console:
    """Where people read: stdout, or stderr where stdout is for machines."""
    return wide_console(sys.stderr if args.json else sys.stdout)


def _progress(args: argparse.Namespace) -> Progress:
    return silent if args.quiet else bars


def demo(args: argparse.Namespace) -> Outcome:
    """The main job with the embedded defaults."""
    return _run(args, apply_overrides(base_config(), args.overrides), None)


def quantize(args: argparse.Namespace) -> Outcome:
    """The main job with a config file."""
    config = load_config(args.config, args.overrides)
    if args.show_config:
        if not args.json:
            print(config)
        return Outcome(config.to_dict())
    if not args.out:
        raise ConfigError("quantize needs --out RUN, the folder to write (or --show-config)")
    return _run(args, config, args.config)


def _run(args: argparse.Namespace, config: Any, path: str | None) -> Outcome:
    console = console_of(args)
    kept = _kept(args)
    if kept is not None and kept.folder.is_dir():
        console.print(Text(f"Progress   goes on from {kept.folder}"))
    try:
        result = pipeline.run(config, path, _progress(args), kept=kept)
    except CheckpointError as error:
        raise ConfigError(f"--resume: {error} (or leave out --resume)") from error
    written = saving.save(result, config, path, args.out)
    if kept is not None:
        shutil.rmtree(kept.folder, ignore_errors=True)
    console.print(Text(result.task.name, style="bold"))
    print_saved(artifacts.load_run(args.out).report, console, mu_title=_mu_title(result))
    if result.plan.is_float:
        console.print(Text(_nothing_passed(config, result)))
    if "refinement" in result.plan.policy:
        console.print(Text(f"Refined    {_refinement_words(result.plan.policy['refinement'])}"))
    for note in _layer_notes(config, result.graph):
        console.print(Text(f"Note       {note}"))
    if not config.batch_size:
        console.print(Text(f"Batches    {result.batch_size} examples, which fit into memory"))
    console.print(Text(f"Files      {args.out}: {', '.join(written)}"))
    data = {"out": str(args.out), "files": written, **saving.report_dict(result)}
    return Outcome(data, result.report.test.passed and not result.plan.is_float)


def _kept(args: argparse.Namespace) -> pipeline.Kept | None:
    """Where a run's progress is kept, beside its folder, which is there when it is done."""
    if args.resume is None:
        return None
    if not args.resume >= 0:
        raise ConfigError(f"--resume is {args.resume}; expected seconds between saves, 0 or more")
    out = Path(args.out)
    return pipeline.Kept(out.with_name(f"{out.name}.progress"), args.resume)


def _refinement_words(record: Mapping[str, Any]) -> str:
    """What the rounds of a refinement did, on the data that chose the plan."""
    rounds, uniform = record["rounds"], record["uniform"]
    count = len(rounds) - 1
    words = (
        f"{count} round{'s' * (count != 1)} took the selection split's loss change from "
        f"{rounds[0]['selection']:+.5f} to {record['selection']:+.5f}"
    )
    if not uniform:
        return words
    best = min(uniform, key=lambda name: uniform[name])
    return f"{words} (uniform {best}: {uniform[best]:+.5f})"


def _nothing_passed(config: Any, result: pipeline.Result) -> str:
    if not result.mu:
        return "Note       the plan leaves every layer in float"
    values = {
        (name, bits): value
        for name, by_bits in result.mu.items()
        for bits, value in by_bits.items()
        if bits in config.policy.bits
    }
    (name, bits), largest = max(values.items(), key=lambda entry: entry[1])
    return (
        f"Note       no layer's mu reaches the threshold {config.policy.mu}, so every layer stays "
        f"float; the largest is {largest:.3g} ({name} in int{bits}): lower policy.mu"
    )


def _layer_notes(config: Any, graph: Graph) -> tuple[str, ...]:
    """What the model's layers can't have of the formats that a config names."""
    if candidates_of(config, graph) == CandidateSet():
        return ()
    return remarks_on_layers({site.kind for site in graph.sites})


def _mu_title(result: pipeline.Result) -> str:
    if not result.mu:
        return ""
    policy = result.plan.policy
    return f"mu ({policy['normalization']}), against the threshold {policy['mu']}"


def inspect(args: argparse.Namespace) -> Outcome:
    """Layers and coverage of a model."""
    config = load_config(args.config, args.overrides)
    task = pipeline.make_task(config, args.config)
    graph = pipeline.trace_task(task, pipeline.shortcuts_of(config))
    table = tabulate(graph)
    console = console_of(args)
    console.print(Text(task.name, style="bold"))
    console.print(coverage_table(graph, table))
    console.print(f"Parameters {format_size(table.float_bits)}")
    if graph.shortcut_sites:
        kept = "as codes" if graph.shortcuts == "codes" else "in float (codes are faster)"
        shared = f"{len(graph.shortcut_sites)} of {len(graph.sites)} inputs"
        console.print(Text(f"Shortcuts  {shared} are read again behind their layer, {kept}"))
    kinds = {site.kind for site in graph.sites}
    notes = (*remarks(default_backend(), FORMATS), *remarks_on_layers(kinds))
    for note in notes:
        console.print(Text(f"Note       {note}"))
    return Outcome(
        {
            "task": task.name,
            "layers": [asdict(row) for row in table.layers],
            "coverage": [asdict(entry) for entry in graph.coverage.entries],
            "summary": graph.coverage.summary(),
            "float_bits": table.float_bits,
            "shortcuts": {"read": graph.shortcuts, "sites": list(graph.shortcut_sites)},
            "notes": list(notes),
        }
    )


def evaluate(args: argparse.Namespace) -> Outcome:
    """A saved model on one split."""
    folder = Path(args.run_folder)
    config, task = task_of(folder, args)
    model = artifacts.load_model(folder / "model", task.apply)
    info = artifacts.load_record(folder / "run.json", RUN_KIND)
    config = with_recorded_size(config, info, args)
    config = with_batch_size(config, model.graph, task)
    params = None
    if not args.no_float:
        params = task.load_params()
    if config.loss != "task":
        if params is None:
            raise ConfigError(
                f"the run's loss is {config.loss!r}, the distance to the float model's outputs; "
                "leave out --no-float"
            )
        task = pipeline.without_labels(
            task, model.graph, params, config.loss, config.batch_size, (args.split,)
        )
    split = task.split(args.split)
    held_out = pipeline.batches(split, config.batch_size)
    metrics = pipeline.metrics_on(task, args.split)
    run = partial(measure, model.graph, batches=held_out, loss=task.loss, metrics=metrics)
    after = run(model, progress=_progress(args))
    data, lines = _measured(task, args.split, after)
    data |= {"run": str(folder), "size_bits": model.size_bits}
    passed = False
    if params is not None:
        before = run(lambda x: task.apply(params, x))
        margin = config.verify.margin or artifacts.load_run(folder).report.test.margin
        options = {"alpha": config.verify.alpha, "groups": split.groups}
        test = noninferiority(after.loss - before.loss, margin=margin, **options)
        changes = metric_changes(before.metrics, after.metrics, **options)
        passed = test.passed
        data |= {"float_loss": float(before.loss.mean()), "change": asdict(test)}
        data["metric_changes"] = [asdict(change) for change in changes]
        data["verdict"] = verdict_words(test, unit=task.unit)
        lines += [metric_line(change) for change in changes]
        lines += [f"Float loss {data['float_loss']:.5f}", f"Verdict    {data['verdict']}"]
        if args.split != "test":
            lines.append(f"Note       the {args.split} split is no held-out data: no certificate")
            passed = False
    else:
        lines += [f"{name:<10} {100 * mean:.2f} %" for name, mean in data["metrics"].items()]
    console_of(args).print(Text("\n".join(lines)))
    return Outcome(data, passed)


def task_of(folder: Path, args: argparse.Namespace) -> tuple[Any, Task]:
    """A run's config and its task, whose splits must be the run's."""
    info = artifacts.load_record(folder / "run.json", RUN_KIND)
    path = args.config or info.get("config_file") or None
    if args.config:
        config = load_config(args.config, args.overrides)
    else:
        config = apply_overrides(_restored(info["config"]), args.overrides)
    task = pipeline.make_task(config, path, _progress(args))
    if task.splits.fingerprint != info["splits"]:
        raise DataError(
            f"{folder}: the run's splits have the fingerprint {info['splits'][:12]}, this task's "
            f"have {task.splits.fingerprint[:12]}: other data, sizes or seed, so that examples "
            "that chose the plan could judge it"
        )
    return config, task


def _measured(task: Task, split: str, after: Measured) -> tuple[dict[str, Any], list[str]]:
    """The integer model's means, as data and in words; metrics' words come with their changes."""
    data: dict[str, Any] = {
        "split": split,
        "examples": len(after.loss),
        "loss": float(after.loss.mean()),
        "accuracy": None if after.correct is None else float(after.correct.mean()),
        "metrics": {name: float(values.mean()) for name, values in after.metrics.items()},
    }
    lines = [
        f"{task.name}: {split}, {len(after.loss)} examples",
        f"Loss       {data['loss']:.5f}",
    ]
    told = TOP_1 in after.metrics and np.array_equal(after.metrics[TOP_1], after.correct)
    if after.correct is not None and not told:
        lines.append(f"Accuracy   {100 * data['accuracy']:.2f} %")
    return data, lines


def _restored(fields: dict[str, Any]) -> ConfigDict:
    """A config from its JSON, whose lists were tuples."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(entry) for key, entry in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(restore(fields))

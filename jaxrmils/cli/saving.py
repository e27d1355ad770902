"""Writes a run's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxrmils import artifacts
from jaxrmils.artifacts.report_files import REPORT_KIND, RUN_KIND, SPREADSHEETS
from jaxrmils.cli.costs import save_run_costs
from jaxrmils.cli.pipeline import Result
from jaxrmils.sensitivity import ScoreMoments
from jaxrmils.statistics import group_numbers


def save(result: Result, config: Any, path: str | Path | None, out: str | Path) -> list[str]:
    """Writes a run's files.

    Args:
      result: from `run`.
      config: its config.
      path: the config file, recorded by name.
      out: the folder; files of an earlier run are replaced one by one, each only when complete.

    Returns:
      What was written, relative to `out`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    info = {
        "task": result.task.name,
        "unit": result.task.unit,
        "config": json.loads(config.to_json()),
        "config_file": str(Path(path).resolve()) if path else "",
        "splits": result.task.splits.fingerprint,
        "batch_size": result.batch_size,
        "versions": artifacts.versions(),
    }
    written = ["plan.json"]
    artifacts.save_plan(result.plan, out / "plan.json")
    written += _save_scores(result, config, out)
    artifacts.save_model(result.model, out / "model", info={"seed": config.seed})
    artifacts.save_record(report_dict(result), out / "report.json", REPORT_KIND)
    artifacts.save_record(info, out / "run.json", RUN_KIND)
    saved = artifacts.load_run(out)
    artifacts.write_page(saved.document, out / "report.html", saved.run)
    sheets = [f"{name}.csv" for name in SPREADSHEETS]
    artifacts.write_spreadsheets(saved.document, *(out / name for name in sheets))
    records = ["run.json", "report.json", "report.html", *sheets]
    return [*written, "model", *records]


def _save_scores(result: Result, config: Any, out: Path) -> list[str]:
    """Writes scores or moments, and costs; those of an earlier run would not belong here."""
    scores, info = result.scores, scores_info(result, config)
    name = "moments" if isinstance(scores, ScoreMoments) else "scores"
    for stale in {"scores", "moments"} - {name if scores is not None else ""}:
        if (out / stale).is_dir():
            shutil.rmtree(out / stale)
    if scores is None:
        return []
    if isinstance(scores, ScoreMoments):
        artifacts.save_moments(scores, out / name, info=info)
    else:
        artifacts.save_scores(scores, out / name, info=info)
    costs = result.costs
    return [name] if costs is None else [name, save_run_costs(costs, config.policy, out)]


def scores_info(result: Result, config: Any) -> dict[str, Any]:
    """What is kept beside the scores: the seed, and which examples belong together, as numbers."""
    groups = result.task.split("selection").groups
    if groups is None:
        return {"seed": config.seed}
    numbers = group_numbers(groups, len(groups)).tolist()
    return {"seed": config.seed, "groups": {"selection": numbers}}


def report_dict(result: Result) -> dict[str, Any]:
    """The report and mu as plain JSON values."""
    report = {**result.report.to_dict(), "mu": result.mu}
    return json.loads(json.dumps(report, default=_plain))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)

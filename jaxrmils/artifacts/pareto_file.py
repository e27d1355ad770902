"""A sweep of budgets in a folder: its page, numbers and plans."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from jaxrmils.artifacts.documents import dump_json
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike, interrupted_save, replace_directory
from jaxrmils.artifacts.folder import FORMAT_VERSION, MANIFEST
from jaxrmils.artifacts.moments_file import kept_scores
from jaxrmils.artifacts.plan_file import plan_bytes
from jaxrmils.artifacts.record_file import load_record
from jaxrmils.evaluation import EvaluationError
from jaxrmils.evaluation.page.decoding import decode
from jaxrmils.evaluation.page.pareto_page import pareto_page
from jaxrmils.evaluation.pareto_report import ParetoReport, pareto_csv
from jaxrmils.policies import Plan

KIND = "jaxrmils pareto"
FOLDER, RECORD, PAGE, SHEET = "pareto", "pareto.json", "pareto.html", "pareto.csv"


def sources(run: PathLike) -> dict[str, str]:
    """SHA-256 of the files of a run that a sweep depends on, by their place in it.

    Raises:
      ArtifactError: one of them is missing.
    """
    found, scores = {}, kept_scores(run) or Path(run) / "scores"
    for path in (scores / MANIFEST, Path(run) / "plan.json"):
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; the folder of a run was expected")
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def save_pareto(report: ParetoReport, plans: Mapping[str, Plan], run: PathLike) -> list[str]:
    """Writes `pareto/` into a run's folder: the page, CSV, JSON, and every plan as a file.

    Args:
      report: the sweep.
      plans: by the names of the report's points; each is written to that point's file.
      run: the run's folder.

    Returns:
      The names of the files, relative to the run.

    Raises:
      ArtifactError: `pareto/` holds something else, or a plan can't be saved.
      OSError: the folder can't be written; an older one is untouched.
    """
    folder = Path(run) / FOLDER
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise ArtifactError(
            f"{folder} holds files, but no {RECORD}, so it was not made by `jaxrmils pareto`; "
            "nothing was written. Move them away"
        )
    document = {"kind": KIND, "format_version": FORMAT_VERSION, **pareto_document(report)}
    files = {
        RECORD: dump_json(document, depth=3),
        SHEET: pareto_csv(report).encode(),
        PAGE: pareto_page(report).encode(),
    }
    for point in report.points:
        files[point.file] = plan_bytes(plans[point.name], folder / point.file)
    replace_directory(folder, files)
    return [f"{FOLDER}/{name}" for name in files]


def pareto_document(report: ParetoReport) -> dict[str, object]:
    """A sweep as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(report)))


def load_pareto(run: PathLike) -> ParetoReport:
    """Reads a run's sweep.

    Args:
      run: the run's folder.

    Raises:
      ArtifactError: the run has none yet; it is damaged or incomplete; or the run's scores or plan
        are other ones by now.
    """
    folder = Path(run) / FOLDER
    path = folder / RECORD
    if not path.is_file():
        old = interrupted_save(folder)
        hint = (
            f" (or rename {old.name}, which an interrupted save left, to {FOLDER})" if old else ""
        )
        raise ArtifactError(f"{path} does not exist; run `jaxrmils pareto {run}` first{hint}")
    try:
        report = decode(ParetoReport, load_record(path, KIND))
    except EvaluationError as error:
        raise ArtifactError(
            f"{path}: {error}; the file was changed or is damaged. Run `jaxrmils pareto {run}` "
            "again"
        ) from error
    missing = [point.file for point in report.points if not (folder / point.file).is_file()]
    if missing or not report.points:
        what = f"lists {missing[0]}, which is missing" if missing else "holds no plans"
        raise ArtifactError(f"{path} {what}; run `jaxrmils pareto {run}` again")
    if report.sources != sources(run):
        raise ArtifactError(
            f"{path} was made from other scores or another plan than {run} holds now; run "
            f"`jaxrmils pareto {run}` again"
        )
    return report

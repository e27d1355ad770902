"""`jaxrmils recommend`: which plans of a sweep to take."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.pareto_file import FOLDER, PAGE, load_pareto
from jaxrmils.cli.budget_printing import picks_document, print_picks
from jaxrmils.cli.commands import Outcome, console_of
from jaxrmils.cli.config import ConfigError
from jaxrmils.evaluation.page.pareto_page import statements


def arguments(parser: argparse.ArgumentParser) -> None:
    """Picks three plans from RUN/pareto/, with a sentence each on why: quality, the smallest plan
    shown to be as good as float; compact, the smallest shown to be within a tolerance; and balanced
    between the two. "Shown" means that the upper end of the interval is within the bound; of plans
    that were not measured, it is predicted at most.

      jaxrmils recommend runs/mnist
      jaxrmils recommend runs/mnist --margin 0.01 --tolerance 0.05
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder with a sweep by pareto")
    parser.add_argument(
        "--margin", type=float, help="a loss change that counts as none (default: the run's)"
    )
    parser.add_argument(
        "--tolerance", type=float, help="a loss change that is accepted (default: four margins)"
    )
    parser.set_defaults(run=run_recommend)


def run_recommend(args: argparse.Namespace) -> Outcome:
    """Three picks from a saved sweep."""
    if args.overrides:
        raise ConfigError(
            f"recommend reads a saved sweep and takes no config fields; found {args.overrides[0]!r}"
        )
    folder = Path(args.run_folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise artifacts.ArtifactError(f"{folder} {found}; the folder of a run was expected")
    report = load_pareto(folder)
    picks = report.picks(args.margin, args.tolerance)
    console = console_of(args)
    print_picks(report, picks, folder, console)
    for note in statements(report):
        console.print(Text(f"Note       {note}"))
    page = folder / FOLDER / PAGE
    console.print(Text(f"Page       {page}"))
    return Outcome({"run": str(folder), "picks": picks_document(picks, folder), "page": str(page)})

"""The `jaxrmils` command."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console

import jaxrmils
from jaxrmils.cli import (
    aot_command,
    budget_command,
    commands,
    export_command,
    profile_command,
    recommend_command,
    reporting,
)
from jaxrmils.cli.config import ConfigError
from jaxrmils.lowering import LoweringError

OK, CRASHED, USAGE, BAD_INPUT, NOT_LOSSLESS = range(5)

_EXIT_CODES = """\
exit codes:
  0  done
  2  wrong usage: unknown option, config field, format, policy or pattern
  3  bad input: data, parameters or files that can't be used; nothing was written
  4  --require-lossless was given and the verdict is another
"""

_OVERRIDES = """\
Every config field can be overridden, as in --config.policy.mu=0.4 or
--config.policy.skip="('Dense_*',)". `jaxrmils quantize --config FILE --show-config` lists
the fields with their values.
"""

_INTRO = """\
Mixed-precision post-training quantization for JAX and Flax models.

  jaxrmils demo                                 all of it on real digits, in a minute or two
  jaxrmils inspect  --config FILE               the layers of a model and what can't be quantized
  jaxrmils quantize --config FILE --out RUN     calibrate, score, plan, quantize, verify, save
  jaxrmils evaluate RUN                         a saved model on held-out data
  jaxrmils report   RUN                         a saved run again: tables, web page, spreadsheets
  jaxrmils compare  RUN RUN                     saved runs side by side
  jaxrmils pareto   RUN                         many budgets from its scores, what each costs
  jaxrmils recommend RUN                        three plans of those, and why
  jaxrmils profile  RUN                         where the time goes on this machine
  jaxrmils export   RUN --out FOLDER            programs that run with jax alone, anywhere
  jaxrmils aot      RUN --target tpu:v5e        what a plan becomes on a device that is not here
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _parser("jaxrmils", _INTRO, _EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"jaxrmils {jaxrmils.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_, build in (
        ("demo", "the main job on embedded digits and a model trained on the spot", _demo),
        ("inspect", "list a model's layers, sizes and coverage", _inspect),
        ("quantize", "quantize a model as a config file says", _quantize),
        ("evaluate", "evaluate a saved run on held-out data", _evaluate),
        ("report", "show a saved run again, as tables, web page and spreadsheets", _report),
        ("compare", "lay saved runs side by side", _compare),
        (
            "pareto",
            "solve and measure many budgets from a run's scores",
            budget_command.pareto_arguments,
        ),
        ("recommend", "pick three plans of those, and say why", recommend_command.arguments),
        ("export", "write a saved model as programs for jax alone", export_command.arguments),
        ("profile", "time every layer in every format on this machine", profile_command.arguments),
        ("aot", "compile a plan for a device that is not here", aot_command.arguments),
    ):
        sub = subparsers.add_parser(
            name,
            help=help_,
            description=inspect.cleandoc(build.__doc__ or ""),
            epilog=_EXIT_CODES
            if name in ("report", "compare", "recommend")
            else _OVERRIDES + "\n" + _EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--json", action="store_true", help="print JSON on stdout, for machines")
        sub.add_argument("--quiet", action="store_true", help="draw no progress bars")
        build(sub)
    return parser


def _parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    """Trains a small CNN on 2,000 real MNIST digits, then runs the main job on the rest:
    trace, calibrate, score, plan, quantize to real integer operations, verify on images that
    chose nothing, save. No network, no files needed.
    """
    parser.add_argument(
        "--out", default="runs/demo", help="folder of the run (default: %(default)s)"
    )
    _add_resume(parser)
    _add_require(parser)
    parser.set_defaults(run=commands.demo)


def _inspect(parser: argparse.ArgumentParser) -> None:
    """Lists the layers of a model with their weights, sizes and multiply-accumulates, and every
    dot and convolution that can't be quantized, with the reason. The model is traced from shapes;
    nothing is trained or run.
    """
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.set_defaults(run=commands.inspect)


def _quantize(parser: argparse.ArgumentParser) -> None:
    """Runs the main job that a config file describes and writes a run folder with plan.json (the
    precision plan, readable and diff-able), scores/ (from which other plans can be made without the
    model), model/ (the integer model), report.json and run.json.

      jaxrmils quantize --config configs/mnist_cnn.py --config.policy.mu=0.01 --out runs/mnist
      jaxrmils quantize --config configs/mnist_cnn.py --out runs/budget \\
        --config.policy.name=budget --config.policy.limits.size_share=0.2
      jaxrmils quantize --config configs/mnist_cnn.py --out runs/refined \\
        --config.policy.name=budget --config.policy.limits.size_share=0.2 \\
        --config.policy.objective=squared_output --config.policy.refine=True
      jaxrmils quantize --config configs/cifar_resnet20.py --out runs/cifar \\
        --config.data.files=test.zip --config.model.weights=resnet20.safetensors
      jaxrmils quantize --config configs/cifar_resnet20.py --out runs/cifar --resume

    What config.task can be, each with its own config files in configs/:
      mnist_cnn    digits that come with a package, and a CNN trained on the spot
      images       a reference network with published weights, and images of a folder, a zip
                   archive or TFDS
      squad        BERT that answers SQuAD's questions, of a JSON file or TFDS
      texts        BERT that classifies texts of a CSV file or TFDS
      FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION
                   your own, a function of the config that returns a jaxrmils.data.Task
    """
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--out", help="folder of the run; required unless --show-config")
    parser.add_argument("--show-config", action="store_true", help="print the config and stop")
    _add_resume(parser)
    _add_require(parser)
    parser.set_defaults(run=commands.quantize)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    """Loads a saved run and measures its integer model on one split of the task's data, beside the
    float model (which is loaded or trained again; --no-float leaves it out).
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder that quantize or demo wrote")
    parser.add_argument(
        "--split",
        default="test",
        choices=("ranges", "selection", "confirmation", "test"),
        help="which split of the data to read (default: %(default)s)",
    )
    parser.add_argument("--config", help="another config file than the run's own")
    parser.add_argument("--no-float", action="store_true", help="measure the integer model alone")
    _add_require(parser)
    parser.set_defaults(run=commands.evaluate)


def _report(parser: argparse.ArgumentParser) -> None:
    """Prints a saved run's tables and writes report.html, which opens offline, layers.csv,
    controls.csv and metrics.csv into its folder. Needs neither the model nor the data.
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder that quantize or demo wrote")
    parser.add_argument(
        "--out",
        metavar="FILE.html",
        help="another place for the page; the spreadsheets go beside it and nothing into RUN",
    )
    _add_require(parser)
    parser.set_defaults(run=reporting.report)


def _compare(parser: argparse.ArgumentParser) -> None:
    """Lays saved runs side by side: verdicts, sizes, loss and accuracy changes, the layers on which
    the plans differ, and why numbers may not be comparable (other data, margins or models).
    """
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="two run folders or more")
    parser.add_argument("--out", metavar="FILE.html", help="also write this page")
    parser.set_defaults(run=reporting.compare_runs)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        nargs="?",
        type=float,
        const=60.0,
        metavar="SECONDS",
        help="keep the progress of ranges and scores in OUT.progress, at most once in so many "
        "seconds (default: %(const)s), and go on from it after a kill; removed when the run is "
        "saved",
    )


def _add_require(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require-lossless",
        action="store_true",
        help="exit with 4 unless the verdict is lossless, for scripts",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; `sys.argv` by default.

    Returns:
      The exit code, see `jaxrmils --help`.
    """
    parser = build_parser()
    try:
        args, rest = parser.parse_known_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        args.overrides = _overrides(rest, parser, args)
        return _finish(args.run(args), args)
    except BrokenPipeError:
        return OK
    except ConfigError as error:
        return _fail(errors, error, USAGE)
    except commands.USAGE_ERRORS as error:
        return _fail(errors, error, USAGE)
    except (*commands.INPUT_ERRORS, LoweringError) as error:
        return _fail(errors, error, BAD_INPUT)


def _overrides(
    rest: list[str], parser: argparse.ArgumentParser, args: argparse.Namespace
) -> list[str]:
    """Splits off `--config.field=value`; anything else that argparse did not know is an error."""
    overrides, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            options = [o for a in _options(parser, args.command) for o in a.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], options, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"unknown argument {word!r}{hint} (jaxrmils {args.command} --help)")
        if "=" not in word and words and not words[0].startswith("--"):
            word = f"{word}={words.pop(0)}"
        overrides.append(word)
    return overrides


def _options(parser: argparse.ArgumentParser, command: str) -> list[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command]._actions
    return []


def _finish(outcome: commands.Outcome, args: argparse.Namespace) -> int:
    if args.json:
        json.dump(outcome.data, sys.stdout, indent=2)
        sys.stdout.write("\n")
    if getattr(args, "require_lossless", False) and not outcome.lossless:
        return NOT_LOSSLESS
    return OK


def _fail(console: Console, error: Exception, code: int) -> int:
    console.print(f"[bold red]error:[/] {_escaped(str(error))}")
    return code


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def entry_point() -> None:
    """What the installed `jaxrmils` script calls."""
    if "--json" in sys.argv:
        _keep_stdout_for_json()
    sys.exit(main())


def _keep_stdout_for_json() -> None:
    """Sends what libraries in C print (HiGHS does) to stderr; Python alone writes to stdout."""
    machine = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    sys.stdout = machine


if __name__ == "__main__":
    entry_point()

"""`jaxrmils export`: a saved run's model as programs that need no model code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.documents import parse_json
from jaxrmils.artifacts.export_file import export_model
from jaxrmils.cli import commands
from jaxrmils.cli.commands import Outcome
from jaxrmils.cli.config import ConfigError
from jaxrmils.lowering import BACKENDS
from jaxrmils.numerics import format_size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Writes a saved run's integer model as programs that run with jax alone, without the model's
    code, jaxrmils or Flax: one jax.export module per platform, weights.safetensors and
    manifest.json. None of the platforms' devices is needed. Needs flatbuffers, which jax
    serializes with: pip install 'jaxrmils[export]'.

      jaxrmils export runs/mnist --out exported --platforms cpu,tpu
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder that quantize or demo wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--platforms",
        default=",".join(BACKENDS),
        help="where it will run, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="of the inputs; any by default, needed where the model's code must know it",
    )
    parser.add_argument("--config", help="another config file than the run's own")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> Outcome:
    """Exports a saved model."""
    platforms = _platforms(args)
    folder, out = Path(args.run_folder), Path(args.out)
    _, task = commands.task_of(folder, args)
    model = artifacts.load_model(folder / "model", task.apply)
    info = {"task": task.name}
    export_model(model, out, platforms=platforms, batch_size=args.batch_size, info=info)
    manifest = parse_json((out / "manifest.json").read_bytes(), out / "manifest.json")
    size = args.batch_size or "any size"
    lines = [
        f"{task.name}: exported for {', '.join(platforms)}, batches of {size}",
        *(f"{kind.capitalize():<10} {_shapes(manifest[kind])}" for kind in ("inputs", "outputs")),
        *(f"{name:<22} {format_size(8 * f['bytes'])}" for name, f in manifest["files"].items()),
        f"Written to {out}",
    ]
    commands.console_of(args).print(Text("\n".join(lines)))
    return Outcome({"out": str(out), **manifest})


def _platforms(args: argparse.Namespace) -> Any:
    platforms = [name.strip() for name in args.platforms.split(",")]
    if not set(platforms) <= set(BACKENDS) or len(set(platforms)) < len(platforms):
        raise ConfigError(
            f"--platforms is {args.platforms!r}; expected some of {','.join(BACKENDS)}, each once"
        )
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}; expected at least 1")
    return platforms


def _shapes(rows: Any) -> str:
    return ", ".join(f"{r['name']} {r['dtype']}[{', '.join(map(str, r['shape']))}]" for r in rows)

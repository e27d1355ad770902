"""Writes an experiment's table as JSON and markdown, with the command and versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxrmils.artifacts import versions


def write_table(out: Path, rows: list[dict], lines: list[str]) -> None:
    """Writes `out.json` and `out.md` and prints the table.

    Args:
      out: the path without a suffix.
      rows: the numbers.
      lines: the same as a markdown table.
    """
    text = "\n".join(lines)
    command = "python " + " ".join(sys.argv)
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": command, "versions": versions(), "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"`{command}`\n\n{text}\n")
    print(text)

"""Writes an experiment's table as JSON and markdown, with the command and versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxrmils.artifacts import versions


def write_table(out: Path, rows: list[dict], lines: list[str], **more: Any) -> None:
    """Writes `out.json`, a row a line, and `out.md`, and prints the table.

    Args:
      out: the path without a suffix.
      rows: the numbers.
      lines: the same as a markdown table.
      more: what else the JSON holds, by name.
    """
    text = "\n".join(lines)
    command = "python " + " ".join(sys.argv)
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command, "versions": versions(), **more}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts.append('"rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]")
    out.with_suffix(".json").write_text("{\n " + ",\n ".join(parts) + "\n}\n")
    out.with_suffix(".md").write_text(f"`{command}`\n\n{text}\n")
    print(text)

"""The benchmark runs; times are not looked at, since the machine may be busy."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(output, *options):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/scoring_scale.py",
            "--quick",
            "--output",
            str(output),
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


def test_curves_are_written(tmp_path):
    result, printed = run(tmp_path / "result.json")
    curves = result["curves"]
    assert [row["examples"] for row in curves["examples"]] == [100, 200]
    assert [(row["sites"], row["devices"]) for row in curves["sites, scanned"]] == [(4, 2)]
    assert [row["work"] for row in curves["examples, attributed"]] == ["attribute"] * 2
    assert all(row["peak_megabytes"] > 50 for rows in curves.values() for row in rows)
    assert "slope" in printed and result["command"].startswith("python benchmarks/scoring_scale.py")
    again, _ = run(tmp_path / "result.json", "--only", "attributed")
    assert again["curves"]["examples"] == curves["examples"]
    assert again["curves"]["examples, attributed"] != curves["examples, attributed"]
    assert again["command, attributed"].endswith("--only attributed")

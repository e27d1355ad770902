"""The benchmark runs; times are not looked at, since the machine may be busy."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_run_writes_a_table(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/budget_solving.py", "--quick", "--output", str(output)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["layers"] == 12 and {"scipy", "command", "cores"} <= set(result)
    assert "squared: sweep of 3 sizes" in result["seconds"]
    assert all(len(times) == result["rounds"] for times in result["seconds"].values())
    assert "median" in done.stdout

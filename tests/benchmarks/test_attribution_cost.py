"""The benchmark runs; times are not looked at, since the machine may be busy."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_run_writes_a_table(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/attribution_cost.py", "--quick", "--output", str(output)]
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
    attributions = {name for name in result["rows"] if name.startswith("attribution")}
    assert set(result["overhead"]) == attributions and len(attributions) == 4
    assert all(len(times) == result["rounds"] for times in result["seconds"].values())
    assert result["command"].startswith("python benchmarks/attribution_cost.py --quick")
    assert "quantized forward" in done.stdout

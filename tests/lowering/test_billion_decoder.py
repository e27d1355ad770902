"""A decoder of shapes is compiled for a slice; skipped where libtpu is not installed."""

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
            "benchmarks/billion_decoder.py",
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


def test_a_decoder_of_shapes_is_compiled_for_a_slice(tmp_path):
    result, _ = run(tmp_path / "result.json", "--data", "2", "--model", "2")
    programs = result["programs"]
    assert set(programs) == {"scoring", "float forward", "w4a8 forward"}
    assert result["sites"] == 10 and result["mesh"] == {"data": 2, "model": 2}
    arguments = {name: row["argument_bytes"] for name, row in programs.items()}
    assert arguments["w4a8 forward"] < arguments["float forward"] < arguments["scoring"]
    # bfloat16, the sharded parameters on two devices each.
    assert arguments["float forward"] < 2 * result["parameters"]

"""Sharded parameters and batches give what a single device gives."""

import os
import subprocess
import sys
from pathlib import Path


def test_sharded_equals_single_device():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    script = Path(__file__).parent / "sharded_job.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""Several processes that each hold a part give what one process gives that holds all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sharded_job import brief, check, data, everything, model

SCRIPT = Path(__file__).parent / "distributed_job.py"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run(case, processes, folder, devices):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(port), str(processes), str(number), case, folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(p.returncode == 0 for p in started), "\n---\n".join(o[-3000:] for o in outputs)


@pytest.mark.parametrize(
    ("case", "processes", "devices", "job"),
    [("examples", 2, 2, everything), ("params", 4, 1, lambda *a: brief(*a)[0])],
)
def test_processes_equal_one(case, processes, devices, job, tmp_path):
    run(case, processes, tmp_path, devices)
    params, graph = model()
    expected = job(graph, params, data(), None)
    leaves, structure = jax.tree.flatten(expected)
    with np.load(tmp_path / "found.npz") as saved:
        found = [saved[f"arr_{number}"] for number in range(len(leaves))]
    check(expected, jax.tree.unflatten(structure, found))


def test_a_process_that_fails_does_not_leave_the_others_waiting(tmp_path):
    run("failure", 2, tmp_path, 1)
    assert "process 1 failed" in (tmp_path / "0.txt").read_text()
    assert "NaN" in (tmp_path / "1.txt").read_text()

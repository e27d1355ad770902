"""A quantization that was killed goes on, and ends with what it would have ended with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxrmils as jr
from jaxrmils.cli.main import OK, USAGE, main
from jaxrmils.numerics import progress_checkpoint

CONFIG = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "slow_task.py:build"
    config.batch_size = 10
    config.policy.name = "rmils"
    for name in ("layers", "attribute", "controls"):
        config.verify[name] = False
    return config
"""

TASK = """
import dataclasses, os, time
import tiny_task
from jaxrmils.data.rows import LazyRows

def build(config, progress):
    task = tiny_task.build(config, progress)
    inputs = task.dataset.inputs

    def read(row):
        time.sleep(float(os.environ.get("SECONDS_OF_A_ROW", "0")))
        return inputs[row]

    rows = LazyRows(read, inputs.shape, inputs.dtype)
    return dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, inputs=rows))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "config.py").write_text(CONFIG)
    (folder / "slow_task.py").write_text(TASK)
    shutil.copy(Path(__file__).parent / "tiny_task.py", folder / "tiny_task.py")
    return folder


def command(folder, out):
    config = str(folder / "config.py")
    return ["quantize", "--config", config, "--out", str(folder / out), "--quiet"]


@pytest.fixture(scope="module")
def killed(folder):
    """The progress of a run that was killed while it scored."""
    environment = os.environ | {"SECONDS_OF_A_ROW": "0.05", "JAX_PLATFORMS": "cpu"}
    paths = [str(folder), str(Path(jr.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    job = [sys.executable, "-m", "jaxrmils.cli.main", *command(folder, "run"), "--resume", "0"]
    running = subprocess.Popen(job, env=environment)
    kept = folder / "run.progress"
    deadline = time.monotonic() + 300
    # Two saves of the scores, of ten batches.
    while len(saves(kept / "scores")) < 2 and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait(timeout=60) == -signal.SIGKILL, "the kill must meet the command at work"
    assert not (folder / "run").exists()
    return kept


def saves(folder):
    return [path for path in folder.glob("[0-9]*") if path.name.isdigit()]


def test_a_killed_run_goes_on(folder, killed, monkeypatch, capsys):
    monkeypatch.syspath_prepend(folder)
    assert main(command(folder, "whole")) == OK
    assert not (folder / "whole.progress").exists()
    done = []
    remaining = progress_checkpoint.Run.remaining

    def counted(self, batches):
        done.append(0)
        for batch in remaining(self, batches):
            done[-1] += 1
            yield batch

    monkeypatch.setattr(progress_checkpoint.Run, "remaining", counted)
    capsys.readouterr()
    before = shutil.copytree(killed, folder / "other.progress")
    assert main([*command(folder, "run"), "--resume"]) == OK
    assert "goes on from" in capsys.readouterr().out
    # Ranges in two passes, which were done, and what was left of the scores' ten batches.
    assert done[:-1] == [0, 0] and 0 < done[-1] <= 8
    assert not killed.exists()
    whole, resumed = folder / "whole", folder / "run"
    assert jr.load_plan(whole / "plan.json") == jr.load_plan(resumed / "plan.json")
    one, other = (jr.load_scores(each / "scores") for each in (whole, resumed))
    for name in ("loss", "activations", "weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    reports = [json.loads((each / "report.json").read_text()) for each in (whole, resumed)]
    assert reports[0] == reports[1]
    # Another run is not taken for this one.
    options = ["--config.ranges.symmetric=True", "--resume"]
    assert main([*command(folder, "other"), *options]) == USAGE
    assert "is the checkpoint of another job" in capsys.readouterr().err
    assert before.exists() and not (folder / "other").exists()


def test_seconds_are_checked(folder, capsys):
    assert main([*command(folder, "never"), "--resume", "-1"]) == USAGE
    assert "expected seconds between saves" in capsys.readouterr().err

"""Killed at any moment and run again, a job ends with what it would have ended with."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from resume_job import SlowBatches, job, loss, model

import jaxrmils as jr
from jaxrmils.numerics.progress_checkpoint import CheckpointError

SCRIPT = Path(__file__).parent / "resume_job.py"


def test_killed_several_times(tmp_path):
    expected = job(tmp_path, None, 0.0)
    (tmp_path / "log.txt").unlink()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    rng, kills, steps = random.Random(0), 0, set()
    while not (tmp_path / "result.npz").exists():
        log = tmp_path / "log.txt"
        before = log.stat().st_size if log.exists() else 0
        running = subprocess.Popen([sys.executable, SCRIPT, str(tmp_path)], env=environment)
        # Not while Python starts: from the first batch on, and never in the last of six runs.
        while running.poll() is None and (not log.exists() or log.stat().st_size == before):
            time.sleep(0.01)
        if kills < 5:
            time.sleep(rng.uniform(0.05, 1.5))
            running.send_signal(signal.SIGKILL)
        code = running.wait(timeout=120)
        killed = code == -signal.SIGKILL
        assert killed or code == 0
        kills += killed
        steps.add(tuple(sorted(str(p) for p in (tmp_path / "kept").rglob("commit_success.txt"))))
    assert kills >= 2 and len(steps) >= 2, "the kills must meet the job at work"
    with np.load(tmp_path / "result.npz") as saved:
        for number, one in enumerate(expected):
            np.testing.assert_array_equal(saved[f"arr_{number}"], one)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished job's folder and its result."""
    folder = tmp_path_factory.mktemp("done")
    params, graph = model()
    inputs = SlowBatches(folder / "log.txt", 0.0, inputs_only=True)
    ranges = jr.calibrate(graph, params, inputs, estimator="minmax")
    data = SlowBatches(folder / "log.txt", 0.0, count=4)
    arguments = (graph, params, data, loss, ranges)
    scores = jr.score(*arguments, checkpoint=folder / "kept", checkpoint_seconds=0.0)
    return folder, arguments, scores


def copied(done, tmp_path):
    shutil.copytree(done[0] / "kept", tmp_path / "kept")
    return tmp_path / "kept"


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.contributions(), other.contributions())


def steps_of(folder):
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def test_what_is_done_is_not_done_again(done, tmp_path, monkeypatch):
    monkeypatch.setattr(jr.sensitivity.scores, "contributions", None)
    equal(jr.score(*done[1], checkpoint=copied(done, tmp_path)), done[2])


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "half"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(done, tmp_path, damage):
    folder = copied(done, tmp_path)
    last = steps_of(folder)[-1]
    stored = [path for path in (last / "arrays").rglob("d/*") if path.is_file()]
    assert stored
    for path in stored if damage in ("cut", "flipped") else ():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    if damage == "missing":
        shutil.rmtree(last / "document")
    if damage == "half":  # as Orbax leaves a save that was cut short
        last.rename(last.with_name(f"{last.name}.orbax-checkpoint-tmp"))
        equal(jr.score(*done[1], checkpoint=folder), done[2])
        return
    with pytest.warns(RuntimeWarning, match="can't be read and is removed"):
        equal(jr.score(*done[1], checkpoint=folder, checkpoint_seconds=0.0), done[2])
    assert steps_of(folder)[-1].name == last.name
    equal(jr.score(*done[1], checkpoint=folder), done[2])


def test_nothing_readable_means_from_the_start(done, tmp_path):
    folder = copied(done, tmp_path)
    for step in steps_of(folder):
        for path in step.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="can't be read and is removed"):
        equal(jr.score(*done[1], checkpoint=folder), done[2])


def other_loss(outputs, targets):
    return loss(outputs, targets) * 2


@pytest.mark.parametrize("what", ["params", "values", "program", "weight_candidates", "data"])
def test_another_job_is_refused(done, tmp_path, what):
    graph, params, data, given, ranges = done[1]
    options = {}
    if what == "params":
        params = {**params, "b": params["b"].at[0, 0].add(1e-6)}
    elif what == "values":
        inputs = [x * 2 for x, _ in data]
        ranges = jr.calibrate(graph, params, inputs, estimator="minmax")
    elif what == "program":
        given = other_loss
    elif what == "weight_candidates":
        options["weight_candidates"] = ()
    else:
        data = list(data)
        data[0], data[1] = data[1], data[0]
    expected = "other" if what == "data" else what
    folder = copied(done, tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        jr.score(graph, params, data, given, ranges, checkpoint=folder, **options)
    equal(jr.score(*done[1], checkpoint=folder), done[2])


def test_fewer_batches_are_refused(done, tmp_path):
    graph, params, data, given, ranges = done[1]
    with pytest.raises(CheckpointError, match="4 batches, and the first 3"):
        jr.score(graph, params, list(data)[:3], given, ranges, checkpoint=copied(done, tmp_path))


def test_a_file_is_refused(done, tmp_path):
    (tmp_path / "kept").write_text("text")
    with pytest.raises(CheckpointError, match="is a file"):
        jr.score(*done[1], checkpoint=tmp_path / "kept")

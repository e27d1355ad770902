"""`jaxrmils export` as a user meets it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_task import build

import jaxrmils as jr
from jaxrmils.cli.config import apply_overrides
from jaxrmils.cli.defaults import base_config
from jaxrmils.cli.main import BAD_INPUT, OK, USAGE, main
from jaxrmils.progress import silent

CONFIG = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "tiny_task.py:build"
    config.batch_size = 50
    config.policy.name = "uniform"
    config.policy.format = "w4a8"
    for name in ("layers", "attribute", "controls"):
        config.verify[name] = False
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.py").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "tiny_task.py", folder / "tiny_task.py")
    out = folder / "run"
    arguments = ["quantize", "--config", str(folder / "config.py"), "--out", str(out), "--quiet"]
    assert main(arguments) == OK
    return out


def test_a_run_is_exported_and_computes_what_its_model_computes(run, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(out), "--platforms", "cpu, tpu"]) == OK
    printed = capsys.readouterr().out
    assert "tiny: exported for cpu, tpu, batches of any size" in printed
    assert "float32[batch, 12]" in printed and "weights.safetensors" in printed
    assert {p.name for p in out.iterdir()} == {
        "manifest.json",
        "weights.safetensors",
        "cpu.jaxexport",
        "tpu.jaxexport",
    }
    task = build(apply_overrides(base_config(), []), silent)
    model = jr.load_model(run / "model", task.apply)
    inputs = task.dataset.inputs[:7]
    expected = jax.jit(model.apply)(model.params, inputs)
    np.testing.assert_array_equal(jr.load_exported(out)(inputs), expected)


def test_json_is_the_manifest(run, tmp_path, capsys):
    out = tmp_path / "exported"
    arguments = ["export", str(run), "--out", str(out), "--platforms=cpu", "--batch-size=8"]
    assert main([*arguments, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["out"] == str(out) and data["inputs"][0]["shape"] == [8, 12]
    assert list(data["platforms"]) == ["cpu"] and data["info"] == {"task": "tiny"}


def test_mistakes_have_exit_codes(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "exported")]
    assert main(["export", str(run), *out, "--platforms", "gpu"]) == USAGE
    assert "cpu,cuda,tpu" in capsys.readouterr().err
    assert main(["export", str(run), *out, "--batch-size", "0"]) == USAGE
    assert main(["export", str(run)]) == USAGE
    assert main(["export", str(tmp_path / "nowhere"), *out]) == BAD_INPUT
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["export", str(run), "--out", str(tmp_path), "--platforms=cpu"]) == BAD_INPUT
    assert "thesis.txt" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]

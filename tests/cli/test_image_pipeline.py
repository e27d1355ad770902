"""The command line on image files: shortened reference networks with random weights."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from image_files import write_checkpoint, write_images

from jaxrmils.cli import pipeline
from jaxrmils.cli.config import load_config
from jaxrmils.cli.main import BAD_INPUT, OK, USAGE, main
from jaxrmils.data import LazyRows
from jaxrmils.zoo import mobilenet_v2, reference, registry

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGE_CONFIGS = [
    "cifar_resnet20",
    "cifar_resnet56",
    "imagenet_efficientnet_lite0",
    "mobilenet_v2_imagenet",
    "resnet18_imagenet",
]
# Every kind of block once: a deep network compiles for a minute.
SHORTER = {"resnet18": {"depths": (1, 1)}, "cifar_resnet20": {"blocks": 1}, "mobilenet_v2": {}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "photos", 24, size=40)


@pytest.fixture
def options(images, tmp_path, monkeypatch):
    """Overrides for a small run of a network, on images of 32 pixels and three classes."""

    def build(name):
        module = reference(name).module.clone(num_classes=3, **SHORTER[name])
        entry = dataclasses.replace(reference(name), module=module, input_size=32)
        monkeypatch.setattr(mobilenet_v2, "STAGES", mobilenet_v2.STAGES[:2])
        monkeypatch.setitem(registry._REFERENCES, name, entry)
        weights = write_checkpoint(entry, tmp_path / "weights.safetensors")
        values = {
            "data.name": "",
            "data.files": images,
            "model.weights": weights,
            "batch_size": 4,
            "splits.ranges": 4,
            "splits.selection": 6,
            "splits.confirmation": 6,
            "splits.test": 8,
            "ranges.estimator": "minmax",
        }
        return [f"--config.{field}={value}" for field, value in values.items()]

    return build


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_run_through(name, options, tmp_path, capsys):
    arguments = [
        "quantize",
        "--config",
        f"{CONFIGS}/{name}_imagenet.py",
        "--out",
        f"{tmp_path}/run",
    ]
    bare = [f"--config.verify.{each}=False" for each in ("layers", "attribute", "controls")]
    bare += ["--config.policy.name=uniform", "--config.verify.margin=100"]
    overrides = options(name)
    assert main([*arguments, *overrides, *bare, "--quiet"]) == OK
    assert f"{name} on photos (24 images)" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {layer["format"] for layer in report["layers"]} == {"w8a8"}
    assert 0.2 < report["quantized_bits"] / report["float_bits"] < 0.5  # norms stay float
    assert report["test"]["n"] == 8 and np.isfinite(report["float_loss"])


def test_a_lossless_run_reads_images_batch_by_batch(options, tmp_path, monkeypatch, capsys):
    most = 0
    whole = LazyRows.__getitem__

    def counted(self, index):
        nonlocal most
        rows = whole(self, index)
        most = max(most, len(rows))
        return rows

    monkeypatch.setattr(LazyRows, "__getitem__", counted)
    arguments = ["quantize", "--config", f"{CONFIGS}/cifar_resnet20.py", "--out", f"{tmp_path}/run"]
    small = ["--config.policy.rounds=1", "--config.policy.length=2", "--config.verify.margin=100"]
    small += ["--config.verify.layers=False", "--config.policy.formats=w8a8"]
    assert main([*arguments, *options("cifar_resnet20"), *small, "--quiet"]) == OK
    assert most == 4
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["lossless"]["steps"] and report["attributed"]["n"] == 8
    assert len(report["controls"]) > 5
    capsys.readouterr()
    assert main(["evaluate", f"{tmp_path}/run", "--json", "--quiet"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["change"]["mean"] == pytest.approx(report["test"]["mean"], abs=1e-6)


def test_metrics_follow_their_examples_without_labels(options):
    config = load_config(CONFIGS / "cifar_resnet20.py", options("cifar_resnet20"))
    task = pipeline.make_task(config, None)
    graph, params = pipeline.trace_task(task), task.load_params()
    unlabelled = pipeline.without_labels(task, graph, params, "kl", 4, ("test",))
    logits = task.apply(params, task.split("test").inputs[:])
    expected = task.metrics(logits, task.splits.test)
    assert isinstance(unlabelled.dataset.inputs, LazyRows)
    found = unlabelled.metrics(unlabelled.split("test").targets, unlabelled.splits.test)
    np.testing.assert_array_equal(found["Acc@1"], expected["Acc@1"])


def test_the_batch_size_is_chosen_to_fit(options):
    config = load_config(CONFIGS / "cifar_resnet20.py", options("cifar_resnet20"))
    task = pipeline.make_task(config, None)
    graph = pipeline.trace_task(task)
    assert pipeline.with_batch_size(config, graph, task) is config
    config.batch_size = 0
    assert pipeline.with_batch_size(config, graph, task).batch_size == 250
    assert config.batch_size == 0


@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_configs_say_what_they_need(name, capsys, tmp_path):
    config = load_config(CONFIGS / f"{name}.py")
    assert config.task == "images" and config.batch_size == 0
    assert config.policy.formats == ("w8a8", "w4a8") and config.verify.margin > 0
    assert reference(config.model.name)
    arguments = ["quantize", "--config", f"{CONFIGS}/{name}.py", "--out", f"{tmp_path}/run"]
    assert main(arguments) == BAD_INPUT
    error = " ".join(capsys.readouterr().err.split())
    assert "config.model.weights is empty; give a checkpoint" in error
    assert "--config.model.weights=FILE.safetensors" in error


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("data.files=nowhere", BAD_INPUT, "config.data.files: nowhere does not exist"),
        ("data.trained_on=True", BAD_INPUT, "config.data.trained_on says so: give such files as"),
        ("model.name=cifar_resnet56", BAD_INPUT, "the checkpoint does not fit the network"),
        ("splits.test=80", BAD_INPUT, "the splits need 96 examples"),
        ("batch_size=-1", USAGE, "batch_size -1"),
        ("task=pictures", USAGE, "task 'pictures': write mnist_cnn, images"),
    ],
)
def test_errors_name_the_option(change, code, message, options, tmp_path, capsys):
    arguments = ["quantize", "--config", f"{CONFIGS}/cifar_resnet20.py", "--out", f"{tmp_path}/run"]
    overrides = [*options("cifar_resnet20"), f"--config.{change}", "--quiet"]
    assert main([*arguments, *overrides]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_help_names_the_tasks(capsys):
    assert main(["quantize", "--help"]) == OK
    out = capsys.readouterr().out
    for task in pipeline.TASKS:
        assert f"\n  {task} " in out

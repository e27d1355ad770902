"""The configs of the paper's experiment, from data that TFDS has prepared to report and table.

Networks are cut down to every kind of block once, their weights random: a deep one compiles for
minutes.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import paper_table
import pytest
from data.handwritten.handwritten_dataset_builder import Handwritten
from image_files import write_checkpoint
from zoo.text_tasks import TINY, prepare_questions, random_variables, task_config, write_questions

from jaxrmils.cli.main import OK, main
from jaxrmils.data import load_mnist5k
from jaxrmils.data.squad import read_questions
from jaxrmils.zoo import BertForSpans, bert_checkpoint, mobilenet_v2, reference, registry
from jaxrmils.zoo.bert_checkpoint import save_bert

CONFIGS = Path(__file__).parents[2] / "configs"
SHORTER = {"resnet18": {"depths": (1, 1)}, "mobilenet_v2": {}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits as photos, in the ArrayRecord format."""
    folder = tmp_path_factory.mktemp("photos")
    digits = load_mnist5k().take(np.arange(40) * 120)
    builder = Handwritten(digits=digits, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


@pytest.fixture
def photo_options(photos, tmp_path, monkeypatch):
    """Overrides for a network of ten classes on images of 32 pixels."""

    def build(name):
        module = reference(name).module.clone(num_classes=10, **SHORTER[name])
        entry = dataclasses.replace(reference(name), module=module, input_size=32)
        monkeypatch.setattr(mobilenet_v2, "STAGES", mobilenet_v2.STAGES[:2])
        monkeypatch.setitem(registry._REFERENCES, name, entry)
        weights = write_checkpoint(entry, tmp_path / "weights.safetensors")
        return {
            "data.name": "handwritten",
            "data.split": "test",
            "data.data_dir": photos,
            "model.weights": weights,
            "batch_size": 8,
            "splits.ranges": 8,
            "splits.selection": 8,
            "splits.confirmation": 8,
            "splits.test": 16,
            "verify.margin": 10.0,
            "verify.layers": False,
            "verify.controls": False,
        }

    return build


@pytest.fixture
def question_options(tmp_path, monkeypatch):
    """Overrides for a tiny encoder on short paragraphs."""
    monkeypatch.setitem(bert_checkpoint.ENCODERS, "bert_base", TINY)
    save_bert(random_variables(BertForSpans(TINY)), tmp_path / "weights.safetensors")
    questions = read_questions(write_questions(tmp_path / "json", 12))
    prepare_questions(tmp_path / "tfds", questions)
    known = task_config(tmp_path, "squad", "")
    return {
        "data.name": "questions_v1",
        "data.data_dir": tmp_path / "tfds",
        "model.weights": known.model.weights,
        "model.tokenizer": known.model.tokenizer,
        "model.max_length": 20,
        "batch_size": 2,
        "splits.ranges": 2,
        "splits.selection": 3,
        "splits.confirmation": 3,
        "splits.test": 4,
        "verify.margin": 50.0,
        "verify.controls": False,
        "verify.layers": False,
        "verify.attribute": False,
    }


def arguments(options):
    return [f"--config.{field}={value}" for field, value in options.items()]


def quantized(name, options, tmp_path, capsys):
    """The saved report of a run with the config's own policy, shown again."""
    out = tmp_path / "run"
    command = ["quantize", "--config", str(CONFIGS / f"{name}.py"), "--out", str(out), "--quiet"]
    assert main([*command, *arguments(options)]) == OK
    (out / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(out), "--quiet"]) == OK
    assert "Verdict" in capsys.readouterr().out
    assert (out / "report.html").stat().st_size > 10_000
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["policy"]["name"] == "lossless"
    report = json.loads((out / "report.json").read_text())
    assert report["lossless"]["steps"] and report["quantized_bits"] < 0.5 * report["float_bits"]
    return report


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_image_networks(name, photo_options, tmp_path, capsys):
    report = quantized(f"{name}_imagenet", photo_options(name), tmp_path, capsys)
    assert report["test"]["n"] == 16
    assert [metric["name"] for metric in report["metrics"]] == ["Acc@1", "Acc@5"]


def test_questions_and_the_papers_table(question_options, tmp_path, capsys, monkeypatch):
    report = quantized("bert_base_squad", question_options, tmp_path, capsys)
    assert report["test"]["n"] == 8
    assert [metric["name"] for metric in report["metrics"]] == ["EM", "F1"]
    command = ["paper_table.py", "--config", str(CONFIGS / "bert_base_squad.py"), "--draws", "2"]
    command += ["--mu", "0.1", "--out", str(tmp_path / "table"), *arguments(question_options)]
    monkeypatch.setattr(sys, "argv", command)
    paper_table.main()
    table = (tmp_path / "table.md").read_text()
    assert "| EM | F1 |" in table and "2 draws of groups" in table and "BERT-base on SQuAD" in table
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["draw"] for row in rows} == {0, 1}
    names = {row["name"] for row in rows}
    assert {"float", "uniform int8", "rmils, radical, mu 0.1", "lossless"} <= names
    assert "tensorflow" not in sys.modules

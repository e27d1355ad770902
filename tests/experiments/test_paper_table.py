"""The paper's table on a network that runs in seconds."""

import json
import sys
from pathlib import Path

import paper_rows
import paper_table
import pytest

from jaxrmils.cli.config import load_config

TASK = Path(__file__).parents[1] / "cli" / "tiny_task.py"
CONFIG = f"""
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "{TASK}:judged"
    config.batch_size = 50
    config.verify.margin = 0.5
    config.policy.formats = ("w8a8", "w4a8")
    config.policy.rounds = 1
    return config
"""


def run(folder, monkeypatch, draws, *mu):
    (folder / "tiny.py").write_text(CONFIG)
    command = ["paper_table.py", "--config", str(folder / "tiny.py"), "--draws", str(draws)]
    command += ["--mu", *(mu or ["0.1"]), "--out", str(folder / "table")]
    command += ["--config.policy.directed=false"]
    monkeypatch.setattr(sys, "argv", command)
    paper_table.main()
    document = json.loads((folder / "table.json").read_text())
    return document, (folder / "table.md").read_text()


def test_every_policy_has_a_row_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    counted, make_task = [], paper_table.make_task

    def interrupted(config, *args):
        counted.append(config.seed)
        if counted == [0, 1]:
            raise KeyboardInterrupt
        return make_task(config, *args)

    monkeypatch.setattr(paper_table, "make_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch, 2)
    document, table = run(tmp_path, monkeypatch, 2)
    rows = document["rows"]
    assert counted == [0, 1, 1]
    assert not list(tmp_path.glob("*.partial.json"))
    names = [row["name"] for row in rows]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert {"float", "uniform int8, ACIQ ranges", "rmils, balanced, mu 0.1", "lossless"} <= {*names}
    float_row, found = rows[0], rows[names.index("lossless")]
    assert float_row["change"] == [0.0, 0.0, 0.0] and float_row["share"] == 1.0
    assert found["share"] < 0.5 and not found["above"]
    assert [len(units) for units in document["tested"].values()] == [150, 150]
    for name in ("Acc@1", "1/rank"):
        moved = sum(amount for _, amount in found["moved"][name]) / 150
        assert found["metrics"][name]["change"][0] == pytest.approx(moved, abs=1e-12)
        assert f"{name}: drop at most, all draws" in table
    assert "2 draws of examples" in table
    # Everything is there: printed again, without a task.
    assert run(tmp_path, monkeypatch, 2) == (document, table) and counted == [0, 1, 1]
    # A further threshold stands before the others, and nothing else is made again.
    wider, _ = run(tmp_path, monkeypatch, 2, "0.01")
    assert counted == [0, 1, 1, 0, 1]
    assert [r for r in wider["rows"] if "mu 0.01" not in r["name"]] == rows
    added = [r["name"] for r in wider["rows"] if "mu" in r["name"]]
    assert added[:2] == ["rmils, radical, mu 0.01", "rmils, radical, mu 0.1"]


def test_what_confidence_explains_of_a_gain():
    def draws(plain, cooled):
        return [
            paper_rows.Draw(
                seed,
                (),
                [
                    row("float, own temperature", [], loss=0.9),
                    row("lossless", [], change=(change, 0.0, 0.0)),
                    row("lossless, own temperature", [], loss=0.9 + rest),
                ],
            )
            for seed, (change, rest) in enumerate(zip(plain, cooled, strict=True))
        ]

    words = paper_rows.own_temperatures(draws([-0.05, -0.06], [-0.01, -0.012]))
    assert "Of the gain" not in words  # two draws tell nothing
    words = paper_rows.own_temperatures(draws([-0.05, -0.06, -0.055], [-0.01, -0.012, -0.011]))
    assert "-0.0550 ±" in words and "-0.0110 ±" in words
    assert words.endswith("Of the gain 80 % is confidence.")
    words = paper_rows.own_temperatures(draws([0.05, 0.06, 0.055], [-0.01, -0.012, -0.011]))
    assert "+0.0550 ±" in words and "Of the gain" not in words


def row(name, moved, loss=1.0, change=(0.0, 0.0, 0.0)):
    return paper_rows.Row(
        name=name,
        loss=loss,
        change=change,
        above=False,
        metrics={},
        megabytes=1.0,
        share=1.0,
        weight_bits=8.0,
        formats={},
        seconds=None,
        moved={"Acc@1": moved},
    )


def test_examples_tested_twice_count_once():
    def bound(second):
        lost = [(position, -1.0) for position in range(10)]
        rows = [row("float", []), row("plan", lost)]
        draws = [paper_rows.Draw(0, list(range(100)), rows), paper_rows.Draw(1, second, rows)]
        return paper_rows._pooled_drop(draws, [rows[1], rows[1]], "Acc@1")

    same, other = bound(list(range(100))), bound(list(range(100, 200)))
    assert same > other > 0.1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar_resnet20", "ResNet-18 on ImageNet: float 69.77"),
        ("resnet18_imagenet", "ResNet-18 on ImageNet: float 69.77"),
        ("imagenet_efficientnet_lite0", "MobileNetV2: float 71.89"),
        ("mobilenet_v2_imagenet", "MobileNetV2: float 71.89"),
        ("bert_base_squad", "BERT-base on SQuAD"),
        ("bert_minilm_squad", "BERT-base on SQuAD"),
        ("bert_minilm_banking77", ""),
        ("mnist_cnn", ""),
    ],
)
def test_what_is_published_of_a_task(name, words):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.py")
    found = paper_rows.published(config)
    assert found.startswith(words) and bool(found) == bool(words)

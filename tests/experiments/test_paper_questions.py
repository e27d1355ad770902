"""The experiment's answers on a network that runs in seconds."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import paper_questions
import paper_transfer
import pytest

TASK = Path(__file__).parents[1] / "cli" / "tiny_task.py"
CONFIG = f"""
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "{TASK}:build"
    config.batch_size = 40
    return config
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder with the results, and the network."""
    folder, known, prepare = tmp_path_factory.mktemp("paper"), [], paper_questions.prepare

    def prepared(*args):
        known.append(prepare(*args))
        return known[0]

    (folder / "tiny.py").write_text(CONFIG)
    command = ["paper_questions.py", "--config", str(folder / "tiny.py"), "--subsets", "3"]
    command += ["--measured", "2", "--smallest", "40", "--out", str(folder / "answers")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(paper_questions, "prepare", prepared)
        paper_questions.main()
    return folder, known[0]


@pytest.fixture
def files(job):
    return job[0]


@pytest.fixture
def scores(job):
    return job[1].scores


@pytest.fixture
def answers(files):
    return json.loads((files / "answers.json").read_text())["rows"][0]


def test_terms_add_up_to_what_is_measured(answers):
    assert len(answers["layers"]) == 4 and len(answers["parts"]) == 8
    for total in answers["sums"]:
        secant, measured = total["secant"][0], total["measured"][0]
        assert abs(secant - measured) < 0.1 * abs(total["tangent"][0] - measured)
    for row in answers["parts"]:
        first, second, alone = (row[key][0] for key in ("tangent", "second", "alone"))
        missed = abs(alone - first)
        if missed > 1e-4:
            assert abs(alone - first - second) < 0.5 * missed


def test_a_layer_alone_is_about_its_weight_and_its_activations_alone(answers):
    by_plan = {(r["layer"], r["plan"]): r["alone"][0] for r in answers["layers"]}
    by_part = {(r["layer"], r["kind"], r["bits"]): r["alone"][0] for r in answers["parts"]}
    for (layer, plan), together in by_plan.items():
        bits = {"int8": 8, "w4a8": 4}[plan]
        apart = by_part[layer, "weights", bits] + by_part[layer, "activations", 8]
        assert together == pytest.approx(apart, abs=3e-4)


def test_all_examples_rank_as_all_examples_do(answers):
    curve = answers["curve"]
    assert [row["examples"] for row in curve["ranks"]] == [40, 40, 80, 80, 100, 100]
    last = [row for row in curve["ranks"] if row["examples"] == 100]
    assert [row["selection"][0] for row in last] == pytest.approx([1.0, 1.0])
    whole = {r["plan"]: r for r in curve["predictions"] if r["examples"] == 100}
    for total in answers["sums"]:
        assert whole[total["plan"]]["tangent"][0] == pytest.approx(total["tangent"][0])
        assert whole[total["plan"]]["measured"][0] == pytest.approx(total["measured"][0])


def test_the_rule_takes_what_looks_negative(answers):
    rules = {row["name"]: row for row in answers["rules"]}
    taken = rules["negative ones, int8"]
    assert taken["tangent"][0] < 0 and set(taken["formats"]) <= {"w8a8", "float"}
    assert rules["the same layers to nearest, int8"]["formats"] == taken["formats"]


def test_the_tables_hold_every_question(files):
    text = (files / "answers.md").read_text()
    assert [f"\n{number}. " in text for number in range(1, 6)] == [True] * 5
    assert text.startswith("`python paper_questions.py --config")


def test_signs_of_strong_contributions_hold_and_of_noise_do_not(scores):
    rng = np.random.default_rng(0)

    def with_mean(n, mean):
        noise = rng.normal(size=(n, *scores.activations.shape[1:]))
        weights = rng.normal(size=(n, *scores.weights.shape[1:]))
        return dataclasses.replace(
            scores, loss=np.zeros(n), activations=noise, weights=weights + mean
        )

    found = paper_transfer.signs(with_mean(100, 1.0), with_mean(200, 1.0), seed=0)
    totals = {r["kind"]: r for r in found if r["from"] == 0 and r["to"] is None}
    assert totals["weights, to nearest"]["same"][0] == 1.0
    assert totals["activations, down or up"]["same"][0] < 0.8


def test_half_of_the_weights_go_to_int4_in_the_order_given(scores):
    rows = scores.table.layers
    for order in (np.arange(len(rows)), np.arange(len(rows))[::-1]):
        plan = paper_transfer.half_int4(scores, order)
        narrow = [row for row in rows if plan.layers[row.name].weight_bits == 4]
        wide = [row for row in rows if plan.layers[row.name].weight_bits == 8]
        total = sum(row.weight_size for row in rows)
        taken = sum(row.weight_size for row in narrow)
        assert taken <= total / 2 < taken + min(row.weight_size for row in wide)


def test_the_plots_are_small(files, monkeypatch):
    if importlib.util.find_spec("matplotlib") is None:
        return  # an extra that the tests do not need
    import paper_plots

    images = files / "images"
    command = ["paper_plots.py", str(files / "answers.json"), "--out", str(images)]
    monkeypatch.setattr(sys, "argv", command)
    paper_plots.main()
    sizes = [path.stat().st_size for path in images.glob("*.png")]
    assert len(sizes) == 5 and max(sizes) < 150_000

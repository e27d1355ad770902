"""Tables of objectives: differences from the refined plan, in loss and in accuracy."""

import json
import re
import sys

import numpy as np
import objectives
import pytest
from objectives_table import counts, markdown, tally
from scipy import stats

# By objective and bits, in 4 draws: (change of the loss, drop of accuracy in points).
NUMBERS = {
    ("refined", 4): [(0.50, 5.0), (0.51, 6.0), (0.52, 5.5), (0.49, 4.5)],
    ("refined", 6): [(0.10, 1.0), (0.12, 1.5), (0.11, 0.5), (0.13, 2.0)],
    # The plan of the refinement at 4 bits, but for how a mean was rounded; dearer and as good at 6.
    ("fisher", 4): [(0.50, 5.0), (0.51, 6.0 + 1e-14), (0.52, 5.5), (0.49, 4.5)],
    ("fisher", 6): [(0.20, 0.5), (0.23, 2.5), (0.21, 1.0), (0.22, 1.0)],
    # Lower loss beyond chance at 4 bits, and of more accuracy at 6.
    ("sqnr", 4): [(0.45, 5.5), (0.47, 5.0), (0.46, 6.0), (0.44, 4.0)],
    ("sqnr", 6): [(0.09, 0.0), (0.14, 0.4), (0.10, -0.6), (0.14, 0.8)],
    ("uniform", 4): [(0.50, 5.0), (0.51, 6.0), (0.52, 5.5), (0.49, 4.5)],
    ("uniform", 6): [(0.60, 8.0), (0.61, 9.5), (0.59, 9.0), (0.62, 8.5)],
}
LOSS, ACCURACY = "change", "Acc@1 drop"


def rows(draws=4):
    return [
        {"seed": s, "bits": b, "objective": o, LOSS: loss, ACCURACY: drop, "seconds": 1.0}
        for (o, b), values in NUMBERS.items()
        for s, (loss, drop) in enumerate(values[:draws])
    ]


def table(lines, title):
    """{(objective, bits): cell} of the table below a title."""
    start = lines.index(title) + 2
    bits = [int(each) for each in re.findall(r"(\d+) bits", lines[start])]
    found = {}
    for line in lines[start + 2 :]:
        if not line:
            return found
        name, *cells = line.strip("| ").split(" | ")
        found |= {(name, b): each for b, each in zip(bits, cells, strict=True)}
    raise AssertionError("a table ends with an empty line")


@pytest.mark.parametrize(
    "column, title",
    [
        (0, "Change of the loss minus that of the refined plan, paired within a draw:"),
        (1, "Acc@1 drop in points minus that of the refined plan, paired within a draw:"),
    ],
)
def test_differences_are_paired_with_students_interval(column, title):
    found = table(markdown(rows()), title)
    assert set(found) == {key for key in NUMBERS if key[0] != "refined"}
    bold = set()
    for (name, bits), cell in found.items():
        pairs = np.array(NUMBERS[name, bits]) - np.array(NUMBERS["refined", bits])
        values = pairs[:, column].round(9) + 0.0
        half = stats.t.ppf(0.975, 3) * stats.sem(values)
        assert cell.strip("*") == f"{values.mean():+.4f} ± {half:.4f}"
        if values.any() and stats.ttest_1samp(values, 0).pvalue < 0.05:
            bold.add((name, bits))
    assert {key for key, cell in found.items() if cell.startswith("**")} == bold
    expected = {("fisher", 6), ("sqnr", 4)} if column == 0 else {("sqnr", 6)}
    assert bold == {*expected, ("uniform", 6)}


def test_cells_beyond_chance_are_counted():
    keys = (LOSS, ACCURACY)
    # `fisher` at 4 bits is the refined plan, and no comparison.
    assert tally(rows(), ["fisher", "sqnr"], keys) == {LOSS: [1, -1, 0], ACCURACY: [0, 0, -1]}
    assert tally(rows(), ["uniform"], keys) == {LOSS: [1], ACCURACY: [1]}
    line = counts(rows(), keys)
    assert "3 of objectives, by the loss 1 / 1, by Acc@1 0 / 1; " in line
    assert "1 of random and uniform plans, by the loss 1 / 0, by Acc@1 1 / 0. " in line
    assert "Of 4 comparisons at 95 %, about 0.2 are expected" in line
    assert line in markdown(rows())


def test_a_single_draw_is_beyond_nothing():
    lines = markdown(rows(draws=1))
    assert not any("**" in line or "beyond chance:" in line for line in lines)
    title = "Acc@1 drop in points minus that of the refined plan, paired within a draw:"
    assert table(lines, title)["uniform", 6] == "+7.0000"


def test_a_table_without_accuracy_compares_the_loss():
    bare = [{k: v for k, v in row.items() if k != ACCURACY} for row in rows()]
    lines = markdown(bare)
    assert not any("Acc@1" in line or "in points" in line for line in lines)
    assert any("3 of objectives, by the loss 1 / 1; " in line for line in lines)


def test_tables_are_written_again_from_their_numbers(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    document = {"command": "python x.py", "settings": {"bits": [3, 4, 6]}, "rows": rows()}
    path.write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--render", str(path)])
    objectives.main()
    lines = path.with_suffix(".md").read_text().splitlines()
    assert lines == ["`python x.py`", "", *markdown(rows(), [3, 4, 6])]
    assert lines[-1].startswith("No plan has 3 bits")
    assert json.loads(path.read_text()) == document


def test_a_config_or_results_are_needed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["objectives.py"])
    with pytest.raises(SystemExit):
        objectives.main()
    assert "--config is needed, or --render" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["cifar_resnet56", "minilm_banking77", "imagenet_efficientnet_lite0"]
)
def test_the_tables_that_are_kept_are_those_of_their_numbers(name, request):
    path = request.config.rootpath / f"experiments/results/objectives_{name}.json"
    found = json.loads(path.read_text())
    lines = markdown(found["rows"], found["settings"]["bits"])
    assert path.with_suffix(".md").read_text().splitlines()[2:] == lines

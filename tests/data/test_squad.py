"""Windows, spans, answers and SQuAD's scores, worked out by hand on small paragraphs."""

import numpy as np
import pytest
from text_files import ids, question, tiny_tokenizer, write_squad

from jaxrmils.data import DataError, load_squad, squad_metrics, squad_predictions
from jaxrmils.data.squad_answers import answer_f1, normalize_answer

REPORT = "The report was written by Ada in Paris."
LAKES = "The lakes is north of the old town ."


def load(folder, *paragraphs, **options):
    options = {"max_length": 16, "doc_stride": 2} | options
    return load_squad(write_squad(folder, *paragraphs), tiny_tokenizer(folder), **options)


@pytest.fixture
def squad(tmp_path):
    """Three questions about two paragraphs; the second paragraph takes two windows."""
    report = [
        question("q0", "who wrote?", ("Ada", 26), ("by Ada", 23)),
        question("q1", " where?", ("in Paris", 30)),
    ]
    lakes = [question("q2", "where is the lake?", ("north of the old town", 13))]
    return load(tmp_path, (REPORT, report), (LAKES, lakes), max_length=15, doc_stride=4)


def logits(squad, spans):
    """Logits that are 1 at the given `(start, end)` of every window and 0 elsewhere."""
    start, end = np.zeros((2, len(spans), squad.offsets.shape[1]), np.float32)
    for row, (first, last) in enumerate(spans):
        start[row, first], end[row, last] = 1.0, 1.0
    return start, end


def test_windows(squad):
    tokens = squad.dataset.inputs["input_ids"]
    assert tokens[0].tolist() == ids(
        "[CLS] who wrote ? [SEP] the report was written by ada in paris . [SEP]"
    )
    assert squad.question_of.tolist() == [0, 1, 2, 2]
    assert squad.dataset.groups.tolist() == [0, 0, 1, 1]
    asked = "[CLS] where is the lake ? [SEP] "
    assert tokens[2].tolist() == ids(asked + "the lake ##s is north of the [SEP]")
    assert tokens[3].tolist() == ids(asked + "is north of the old town . [SEP]")


def test_targets_are_the_answers_tokens(squad):
    targets = squad.dataset.targets
    # "Ada"; "in Paris"; cut off in the first window of the last question, whole in the second.
    assert targets["start"].tolist() == [10, 10, 0, 8]
    assert targets["end"].tolist() == [10, 11, 0, 12]
    for row, (start, end) in enumerate(zip(targets["start"], targets["end"], strict=True)):
        asked = squad.questions[squad.question_of[row]]
        if end:
            text = asked.context[squad.offsets[row, start, 0] : squad.offsets[row, end, 1]]
            assert text == asked.answers[0][0]
    # Question, special tokens and padding are no part of the paragraph.
    assert (squad.offsets[0, :5] == -1).all() and (squad.offsets[0, -1] == -1).all()


def test_perfect_logits_give_perfect_scores(squad):
    spans = list(zip(squad.dataset.targets["start"], squad.dataset.targets["end"], strict=True))
    scores = squad_metrics(squad, squad_predictions(squad, *logits(squad, spans)))
    assert scores.exact_match == scores.mean_f1 == 100.0
    assert scores.questions.tolist() == [0, 1, 2]


def test_the_best_valid_span_of_all_windows_wins(squad):
    start, end = logits(squad, [(0, 0)] * 4)
    # Best of all: from the question into the paragraph, then backwards; both do not count.
    start[0, 2], end[0, 6] = 9.0, 4.0
    start[0, 8] = 5.0
    start[0, 5] = 3.0
    start[2, 7], end[2, 8] = 2.0, 2.0
    start[3, 11], end[3, 12] = 2.5, 2.0
    found = squad_predictions(squad, start, end)
    assert found["q0"] == "The report"
    assert found["q2"] == "old town"
    # With one start and one end in the running, nothing valid is left for the first question.
    assert squad_predictions(squad, start, end, n_best=1)["q0"] == ""


def test_the_first_of_equal_windows_wins(squad):
    found = squad_predictions(squad, *logits(squad, [(5, 5), (4, 4), (7, 7), (8, 12)]))
    assert found["q2"] == "The"


def test_answers_have_a_longest_length(squad):
    start, end = logits(squad, [(5, 12), (5, 5), (7, 8), (7, 8)])
    assert squad_predictions(squad, start, end)["q0"] == "The report was written by Ada in Paris"
    short = squad_predictions(squad, start, end, max_answer_length=7)["q0"]
    # One of the two logits is lost; the first of equals is the earliest start.
    assert short == "The"


def test_scores_of_a_part(squad):
    windows = np.array([3, 0, 2])
    start, end = logits(squad, [(8, 12), (9, 10), (0, 0)])
    found = squad_predictions(squad, start, end, windows=windows)
    assert found == {"q0": "by Ada", "q2": "north of the old town"}
    scores = squad_metrics(squad, {**found, "q2": "the town."})
    assert scores.questions.tolist() == [0, 2]
    # The second accepted answer fits; "town" shares one of one and of four words.
    assert scores.exact.tolist() == [True, False]
    np.testing.assert_allclose(scores.f1, [1.0, 2 * 1.0 * 0.25 / 1.25])


@pytest.mark.parametrize(
    ("prediction", "truth", "f1"),
    [
        ("Saint-Denis", "saintdenis", 1.0),
        ("a theatre,  an Ort", "Theatre Ort", 1.0),
        ("two two one", "two", 0.5),
        ("a an", "the", 0.0),
        ("", "x", 0.0),
    ],
)
def test_f1_by_hand(prediction, truth, f1):
    assert answer_f1(prediction, truth) == pytest.approx(f1)
    assert answer_f1(truth, prediction) == pytest.approx(f1)
    if f1 == 1.0:
        assert normalize_answer(prediction) == normalize_answer(truth)


def test_blanks_around_an_answer(tmp_path):
    squad = load(tmp_path, (REPORT, [question("q", "who?", (" Ada ", 25))]))
    assert squad.dataset.targets["start"].tolist() == squad.dataset.targets["end"].tolist() == [9]


def test_limit_and_name(tmp_path):
    asked = [question(f"q{n}", "who?", ("Ada", 26)) for n in range(3)]
    squad = load(tmp_path, (REPORT, asked[:1]), (REPORT, asked[1:]), limit=2, name="two")
    assert [q.id for q in squad.questions] == ["q0", "q1"] and squad.dataset.name == "two"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (question("q", "who?", ("Ida", 26)), "answer 'Ida' should stand at character 26 .* 'Ada'"),
        (question("q", "who?"), "question q has no answer, as in SQuAD v2"),
        ({"id": "q"}, "is not of SQuAD's form .* KeyError 'question'"),
        (question("q", "who " * 12, ("Ada", 26)), "q of 12 tokens leaves 1 of max_length=16 .* 2;"),
    ],
)
def test_bad_files(tmp_path, asked, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, (REPORT, [asked]))


def test_bad_arguments(squad, tmp_path):
    twice = [question("q", "who?", ("Ada", 26))] * 2
    with pytest.raises(DataError, match="same id"):
        load(tmp_path, (REPORT, twice))
    with pytest.raises(DataError, match="no question to read"):
        load(tmp_path, (REPORT, twice[:1]), limit=0)
    with pytest.raises(DataError, match="is no file; expected SQuAD's JSON"):
        load_squad(tmp_path / "none.json", None)
    start, end = logits(squad, [(0, 0)] * 4)
    with pytest.raises(DataError, match=r"expected \(3, 15\), a row for each window"):
        squad_predictions(squad, start, end, windows=np.arange(3))
    with pytest.raises(DataError, match="question q2 misses window 3"):
        squad_predictions(squad, start[:3], end[:3], windows=np.arange(3))
    with pytest.raises(DataError, match="NaN or infinite"):
        squad_predictions(squad, start * np.nan, end)
    with pytest.raises(DataError, match=r"1 of them for questions .*\['other'\]"):
        squad_metrics(squad, {"other": "x"})

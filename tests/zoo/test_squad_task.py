"""Questions as examples: their splits, weights, scores, and a whole run."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from data.text_files import question, tiny_tokenizer, write_squad
from safetensors.numpy import load_file, save_file
from text_tasks import (
    TINY,
    prepare_banking,
    prepare_questions,
    random_variables,
    task_config,
    write_questions,
)

from jaxrmils.cli import pipeline
from jaxrmils.data import (
    SPLIT_NAMES,
    DataError,
    check_disjoint,
    load_squad,
    load_squad_tfds,
    load_tokenizer,
    squad_metrics,
    squad_predictions,
)
from jaxrmils.data.squad import read_questions
from jaxrmils.zoo import BertForSpans, WeightError
from jaxrmils.zoo.bert_checkpoint import save_bert
from jaxrmils.zoo.squad_task import squad_task

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(tmp_path):
    save_bert(random_variables(BertForSpans(TINY)), tmp_path / "weights.safetensors")
    return task_config(tmp_path, "squad", write_questions(tmp_path, 12))


def build(config):
    return squad_task(config, architecture=TINY)


def test_splits_deal_whole_paragraphs(config):
    task = build(config)
    assert len(task.dataset) == 24 and task.training is None
    sizes = {"ranges": 2, "selection": 3, "confirmation": 2, "test": 4}
    for name in SPLIT_NAMES:
        assert len(set(task.split(name).groups)) == sizes[name]
        assert len(task.split(name)) == 2 * sizes[name]
    check_disjoint(task.splits, None, task.dataset.groups)
    assert build(config).splits.fingerprint == task.splits.fingerprint
    config.seed = 1
    assert build(config).splits.fingerprint != task.splits.fingerprint


def test_scores_are_those_of_the_data_sets_functions(config):
    task = build(config)
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 24, 20)).astype(np.float32)
    # Some are right, so that scores differ.
    answered = np.arange(0, 24, 3)
    start[answered, task.dataset.targets["start"][answered]] = 9.0
    end[answered, task.dataset.targets["end"][answered]] = 9.0
    tokenizer = tiny_tokenizer(Path(config.model.tokenizer).parent)
    squad = load_squad(config.data.files, tokenizer, max_length=20, doc_stride=2)
    assert len(squad.dataset) == 24
    scores = squad_metrics(squad, squad_predictions(squad, start, end))
    assert 0 < scores.exact.sum() < 24
    chosen = rng.permutation(24)[:17]
    found = task.metrics((start[chosen], end[chosen]), chosen)
    np.testing.assert_array_equal(found["EM"], scores.exact[chosen])
    np.testing.assert_array_equal(found["F1"], scores.f1[chosen])


def test_a_question_is_one_example_and_a_cut_answer_stays(tmp_path, config):
    text = "The report was written by Ada in Paris . " * 2 + "Where is the lake ?"
    asked = [
        question("cut", "where?", ("lake", text.index("lake"))),
        question("whole", "where?", ("in Paris", text.index("in Paris"))),
    ]
    others = [(f"Ada wrote {n}.", [question(f"o{n}", "who?", ("Ada", 0))]) for n in range(12)]
    config.data.files = str(write_squad(tmp_path, (text, asked), *others))
    task = build(config)
    assert len(task.dataset) == 14
    targets = np.stack([task.dataset.targets["start"], task.dataset.targets["end"]], axis=1)
    assert targets[0].tolist() == [0, 0] and targets[1, 0] > 0
    # The logits of the target are counted as no answer, since it is none.
    logits = np.eye(20, dtype=np.float32)[targets.T] * 5
    assert task.metrics(tuple(logits), np.arange(14))["EM"].tolist() == [0.0] + [1.0] * 13


@pytest.mark.parametrize("prefixes", [("bert.", "qa_outputs."), ("b.", "h."), ("model.bert.", 0)])
def test_weights_under_any_known_names(config, prefixes):
    encoder, head = prefixes[0], prefixes[1] or "model.qa_outputs."
    tensors = {
        name.replace("bert.", encoder, 1)
        if name.startswith("bert.")
        else name.replace("qa_outputs.", head): tensor
        for name, tensor in load_file(config.model.weights).items()
    }
    save_file(tensors, config.model.weights)
    task, expected = build(config), random_variables(BertForSpans(TINY))
    jax.tree.map(np.testing.assert_array_equal, task.load_params(), expected)
    jax.tree.map(lambda shape, leaf: shape.shape == leaf.shape or 1 / 0, task.shapes, expected)


def test_weights_of_something_else(config):
    tensors = load_file(config.model.weights)
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, config.model.weights)
    with pytest.raises(WeightError, match=r"missing from the checkpoint"):
        build(config).load_params()
    config.model.weights = ""
    with pytest.raises(DataError, match=r"config\.model\.weights is empty"):
        build(config).load_params()
    config.model.weights = "none.safetensors"
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        build(config).load_params()


def test_data_that_the_model_has_seen_gives_no_verdict(config):
    config.data.trained_on = True
    task = build(config)
    with pytest.raises(DataError, match="selection holds 6 training examples"):
        check_disjoint(task.splits, task.training, task.dataset.groups)


def test_calibration_data_gives_the_ranges_alone(tmp_path, config):
    other = write_questions(tmp_path / "other", 6, prefix="train", name="train.json")
    config.data.calibration, config.data.calibration_trained_on = str(other), True
    config.splits.update(ranges=4, test=7)  # twelve paragraphs are left to judge
    task = build(config)
    check_disjoint(task.splits, task.training, task.dataset.groups)
    assert task.training.tolist() == list(range(24, 36))
    assert task.splits.ranges.min() >= 24 and len(task.splits.ranges) == 8
    assert max(task.splits.selection.max(), task.splits.test.max()) < 24
    # A score of an example of the second file belongs to its own question.
    targets = task.split("ranges").targets
    logits = [np.eye(20, dtype=np.float32)[targets[key]] for key in ("start", "end")]
    assert task.metrics(tuple(logits), task.splits.ranges)["EM"].all()
    config.data.calibration_splits, config.splits.ranges = ("ranges", "selection"), 3
    task = build(config)
    with pytest.raises(DataError, match="selection holds 6 training examples"):
        check_disjoint(task.splits, task.training, task.dataset.groups)


def test_few_examples_are_few_paragraphs(config):
    config.data.examples = 11
    task = build(config)
    used = np.concatenate([getattr(task.splits, name) for name in SPLIT_NAMES])
    assert len(set(task.dataset.groups[used])) == 11
    config.data.examples = 10
    with pytest.raises(DataError, match=r"need 11 groups .* but 10 were found"):
        build(config)


def test_files_that_share_a_paragraph(tmp_path, config):
    config.data.calibration = str(write_questions(tmp_path / "other", 2))
    with pytest.raises(DataError, match="share 2 paragraphs, the first of them 'Report 0 of q"):
        build(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.files", "", r"config\.data\.files is empty; the task 'squad' needs a file in SQuAD"),
        ("data.files", "none.json", r"none\.json is no file"),
        ("model.tokenizer", "", r"config\.model\.tokenizer is empty"),
        ("model.tokenizer", "none.json", r"none\.json is no file"),
        ("data.name", "squad", r"and config\.data\.name is 'squad'; the task 'squad' reads one of"),
        ("data.labels", "x", r"config\.data\.labels is 'x', which the task 'squad' does not read"),
        ("model.max_length", 21, r"max_length is 21, but the encoder reads 20"),
        ("splits.test", 6, r"need 13 groups .* but 12 were found"),
    ],
)
def test_options_that_do_not_fit(config, field, value, message):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(DataError, match=message):
        build(config)


def test_unknown_encoder_and_splits(tmp_path, config):
    with pytest.raises(DataError, match="name is ''; expected one of minilm_l6, bert_base"):
        squad_task(config)
    config.data.calibration = config.data.files
    with pytest.raises(DataError, match=r"config\.data\.calibration is config\.data\.files"):
        build(config)
    config.data.calibration = str(write_questions(tmp_path / "other", 2, prefix="t"))
    config.data.calibration_splits = ("test",)
    with pytest.raises(DataError, match=r"calibration_splits is \('test',\)"):
        build(config)
    config.data.calibration_splits = ("ranges",)
    config.splits.ranges = 3
    with pytest.raises(DataError, match=r"need 3 groups \(ranges 3\) but 2 were found"):
        build(config)


def test_a_data_set_of_tfds(tmp_path, config):
    questions = read_questions(config.data.files)
    several = (*questions[0].answers, ("Ada", questions[0].context.index("Ada")))
    questions[0] = dataclasses.replace(questions[0], answers=several)
    prepare_questions(tmp_path / "tfds", questions)
    of_file = build(config)
    config.data.update(files="", name="questions_v1", data_dir=str(tmp_path / "tfds"))
    task = build(config)
    assert task.name == "BERT on questions_v1/validation (24 questions)"
    assert "tensorflow" not in sys.modules
    tokenizer = load_tokenizer(config.model.tokenizer)
    squad = load_squad_tfds(
        "questions_v1",
        "validation",
        tokenizer,
        data_dir=tmp_path / "tfds",
        max_length=20,
        windows=False,
    )
    # In TFDS's order, the same examples, and the same questions about each paragraph.
    known = {question.id: number for number, question in enumerate(questions)}
    order = [known[question.id] for question in squad.questions]
    assert sorted(order) == list(range(24)) and order != sorted(order)
    assert [question.answers for question in squad.questions] == [
        questions[number].answers for number in order
    ]
    expected = of_file.dataset.take(order)
    jax.tree.map(np.testing.assert_array_equal, task.dataset.inputs, expected.inputs)
    jax.tree.map(np.testing.assert_array_equal, task.dataset.targets, expected.targets)
    pairs = set(zip(task.dataset.groups.tolist(), expected.groups.tolist(), strict=True))
    assert len(pairs) == 12
    logits = [np.eye(20, dtype=np.float32)[task.dataset.targets[k]] * 5 for k in ("start", "end")]
    assert task.metrics(tuple(logits), np.arange(24))["EM"].all()
    # A further file sets the ranges.
    config.data.calibration = str(write_questions(tmp_path / "other", 4, prefix="t"))
    config.splits.update(ranges=4, test=7)
    assert build(config).splits.ranges.min() >= 24


def test_answers_of_tfds_are_checked(tmp_path, config):
    questions = read_questions(config.data.files)
    questions[3] = dataclasses.replace(questions[3], answers=())
    prepare_questions(tmp_path / "tfds", questions)
    config.data.update(files="", name="questions_v1", data_dir=str(tmp_path / "tfds"))
    with pytest.raises(DataError, match=r"validation: question q1b has no answer, as in SQuAD v2"):
        build(config)
    prepare_banking(tmp_path / "tfds", [("a", 1)])
    config.data.update(name="banking", split="test")
    with pytest.raises(DataError, match="banking has no feature 'answers/answer_start'"):
        build(config)


TASK_FILE = """
from jaxrmils.zoo import BertConfig
from jaxrmils.zoo.squad_task import squad_task

def task(config, progress):
    return squad_task(config, progress, architecture=BertConfig(**{sizes}))
"""


def test_the_config_of_bert_base_runs_on_a_tiny_encoder(tmp_path, config):
    spec = importlib.util.spec_from_file_location("bert_base", CONFIGS / "bert_base_squad.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.get_config()
    assert (run.task, run.model.name, run.model.max_length) == ("squad", "bert_base", 384)
    (tmp_path / "tiny.py").write_text(TASK_FILE.format(sizes=dataclasses.asdict(TINY)))
    run.task = "tiny.py:task"
    for field in ("weights", "tokenizer", "max_length"):
        run.model[field] = config.model[field]
    run.data.files = config.data.files
    run.splits.update(config.splits)
    run.batch_size = 2  # divides all splits, so that each program is compiled once
    run.policy.length, run.policy.rounds = 2, 1
    run.verify.update(margin=50.0, layers=False, attribute=False, controls=False)
    result = pipeline.run(run, tmp_path / "config.py")
    assert result.task.name == "bert_base on squad (24 questions)"
    lookups = {name for name in result.plan.layers if "embeddings" in name}
    assert len(lookups) == 2
    # The margin lets everything pass, so the smallest plan is taken: the tables too have 4 bits.
    assert {result.plan.layers[name].weight_bits for name in lookups} == {4}
    test = result.task.split("test")
    start, end = result.model(test.inputs)
    scores = result.task.metrics((start, end), result.task.splits.test)
    assert scores["F1"].shape == (8,) and (scores["F1"] >= scores["EM"]).all()

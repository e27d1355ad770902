"""Texts of a CSV file, a classifier's weights and its classes."""

import sys

import jax
import numpy as np
import pytest
from data.banking.banking_dataset_builder import CLASSES as BANKING_CLASSES
from safetensors.numpy import load_file, save_file
from text_tasks import (
    CLASSES,
    TEXTS,
    TINY,
    prepare_banking,
    random_variables,
    some_rows,
    task_config,
    write_texts,
)

from jaxrmils.data import (
    SPLIT_NAMES,
    DataError,
    check_disjoint,
    encode_texts,
    load_tokenizer,
    read_tfds,
)
from jaxrmils.zoo import BertForClassification, WeightError, cross_entropy
from jaxrmils.zoo.bert_checkpoint import save_bert
from jaxrmils.zoo.text_task import text_task


@pytest.fixture
def config(tmp_path):
    variables = random_variables(BertForClassification(TINY, 3, "mean"))
    save_bert(variables, tmp_path / "weights.safetensors", classes=CLASSES)
    return task_config(tmp_path, "texts", write_texts(tmp_path, some_rows(30)))


def build(config):
    return text_task(config, architecture=TINY)


def test_a_task_of_texts(config):
    task = build(config)
    assert len(task.dataset) == 30 and task.training is None and task.dataset.groups is None
    assert [len(task.split(name)) for name in SPLIT_NAMES] == [2, 3, 2, 4]
    # In the checkpoint's order, which is not the alphabet's.
    assert task.dataset.targets[:4].tolist() == [0, 1, 2, 0]
    expected = random_variables(BertForClassification(TINY, 3, "mean"))
    jax.tree.map(np.testing.assert_array_equal, task.load_params(), expected)
    chosen = np.array([7, 2, 11, 3])
    logits = np.asarray(task.apply(expected, task.dataset.take(chosen).inputs))
    found = task.metrics(logits, chosen)
    right = [int(row.argmax()) == int(n % 3) for row, n in zip(logits, chosen, strict=True)]
    assert list(found) == ["Acc@1"] and found["Acc@1"].tolist() == [float(r) for r in right]
    assert task.loss is cross_entropy


def test_a_file_that_lacks_a_class_keeps_the_checkpoints_numbers(tmp_path, config):
    rows = [row for row in some_rows(45) if row[1] != "where"]
    config.data.files = str(write_texts(tmp_path, rows, name="few.csv"))
    assert set(build(config).dataset.targets.tolist()) == {0, 2}


def test_a_checkpoint_with_pooler_and_without_names(tmp_path, config):
    module = BertForClassification(TINY, 3)
    save_bert(random_variables(module), config.model.weights)
    task = build(config)
    inputs = task.dataset.take([0, 1]).inputs
    logits = module.apply(random_variables(module), **inputs)
    np.testing.assert_allclose(task.apply(task.load_params(), inputs), logits, rtol=1e-6)
    # All names occur, so sorted they are the classes; or the file has indices.
    assert task.dataset.targets[:3].tolist() == [2, 1, 0]
    config.data.files = str(write_texts(tmp_path, some_rows(30, ["2", "0"]), name="numbers.csv"))
    assert build(config).dataset.targets[:3].tolist() == [2, 0, 2]
    config.data.files = str(write_texts(tmp_path, some_rows(30, ["who", "where"]), name="two.csv"))
    with pytest.raises(DataError, match=r"2 class names .* has 3 classes and does not name them"):
        build(config)
    config.data.files = str(write_texts(tmp_path, some_rows(30, ["3", "0"]), name="more.csv"))
    with pytest.raises(DataError, match="the first is 3 at example 0; expected 0 to 2"):
        build(config)


def test_groups_stay_together(tmp_path, config):
    rows = [(*row, f"author {n // 2}") for n, row in enumerate(some_rows(30))]
    config.data.files = str(write_texts(tmp_path, rows, ("sentence", "label", "group"), "g.csv"))
    task = build(config)
    assert [len(task.split(name)) for name in SPLIT_NAMES] == [4, 6, 4, 8]
    check_disjoint(task.splits, None, task.dataset.groups)


def test_training_data_gives_ranges_alone(tmp_path, config):
    config.data.calibration = str(write_texts(tmp_path, some_rows(9), name="train.csv"))
    config.data.calibration_trained_on = True
    with config.ignore_type():
        config.splits.ranges = 0.5
    task = build(config)
    check_disjoint(task.splits, task.training)
    assert len(task.splits.ranges) == 4 and task.splits.ranges.min() >= 30
    assert task.splits.test.max() < 30
    config.data.trained_on = True
    task = build(config)
    with pytest.raises(DataError, match="selection holds 3 training examples"):
        check_disjoint(task.splits, task.training)


def test_files_that_do_not_fit(tmp_path, config):
    files = config.data.files
    config.data.files = str(write_texts(tmp_path, [("a", "b")], ("texts", "label"), "x.csv"))
    with pytest.raises(DataError, match=r"columns \['texts', 'label'\]; expected one of text, sen"):
        build(config)
    config.data.files = str(write_texts(tmp_path, some_rows(3, ["why"]), name="x.csv"))
    with pytest.raises(DataError, match=r"1 labels are none of the 3 classes: \['why'\]"):
        build(config)
    config.data.files = str(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"none\.csv is no file"):
        build(config)
    config.data.files = files
    state = load_file(config.model.weights)
    save_file({n: t for n, t in state.items() if "classifier" not in n}, config.model.weights)
    with pytest.raises(WeightError, match=r"has no tensor classifier\.bias"):
        build(config)
    config.model.weights = ""
    with pytest.raises(DataError, match=r"config\.model\.weights is empty; the task 'texts'"):
        build(config)


TOPICS = 77


def of_tfds(config, folder, **options):
    config.data.update(files="", name="banking", split="test", data_dir=str(folder), **options)
    return config


def banking_rows(count=100):
    return [(f"{TEXTS[n % 4]} {n}", n * 5 % TOPICS) for n in range(count)]


@pytest.fixture
def banking(tmp_path, config):
    """A config for 77 classes, and a checkpoint that numbers them the other way round."""
    variables = random_variables(BertForClassification(TINY, TOPICS, "mean"))
    names = BANKING_CLASSES[::-1]
    save_bert(variables, tmp_path / "weights.safetensors", classes=names)
    prepare_banking(tmp_path / "tfds", banking_rows())
    return of_tfds(config, tmp_path / "tfds")


def test_a_data_set_of_tfds(tmp_path, banking):
    task = build(banking)
    assert task.name == "BERT on banking/test (100 texts)" and task.dataset.groups is None
    read = read_tfds("banking", "test", data_dir=tmp_path / "tfds", features=["text", "label"])
    assert sorted(zip(*read.values(), strict=True)) == sorted(banking_rows())
    assert task.dataset.targets.tolist() == [76 - label for label in read["label"]]
    tokenizer = load_tokenizer(banking.model.tokenizer)
    expected = encode_texts(tokenizer, read["text"], max_length=20)
    jax.tree.map(np.testing.assert_array_equal, task.dataset.inputs, expected)
    assert "tensorflow" not in sys.modules
    # With 77 classes, five tries count, too.
    chosen = np.arange(10)
    found = task.metrics(np.eye(TOPICS)[task.dataset.targets[chosen]], chosen)
    assert list(found) == ["Acc@1", "Acc@5"] and found["Acc@1"].all()
    logits = np.tile(np.arange(TOPICS, dtype=np.float32), (10, 1))
    first = (task.dataset.targets[chosen] >= TOPICS - 5).astype(float).tolist()
    assert task.metrics(logits, chosen)["Acc@5"].tolist() == first and 0 < sum(first) < 10


def test_other_features_and_a_file_that_calibrates(tmp_path, banking):
    rows = [(f"where is {n}", n % 2) for n in range(30)]
    options = {"names": ("question", "kind"), "classes": TOPICS}
    prepare_banking(tmp_path / "other", rows, **options)
    config = of_tfds(banking, tmp_path / "other")
    with pytest.raises(DataError, match=r"no feature 'label'; its features are \['kind', 'quest"):
        build(config)
    config.data.update(text_feature="question", label_feature="kind")
    # Numbers alone are those of the checkpoint.
    assert sorted(build(config).dataset.targets.tolist()) == [0] * 15 + [1] * 15
    config.data.calibration = str(write_texts(tmp_path, some_rows(8, ["topic_1", "topic_2"])))
    task = build(config)
    assert len(task.dataset) == 38 and task.splits.ranges.min() >= 30
    config.data.update(text_feature="kind", label_feature="kind")
    with pytest.raises(DataError, match=r"'kind' holds int; expected texts: --config\.data\.text"):
        build(config)


def test_classes_that_the_checkpoint_does_not_have(tmp_path, banking):
    prepare_banking(tmp_path / "few", [("where is it?", 1)] * 20, classes=["a", "b"])
    with pytest.raises(DataError, match=r"1 labels are none of the 77 classes: \['b'\]"):
        build(of_tfds(banking, tmp_path / "few"))


def test_one_kind_of_source(banking):
    banking.data.files = "texts.csv"
    with pytest.raises(DataError, match=r"the task 'texts' reads one of them: a CSV file, or conf"):
        build(banking)
    banking.data.update(files="", data_dir="")
    with pytest.raises(DataError, match="where has TFDS prepared banking"):
        build(banking)

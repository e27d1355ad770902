"""Texts of a CSV file, a classifier's weights and its classes."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from text_tasks import CLASSES, TINY, random_variables, some_rows, task_config, write_texts

from jaxrmils.data import SPLIT_NAMES, DataError, check_disjoint
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

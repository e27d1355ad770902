"""A data set that TFDS wrote comes back as it was, without TensorFlow."""

import builtins
import sys

import numpy as np
import pytest
from handwritten.handwritten_dataset_builder import WRITERS, Handwritten, record
from image_files import image_config, write_checkpoint

from jaxrmils.cli.defaults import base_config
from jaxrmils.data import DataError, load_mnist5k, load_tfds, resize_and_crop
from jaxrmils.zoo import image_task, mnist_cnn_task, reference

COUNT = 240


@pytest.fixture(scope="module")
def digits():
    return load_mnist5k().take(np.arange(COUNT) * 20)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Where TFDS has written the digits in the ArrayRecord format."""
    folder = tmp_path_factory.mktemp("tfds")
    builder = Handwritten(digits=digits, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def load(folder, split="test", **changes):
    arguments = {"inputs": "image", "targets": "label"} | changes
    return load_tfds("handwritten", split, data_dir=folder, **arguments)


def test_every_example_comes_back(folder, digits):
    data = load(folder, targets={"label": "label", "serial": "about/serial"})
    assert data.name == "handwritten/test"
    assert data.inputs.dtype == np.uint8
    serial = data.targets["serial"]
    assert serial.dtype == data.targets["label"].dtype == np.int32
    np.testing.assert_array_equal(np.sort(serial), np.arange(COUNT))
    # TFDS shuffles once, when it writes.
    assert not np.array_equal(serial, np.arange(COUNT))
    np.testing.assert_array_equal(data.targets["label"], digits.targets[serial])
    np.testing.assert_array_equal(data.inputs, np.round(digits.inputs[serial] * 255))
    pictures = load(folder, inputs="picture").inputs
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, data.inputs)
    assert "tensorflow" not in sys.modules


def test_the_digits_task_reads_them(folder, digits):
    config = base_config()
    config.data.name, config.data.split = "handwritten", "test"
    config.data.data_dir = str(folder)
    config.train.examples = 100
    config.splits.update(ranges=20, selection=40, confirmation=40, test=40)
    task = mnist_cnn_task(config)
    assert task.name == f"MnistCNN on MNIST ({COUNT} images)"
    assert task.dataset.inputs.dtype == np.float32
    assert task.dataset.inputs.max() == 1.0
    assert np.bincount(task.dataset.targets).tolist() == np.bincount(digits.targets).tolist()


def test_the_order_is_always_the_same(folder):
    first, again = load(folder), load(folder)
    np.testing.assert_array_equal(first.inputs, again.inputs)


def test_splits_and_slices(folder):
    assert len(load(folder, "train")) == COUNT // 2
    part = load(folder, "test[50%:]")
    np.testing.assert_array_equal(part.inputs, load(folder).inputs[COUNT // 2 :])


def test_texts_are_encoded_and_groups_counted(folder, digits):
    data = load(
        folder,
        inputs={"length": "text", "image": "image"},
        targets={"serial": "about/serial"},
        groups="about/writer",
        encode={"text": lambda texts: np.array([len(text) for text in texts], np.int32)},
    )
    serial = data.targets["serial"]
    texts = [record(n, digits.inputs[n], digits.targets[n])["text"] for n in serial]
    np.testing.assert_array_equal(data.inputs["length"], [len(text) for text in texts])
    np.testing.assert_array_equal(data.groups, serial % WRITERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": "pixels"}, r"no feature 'pixels'; its features are \['about/serial', .*'text'"),
        ({"groups": "author"}, "no feature 'author'"),
        ({"encode": {"words": len}}, "no feature 'words'"),
        ({"inputs": "text"}, r"'text' holds texts such as 'number .* encode=\{'text'"),
        ({"inputs": "row"}, r"'row' have 3 shapes, such as \[\(1,\), \(2,\)\]"),
        ({"split": "validation"}, r"no split 'validation'; its splits are \['test', 'train'\]"),
    ],
)
def test_what_is_not_there_is_named(folder, changes, message):
    with pytest.raises(DataError, match=message):
        load(folder, **changes)


def test_integers_that_jax_would_cut(folder):
    def huge(values):
        return np.full(len(values), 2**40)

    with pytest.raises(DataError, match="'about/serial' holds integers beyond int32"):
        load(folder, targets="about/serial", encode={"about/serial": huge})


def test_unprepared_data_are_not_fetched(tmp_path):
    with pytest.raises(DataError, match=r"handwritten is neither prepared in .* nor known to TFDS"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"mnist is not prepared in .*download_and_prepare\(\)"):
        load_tfds("mnist", "test", data_dir=tmp_path, inputs="image", targets="label")
    assert not list(tmp_path.rglob("*.*"))


def test_other_file_formats_are_refused(folder, tmp_path):
    written = folder / "handwritten" / "1.0.0"
    copy = tmp_path / "handwritten" / "1.0.0"
    copy.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        text = (written / name).read_text().replace("array_record", "tfrecord")
        (copy / name).write_text(text)
    with pytest.raises(DataError, match="stored as tfrecord; expected array_record"):
        load(tmp_path)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "importlib_resources"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf"{package} cannot be imported; .*jaxrmils\[tfds\]"):
        load(tmp_path)


def test_lazy_features_are_read_with_their_batch(folder):
    read = []

    def halved(picture):
        read.append(picture.shape)
        return picture[::2, ::2]

    data = load(folder, inputs={"small": "picture"}, lazy={"picture": halved})
    assert len(read) == 1  # one example tells shape and dtype
    expected = load(folder)
    np.testing.assert_array_equal(data.targets, expected.targets)
    part = data.take(np.arange(100, 110))
    for start, (inputs, targets) in zip((0, 4, 8), part.batches(4), strict=True):
        window = slice(100 + start, min(100 + start + 4, 110))
        np.testing.assert_array_equal(inputs["small"], expected.inputs[window, ::2, ::2])
        np.testing.assert_array_equal(targets, expected.targets[window])
    assert len(read) == 11


def test_lazy_features_that_cannot_be_read(folder):
    def ragged(row):
        return row

    with pytest.raises(DataError, match=r"'row' of example \d+ is int64\[\d\], of example 0 int64"):
        list(load(folder, inputs="row", lazy={"row": ragged}).batches(8))
    with pytest.raises(DataError, match=r"'picture' of example 0 cannot be read \(KeyError: 5\)"):
        load(folder, inputs="picture", lazy={"picture": lambda picture: {}[5]})
    with pytest.raises(DataError, match="'picture' is lazy; encode and groups need it at once"):
        load(folder, inputs="picture", groups="picture", lazy={"picture": np.asarray})


def test_the_task_images_reads_tfds(folder, digits, tmp_path):
    weights = write_checkpoint(reference("cifar_resnet20"), tmp_path / "weights.safetensors")
    config = image_config("cifar_resnet20", "", weights, splits=(10, 20, 30, 40))
    config.data.name, config.data.split = "handwritten", "test"
    config.data.data_dir = str(folder)
    task = image_task(config)
    assert task.name == f"cifar_resnet20 on handwritten/test ({COUNT} images)"
    images, labels = task.split("test").batches(40)[0]
    serial = load(folder, targets="about/serial").targets[task.splits.test]
    np.testing.assert_array_equal(labels, digits.targets[serial])
    gray = np.round(digits.inputs[serial[0]] * 255).astype(np.uint8)
    expected = resize_and_crop(np.repeat(gray, 3, axis=-1), 32)
    np.testing.assert_array_equal(images[0], expected)
    assert task.apply(task.load_params(), images[:2]).shape == (2, 10)

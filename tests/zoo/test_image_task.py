"""Files and a checkpoint become a task; whatever does not fit is named."""

import jax
import numpy as np
import pytest
from image_files import image_config, write_checkpoint, write_images

from jaxrmils.cli.pipeline import trace_task
from jaxrmils.data import DataError, LazyRows, check_disjoint, load_image_folder
from jaxrmils.zoo import cross_entropy, image_task, reference
from jaxrmils.zoo.image_task import top_accuracies

NETWORK = reference("cifar_resnet20").with_classes(3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "main", 24, size=40)
    write_images(folder / "more", 12, size=32, seed=1)
    write_checkpoint(NETWORK, folder / "three.safetensors")
    return folder


@pytest.fixture
def config(files):
    splits = (4, 5, 6, 7)
    return image_config(
        "cifar_resnet20", files / "main", files / "three.safetensors", splits=splits
    )


def test_the_task_is_the_network_on_the_files(config, files):
    task = image_task(config)
    assert task.name == "cifar_resnet20 on main (24 images)"
    assert isinstance(task.dataset.inputs, LazyRows) and task.dataset.inputs.dtype == np.uint8
    assert task.training is None and task.loss is cross_entropy
    check_disjoint(task.splits)
    test = task.split("test")
    (images, labels) = test.batches(7)[0]
    options = {"size": 32, "normalization": NETWORK.normalization}
    eager = load_image_folder(files / "main", **options)
    np.testing.assert_array_equal(labels, eager.targets[task.splits.test])
    # Three classes, as the checkpoint has, and normalized inside.
    params = task.load_params()
    logits = task.apply(params, images)
    assert logits.shape == (7, 3)
    expected = NETWORK.module.apply(params, eager.inputs[task.splits.test])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    accuracy = task.metrics(logits, task.splits.test)
    np.testing.assert_array_equal(accuracy["Acc@1"], np.argmax(logits, axis=1) == labels)
    assert set(accuracy) == {"Acc@1"}


def test_the_first_convolution_reads_an_activation(config):
    graph = trace_task(image_task(config))
    first = graph.sites[0]
    assert first.name == "conv1/kernel"
    assert [operand.role for operand in first.operands] == ["activation", "weight"]
    assert len(graph.sites) == 20


def test_splits_follow_the_seed(config):
    first, again = image_task(config), image_task(config)
    assert first.splits.fingerprint == again.splits.fingerprint
    config.seed = 1
    assert image_task(config).splits.fingerprint != first.splits.fingerprint


def test_calibration_files_serve_their_splits_alone(config, files):
    config.data.calibration = str(files / "more")
    config.data.calibration_splits = ("ranges", "selection")
    config.data.calibration_trained_on = True
    task = image_task(config)
    assert len(task.dataset) == 36 and task.training.tolist() == list(range(24, 36))
    for name in ("ranges", "selection"):
        assert getattr(task.splits, name).min() >= 24
    for name in ("confirmation", "test"):
        assert getattr(task.splits, name).max() < 24
    with pytest.raises(DataError, match="split selection holds 5 training examples"):
        check_disjoint(task.splits, task.training)
    more = load_image_folder(files / "more", size=32)
    images, labels = task.split("ranges").batches(4)[0]
    np.testing.assert_array_equal(images, more.inputs[task.splits.ranges - 24])
    np.testing.assert_array_equal(labels, more.targets[task.splits.ranges - 24])


def test_images_that_give_ranges_alone_need_no_labels(config, files, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((files / "more").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    config.data.calibration = str(flat)
    task = image_task(config)
    assert set(task.split("ranges").targets) == {-1}
    check_disjoint(task.splits)
    config.data.calibration_splits = ("ranges", "selection")
    with pytest.raises(DataError, match="lies in no subfolder"):
        image_task(config)


def test_a_subset_is_drawn(config):
    config.data.examples = 22
    task = image_task(config)
    assert sum(len(task.split(name)) for name in ("ranges", "selection", "test")) == 16
    config.data.examples = 21
    with pytest.raises(DataError, match=r"need 22 examples .* but 21 were found"):
        image_task(config)


def test_images_the_network_has_seen_are_recorded(config):
    config.data.trained_on = True
    task = image_task(config)
    with pytest.raises(DataError, match="holds 5 training examples"):
        check_disjoint(task.splits, task.training)


def test_metrics_agree_with_sorting():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 6, (200, 9)).astype(np.float32)  # with ties
    labels = rng.integers(0, 9, 500)
    chosen = rng.permutation(500)[:200]
    found = top_accuracies(labels)(jax.numpy.asarray(logits), chosen)
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == labels[chosen][:, None]
    np.testing.assert_array_equal(found["Acc@1"], hits[:, 0])
    np.testing.assert_array_equal(found["Acc@5"], hits[:, :5].any(axis=1))
    broken = top_accuracies(labels)(np.full((1, 9), np.nan), np.array([0]))
    assert broken["Acc@1"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "data.files",
            "",
            r"name is '' and .* give one of them: --config.data.files=FOLDER_OR_ZIP",
        ),
        ("data.name", "imagenet2012", "name is 'imagenet2012' and .* give one of them"),
        ("data.files", "nowhere", "data.files: nowhere does not exist"),
        ("data.labels", "nowhere.csv", "data.files: nowhere.csv does not exist"),
        ("data.calibration", "nowhere", "data.calibration: nowhere does not exist"),
        ("model.name", "alexnet", r"model.name is 'alexnet'; expected one of resnet18, "),
        ("model.name", "", r"model.name is empty; .* --config.model.name=resnet18"),
        ("model.weights", "", "model.weights is empty; .* --config.model.weights=FILE"),
        ("model.weights", "nowhere.pth", "model.weights: there is no file nowhere.pth"),
        ("data.calibration_splits", ("test",), r"calibration_splits is \('test',\)"),
    ],
)
def test_options_that_do_not_fit_are_named(config, files, field, value, message):
    if field == "data.calibration_splits":
        config.data.calibration = str(files / "more")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(DataError, match=message):
        image_task(config)


def test_tfds_needs_its_folder(config):
    config.data.files, config.data.name = "", "imagenet2012"
    with pytest.raises(DataError, match=r"data_dir is empty; where has TFDS prepared imagenet2012"):
        image_task(config)
    config.data.data_dir, config.data.labels = "here", "labels.csv"
    with pytest.raises(DataError, match=r"config.data.labels and config.data.where"):
        image_task(config)


def test_the_same_files_cannot_calibrate(config):
    config.data.calibration = config.data.files
    with pytest.raises(DataError, match="what chooses a plan must not judge it"):
        image_task(config)


def test_folders_must_name_all_classes(config, tmp_path):
    path = write_checkpoint(reference("cifar_resnet20"), tmp_path / "ten.safetensors")
    config.model.weights = str(path)
    with pytest.raises(DataError, match=r"names 3 classes .* but the model predicts 10"):
        image_task(config)

"""Images come out as Pillow shows them, in order, with the right labels."""

import builtins
import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrmils.data import DataError, Normalization, load_image_folder, resize_and_crop

NAMES = ["bird/b 1.png", "bird/a.PNG", "cat/x.png", "ant/deep.png"]


def pixels(seed, height=12, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four images in three classes, and files that are none."""
    root = tmp_path / "birds"
    files = {name: png(pixels(seed)) for seed, name in enumerate(NAMES)}
    files |= {"bird/notes.txt": b"no image", "bird/._a.png": b"junk", "__MACOSX/a.png": b"junk"}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def expected_images():
    return np.stack([pixels(NAMES.index(name)) for name in sorted(NAMES)])


def write_labels(path, rows, header="file,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_class_folders(folder):
    data = load_image_folder(folder, size=12)
    assert data.name == "birds"
    assert data.inputs.dtype == np.uint8 and data.targets.dtype == np.int32
    np.testing.assert_array_equal(data.inputs, expected_images())
    assert data.targets.tolist() == [0, 1, 1, 2]
    known = load_image_folder(folder, size=12, classes=["bird", "fish", "ant", "cat"])
    assert known.targets.tolist() == [2, 0, 0, 3]


def test_a_zip_archive_reads_like_its_folder(folder, tmp_path):
    archive = tmp_path / "birds.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*.*"):
            file.write(path, f"top/{path.relative_to(folder)}")
    zipped, plain = load_image_folder(archive, size=8), load_image_folder(folder, size=8)
    np.testing.assert_array_equal(zipped.inputs, plain.inputs)
    np.testing.assert_array_equal(zipped.targets, plain.targets)
    assert zipped.name == "birds"


def test_labels_from_a_table(folder, tmp_path):
    rows = [
        f"{name},{label},test,p{label // 4}"
        for name, label in zip(NAMES, (7, 3, 5, 1), strict=True)
    ]
    rows.append("other.png,9,train,p0")
    labels = write_labels(tmp_path / "l.csv", rows, "file,label,split,patient")
    options = {"labels": labels, "where": {"split": "test"}, "group_column": "patient"}
    data = load_image_folder(folder, size=12, **options)
    np.testing.assert_array_equal(data.inputs, expected_images())
    assert data.targets.tolist() == [1, 3, 7, 5]
    assert data.groups is not None and data.groups.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([f"{name},1" for name in NAMES[1:]], r"1 images of .* have no row .* bird/b 1\.png"),
        ([f"{name},1" for name in [*NAMES, "z.png"]], r"lists 1 images .* first is z\.png"),
        ([f"{name},1" for name in [*NAMES, NAMES[0]]], r"lists bird/b 1\.png more than once"),
    ],
)
def test_labels_and_images_belong_together(folder, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_image_folder(folder, size=12, labels=write_labels(tmp_path / "l.csv", rows))


def test_normalization_inside_and_outside_the_model(folder):
    normalization = Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), scale=1 / 255)
    stored = load_image_folder(folder, size=12).inputs
    floats = load_image_folder(folder, size=12, normalization=normalization).inputs
    assert floats.dtype == np.float32
    reference = (stored / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.5])
    np.testing.assert_allclose(floats, reference, atol=1e-6)
    inside = jax.jit(normalization)(jnp.asarray(stored))
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, floats, atol=1e-6)


def test_centre_crop_before_resizing():
    image = pixels(0, height=288, width=320)
    # 288 * 224 / 256 = 252, in the middle.
    square = Image.fromarray(image[18:270, 34:286]).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_and_crop(image, 224, crop_padding=32), np.asarray(square))


def test_the_whole_centre_square_by_default():
    image = pixels(0, height=10, width=15)
    np.testing.assert_array_equal(resize_and_crop(image, 10), image[:, 3:13])


def test_grayscale_and_other_modes(tmp_path):
    transparent = Image.fromarray(pixels(0)).convert("RGBA")
    (tmp_path / "a").mkdir()
    transparent.save(tmp_path / "a" / "1.png")
    transparent.convert("L").save(tmp_path / "a" / "2.png")
    color = load_image_folder(tmp_path, size=12).inputs
    np.testing.assert_array_equal(color[0], pixels(0))
    gray = load_image_folder(tmp_path, size=12, grayscale=True).inputs
    assert gray.shape == (2, 12, 12, 1)
    np.testing.assert_array_equal(gray[0], gray[1])


def test_jpeg(tmp_path):
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (32, 32, 3))
    Image.fromarray(np.ascontiguousarray(smooth)).save(tmp_path / "1.JPEG", quality=95)
    labels = write_labels(tmp_path / "l.csv", ["1.JPEG,4"])
    data = load_image_folder(tmp_path, size=32, labels=labels)
    assert data.targets.tolist() == [4]
    assert np.abs(data.inputs[0].astype(int) - smooth).max() < 8
    with pytest.raises(DataError, match=r"1\.JPEG lies in no subfolder .* pass labels="):
        load_image_folder(tmp_path, size=32)


def test_broken_images_are_named(folder):
    (folder / "cat" / "cut.png").write_bytes(png(pixels(9))[:150])
    (folder / "cat" / "text.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"2 of 6 images .*: cat/cut\.png \(.*; cat/text\.jpg \("):
        load_image_folder(folder, size=12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "does not exist; expected a folder of images or a zip"),
        (lambda path: path, "holds no image; expected files ending in .jpeg, .jpg, .png"),
        (lambda path: write_labels(path / "x.zip", []), "neither a folder nor a zip archive"),
    ],
)
def test_not_a_folder_of_images(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        load_image_folder(make(tmp_path), size=8)


def test_refusals(folder, monkeypatch):
    with pytest.raises(DataError, match=r"^size is 0"):
        load_image_folder(folder, size=0)
    with pytest.raises(DataError, match="about the CSV table; pass labels= as well"):
        load_image_folder(folder, size=8, group_column="patient")
    with pytest.raises(DataError, match=r"1 labels are none of the 2 classes: \['cat'\]"):
        load_image_folder(folder, size=8, classes=["ant", "bird"])
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(DataError, match=r"^reading images needs Pillow.*jaxrmils\[data\]"):
        load_image_folder(folder, size=8)


@pytest.mark.parametrize("normalization", [None, Normalization((9.0,), (3.0,))])
def test_lazy_images_are_the_same(folder, tmp_path, normalization):
    archive = tmp_path / "birds.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, seed in zip(NAMES, range(4), strict=True):
            file.writestr(name, png(pixels(seed)))
    for source in (folder, archive):
        options = {"size": 8, "crop_padding": 2, "normalization": normalization}
        lazy = load_image_folder(source, lazy=True, **options)
        eager = load_image_folder(source, **options)
        assert (lazy.inputs.shape, lazy.inputs.dtype) == (eager.inputs.shape, eager.inputs.dtype)
        np.testing.assert_array_equal(lazy.targets, eager.targets)
        found = np.concatenate([inputs for inputs, _ in lazy.take([3, 0, 1]).batches(2)])
        np.testing.assert_array_equal(found, eager.inputs[[3, 0, 1]])


def test_a_broken_lazy_image_is_named_when_it_is_met(folder):
    (folder / "cat" / "torn.png").write_bytes(png(pixels(1))[:60])
    data = load_image_folder(folder, size=12, lazy=True)
    assert len(list(data.take([0, 1, 2]).batches(2))) == 2
    with pytest.raises(DataError, match=r"birds: cat/torn.png cannot be read \(.*repair or remove"):
        list(data.batches(2))


def test_images_without_labels(folder):
    (folder / "alone.png").write_bytes(png(pixels(7)))
    data = load_image_folder(folder, size=12, labelled=False)
    assert data.targets.tolist() == [-1] * 5 and data.targets.dtype == np.int32
    with pytest.raises(DataError, match="labelled=False says that none are read"):
        load_image_folder(folder, size=12, labelled=False, labels="labels.csv")


def test_labels_must_mean_the_classes_of_the_model(folder, tmp_path):
    assert load_image_folder(folder, size=12, num_classes=3).targets.tolist() == [0, 1, 1, 2]
    with pytest.raises(DataError, match=r"names 3 classes \(ant, bird, cat.*predicts 10, so which"):
        load_image_folder(folder, size=12, num_classes=10)
    rows = [f"{name},{number}" for number, name in enumerate(NAMES)]
    labels = write_labels(tmp_path / "labels.csv", rows)
    numbers = load_image_folder(folder, size=12, labels=labels, num_classes=10).targets
    assert numbers.tolist() == [NAMES.index(name) for name in sorted(NAMES)]
    with pytest.raises(DataError, match=r"labels.csv: 1 label is out of range: .* for 3 classes"):
        load_image_folder(folder, size=12, labels=labels, num_classes=3)

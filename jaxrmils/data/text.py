"""Texts as BERT's inputs: WordPiece tokens by the `tokenizers` library, and labelled CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrmils.data.dataset import DataError, Dataset
from jaxrmils.data.tables import class_indices, read_columns

Tokenizer = Any  # tokenizers.Tokenizer, which an optional extra brings
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(path: str | Path, *, lowercase: bool = True) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: a `tokenizer.json`, or BERT's `vocab.txt`, one token a line.
        lowercase: for a `vocab.txt`: the model is uncased (accents are stripped too). A
            `tokenizer.json` says so itself.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        DataError: `tokenizers` is missing, there is no such file, or it is of another kind.
    """
    tokenizers, path = _import_tokenizers(), Path(path)
    if not path.is_file():
        raise DataError(f"{path} is no file; expected a tokenizer.json or a vocab.txt")
    if path.suffix == ".json":
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{path} is no tokenizer of the tokenizers library: {error}") from error
    if path.suffix != ".txt":
        raise DataError(f"{path.name} is neither a tokenizer.json nor a vocab.txt")
    return _word_piece(tokenizers, path, lowercase)


def encode_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int,
    pairs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Texts as arrays of tokens, cut and padded to one length.

    Args:
        tokenizer: what `load_tokenizer` returned; its own padding and truncation are not used.
        texts: the texts.
        max_length: tokens of a row; longer texts lose their end.
        pairs: second texts, as many, for a model that takes two.

    Returns:
        `{"input_ids", "attention_mask", "token_type_ids"}`, int32 `[texts, max_length]` each.

    Raises:
        DataError: there is no text, the numbers of texts differ, `max_length` leaves no room
            beside the special tokens, or the tokenizer has no padding token.
    """
    if not len(texts) or (pairs is not None and len(pairs) != len(texts)):
        raise DataError(
            f"found {len(texts)} texts and {'no' if pairs is None else len(pairs)} second texts; "
            "expected at least one, and as many of both"
        )
    tokenizer = prepared(tokenizer, max_length, pairs=pairs is not None)
    tokenizer.enable_truncation(max_length)
    rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    return token_arrays(tokenizer.encode_batch(rows))


def load_text_csv(
    path: str | Path,
    *,
    text: str,
    label: str,
    tokenizer: Tokenizer,
    max_length: int,
    pair: str | None = None,
    group: str | None = None,
    where: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Dataset:
    """Labelled texts from a CSV file with a header line, in the file's order.

    Args:
        path: the file.
        text: the column with texts.
        label: the column with labels: integers, or names of classes.
        tokenizer: what `load_tokenizer` returned.
        max_length: tokens of a row; longer texts lose their end.
        pair: the column with second texts.
        group: the column that says which texts belong together (an author, a conversation).
        where: keep only the rows with these values, such as `{"split": "test"}`.
        classes: names of the classes in the order of their indices; by default all names that
            occur, sorted.
        name: what reports call the data; the file's name by default.

    Returns:
        `inputs` as from `encode_texts`, `targets` int32 `[texts]`, `groups` int64 or `None`.

    Raises:
        DataError: see `read_columns`, `class_indices` and `encode_texts`.
    """
    columns = [column for column in (text, label, pair, group) if column is not None]
    table = read_columns(path, columns, where)
    second = None if pair is None else table[pair]
    inputs = encode_texts(tokenizer, table[text], max_length=max_length, pairs=second)
    groups = None if group is None else np.unique(table[group], return_inverse=True)[1]
    targets = class_indices(table[label], classes)
    return Dataset(inputs, targets, groups, name or Path(path).stem)


def prepared(tokenizer: Tokenizer, max_length: int, *, pairs: bool) -> Tokenizer:
    """A copy of a tokenizer that pads to `max_length` and truncates nothing.

    Args:
        tokenizer: what `load_tokenizer` returned.
        max_length: tokens of a row.
        pairs: whether it will see pairs of texts.

    Raises:
        DataError: `max_length` leaves no room, or the tokenizer has no padding token.
    """
    special = tokenizer.num_special_tokens_to_add(pairs)
    if max_length <= special:
        raise DataError(
            f"max_length is {max_length} and the special tokens take {special}; expected more"
        )
    padding = tokenizer.padding or {"pad_token": "[PAD]"}
    pad_id = tokenizer.token_to_id(padding["pad_token"])
    if pad_id is None:
        raise DataError(
            "the tokenizer has no token [PAD] and no padding of its own; "
            "call its enable_padding(pad_id=, pad_token=) first"
        )
    copy = _import_tokenizers().Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.enable_padding(length=max_length, pad_id=pad_id, pad_token=padding["pad_token"])
    return copy


def token_arrays(encodings: Sequence[Any]) -> dict[str, np.ndarray]:
    """Encodings of equal length as a model's inputs.

    Args:
        encodings: of the `tokenizers` library.

    Returns:
        `{"input_ids", "attention_mask", "token_type_ids"}`, int32 `[encodings, length]` each.
    """
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int32),
        "attention_mask": np.array([e.attention_mask for e in encodings], np.int32),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int32),
    }


def _word_piece(tokenizers: Any, path: Path, lowercase: bool) -> Tokenizer:
    model = tokenizers.models.WordPiece.from_file(str(path), unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    missing = [token for token in SPECIAL_TOKENS[:4] if tokenizer.token_to_id(token) is None]
    if missing:
        raise DataError(f"{path} lacks the tokens {missing}; expected BERT's vocabulary")
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    end, start = (
        ("[SEP]", tokenizer.token_to_id("[SEP]")),
        ("[CLS]", tokenizer.token_to_id("[CLS]")),
    )
    tokenizer.post_processor = tokenizers.processors.BertProcessing(end, start)
    known = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(known)
    return tokenizer


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "texts need the tokenizers library, which is not installed; "
            "run: pip install 'jaxrmils[data]'"
        ) from error
    return tokenizers

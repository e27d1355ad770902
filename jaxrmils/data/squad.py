"""SQuAD's question answering data, files in its JSON form or TFDS's, as windows of tokens.

Rajpurkar et al., https://arxiv.org/abs/1606.05250; XQuAD and other v1.1 data have the same form.
`squad_answers.py` turns a model's logits into answers and scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrmils.data.dataset import DataError, Dataset
from jaxrmils.data.text import Tokenizer, prepared, token_arrays
from jaxrmils.data.tfds_source import read_tfds

NOT_CONTEXT = -1


@dataclass(frozen=True)
class Question:
    """A question about a paragraph.

    Args:
        id: its name in the file.
        text: the question.
        paragraph: number of the paragraph in the file, from 0.
        context: the paragraph.
        answers: accepted answers, each a part of the paragraph, with the position of its first
            character.
    """

    id: str
    text: str
    paragraph: int
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Squad:
    """Questions and the windows of tokens that a model reads.

    Args:
        dataset: `inputs` as from `encode_texts`, one row a window; `targets` `{"start", "end"}`,
            the answer's first and last token, int32 `[windows]`, both 0 (the first token) where
            the window does not hold the whole answer; `groups` the paragraph.
        questions: in the file's order.
        question_of: int64 `[windows]`, which question a window belongs to.
        offsets: int32 `[windows, length, 2]`, first character and the one after the last of every
            token in its paragraph, -1 for tokens that are not of the paragraph.
    """

    dataset: Dataset
    questions: tuple[Question, ...]
    question_of: np.ndarray
    offsets: np.ndarray


def load_squad(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    windows: bool = True,
    limit: int | None = None,
    name: str | None = None,
) -> Squad:
    """Questions from a file in SQuAD v1.1's JSON form.

    A paragraph that does not fit beside its question is read in several overlapping windows, or
    cut at its end.

    Args:
        path: the JSON file.
        tokenizer: what `load_tokenizer` returned.
        max_length: tokens of a window, question and special tokens included.
        doc_stride: tokens that neighbouring windows of a paragraph share.
        windows: False keeps the first window of each question alone, so that an example is a
            question; the rest of a long paragraph is not read.
        limit: keep only the first so many questions.
        name: what reports call the data; the file's name by default.

    Returns:
        The windows, in the order of the questions.

    Raises:
        DataError: the file has another form, a question has no answer (SQuAD v2), an answer does
            not stand where the file says, or a question leaves no room for its paragraph.
    """
    path = Path(path)
    options = {"max_length": max_length, "doc_stride": doc_stride, "windows": windows}
    questions = read_questions(path)[:limit]
    if not questions:
        raise DataError(f"{path}: no question to read (limit={limit}); expected at least one")
    return _windows(questions, tokenizer, str(path), name or path.stem, **options)


def load_squad_tfds(
    name: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    data_dir: str | Path,
    max_length: int = 384,
    doc_stride: int = 128,
    windows: bool = True,
    limit: int | None = None,
) -> Squad:
    """Questions of a data set with the features of TFDS's `squad`, read without TensorFlow.

    The features are `id`, `context`, `question` and `answers`, a sequence of `text` and
    `answer_start`. Questions with the same context belong to one paragraph.

    Args:
        name, split, data_dir: as for `load_tfds`.
        tokenizer, max_length, doc_stride, windows, limit: as for `load_squad`.

    Returns:
        The windows, in the order of TFDS's examples.

    Raises:
        DataError: as for `load_tfds` and `load_squad`.
    """
    source = f"{name}/{split}"
    answers = ("answers/text", "answers/answer_start")
    features = ("id", "context", "question", *answers)
    columns = read_tfds(name, split, data_dir=data_dir, features=features)
    paragraphs = {context: n for n, context in enumerate(dict.fromkeys(columns["context"]))}
    questions = [
        Question(key, text, paragraphs[context], context, _answers(texts, starts))
        for key, context, text, texts, starts in zip(*columns.values(), strict=True)
    ][:limit]
    if not questions:
        raise DataError(f"{source}: no question to read (limit={limit}); expected at least one")
    _check_questions(source, questions)
    options = {"max_length": max_length, "doc_stride": doc_stride, "windows": windows}
    return _windows(questions, tokenizer, source, source, **options)


def _answers(texts: Sequence[str], starts: Sequence[int]) -> tuple[tuple[str, int], ...]:
    return tuple((text, int(start)) for text, start in zip(texts, starts, strict=True))


def _windows(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    source: str,
    name: str,
    *,
    max_length: int,
    doc_stride: int,
    windows: bool,
) -> Squad:
    """The windows of checked questions; `source` is what messages call them."""
    tokenizer = prepared(tokenizer, max_length, pairs=True)
    stride = doc_stride if windows else 0
    _check_room(source, tokenizer, questions, max_length, stride)
    tokenizer.enable_truncation(max_length, stride=stride, strategy="only_second")
    pairs = [(question.text, question.context) for question in questions]
    encodings, question_of = [], []
    for number, encoding in enumerate(tokenizer.encode_batch(pairs)):
        found = [encoding, *encoding.overflowing] if windows else [encoding]
        encodings += found
        question_of += [number] * len(found)
    question_of = np.array(question_of, np.int64)
    offsets = np.stack([_context_offsets(encoding) for encoding in encodings])
    spans = np.array(
        [
            _token_span(window, questions[number])
            for window, number in zip(offsets, question_of, strict=True)
        ],
        np.int32,
    )
    groups = np.array([questions[number].paragraph for number in question_of], np.int64)
    targets = {"start": spans[:, 0], "end": spans[:, 1]}
    dataset = Dataset(token_arrays(encodings), targets, groups, name)
    return Squad(dataset, tuple(questions), question_of, offsets)


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file in SQuAD v1.1's JSON form, in its order.

    Raises:
        DataError: there is no such file, it has another form, a question has no answer, or an
            answer does not stand where the file says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is no file; expected SQuAD's JSON form")
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        paragraphs = [part for article in articles for part in article["paragraphs"]]
        questions = [
            Question(
                entry["id"],
                entry["question"],
                number,
                part["context"],
                tuple((answer["text"], answer["answer_start"]) for answer in entry["answers"]),
            )
            for number, part in enumerate(paragraphs)
            for entry in part["qas"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path} is not of SQuAD's form (data, paragraphs, context and qas, and for each id, "
            f"question and answers with text and answer_start): {type(error).__name__} {error}"
        ) from error
    _check_questions(path, questions)
    return questions


def _check_questions(path: Path | str, questions: Sequence[Question]) -> None:
    if len({question.id for question in questions}) != len(questions):
        raise DataError(f"{path}: two questions have the same id; expected each id once")
    for question in questions:
        if not question.answers:
            raise DataError(
                f"{path}: question {question.id} has no answer, as in SQuAD v2; load_squad reads "
                "v1.1, where every question has one: take such questions out"
            )
        for text, start in question.answers:
            found = question.context[start : start + len(text)]
            if found != text or not text:
                raise DataError(
                    f"{path}: question {question.id}: the answer {text!r} should stand at "
                    f"character {start} of its paragraph, where {found!r} was found"
                )


def _check_room(
    path: str, tokenizer: Tokenizer, questions: Sequence[Question], max_length: int, doc_stride: int
) -> None:
    texts = [question.text for question in questions]
    bare = tokenizer.encode_batch(texts, add_special_tokens=False)
    lengths = [sum(encoding.attention_mask) for encoding in bare]
    room = max_length - tokenizer.num_special_tokens_to_add(True) - max(lengths)
    if doc_stride < 0 or room <= doc_stride:
        longest = questions[int(np.argmax(lengths))]
        raise DataError(
            f"{path}: question {longest.id} of {max(lengths)} tokens leaves {room} of "
            f"max_length={max_length} for its paragraph, and doc_stride is {doc_stride}; expected "
            "0 <= doc_stride < what is left: raise max_length or lower doc_stride"
        )


def _context_offsets(window: Any) -> np.ndarray:
    """int32 `[length, 2]`: characters of the paragraph's tokens, -1 elsewhere."""
    of_context = np.array([sequence == 1 for sequence in window.sequence_ids])
    return np.where(of_context[:, None], np.array(window.offsets), NOT_CONTEXT).astype(np.int32)


def _token_span(offsets: np.ndarray, question: Question) -> tuple[int, int]:
    """First and last token of the question's first answer in a window, (0, 0) if it is cut."""
    text, start = question.answers[0]
    # Blanks around it belong to no token.
    start += len(text) - len(text.lstrip())
    end = start + len(text.strip())
    touching = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    if not touching.size:
        return 0, 0
    first, last = touching[0], touching[-1]
    if offsets[first, 0] > start or offsets[last, 1] < end:
        return 0, 0
    return int(first), int(last)

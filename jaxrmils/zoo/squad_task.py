"""Answers to questions about a paragraph (SQuAD) by a fine-tuned BERT."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrmils.data import (
    DataError,
    Squad,
    Task,
    join,
    load_squad,
    load_squad_tfds,
    load_tokenizer,
    squad_metrics,
    squad_predictions,
)
from jaxrmils.graph import from_linen
from jaxrmils.progress import Progress, silent
from jaxrmils.zoo.bert import BertConfig, BertForSpans, span_cross_entropy
from jaxrmils.zoo.bert_checkpoint import encoder_config, load_bert, token_shapes
from jaxrmils.zoo.file_splits import check_file_options, deal_files
from jaxrmils.zoo.importing import Variables, load_state_dict


def squad_task(
    config: Any, progress: Progress = silent, *, architecture: BertConfig | None = None
) -> Task:
    """Questions in SQuAD v1.1's form, of a JSON file or of TFDS, and a `BertForSpans`.

    An example is a question with its paragraph cut at `config.model.max_length` tokens, so that
    loss, exact match and F1 belong to the same thing. Paragraphs are the groups: `config.splits`
    and `config.data.examples` count paragraphs.

    Where the answer begins or ends behind the cut, the loss's target is the first token, as in
    BERT's own training on SQuAD. Such examples stay in the loss: leaving them out, or giving them
    no loss, would make a plan look better than it is. Exact match and F1 count them like all
    others, so there the model can hardly be right.

    Args:
        config: with `seed`, `splits`, `model` (`name`, `weights`, `tokenizer`, `max_length`) and
            `data` (`files`, or `name`, `split` and `data_dir` for a data set with the features of
            TFDS's `squad`; `examples`, `trained_on`, and of a further JSON file `calibration`,
            `calibration_splits`, `calibration_trained_on`), as in `jaxrmils.cli.defaults`.
        progress: not used; reading takes seconds.
        architecture: the encoder's sizes; by default those of `config.model.name`.

    Returns:
        The task; its metrics are "EM" and "F1". Weights are read when they are first asked for.

    Raises:
        DataError: an option is missing or does not fit, a file is missing or of another form, or
            the calibration file has paragraphs of the other.
    """
    check_file_options(config, "squad", "a file in SQuAD's JSON form", ("tokenizer",))
    sizes = architecture or encoder_config(config.model.name)
    _check_length(config.model.max_length, sizes)
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = config.data
    options = {"max_length": config.model.max_length, "windows": False}
    files = [file for file in (data.files, data.calibration) if file]
    parts = [load_squad(file, tokenizer, **options) for file in files]
    if data.name:
        known = (data.name, data.split, tokenizer)
        parts.insert(0, load_squad_tfds(*known, data_dir=data.data_dir, **options))
    squad = _joined(parts)
    lengths = [len(part.dataset) for part in parts]
    splits, training = deal_files(config, lengths, squad.dataset.groups)
    module = BertForSpans(sizes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), **token_shapes())
    apply, _ = from_linen(module, shapes)
    model = config.model.name or "BERT"
    return Task(
        name=f"{model} on {parts[0].dataset.name} ({lengths[0]:,} questions)",
        apply=apply,
        params=lambda: _weights(config.model.weights, module),
        shapes=shapes,
        loss=span_cross_entropy,
        dataset=squad.dataset,
        splits=splits,
        training=training,
        metrics=lambda outputs, indices: question_scores(squad, outputs, indices),
    )


def question_scores(squad: Squad, outputs: Any, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Exact match and F1 of every question, for data whose examples are questions.

    Args:
        squad: from `load_squad(..., windows=False)`.
        outputs: `(start, end)` logits, `[examples, length]` each.
        indices: integers `[examples]`, which of the data set's examples, each once.

    Returns:
        `{"EM", "F1"}`, float64 `[examples]` in [0, 1], in the order of `indices`.

    Raises:
        DataError: the shapes do not fit, logits are not finite, or an index is repeated.
    """
    indices, (start, end) = np.asarray(indices), outputs
    predictions = squad_predictions(squad, start, end, windows=indices)
    # Scores come in the order of the file.
    scores, place = squad_metrics(squad, predictions), np.argsort(np.argsort(indices))
    return {"EM": scores.exact[place].astype(np.float64), "F1": scores.f1[place]}


def _joined(parts: Sequence[Squad]) -> Squad:
    """The questions of all files, in order."""
    if len(parts) == 1:
        return parts[0]
    contexts = [{question.context for question in part.questions} for part in parts]
    shared = set.intersection(*contexts)
    if shared:
        raise DataError(
            f"{' and '.join(part.dataset.name for part in parts)} share {len(shared)} paragraphs, "
            f"the first of them {min(shared)[:40]!r}; what chooses a plan must not judge it: take "
            "them out of one of the files"
        )
    ids = [{question.id for question in part.questions} for part in parts]
    if set.intersection(*ids):
        raise DataError(
            f"{' and '.join(part.dataset.name for part in parts)} share the question id "
            f"{min(set.intersection(*ids))!r}; give each question an id of its own"
        )
    questions = tuple(question for part in parts for question in part.questions)
    return Squad(
        functools.reduce(join, [part.dataset for part in parts]),
        questions,
        np.arange(len(questions)),
        np.concatenate([part.offsets for part in parts]),
    )


def _check_length(max_length: int, sizes: BertConfig) -> None:
    if max_length > sizes.max_length:
        raise DataError(
            f"config.model.max_length is {max_length}, but the encoder reads "
            f"{sizes.max_length} tokens at most"
        )


def _weights(path: str, module: BertForSpans) -> Variables:
    if not path:
        raise DataError(
            "config.model.weights is empty; give the weights of a BertForQuestionAnswering, such "
            "as experiments/finetune_bert.py squad saves"
        )
    return load_bert(load_state_dict(path), module, "qa_outputs")

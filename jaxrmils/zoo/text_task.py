"""Classification of texts of a CSV file or of TFDS by a fine-tuned BERT."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrmils.data import (
    DataError,
    Dataset,
    Task,
    check_labels,
    encode_texts,
    join,
    load_text_csv,
    load_tokenizer,
    read_tfds,
    tfds_class_names,
)
from jaxrmils.data.tables import class_indices, read_columns
from jaxrmils.graph import from_linen
from jaxrmils.progress import Progress, silent
from jaxrmils.zoo.bert import BertConfig, BertForClassification
from jaxrmils.zoo.bert_checkpoint import (
    class_names,
    encoder_config,
    load_bert,
    token_shapes,
    with_published_names,
)
from jaxrmils.zoo.file_splits import check_file_options, deal_files
from jaxrmils.zoo.image_task import top_accuracies
from jaxrmils.zoo.importing import StateDict, WeightError, load_state_dict
from jaxrmils.zoo.training import cross_entropy

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "category", "class", "intent")
GROUP_COLUMN = "group"


def text_task(
    config: Any, progress: Progress = silent, *, architecture: BertConfig | None = None
) -> Task:
    """Texts of a CSV file, or of a data set of TFDS, and a `BertForClassification`.

    The file has a column `text` or `sentence` and one of `label`, `category`, `class` or `intent`;
    with a column `group`, whole groups are dealt out to the splits, whose sizes then count groups.
    The classifier reads BERT's pooler where the checkpoint has one, else the mean of the tokens'
    vectors, as `experiments/finetune_bert.py` trains it.

    Args:
        config: with `seed`, `splits`, `model` (`name`, `weights`, `tokenizer`, `max_length`) and
            `data` (`files`, or `name`, `split`, `data_dir`, `text_feature` and `label_feature` for
            a data set of TFDS; `examples`, `trained_on`, and of a further CSV file `calibration`,
            `calibration_splits`, `calibration_trained_on`), as in `jaxrmils.cli.defaults`.
        progress: not used; reading takes seconds.
        architecture: the encoder's sizes; by default those of `config.model.name`.

    Returns:
        The task; its metrics are "Acc@1" and, with more than 5 classes, "Acc@5". The number of
        classes is the checkpoint's.

    Raises:
        DataError: an option is missing or does not fit, a file is missing or of another form, or
            labels are not the checkpoint's.
        WeightError: the checkpoint is no classifier, or of another encoder.
        FileNotFoundError: there is no checkpoint.
    """
    check_file_options(config, "texts", "a CSV file", ("weights", "tokenizer"))
    sizes = architecture or encoder_config(config.model.name)
    state = with_published_names(load_state_dict(config.model.weights), "classifier")
    module = _classifier(state, sizes, config.model.weights)
    tokenizer = load_tokenizer(config.model.tokenizer)
    names = class_names(config.model.weights)
    data = config.data
    known = (tokenizer, config.model.max_length, names, module.num_classes)
    files = [Path(file) for file in (data.files, data.calibration) if file]
    parts = [_read(file, *known) for file in files]
    if data.name:
        parts.insert(0, _read_tfds(data, *known))
    dataset = functools.reduce(join, parts)
    splits, training = deal_files(config, [len(part) for part in parts], dataset.groups)
    shapes = jax.eval_shape(module.init, jax.random.key(0), **token_shapes())
    apply, _ = from_linen(module, shapes)

    return Task(
        name=f"{config.model.name or 'BERT'} on {parts[0].name} ({len(parts[0]):,} texts)",
        apply=apply,
        params=lambda: load_bert(state, module, "classifier"),
        shapes=shapes,
        loss=cross_entropy,
        dataset=dataset,
        splits=splits,
        training=training,
        metrics=top_accuracies(dataset.targets),
    )


def text_columns(path: str | Path) -> tuple[str, str]:
    """The names of a CSV file's columns with texts and with labels.

    Raises:
        DataError: there is no such file, or it has no such columns.
    """
    header = _header(path)
    text = next((column for column in TEXT_COLUMNS if column in header), None)
    label = next((column for column in LABEL_COLUMNS if column in header), None)
    if text is None or label is None:
        raise DataError(
            f"{path} has the columns {header}; expected one of {', '.join(TEXT_COLUMNS)} and one "
            f"of {', '.join(LABEL_COLUMNS)}: rename them in its first line"
        )
    return text, label


def _header(path: str | Path) -> list[str]:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is no file; expected a CSV table with a header line")
    with path.open(newline="", encoding="utf-8-sig") as file:
        return next(csv.reader(file), [])


def _classifier(state: StateDict, sizes: BertConfig, path: str) -> BertForClassification:
    if "classifier.bias" not in state:
        raise WeightError(
            f"{path} has no tensor classifier.bias; expected the weights of a "
            "BertForSequenceClassification, such as experiments/finetune_bert.py classify saves"
        )
    pooler = any("pooler.dense." in name for name in state)
    classes = len(state["classifier.bias"])
    return BertForClassification(sizes, classes, "pooler" if pooler else "mean")


def _read(
    path: Path, tokenizer: Any, max_length: int, names: list[str] | None, num_classes: int
) -> Dataset:
    text, label = text_columns(path)
    if names is None:
        _check_names(path, label, num_classes)
    dataset = load_text_csv(
        path,
        text=text,
        label=label,
        group=GROUP_COLUMN if GROUP_COLUMN in _header(path) else None,
        tokenizer=tokenizer,
        max_length=max_length,
        classes=names,
    )
    check_labels(dataset.targets, num_classes)
    return dataset


def _read_tfds(
    data: Any, tokenizer: Any, max_length: int, names: list[str] | None, num_classes: int
) -> Dataset:
    """The texts of a data set of TFDS, with the checkpoint's numbers of classes."""
    text, label = data.text_feature, data.label_feature
    where = {"data_dir": data.data_dir}
    found = read_tfds(data.name, data.split, **where, features=[text, label])
    texts, labels = found[text], found[label]
    if not isinstance(texts[0], str):
        raise DataError(
            f"{data.name}: feature {text!r} holds {type(texts[0]).__name__}; expected texts: "
            "--config.data.text_feature=NAME"
        )
    if isinstance(labels[0], str):
        if names is None:
            _check_all_occur(data.name, label, set(labels), num_classes)
        targets = class_indices(labels, names)
    elif not isinstance(labels[0], (int, np.integer)):
        raise DataError(
            f"{data.name}: feature {label!r} holds {type(labels[0]).__name__}; expected a class "
            "for each text: --config.data.label_feature=NAME"
        )
    else:
        own = tfds_class_names(data.name, **where, feature=label)
        numbers = np.array(labels, np.int32)
        targets = numbers
        if names is not None and own is not None:
            targets = class_indices([own[n] for n in numbers], names)
    check_labels(targets, num_classes)
    inputs = encode_texts(tokenizer, texts, max_length=max_length)
    return Dataset(inputs, targets, None, f"{data.name}/{data.split}")


def _check_names(path: Path, label: str, num_classes: int) -> None:
    """Without the checkpoint's class names, names in order are indices only if all occur."""
    _check_all_occur(path, label, set(read_columns(path, [label])[label]), num_classes)


def _check_all_occur(path: Path | str, label: str, found: set[str], num_classes: int) -> None:
    if not all(name.removeprefix("-").isdecimal() for name in found) and len(found) != num_classes:
        raise DataError(
            f"{path}: {len(found)} class names in column {label!r}, but the checkpoint has "
            f"{num_classes} classes and does not name them; write class indices instead of names"
        )

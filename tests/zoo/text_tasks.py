"""Tiny encoders, files and configs for the tasks that read texts."""

import csv

import jax
import numpy as np
from data.banking.banking_dataset_builder import Banking
from data.questions_v1.questions_v1_dataset_builder import QuestionsV1
from data.text_files import VOCABULARY, question, write_squad, write_vocabulary

from jaxrmils.cli.defaults import base_config
from jaxrmils.zoo import BertConfig
from jaxrmils.zoo.bert_checkpoint import token_shapes

TINY = BertConfig(
    hidden_size=8,
    layers=1,
    heads=2,
    intermediate_size=12,
    vocabulary_size=len(VOCABULARY),
    max_length=20,
)
CLASSES = ["who", "where", "other"]
TEXTS = ("who wrote it?", "where is the lake?", "north of the old town", "by Ada, in Paris")
PLACES = ("paris", "north", "old town", "a lake", "the north")


def random_variables(module, seed=0):
    """Variables of the size that training leaves behind, float32."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), **token_shapes())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def write_questions(folder, paragraphs, *, prefix="q", name="squad.json"):
    """A SQuAD file of so many paragraphs with two questions each."""
    parts = []
    for number in range(paragraphs):
        place = PLACES[number % len(PLACES)]
        start = f"Report {number} of {prefix[0]} was written in "
        asked = [
            question(f"{prefix}{number}a", "where?", (place, len(start))),
            question(f"{prefix}{number}b", "who wrote the report?", ("written", start.index("wr"))),
        ]
        parts.append((f"{start}{place} by Ada.", asked))
    folder.mkdir(exist_ok=True)
    return write_squad(folder, *parts).rename(folder / name)


def task_config(folder, task, files, **data):
    """A config for a tiny encoder, its files in `folder`."""
    config = base_config()
    config.task = task
    config.model.tokenizer = str(write_vocabulary(folder))
    config.model.weights = str(folder / "weights.safetensors")
    config.model.max_length = 20
    config.data.files = str(files)
    config.data.update(data)
    config.splits.update(ranges=2, selection=3, confirmation=2, test=4)
    return config


def write_texts(folder, rows, header=("text", "category"), name="texts.csv"):
    """A CSV file."""
    path = folder / name
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def some_rows(count, classes=CLASSES):
    """Texts and classes that have nothing to do with each other."""
    return [(f"{TEXTS[n % 4]} {n}", classes[n % len(classes)]) for n in range(count)]


def prepare_banking(folder, rows, **options):
    """Texts and numbers of classes as TFDS prepares them."""
    builder = Banking(rows=rows, data_dir=folder, file_format="array_record", **options)
    builder.download_and_prepare()


def prepare_questions(folder, questions):
    """Questions as TFDS prepares them."""
    builder = QuestionsV1(questions=questions, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()

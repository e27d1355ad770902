"""What the configs of experiment 5 need, small: whole networks with random weights, and real data.

    python experiments/random_weights.py runs/random --photos imagenet/heldout \
        --labels imagenet/labels.csv --questions xquad.en.json

writes ImageNet photos and questions as TFDS prepares them, without TensorFlow (`imagenet2012`, and
`some_questions` with the features of `squad`), and checkpoints of ResNet-18 and MobileNetV2 under
torchvision's names and of BERT-base under Hugging Face's, all of them drawn. They prove that
`configs/resnet18_imagenet.py`, `mobilenet_v2_imagenet.py` and `bert_base_squad.py` run from end to
end; what the tables then say of accuracy means nothing.
"""

from __future__ import annotations

import abc
import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

from jaxrmils.data.squad import Question, read_questions
from jaxrmils.zoo import BertForSpans, Reference, reference
from jaxrmils.zoo.bert_checkpoint import encoder_config, save_bert, token_shapes
from jaxrmils.zoo.importing import LEAF_NAMES

NETWORKS = ("resnet18", "mobilenet_v2")
CLASSES = 1000
BERT_STD = 0.02
"""Of BERT's initial weights (Devlin et al. 2018, https://arxiv.org/abs/1810.04805)."""


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of ImageNet photos")
    parser.add_argument("--labels", type=Path, required=True, help="a CSV file: file, label")
    parser.add_argument("--questions", type=Path, required=True, help="in SQuAD's JSON form")
    parser.add_argument("--examples", type=int, default=64, help="photos")
    parser.add_argument("--paragraphs", type=int, default=16, help="with all their questions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    photos = list(labelled(args.photos, args.labels))
    drawn = rng.choice(len(photos), min(args.examples, len(photos)), replace=False)
    questions = [q for q in read_questions(args.questions) if q.paragraph < args.paragraphs]
    common = {"data_dir": args.folder, "file_format": "array_record"}
    Imagenet2012([photos[i] for i in sorted(drawn)], **common).download_and_prepare()
    SomeQuestions(questions, **common).download_and_prepare()
    for name in NETWORKS:
        save_file(random_state(reference(name), rng), args.folder / f"{name}.safetensors")
    save_bert(random_bert("bert_base", rng), args.folder / "bert_base.safetensors")
    for path in sorted(args.folder.iterdir()):
        print(path)


def labelled(photos: Path, labels: Path) -> Iterator[tuple[Path, int]]:
    """The photos of the folder that the file lists."""
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            if (photos / row["file"]).exists():
                yield photos / row["file"], int(row["label"])


def random_state(network: Reference, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A state dict in torch's layout: He's initial kernels, normalizations that change nothing."""
    tensors = {}
    leaves: Mapping[tuple[str, ...], Any] = flatten_dict(network.shapes())
    for (kind, *path, last), leaf in leaves.items():
        if last == "kernel":
            # Flax has the outputs last, torch has them first and the inputs behind.
            value = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
            value = value.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
        else:
            value = np.full(leaf.shape, 1.0 if last in ("scale", "var") else 0.0)
        name = ".".join((*path, LEAF_NAMES.get((kind, last), last)))
        tensors[name] = np.ascontiguousarray(value, np.float32)
    return tensors


def random_bert(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Variables as BERT's own training starts with, and a head that tells tokens apart."""
    module = BertForSpans(encoder_config(name))
    shapes = jax.eval_shape(module.init, jax.random.key(0), **token_shapes())

    def value(path: Any, leaf: Any) -> np.ndarray:
        last = path[-1].key
        if last in ("scale", "bias"):
            return np.full(leaf.shape, float(last == "scale"), np.float32)
        return (BERT_STD * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Examples that are at hand, written as one split."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, examples: list[Any], **kwargs: Any) -> None:
        self.examples = examples
        super().__init__(**kwargs)

    @abc.abstractmethod
    def features(self) -> dict[str, Any]:
        """Of an example."""

    @abc.abstractmethod
    def record(self, example: Any) -> dict[str, Any]:
        """An example as it is written."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"validation": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, example in enumerate(self.examples):
            yield number, self.record(example)


class Imagenet2012(Prepared, skip_registration=True):
    """Photos and the numbers of their classes."""

    VERSION = tfds.core.Version("5.1.0")  # the one that TFDS's own `imagenet2012` reads

    def features(self) -> dict[str, Any]:
        """As TFDS's own data set has them."""
        return {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
            "file_name": tfds.features.Text(),
        }

    def record(self, example: tuple[Path, int]) -> dict[str, Any]:
        """A photo in RGB."""
        path, label = example
        return {"image": Image.open(path).convert("RGB"), "label": label, "file_name": path.name}


class SomeQuestions(Prepared, skip_registration=True):
    """Questions about paragraphs."""

    def features(self) -> dict[str, Any]:
        """As TFDS's own data set has them."""
        text = tfds.features.Text()
        answers = tfds.features.Sequence({"text": text, "answer_start": np.int32})
        return dict.fromkeys(("id", "title", "context", "question"), text) | {"answers": answers}

    def record(self, example: Question) -> dict[str, Any]:
        """A question with its accepted answers."""
        answers = [{"text": text, "answer_start": start} for text, start in example.answers]
        return {
            "id": example.id,
            "title": "",
            "context": example.context,
            "question": example.text,
            "answers": answers,
        }


if __name__ == "__main__":
    main()

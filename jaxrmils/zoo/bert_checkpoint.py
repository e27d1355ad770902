"""BERT checkpoints as the tasks and the fine-tuning script read and write them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxrmils.data import DataError
from jaxrmils.zoo.bert import BERT_BASE, MINILM_L6, BertConfig, import_bert
from jaxrmils.zoo.importing import StateDict, Variables

ENCODERS = {"minilm_l6": MINILM_L6, "bert_base": BERT_BASE}

# Names of tensors that differ from Hugging Face's, each as `import_bert`'s `rename`: those of
# scripts that keep the encoder in `self.b` and the head in `self.h`, and of modules that wrap the
# whole model as `self.model`.
NAME_SCHEMES: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    ((r"^b\.", "bert."), (r"^h\.", "qa_outputs.")),
    ((r"^model\.", ""),),
)

# Linen's names to Hugging Face's, the inverse of `bert.TENSOR_NAMES`.
_PUBLISHED_NAMES = (
    (r"^pooler\.", "bert.pooler.dense."),
    (r"^bert\.layer_(\d+)\.", r"bert.encoder.layer.\1."),
    (r"(\.layer\.\d+\.attention)\.(query|key|value)\.", r"\1.self.\2."),
    (r"\.attention_output\.", ".attention.output.dense."),
    (r"\.attention_LayerNorm\.", ".attention.output.LayerNorm."),
    (r"(\.layer\.\d+)\.(intermediate|output)\.", r"\1.\2.dense."),
    (r"\.output_LayerNorm\.", ".output.LayerNorm."),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def encoder_config(name: str) -> BertConfig:
    """The sizes of a reference encoder.

    Args:
        name: "minilm_l6" or "bert_base".

    Raises:
        DataError: there is no such encoder; lists those there are.

    >>> encoder_config("minilm_l6").layers
    6
    """
    if name not in ENCODERS:
        raise DataError(
            f"config.model.name is {name!r}; expected one of {', '.join(ENCODERS)}. For an encoder "
            "of other sizes call the task with architecture=BertConfig(...) from a function of "
            "your own"
        )
    return ENCODERS[name]


def token_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs of an encoder for a text of one token, enough to find the shapes of its params."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)


def with_published_names(state_dict: StateDict, head: str) -> dict[str, Any]:
    """A checkpoint's tensors under Hugging Face's names, whichever of `NAME_SCHEMES` it follows.

    Args:
        state_dict: names to tensors.
        head: the head's name in Hugging Face's model, "qa_outputs" or "classifier".

    Returns:
        The tensors; under their own names where no scheme leads to `<head>.weight`, so that
        `import_bert` can say what is missing.

    >>> with_published_names({"b.embeddings.x": 0, "h.weight": 1}, "qa_outputs")
    {'bert.embeddings.x': 0, 'qa_outputs.weight': 1}
    """
    for scheme in NAME_SCHEMES:
        renamed = {_renamed(name, scheme): tensor for name, tensor in state_dict.items()}
        if f"{head}.weight" in renamed and len(renamed) == len(state_dict):
            return renamed
    return dict(state_dict)


def load_bert(state_dict: StateDict, module: nn.Module, head: str) -> Variables:
    """A checkpoint as a module's variables; see `import_bert` and `with_published_names`.

    Raises:
        WeightError: the checkpoint is of another model.
    """
    return import_bert(with_published_names(state_dict, head), module)


def export_bert(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables under the names and in the layout of Hugging Face's `Bert*` models.

    Args:
        variables: `{"params": ...}` of a `BertForSpans`, `BertForClassification` or
            `BertForEmbedding`.

    Returns:
        Names to float32 arrays, which `import_bert` reads back unchanged.

    >>> export_bert({"params": {"qa_outputs": {"kernel": np.ones((3, 2))}}})["qa_outputs.weight"]
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    tensors = {}
    leaves: Any = flatten_dict(variables["params"])
    for path, leaf in leaves.items():
        name = _renamed(".".join((*path[:-1], _LEAVES[path[-1]])), _PUBLISHED_NAMES)
        array = np.asarray(leaf, np.float32)
        tensors[name] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    return tensors


def save_bert(
    variables: Mapping[str, Any], path: str | Path, *, classes: Sequence[str] | None = None
) -> None:
    """Writes variables as a `.safetensors` file under Hugging Face's names.

    The file is written aside and moved into place, so that it is never half there.

    Args:
        variables: see `export_bert`.
        path: the file.
        classes: names of a classifier's classes in the order of its outputs, kept beside them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({"classes": json.dumps(list(classes))} if classes else {})
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(export_bert(variables), aside, metadata)
    aside.replace(path)


def class_names(path: str | Path) -> list[str] | None:
    """The names of the classes that `save_bert` kept in a file; `None` where there are none."""
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["classes"]) if "classes" in metadata else None


def _renamed(name: str, rename: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name

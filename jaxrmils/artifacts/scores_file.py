"""Scores in a folder, with the ranges and the model's table that policies need beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrmils.artifacts.documents import decoding
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.folder import ARRAYS, MANIFEST, Folder, load_folder, save_folder
from jaxrmils.artifacts.ranges_file import decode_ranges, encode_ranges
from jaxrmils.graph import ActivationRow, LayerRow, ModelTable
from jaxrmils.sensitivity import Candidate, ScoreMoments, Scores

KIND = "jaxrmils scores"

_ARRAYS = ("loss", "activations", "weights", "gradient_sum", "gradient_square")


def save_scores(
    scores: Scores, directory: PathLike, *, info: Mapping[str, Any] | None = None
) -> None:
    """Writes scores into a folder: `arrays.safetensors` and `manifest.json`.

    The ranges that they were made with and the model's table travel along, so that plans,
    predictions and sizes can be made without running the model.

    Args:
      scores: from `score`.
      directory: new, empty, or of older scores; replaced at once or not at all.
      info: kept in the manifest (seeds, data, command); JSON values.

    Raises:
      ArtifactError: the folder holds something else, or info can't be saved.
      OSError: the folder can't be written; an older one is untouched.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxrmils import calibrate, score, trace
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> loss = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=1)
    >>> scores = score(graph, params, [(x, x[:, :2])], loss, calibrate(graph, params, [x]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_scores(scores, folder, info={"seed": 0})
    ...     loaded = load_scores(folder)
    >>> len(loaded), loaded.weight_rows, bool((loaded.loss == scores.loss).all())
    (3, ('w',), True)
    """
    fields, arrays = encode_common(scores)
    arrays.update({name: np.asarray(getattr(scores, name)) for name in _ARRAYS})
    if scores.shift is not None:
        arrays["shift"] = np.asarray(scores.shift)
    save_folder(
        directory,
        KIND,
        fingerprint=scores.table.fingerprint,
        fields=fields,
        arrays=arrays,
        info=info,
    )


def load_scores(directory: PathLike) -> Scores:
    """Reads scores, bit-identical to the saved ones.

    Args:
      directory: of `save_scores`.

    Returns:
      The scores, with their ranges and table.

    Raises:
      ArtifactError: nothing there, another kind or format version, damaged or missing files.
    """
    folder = load_folder(directory, KIND)
    arrays = folder.arrays
    with decoding(folder.path / MANIFEST):
        scores = Scores(
            **decode_common(folder),
            **{name: arrays[name] for name in _ARRAYS},
            shift=arrays.get("shift"),
        )
        _check_shapes(scores, folder.path / ARRAYS)
    return scores


def encode_common(scores: Scores | ScoreMoments) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What scores and moments both have: fields of the manifest, and the arrays of the ranges."""
    ranges, arrays = encode_ranges(scores.ranges)
    fields = {
        "examples": len(scores),
        "activation_candidates": _candidates_document(scores.activation_candidates),
        "weight_candidates": _candidates_document(scores.weight_candidates),
        "activation_rows": [list(row) for row in scores.activation_rows],
        "weight_rows": list(scores.weight_rows),
        "table": dataclasses.asdict(scores.table),
        "ranges": ranges,
    }
    return fields, arrays


def decode_common(folder: Folder) -> dict[str, Any]:
    """The same as arguments of `Scores` and `ScoreMoments`; called inside `decoding`."""
    manifest = folder.manifest
    return {
        "table": _table(manifest["table"]),
        "ranges": decode_ranges(folder),
        "activation_rows": tuple(
            (site, position) for site, position in manifest["activation_rows"]
        ),
        "weight_rows": tuple(manifest["weight_rows"]),
        "activation_candidates": _candidates(manifest["activation_candidates"]),
        "weight_candidates": _candidates(manifest["weight_candidates"]),
    }


def _check_shapes(scores: Scores, path: PathLike) -> None:
    examples = len(scores)
    operands, uses = len(scores.activation_rows), len(scores.weight_rows)
    expected = {
        "activations": (examples, operands, len(scores.activation_candidates)),
        "weights": (examples, uses, len(scores.weight_candidates)),
        "gradient_sum": (examples, operands),
        "gradient_square": (examples, operands),
    }
    for name, shape in expected.items():
        found = getattr(scores, name).shape
        if found != shape:
            raise ArtifactError(
                f"{path}: {name} has the shape {found}; {MANIFEST} lists {shape} (examples, rows, "
                "candidates). Save the scores again"
            )


def _candidates_document(candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    # Fields beyond these two are left out where they are not set, as in files without them.
    required = ("bits", "rounding")
    return [
        {k: v for k, v in dataclasses.asdict(each).items() if k in required or v}
        for each in candidates
    ]


def _candidates(documents: Any) -> tuple[Candidate, ...]:
    return tuple(Candidate(**document) for document in documents)


def _table(document: Any) -> ModelTable:
    return ModelTable(
        layers=tuple(_row(layer) for layer in document["layers"]),
        leaf_names=tuple(document["leaf_names"]),
        leaf_bits=tuple(document["leaf_bits"]),
        float_leaves=tuple(document["float_leaves"]),
        fingerprint=document["fingerprint"],
    )


def _row(document: Any) -> LayerRow:
    # JSON knows lists only; every list of a row is a tuple.
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in document.items()
    }
    fields["activations"] = tuple(ActivationRow(**row) for row in document["activations"])
    return LayerRow(**fields)

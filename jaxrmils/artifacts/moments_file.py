"""Moments of scores in a folder, with the ranges and the model's table, as scores are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrmils.artifacts.documents import decoding
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.folder import ARRAYS, MANIFEST, load_folder, read_manifest, save_folder
from jaxrmils.artifacts.scores_file import decode_common, encode_common, load_scores
from jaxrmils.sensitivity import ScoreMoments, Scores
from jaxrmils.sensitivity.moments import Moments

KIND = "jaxrmils moments"


def kept_scores(run: PathLike) -> Path | None:
    """Where a run keeps its scores or their moments; None if it has neither."""
    for name in ("scores", "moments"):
        if (Path(run) / name / MANIFEST).is_file():
            return Path(run) / name
    return None


def load_kept(directory: PathLike) -> Scores | ScoreMoments:
    """Scores or moments, whichever a folder of `kept_scores` holds; ArtifactError as theirs."""
    kind = read_manifest(Path(directory)).get("kind")
    return load_moments(directory) if kind == KIND else load_scores(directory)


def save_moments(
    moments: ScoreMoments, directory: PathLike, *, info: Mapping[str, Any] | None = None
) -> None:
    """Writes moments into a folder: `arrays.safetensors` and `manifest.json`.

    Args:
      moments: from `score_moments`.
      directory: new, empty, or of older moments; replaced at once or not at all.
      info: kept in the manifest (seeds, data, command); JSON values.

    Raises:
      ArtifactError: the folder holds something else, or info can't be saved.
      OSError: the folder can't be written; an older one is untouched.
    """
    fields, arrays = encode_common(moments)
    arrays |= {"mean": moments.moments.mean, "products": moments.moments.products}
    fingerprint = moments.table.fingerprint
    save_folder(directory, KIND, fingerprint=fingerprint, fields=fields, arrays=arrays, info=info)


def load_moments(directory: PathLike) -> ScoreMoments:
    """Reads moments, bit-identical to the saved ones.

    Args:
      directory: of `save_moments`.

    Returns:
      The moments, with their ranges and table.

    Raises:
      ArtifactError: nothing there, another kind or format version, damaged or missing files.
    """
    folder = load_folder(directory, KIND)
    arrays = folder.arrays
    with decoding(folder.path / MANIFEST):
        found = Moments(int(folder.manifest["examples"]), arrays["mean"], arrays["products"])
        moments = ScoreMoments(moments=found, **decode_common(folder))
        width = moments.width
    if found.mean.shape != (width,) or found.products.shape != (width, width):
        raise ArtifactError(
            f"{folder.path / ARRAYS}: mean and products have the shapes {found.mean.shape} and "
            f"{found.products.shape}; {MANIFEST} lists {width} columns. Save the moments again"
        )
    return moments

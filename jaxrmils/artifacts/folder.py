"""What artifacts in a folder share: a manifest, an arrays file, and their checks."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np

from jaxrmils.artifacts.arrays import pack_arrays, unpack_arrays
from jaxrmils.artifacts.documents import check_json, decoding, dump_json, parse_json
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike, interrupted_save, replace_directory
from jaxrmils.version import __version__

FORMAT_VERSION = 1
LOADERS = {
    "jaxrmils plan": "load_plan",
    "jaxrmils ranges": "load_ranges",
    "jaxrmils scores": "load_scores",
    "jaxrmils moments": "load_moments",
    "jaxrmils model": "load_model",
    "jaxrmils export": "load_exported",
    "jaxrmils costs": "load_costs",
}
"""The kinds of artifact and what reads them."""

MANIFEST, ARRAYS, PLAN = "manifest.json", "arrays.safetensors", "plan.json"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder artifact, read and verified.

    Attributes:
      path: where it is.
      manifest: its manifest.
      arrays: its arrays by name.
      files: its other files by name.
    """

    path: Path
    manifest: dict[str, Any]
    arrays: dict[str, Any]
    files: dict[str, bytes]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "jaxrmils": __version__,
    }


def save_folder(
    directory: PathLike,
    kind: str,
    *,
    fingerprint: str,
    fields: Mapping[str, Any],
    arrays: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder artifact, in place of an older one of the same kind.

    Args:
      directory: the folder; must be new, empty or of the same kind.
      kind: one of `LOADERS`.
      fingerprint: of the graph it belongs to.
      fields: the kind's own part of the manifest.
      arrays: what goes into the arrays file.
      files: other files by name.
      info: the user's own part of the manifest (seeds, data, command, ...).

    Raises:
      ArtifactError: the folder holds something else; info or an array can't be saved.
      OSError: it can't be written; an older artifact is untouched.
    """
    _check_replaceable(Path(directory), kind)
    info = dict(info or {})
    check_json(info, "info", directory)
    data, keys = pack_arrays(arrays, directory)
    contents = {ARRAYS: data, **(files or {})}
    manifest = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "info": info,
        "fingerprint": fingerprint,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
        "prng_keys": keys,
        **fields,
    }
    # The manifest last: a folder that has one is complete.
    replace_directory(directory, {**contents, MANIFEST: dump_json(manifest, depth=3)})


def load_folder(directory: PathLike, kind: str) -> Folder:
    """Reads a folder artifact and verifies every file's hash.

    Raises:
      ArtifactError: nothing there, another kind or format version, damaged or missing files.
    """
    path = Path(directory)
    manifest = read_manifest(path, kind)
    with decoding(path / MANIFEST):
        expected = {name: (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
        prng_keys = dict(manifest["prng_keys"])
    if not isinstance(manifest.get("fingerprint"), str):
        raise ArtifactError(
            f"{path / MANIFEST}: fingerprint is {manifest.get('fingerprint')!r}; a str was "
            "expected. Save the artifact again"
        )
    if ARRAYS not in expected or any(Path(name).name != name for name in expected):
        raise ArtifactError(
            f"{path / MANIFEST} lists the files {list(expected)}; {ARRAYS} was expected among "
            "them, and no folders. Save the artifact again"
        )
    files = {name: verified_bytes(path / name, *facts) for name, facts in expected.items()}
    data = files.pop(ARRAYS)
    with decoding(path / MANIFEST):
        arrays = unpack_arrays(data, prng_keys, path / ARRAYS)
    return Folder(path, manifest, arrays, files)


def read_manifest(path: Path, kind: str | None = None) -> dict[str, Any]:
    """A folder's manifest; its kind and format version are checked if a kind is given."""
    if not path.is_dir():
        old = interrupted_save(path)
        found = "is a file" if path.exists() else "does not exist"
        hint = (
            f"; a save was interrupted: rename {old.name} beside it to {path.name}" if old else ""
        )
        raise ArtifactError(f"{path} {found}; the folder of an artifact was expected{hint}")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path} holds no {MANIFEST}, so it is no artifact or was copied incompletely; give "
            "the folder that was saved"
        )
    manifest = parse_json((path / MANIFEST).read_bytes(), path / MANIFEST)
    if kind is not None:
        check_header(manifest, path / MANIFEST, kind)
    return manifest


def check_header(document: Mapping[str, Any], path: Path, kind: str) -> None:
    """Raises ArtifactError unless a document is of a kind, in a format version that is known."""
    found = document.get("kind")
    if found != kind:
        loader = LOADERS.get(str(found))
        advice = f"use {loader}" if loader else "it is no artifact of jaxrmils"
        raise ArtifactError(f"{path} is of the kind {found!r}; {kind!r} was expected: {advice}")
    version = document.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ArtifactError(
            f"{path} has the format version {version!r}; this jaxrmils reads {FORMAT_VERSION}. "
            "Install the jaxrmils that saved it, or save it again with this one"
        )


def verified_bytes(path: Path, size: int, sha256: str) -> bytes:
    """A file's bytes; ArtifactError unless they are those that its manifest lists."""
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing, but {MANIFEST} lists it; copy the whole folder from its source, "
            "or save the artifact again"
        )
    data = path.read_bytes()
    advice = "Copy it again from its source, or save the artifact again"
    if path.name == PLAN:
        advice += ". A model's plan can't be edited: load it with load_plan and quantize once more"
    if len(data) != size:
        raise ArtifactError(f"{path} has {len(data)} bytes; {size} were saved. {advice}")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ArtifactError(
            f"{path} is damaged: its sha256 is {found[:12]}, {sha256[:12]} was saved. {advice}"
        )
    return data


def _check_replaceable(path: Path, kind: str) -> None:
    """Saving replaces the whole folder, so it must hold nothing but an artifact of this kind."""
    if not path.is_dir():
        return
    names = sorted(p.name for p in path.iterdir())
    foreign = [name for name in names if name not in (MANIFEST, ARRAYS, PLAN)]
    if names and (foreign or MANIFEST not in names):
        raise ArtifactError(
            f"{path} holds {(foreign or names)[:5]}, which saving there would delete; give a new "
            "or empty folder, or that of an older artifact"
        )
    if not names:
        return
    try:
        found = read_manifest(path).get("kind")
    except ArtifactError:
        return  # a damaged artifact
    if found != kind:
        raise ArtifactError(
            f"{path} holds an artifact of the kind {found!r}, which saving a {kind!r} there would "
            "delete; give another folder, or remove this one first"
        )

"""Records of a run: what it was configured with and what it found, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrmils.artifacts.documents import dump_json, parse_json
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike, replace_file
from jaxrmils.artifacts.folder import FORMAT_VERSION, check_header


def save_record(document: Mapping[str, Any], path: PathLike, kind: str) -> None:
    """Writes JSON values under a header of kind and format version, at once or not at all.

    Args:
      document: JSON values.
      path: the file.
      kind: what it is, such as "jaxrmils report".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_record({"loss": 0.5}, f"{folder}/r.json", "jaxrmils report")
    ...     load_record(f"{folder}/r.json", "jaxrmils report")["loss"]
    0.5
    """
    header = {"kind": kind, "format_version": FORMAT_VERSION}
    replace_file(path, dump_json({**header, **document}, depth=3))


def load_record(path: PathLike, kind: str) -> dict[str, Any]:
    """Reads a record.

    Raises:
      ArtifactError: no such file, no JSON, another kind or format version.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; a {kind!r} file was expected")
    document = parse_json(path.read_bytes(), path)
    check_header(document, path, kind)
    return document

"""What an artifact is, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxrmils.artifacts.documents import parse_json
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.folder import LOADERS, read_manifest

# Parts of a manifest or a plan that are short enough to be shown.
_SHOWN = (
    "kind",
    "format_version",
    "fingerprint",
    "versions",
    "info",
    "policy",
    "examples",
    "backend",
    "plan",
    "sizes",
    "files",
)


def describe(path: PathLike) -> dict[str, Any]:
    """An artifact's kind, versions and sizes; neither its arrays nor hashes are read.

    Artifacts of a newer format version are described too.

    Args:
      path: a plan's file, or the folder of ranges, scores or a model.

    Returns:
      A dict with "path", "kind", "format_version", "fingerprint" and "loader" (the name of the
      function that reads it), and where it has them "versions", "info", "files" (bytes and sha256
      by name), "examples", "backend", "sizes", "policy", and "plan" (how many layers have each
      format).

    Raises:
      ArtifactError: nothing there, damaged JSON, or no artifact of jaxrmils.

    >>> import tempfile
    >>> from jaxrmils.artifacts import save_plan
    >>> from jaxrmils.policies import LayerPlan, Plan
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_plan(Plan({"Dense_0/kernel": LayerPlan(4)}, "f00d"), f"{folder}/plan.json")
    ...     found = describe(f"{folder}/plan.json")
    >>> found["kind"], found["loader"], found["plan"]
    ('jaxrmils plan', 'load_plan', {'w4': 1})
    """
    path = Path(path)
    document = parse_json(path.read_bytes(), path) if path.is_file() else read_manifest(path)
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in LOADERS:
        raise ArtifactError(
            f"{path} is of the kind {kind!r}; expected one of {', '.join(LOADERS)}. It is no "
            "artifact of jaxrmils, or one of a newer version"
        )
    result: dict[str, Any] = {"path": str(path), "loader": LOADERS[kind]}
    result.update({key: document[key] for key in _SHOWN if key in document})
    layers = document.get("layers")
    if isinstance(layers, dict):
        formats = [str(layer.get("format")) for layer in layers.values() if isinstance(layer, dict)]
        result["plan"] = {name: formats.count(name) for name in dict.fromkeys(formats)}
    return result

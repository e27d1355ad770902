"""A plan as a JSON file that people read, compare and edit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrmils.artifacts.documents import check_json, dump_json, parse_json
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike, replace_file
from jaxrmils.artifacts.folder import FORMAT_VERSION, MANIFEST, check_header, read_manifest
from jaxrmils.policies import LayerPlan, Plan

KIND = "jaxrmils plan"

_KEYS = ("kind", "format_version", "fingerprint", "policy", "layers")
_OPTIONAL = ("format", "dynamic", "weight_group")
_LAYER_KEYS = ("weight_bits", "activation_bits", "rounding", "weight_rounding", *_OPTIONAL)
_BITS = (4, 8, 32)
# A plan must give the same model every time, so it has no stochastic rounding.
_ROUNDINGS = ("nearest", "floor", "ceil")


def save_plan(plan: Plan, path: PathLike) -> None:
    """Writes a plan as JSON, one layer to a line in the model's order.

    The file may be edited: change a layer's `weight_bits`, `activation_bits` (4, 8, or 32 for
    float), `rounding` or `weight_rounding`, add `"dynamic": true` for grids of rows that are made
    at run time or `"weight_group": 128` for scales of groups, and change its `format` with them or
    remove that. Whether the plan suits the model is checked where it is used.

    Args:
      plan: the plan.
      path: the file; replaced at once or not at all.

    Raises:
      ArtifactError: path is a folder; the plan holds what JSON can't give back as it is.
      OSError: the file can't be written; an older one is untouched.

    >>> import tempfile
    >>> plan = Plan({"Dense_0/kernel": LayerPlan(4, 8, ("floor",))}, "f00d", {"name": "by hand"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_plan(plan, f"{folder}/plan.json")
    ...     load_plan(f"{folder}/plan.json") == plan
    True
    """
    replace_file(path, plan_bytes(plan, path))


def load_plan(path: PathLike) -> Plan:
    """Reads a plan.

    Args:
      path: a file of `save_plan`, or the same edited by hand.

    Returns:
      The plan, equal to the one that was saved.

    Raises:
      ArtifactError: no such file, no JSON, another kind or format version, an unknown or missing
        key, or a value that no plan can have.
    """
    path = Path(path)
    if path.is_dir():
        kind = read_manifest(path).get("kind") if (path / MANIFEST).is_file() else None
        found = f"a folder that holds a {kind!r}" if kind else "a folder"
        raise ArtifactError(f"{path} is {found}; the file of a plan was expected")
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; the file of a plan was expected")
    return parse_plan(path.read_bytes(), path)


def plan_bytes(plan: Plan, path: PathLike) -> bytes:
    """The content of a plan's file; path is for messages."""
    policy = dict(plan.policy)
    check_json(policy, "the plan's policy", path)
    document = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "fingerprint": plan.fingerprint,
        "policy": policy,
        "layers": {name: layer_document(layer) for name, layer in plan.layers.items()},
    }
    _plan(document, Path(path))
    return dump_json(document, depth=2)


def parse_plan(data: bytes, path: Path) -> Plan:
    """A plan from the content of its file."""
    document = parse_json(data, path)
    check_header(document, path, KIND)
    return _plan(document, path)


def layer_document(layer: LayerPlan) -> dict[str, Any]:
    """A layer's entry as JSON values."""
    return {
        "format": layer.format,
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "rounding": list(layer.rounding),
        "weight_rounding": layer.weight_rounding,
        **({"dynamic": True} if layer.dynamic else {}),
        **({"weight_group": layer.weight_group} if layer.weight_group else {}),
    }


def _plan(document: Mapping[str, Any], path: Path) -> Plan:
    _check_keys(document, _KEYS, (), str(path))
    for key, kind in (("fingerprint", str), ("policy", dict), ("layers", dict)):
        if not isinstance(document[key], kind):
            raise ArtifactError(
                f"{path}: {key} is {document[key]!r}; a {kind.__name__} was expected"
            )
    layers = {
        name: parse_layer(layer, f"{path}: layer {name!r}")
        for name, layer in document["layers"].items()
    }
    return Plan(layers, document["fingerprint"], document["policy"])


def parse_layer(document: Any, where: str) -> LayerPlan:
    """A layer from its entry; ArtifactError, which begins with `where`, if it can be none."""
    if not isinstance(document, dict):
        raise ArtifactError(f"{where} is {document!r}; an object was expected")
    _check_keys(document, _LAYER_KEYS, _OPTIONAL, where)
    for key in ("weight_bits", "activation_bits"):
        # The type too: 8.0 and True equal integers.
        if type(document[key]) is not int or document[key] not in _BITS:
            raise ArtifactError(f"{where}: {key} is {document[key]!r}; 4, 8 or 32 was expected")
    if not isinstance(document["rounding"], list):
        raise ArtifactError(
            f"{where}: rounding is {document['rounding']!r}; a list with a direction for every "
            "quantized activation was expected, empty where activations stay float"
        )
    for rounding in (*document["rounding"], document["weight_rounding"]):
        if rounding not in _ROUNDINGS:
            raise ArtifactError(
                f"{where}: rounding {rounding!r}; {_near(rounding, _ROUNDINGS)}nearest, floor or "
                "ceil was expected"
            )
    dynamic = document.get("dynamic", False)
    if type(dynamic) is not bool:
        raise ArtifactError(f"{where}: dynamic is {dynamic!r}; true or false was expected")
    group = document.get("weight_group", 0)
    if type(group) is not int or group < 0:
        raise ArtifactError(f"{where}: weight_group is {group!r}; a whole number was expected")
    layer = LayerPlan(
        document["weight_bits"],
        document["activation_bits"],
        tuple(document["rounding"]),
        document["weight_rounding"],
        dynamic,
        group,
    )
    if document.get("format", layer.format) != layer.format:
        raise ArtifactError(
            f"{where}: format is {document['format']!r}, but its bits are of {layer.format!r}; the "
            "bits decide. Make the two agree, or remove the format"
        )
    return layer


def _check_keys(
    document: Mapping[str, Any], known: Iterable[str], optional: Iterable[str], where: str
) -> None:
    known = tuple(known)
    for key in document:
        if key not in known:
            raise ArtifactError(
                f"{where}: unknown key {key!r}; {_near(key, known)}expected {', '.join(known)}"
            )
    missing = [key for key in known if key not in document and key not in optional]
    if missing:
        raise ArtifactError(f"{where}: {', '.join(missing)} missing; add what is missing")


def _near(word: Any, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=3) if isinstance(word, str) else []
    return f"did you mean {' or '.join(matches)}? " if matches else ""

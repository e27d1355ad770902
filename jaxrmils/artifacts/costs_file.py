"""Costs as JSON: what an objective that needs a pass of its own says of every layer and format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrmils.artifacts.documents import check_json, decoding
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.plan_file import layer_document, parse_layer
from jaxrmils.artifacts.record_file import load_record, save_record
from jaxrmils.policies import Costs

KIND = "jaxrmils costs"


def save_costs(costs: Costs, path: PathLike, *, info: Mapping[str, Any] | None = None) -> None:
    """Writes costs, at once or not at all, so that budgets can be solved without the model.

    Args:
      costs: from one of `MEASURED_COSTS`, or made by hand.
      path: the file.
      info: kept beside them (data, seeds, formats); JSON values.

    Raises:
      ArtifactError: info can't be saved.
      OSError: the file can't be written; an older one is untouched.

    >>> import tempfile
    >>> from jaxrmils.policies import LayerPlan
    >>> costs = Costs("by hand", "nats", {"a": {LayerPlan(): 0.0, LayerPlan(4): 0.1}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_costs(costs, f"{folder}/costs.json")
    ...     load_costs(f"{folder}/costs.json") == costs
    True
    """
    info = dict(info or {})
    check_json(info, "info", path)
    options = {
        name: [{**layer_document(layer), "cost": cost} for layer, cost in own.items()]
        for name, own in costs.options.items()
    }
    document = {"objective": costs.objective, "unit": costs.unit, "options": options, "info": info}
    save_record(document, path, KIND)


def load_costs(path: PathLike) -> Costs:
    """Reads costs, equal to the saved ones. Whether they suit a model is checked where it is used.

    Raises:
      ArtifactError: no such file, another kind or format version, or an option that no layer can
        have.
    """
    document = load_record(path, KIND)
    with decoding(path):
        options = {
            name: dict(_option(entry, f"{path}: layer {name!r}") for entry in own)
            for name, own in document["options"].items()
        }
        return Costs(str(document["objective"]), str(document["unit"]), options)


def costs_info(path: PathLike) -> dict[str, Any]:
    """What was saved beside costs; ArtifactError as `load_costs`."""
    return dict(load_record(path, KIND).get("info", {}))


def _option(entry: Any, where: str) -> tuple[Any, float]:
    if not isinstance(entry, dict) or not isinstance(entry.get("cost"), (int, float)):
        raise ArtifactError(f"{where} holds {entry!r}; a format with its cost was expected")
    layer = parse_layer({key: value for key, value in entry.items() if key != "cost"}, where)
    return layer, float(entry["cost"])

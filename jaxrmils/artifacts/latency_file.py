"""Latency tables as JSON: what `jaxrmils profile` measures and `budget` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrmils.artifacts.documents import decoding
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.record_file import load_record, save_record
from jaxrmils.policies import LatencyTable, LayerPlan, PlanError

KIND = "jaxrmils latency"


def save_latency(
    table: LatencyTable,
    path: PathLike,
    *,
    info: Mapping[str, Any] | None = None,
    plans: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes a latency table, at once or not at all.

    Args:
      table: seconds by layer and format's name.
      path: the file.
      info: kept beside it; JSON values.
      plans: what the table predicts of plans and what was measured, kept beside it; JSON values.

    Raises:
      ArtifactError: an entry is for a `LayerPlan`, not for a format's name.

    >>> import tempfile
    >>> table = LatencyTable({"a": {"float": 2e-3, "w8a8": 1e-3}}, "cpu", "timed")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_latency(table, f"{folder}/latency.json")
    ...     load_latency(f"{folder}/latency.json") == table
    True
    """
    for name, own in table.seconds.items():
        if any(isinstance(key, LayerPlan) for key in own):
            raise ArtifactError(
                f"the latency table's layer {name} has entries for plans with roundings; only "
                "formats' names can be saved"
            )
    document = {
        "backend": table.backend,
        "source": table.source,
        "overhead": table.overhead,
        "seconds": {name: dict(own) for name, own in table.seconds.items()},
        "info": dict(info or {}),
    }
    if plans:
        document["plans"] = [dict(each) for each in plans]
    save_record(document, path, KIND)


def load_latency(path: PathLike) -> LatencyTable:
    """Reads a latency table.

    Raises:
      ArtifactError: no such file, another kind, or seconds that make no sense.
    """
    document = load_record(path, KIND)
    with decoding(path):
        try:
            return LatencyTable(
                {
                    n: {k: float(s) for k, s in own.items()}
                    for n, own in document["seconds"].items()
                },
                str(document["backend"]),
                str(document["source"]),
                float(document["overhead"]),
            )
        except PlanError as error:
            raise ArtifactError(f"{path}: {error}") from error

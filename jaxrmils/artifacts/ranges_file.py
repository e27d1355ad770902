"""Calibrated ranges in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrmils.artifacts.arrays import to_jax
from jaxrmils.artifacts.documents import decoding
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.folder import MANIFEST, Folder, load_folder, save_folder
from jaxrmils.numerics import QuantParams, Ranges, RangeStats

KIND = "jaxrmils ranges"


def save_ranges(
    ranges: Ranges, directory: PathLike, *, info: Mapping[str, Any] | None = None
) -> None:
    """Writes ranges into a folder: `arrays.safetensors` and `manifest.json`.

    Args:
      ranges: from `calibrate`.
      directory: new, empty, or of older ranges; replaced at once or not at all.
      info: kept in the manifest (seeds, data, command); JSON values.

    Raises:
      ArtifactError: the folder holds something else, or info can't be saved.
      OSError: the folder can't be written; an older one is untouched.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> ranges = calibrate(trace(lambda p, x: x @ p["w"], params, x), params, [x])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_ranges(ranges, folder)
    ...     loaded = load_ranges(folder)
    >>> loaded.estimator, float(loaded.stats["w"][0].maximum)
    ('mse', 1.0)
    """
    fields, arrays = encode_ranges(ranges)
    save_folder(
        directory,
        KIND,
        fingerprint=ranges.fingerprint,
        fields={"ranges": fields},
        arrays=arrays,
        info=info,
    )


def load_ranges(directory: PathLike) -> Ranges:
    """Reads ranges, bit-identical to the saved ones.

    Args:
      directory: of `save_ranges`.

    Returns:
      The ranges.

    Raises:
      ArtifactError: nothing there, another kind or format version, damaged or missing files.
    """
    return decode_ranges(load_folder(directory, KIND))


def encode_ranges(ranges: Ranges) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ranges as an entry of a manifest and arrays."""
    sites, arrays = {}, {}
    for site, parts in ranges.stats.items():
        sites[site] = []
        for position, (stats, grids) in enumerate(zip(parts, ranges.grids[site], strict=True)):
            prefix = f"ranges/{site}/{position}"
            arrays[f"{prefix}/minimum"] = stats.minimum
            arrays[f"{prefix}/maximum"] = stats.maximum
            if stats.histogram is not None:
                arrays[f"{prefix}/histogram"] = stats.histogram
            for bits, grid in grids.items():
                arrays[f"{prefix}/int{bits}/scale"] = grid.scale
                arrays[f"{prefix}/int{bits}/zero_point"] = grid.zero_point
            entry = {"histogram": stats.histogram is not None, "bits": list(grids)}
            sites[site].append(entry)
    fields = {
        "estimator": ranges.estimator,
        "symmetric": ranges.symmetric,
        "percentile": float(ranges.percentile),
        "examples": int(ranges.examples),
        "sites": sites,
    }
    return fields, {name: np.asarray(array) for name, array in arrays.items()}


def decode_ranges(folder: Folder) -> Ranges:
    """Ranges from a folder whose manifest has them."""

    def array(name: str) -> Any:
        return to_jax(folder.arrays[name], name, folder.path)

    def stats(prefix: str, entry: Any) -> RangeStats:
        counts = array(f"{prefix}/histogram") if entry["histogram"] else None
        return RangeStats(array(f"{prefix}/minimum"), array(f"{prefix}/maximum"), counts)

    def grids(prefix: str, entry: Any, symmetric: bool) -> dict[int, QuantParams]:
        return {
            bits: QuantParams(
                array(f"{prefix}/int{bits}/scale"),
                array(f"{prefix}/int{bits}/zero_point"),
                bits,
                symmetric,
            )
            for bits in entry["bits"]
        }

    with decoding(folder.path / MANIFEST):
        fields = folder.manifest["ranges"]
        sites = {
            site: [(f"ranges/{site}/{i}", entry) for i, entry in enumerate(entries)]
            for site, entries in fields["sites"].items()
        }
        symmetric = bool(fields["symmetric"])
        return Ranges(
            stats={s: tuple(stats(*part) for part in parts) for s, parts in sites.items()},
            grids={
                s: tuple(grids(*part, symmetric) for part in parts) for s, parts in sites.items()
            },
            estimator=fields["estimator"],
            symmetric=symmetric,
            percentile=float(fields["percentile"]),
            examples=int(fields["examples"]),
            fingerprint=folder.manifest["fingerprint"],
        )

"""Exported models in a folder: one module per platform, the weights, a manifest."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export

from jaxrmils.artifacts.arrays import pack_arrays, to_jax, unpack_arrays
from jaxrmils.artifacts.documents import check_json, decoding, dump_json
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike, replace_directory
from jaxrmils.artifacts.folder import (
    FORMAT_VERSION,
    MANIFEST,
    read_manifest,
    verified_bytes,
    versions,
)
from jaxrmils.artifacts.plan_file import plan_bytes
from jaxrmils.artifacts.portable import BATCH, check_flatbuffers, export_for, portable
from jaxrmils.graph import compat
from jaxrmils.graph.naming import leaf_names
from jaxrmils.lowering import BACKENDS, Backend, QuantizedModel, default_backend

KIND = "jaxrmils export"
WEIGHTS, SUFFIX = "weights.safetensors", ".jaxexport"


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedModel:
    """An exported model, loaded for a platform.

    Attributes:
      platform: "cpu", "cuda" or "tpu".
      params: its parameters by name, as in `weights.safetensors`.
      exported: the module; `exported.call(params, inputs)` runs it.
      manifest: versions, shapes, the plan's hash.
    """

    platform: Backend
    params: Mapping[str, Any]
    exported: export.Exported
    manifest: Mapping[str, Any]

    def __call__(self, inputs: Any) -> Any:
        """The outputs for a batch, bit for bit those of the jitted quantized model.

        Args:
          inputs: like the exported ones; containers other than dict, list, tuple and None were
            exported as a flat dict of the leaves by name.

        Raises:
          ArtifactError: the inputs have other containers, shapes or dtypes than the exported ones.
        """
        return self._compiled(self.params, inputs)

    def apply(self, params: Mapping[str, Any], inputs: Any) -> Any:
        """The same as a pure function of parameters by name and inputs, to jit as part of more.

        Raises:
          ArtifactError: as `__call__`.
        """
        _check_inputs(_inputs(self.exported), inputs)
        return self.exported.call(params, inputs)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.apply)


def export_model(
    model: QuantizedModel,
    folder: PathLike,
    inputs: Any = None,
    *,
    platforms: Sequence[Backend] = BACKENDS,
    batch_size: int | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes a quantized model as programs that run without its code, jaxrmils or Flax.

    `cpu.jaxexport`, `cuda.jaxexport` and `tpu.jaxexport` are `jax.export` modules, functions of
    (weights by name, inputs); `weights.safetensors` holds the weights, int4 codes two per byte, for
    all platforms; `manifest.json` versions, shapes, dtypes and hashes, among them the plan's, which
    is that of the `plan.json` of `save_model`. A module is read by the jax that wrote it and by
    later ones, within the time that jax promises.

    Args:
      model: from `quantize` or `load_model`, made for any backend.
      folder: new, empty, or of an older export; replaced at once or not at all.
      inputs: an example of the inputs, arrays or shapes, of any batch size; the traced shapes by
        default.
      platforms: "cpu", "cuda", "tpu"; none of these devices is needed.
      batch_size: leaves the batch size open by default. Needed where the model's code must know it.
      info: kept in the manifest (seeds, data, command); JSON values.

    Raises:
      ArtifactError: an unknown platform, a model that can't be lowered for one, a folder that holds
        something else, or arrays or info that can't be saved.
      ImportError: flatbuffers, which jax serializes with, is not installed.
      OSError: the folder can't be written; an older one is untouched.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxrmils import calibrate, quantize, tabulate, trace, uniform
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [x]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     export_model(model, directory, platforms=("cpu",))
    ...     loaded = load_exported(directory)
    >>> bool((loaded(x[:2]) == model(x[:2])).all())
    True
    """
    _check_platforms(platforms)
    _check_replaceable(Path(folder))
    info = dict(info or {})
    check_json(info, "info", folder)
    if batch_size is not None and batch_size < 1:
        raise ArtifactError(f"batch_size is {batch_size}; expected at least 1, or None for any")
    parts = portable(model, inputs)
    modules = {p: export_for(parts, p, batch_size) for p in platforms}
    first = modules[platforms[0]][0]
    weights, _ = pack_arrays(parts.arrays, folder)
    files = {WEIGHTS: weights, **{p + SUFFIX: data for p, (_, data) in modules.items()}}
    plan = plan_bytes(model.plan, folder)
    manifest = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "info": info,
        "fingerprint": model.graph.fingerprint,
        "plan": {"sha256": hashlib.sha256(plan).hexdigest(), **model.plan.counts()},
        "batch_size": BATCH if batch_size is None else batch_size,
        "inputs": _shapes(_inputs(first), "inputs"),
        "outputs": _shapes(jax.tree.unflatten(first.out_tree, first.out_avals), "outputs"),
        "platforms": {
            p: {"file": p + SUFFIX, "calling_convention": module.calling_convention_version}
            for p, (module, _) in modules.items()
        },
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    replace_directory(folder, {**files, MANIFEST: dump_json(manifest, depth=3)})


def load_exported(folder: PathLike, *, platform: Backend | None = None) -> ExportedModel:
    """Reads an exported model and verifies the files it needs by their hashes.

    Args:
      folder: of `export_model`.
      platform: where it will run; the default is where jax runs now.

    Returns:
      The model; `model(inputs)` runs it.

    Raises:
      ArtifactError: nothing there, another kind or format version, damaged or missing files, or a
        platform that was not exported or that jax does not find here.
      ImportError: flatbuffers, which jax reads modules with, is not installed.
    """
    path = Path(folder)
    manifest = read_manifest(path, KIND)
    wanted = platform or default_backend()
    with decoding(path / MANIFEST):
        exported_for = {name: entry["file"] for name, entry in manifest["platforms"].items()}
        facts = {name: (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
        written_by = manifest["versions"]["jax"]
    if wanted not in exported_for:
        raise ArtifactError(
            f"{path} was exported for {', '.join(exported_for)}, not for {wanted}; export the "
            f"model with platforms=({wanted!r},) among others"
        )
    check_flatbuffers()
    with decoding(path / MANIFEST):
        weights = verified_bytes(path / WEIGHTS, *facts[WEIGHTS])
        module = verified_bytes(path / exported_for[wanted], *facts[exported_for[wanted]])
    try:
        exported = export.deserialize(bytearray(module))
        if written_by != jax.__version__:
            exported.mlir_module()  # Operations that this jax does not know show up here.
    except Exception as error:
        raise ArtifactError(
            f"{path / exported_for[wanted]} can't be read by jax {jax.__version__} "
            f"({type(error).__name__}: {error}); it was written by jax {written_by}: use that "
            "version or a later one, or export again"
        ) from error
    arrays = {
        name: to_jax(array, name, path / WEIGHTS)
        for name, array in unpack_arrays(weights, {}, path / WEIGHTS).items()
    }
    if wanted != default_backend():
        arrays = jax.device_put(arrays, _device(wanted))
    return ExportedModel(wanted, arrays, exported, manifest)


def _device(platform: Backend) -> Any:
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        raise ArtifactError(
            f"jax finds no {platform} here ({error}); it runs on {default_backend()}: load the "
            f"model for that, or set JAX_PLATFORMS"
        ) from error


def _inputs(exported: export.Exported) -> Any:
    """What a module says of its inputs; its arguments are the weights and the inputs."""
    (_, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    return inputs


def _check_inputs(expected: Any, inputs: Any) -> None:
    """Raises ArtifactError where the containers, shapes or dtypes are others than the exported."""
    found = jax.tree.map(compat.abstract, inputs)
    if jax.tree.structure(expected) != jax.tree.structure(found):
        raise ArtifactError(
            f"the inputs have the structure {jax.tree.structure(found)}; "
            f"{jax.tree.structure(expected)} was exported"
        )
    names = _names(expected, "inputs")
    leaves = list(zip(names, jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))
    for name, want, got in leaves:
        fits = len(want.shape) == len(got.shape) and all(
            one == two if isinstance(one, int) else two > 0
            for one, two in zip(want.shape, got.shape, strict=True)
        )
        if not fits or want.dtype != got.dtype:
            raise ArtifactError(f"{name}: {_text(got)} was given, {_text(want)} was exported")
    if len({got.shape[0] for _, _, got in leaves}) > 1:
        sizes = {name: got.shape[0] for name, _, got in leaves}
        raise ArtifactError(f"inputs disagree about the batch size: {sizes}")


def _text(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _names(tree: Any, what: str) -> tuple[str, ...]:
    return (what,) if jax.tree_util.all_leaves([tree]) else leaf_names(tree)


def _shapes(tree: Any, what: str) -> list[dict[str, Any]]:
    """The leaves of a tree by name; the length of an open axis is a formula, as a string."""
    return [
        {
            "name": name,
            "dtype": str(leaf.dtype),
            "shape": [d if isinstance(d, int) else str(d) for d in leaf.shape],
        }
        for name, leaf in zip(_names(tree, what), jax.tree.leaves(tree), strict=True)
    ]


def _check_platforms(platforms: Sequence[str]) -> None:
    known = set(platforms) <= set(BACKENDS) and not isinstance(platforms, str)
    if not known or not platforms or len(set(platforms)) < len(platforms):
        raise ArtifactError(
            f"platforms is {platforms!r}; expected one or more of {BACKENDS}, each once"
        )


def _check_replaceable(path: Path) -> None:
    """Exporting replaces the whole folder, so it must hold nothing but an older export."""
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    foreign = [n for n in names if n not in (MANIFEST, WEIGHTS) and not n.endswith(SUFFIX)]
    if names and (foreign or MANIFEST not in names):
        raise ArtifactError(
            f"{path} holds {(foreign or names)[:5]}, which exporting there would delete; give a "
            "new or empty folder, or that of an older export"
        )

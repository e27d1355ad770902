"""A quantized model in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import jax

from jaxrmils.artifacts.arrays import to_jax
from jaxrmils.artifacts.documents import decoding
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.artifacts.folder import MANIFEST, PLAN, Folder, load_folder, save_folder
from jaxrmils.artifacts.plan_file import parse_plan, plan_bytes
from jaxrmils.artifacts.shapes import (
    check_dtypes,
    decode_tree,
    differences,
    encode_tree,
    site_differences,
    site_table,
)
from jaxrmils.graph import SHORTCUTS, Graph, TraceError, tabulate, trace
from jaxrmils.graph.compat import abstract
from jaxrmils.graph.trace import Apply
from jaxrmils.lowering import Backend, QuantizedModel, QuantizedParams, QuantizedWeight
from jaxrmils.numerics import QTensor, QuantParams, pack_int4
from jaxrmils.policies import PlanError, check_plan

KIND = "jaxrmils model"


def save_model(
    model: QuantizedModel, directory: PathLike, *, info: Mapping[str, Any] | None = None
) -> None:
    """Writes a quantized model into a folder.

    `arrays.safetensors` holds codes, scales, sums, grids and the float leaves that are still read,
    int4 codes two per byte whatever the backend; `plan.json` the plan; `manifest.json` versions,
    hashes, sizes, and the shapes of parameters and inputs. The model's code is not saved.

    Args:
      model: from `quantize`.
      directory: new, empty, or of an older model; replaced at once or not at all.
      info: kept in the manifest (seeds, data, command); JSON values.

    Raises:
      ArtifactError: the folder holds something else, or a leaf or info can't be saved.
      OSError: the folder can't be written; an older one is untouched.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxrmils import calibrate, quantize, tabulate, trace, uniform
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> apply = lambda p, x: x @ p["w"]
    >>> graph = trace(apply, params, x)
    >>> model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [x]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, folder)
    ...     loaded = load_model(folder, apply)
    >>> bool((loaded(x) == model(x)).all())
    True
    """
    fields, arrays = _encode_params(model.params)
    save_folder(
        directory,
        KIND,
        fingerprint=model.graph.fingerprint,
        fields={
            "backend": model.backend,
            "plan": model.plan.counts(),
            "sizes": {"size_bits": model.size_bits, "float_bits": model.sizes.float_bits},
            "inputs": encode_tree(model.graph.example),
            "params": encode_tree(model.graph.params),
            "shortcuts": model.graph.shortcuts,
            "sites": site_table(model.graph),
            **fields,
        },
        arrays=arrays,
        files={PLAN: plan_bytes(model.plan, directory)},
        info=info,
    )


def load_model(
    directory: PathLike,
    apply: Apply,
    *,
    params: Any = None,
    inputs: Any = None,
    backend: Backend | None = None,
    unpacked: bool = False,
) -> QuantizedModel:
    """Reads a quantized model; its outputs are bit-identical to those of the saved one.

    `apply` is traced again at the stored shapes and must give the same sites. Operations without
    parameters between them are `apply`'s own: they are run as they are, not compared.

    Args:
      directory: of `save_model`.
      apply: the float model's function, as it was traced.
      params: needed where the params tree has containers other than dict, list and tuple (a Flax
        FrozenDict, a dataclass): the same tree of arrays or `jax.ShapeDtypeStruct`. Values are not
        read.
      inputs: likewise for the inputs; any batch size. May also give other shapes than the model was
        traced at, where it accepts them.
      backend: where it will run, if not where it was made for: "cpu", "cuda" or "tpu".
      unpacked: hold int4 weights as int8 arrays, as in `quantize`; nothing is unpacked in a call.

    Returns:
      The model.

    Raises:
      ArtifactError: nothing there, another kind or format version, damaged or missing files,
        containers that can't be rebuilt, or a model that differs from the saved one.
    """
    if backend is not None and backend not in get_args(Backend):
        raise ArtifactError(f"backend is {backend!r}; expected one of {get_args(Backend)}")
    folder = load_folder(directory, KIND)
    if PLAN not in folder.files:
        raise ArtifactError(f"{folder.path / MANIFEST} lists no {PLAN}; save the model again")
    plan = parse_plan(folder.files[PLAN], folder.path / PLAN)
    graph = _graph(folder, apply, params, inputs)
    table = tabulate(graph)
    with decoding(folder.path / MANIFEST):
        chosen: Backend = backend or folder.manifest["backend"]
        quantized = _decode_params(folder, chosen, unpacked)
    try:
        check_plan(plan, table)
    except PlanError as error:
        raise ArtifactError(
            f"{folder.path / PLAN} does not fit the model: {error}. Save it again"
        ) from error
    return QuantizedModel(graph=graph, plan=plan, params=quantized, backend=chosen, sizes=table)


def _graph(folder: Folder, apply: Apply, params: Any, inputs: Any) -> Graph:
    """The graph of `apply` at the stored shapes, checked to be the one that was saved."""
    where = folder.path / MANIFEST
    with decoding(where):
        stored = {name: folder.manifest[name] for name in ("params", "inputs", "sites")}
        for name in ("params", "inputs"):
            check_dtypes(stored[name], name, where)
        shortcuts: Any = folder.manifest.get("shortcuts", SHORTCUTS[0])
        if shortcuts not in SHORTCUTS:
            raise ArtifactError(
                f"{where}: shortcuts is {shortcuts!r}; expected one of {', '.join(SHORTCUTS)}"
            )
        if params is None:
            params = decode_tree(stored["params"], "params", where)
        if inputs is None:
            inputs = decode_tree(stored["inputs"], "inputs", where)
    params = jax.tree.map(abstract, params)
    inputs = jax.tree.map(abstract, inputs)
    _refuse(folder, differences(stored["params"], encode_tree(params), "params"))
    try:
        graph = trace(apply, params, inputs, shortcuts=shortcuts)
    except TraceError as error:
        raise ArtifactError(
            f"{folder.path}: apply can't be traced at the shapes of the saved model: {error} Pass "
            "the apply that was quantized, and params and inputs as they were"
        ) from error
    found = site_table(graph)
    sites = site_differences(stored["sites"], found)
    if graph.fingerprint != folder.manifest["fingerprint"]:
        _refuse(folder, sites or ["the dtypes or the channels of its weights differ"])
    # Operand shapes are no part of the fingerprint: another stride shows in them alone.
    if encode_tree(graph.example)["leaves"] == stored["inputs"]["leaves"]:
        _refuse(folder, sites)
    return graph


def _refuse(folder: Folder, found: list[str]) -> None:
    """Raises ArtifactError if there are differences."""
    if not found:
        return
    more = f", and {len(found) - 5} more" if len(found) > 5 else ""
    raise ArtifactError(
        f"{folder.path} belongs to another model than the given one: {'; '.join(found[:5])}{more}. "
        "Give the model that was saved, or quantize this one"
    )


def _encode_params(params: QuantizedParams) -> tuple[dict[str, Any], dict[str, Any]]:
    weights, grids = {}, {}
    arrays = {f"leaves/{name}": leaf for name, leaf in params.leaves.items()}
    for name, weight in params.weights.items():
        tensor = _at_rest(weight.tensor)
        for part in ("values", "scale", "zero_point"):
            if getattr(tensor, part) is not None:
                arrays[f"weights/{name}/{part}"] = getattr(tensor, part)
        arrays.update({f"sums/{site}": sums for site, sums in weight.sums.items()})
        weights[name] = {
            "bits": tensor.bits,
            "packed_dim": tensor.packed_dim,
            "symmetric": tensor.zero_point is None,
            "sums": list(weight.sums),
            **({"group": tensor.group} if tensor.group else {}),
        }
    for site, parts in params.grids.items():
        grids[site] = [{"bits": grid.bits, "symmetric": grid.symmetric} for grid in parts]
        for position, grid in enumerate(parts):
            arrays[f"grids/{site}/{position}/scale"] = grid.scale
            arrays[f"grids/{site}/{position}/zero_point"] = grid.zero_point
    return {"leaves": list(params.leaves), "weights": weights, "grids": grids}, arrays


def _decode_params(folder: Folder, backend: Backend, unpacked: bool) -> QuantizedParams:
    def array(name: str) -> Any:
        return to_jax(folder.arrays[name], name, folder.path)

    def weight(name: str, entry: Any) -> QuantizedWeight:
        prefix = f"weights/{name}"
        zero_point = None if entry["symmetric"] else array(f"{prefix}/zero_point")
        tensor = QTensor(
            array(f"{prefix}/values"),
            array(f"{prefix}/scale"),
            zero_point,
            entry["bits"],
            entry["packed_dim"],
            entry.get("group", 0),
        )
        if backend == "tpu" and tensor.bits == 4:
            tensor = tensor.native_int4()
        elif unpacked:
            tensor = tensor.unpacked()
        sums = {site: array(f"sums/{site}") for site in entry["sums"]}
        return QuantizedWeight(tensor, sums)

    def grid(prefix: str, entry: Any) -> QuantParams:
        scale, zero_point = array(f"{prefix}/scale"), array(f"{prefix}/zero_point")
        return QuantParams(scale, zero_point, entry["bits"], entry["symmetric"])

    manifest = folder.manifest
    return QuantizedParams(
        leaves={name: array(f"leaves/{name}") for name in manifest["leaves"]},
        weights={name: weight(name, entry) for name, entry in manifest["weights"].items()},
        grids={
            site: tuple(grid(f"grids/{site}/{i}", entry) for i, entry in enumerate(entries))
            for site, entries in manifest["grids"].items()
        },
    )


def _at_rest(tensor: QTensor) -> QTensor:
    """int4 codes two per byte, as every file has them."""
    if tensor.bits != 4 or tensor.packed:
        return tensor
    codes = tensor.codes()
    return dataclasses.replace(tensor, values=pack_int4(codes), packed_dim=codes.shape[-1])

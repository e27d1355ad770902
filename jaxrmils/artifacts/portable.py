"""A quantized model as a program that needs no model code: `jax.export`, one module per platform.

The formulation of an integer operation depends on the backend, so every platform gets a module of
its own. One module for all would hold every formulation and choose at each site, and could not be
compiled or checked on one platform alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import export

from jaxrmils.artifacts.arrays import is_key
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.graph import compat
from jaxrmils.graph.naming import leaf_names
from jaxrmils.lowering import Backend, QuantizedModel
from jaxrmils.lowering.named_params import at_rest, for_backend, from_named, named_arrays

BATCH = "batch"
"""The name of the batch axis's length where it is left open."""


@dataclasses.dataclass(frozen=True)
class Portable:
    """A model as a function of named arrays and of inputs in plain containers.

    Attributes:
      arrays: the parameters at rest, by name; int4 codes two per byte, PRNG keys as their data.
      inputs: shapes of the inputs, in dicts with str keys, lists, tuples and None alone; other
        containers have become a flat dict by the leaves' names.
      call: `call(platform)(arrays, inputs)`; its outputs are in plain containers too.
    """

    arrays: dict[str, Any]
    inputs: Any
    call: Callable[[Backend], Callable[[dict[str, Any], Any], Any]]


def portable(model: QuantizedModel, inputs: Any = None) -> Portable:
    """Takes a model apart for export.

    Args:
      model: from `quantize` or `load_model`.
      inputs: arrays or shapes to take the axes behind the batch from; the traced ones by default.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import calibrate, quantize, tabulate, trace, uniform
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [x]))
    >>> parts = portable(model)
    >>> bool((parts.call("cpu")(parts.arrays, x) == model(x)).all())
    True
    """
    packed = at_rest(model.params)
    named = named_arrays(packed)
    keys = {name: str(jax.random.key_impl(a)) for name, a in named.items() if is_key(a)}
    shapes = jax.tree.map(compat.abstract, model.graph.example if inputs is None else inputs)
    structure, names = jax.tree.structure(shapes), leaf_names(shapes)
    is_plain = _is_plain(shapes)

    def call(platform: Backend) -> Callable[[dict[str, Any], Any], Any]:
        target = dataclasses.replace(model, backend=platform, params=packed)

        def run(arrays: dict[str, Any], inputs: Any) -> Any:
            opened = {n: jax.random.wrap_key_data(arrays[n], impl=impl) for n, impl in keys.items()}
            params = for_backend(from_named(packed, {**arrays, **opened}), platform)
            if not is_plain:
                inputs = jax.tree.unflatten(structure, [inputs[name] for name in names])
            return plain(target.apply(params, inputs))

        return run

    arrays = {n: jax.random.key_data(a) if n in keys else a for n, a in named.items()}
    return Portable(arrays, plain(shapes), call)


def export_for(
    parts: Portable, platform: Backend, batch_size: int | None
) -> tuple[export.Exported, bytes]:
    """Lowers a model for a platform; no such device is needed.

    Args:
      parts: from `portable`.
      platform: "cpu", "cuda" or "tpu".
      batch_size: of the inputs; None leaves it open.

    Returns:
      The module and its bytes.

    Raises:
      ArtifactError: the model can't be lowered so.
      ImportError: flatbuffers, which jax serializes with, is not installed.
    """
    check_flatbuffers()
    length = export.symbolic_shape(BATCH)[0] if batch_size is None else batch_size
    arrays = jax.tree.map(compat.abstract, parts.arrays)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype), parts.inputs
    )
    try:
        # Whatever the model's own code does with a length it can't know may fail in any way.
        exported = export.export(jax.jit(parts.call(platform)), platforms=(platform,))(
            arrays, inputs
        )
    except Exception as error:
        what = "any batch size" if batch_size is None else f"batches of {batch_size}"
        advice = (
            "if its code needs to know the batch size, give one (batch_size=)"
            if batch_size is None
            else "other batch sizes or platforms may work"
        )
        raise ArtifactError(
            f"the model can't be exported for {platform} and {what}: {type(error).__name__}: "
            f"{_first_line(error)}; {advice}"
        ) from error
    return exported, bytes(exported.serialize())


def check_flatbuffers() -> None:
    """Raises ImportError if jax can't read or write modules, and says what is missing."""
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise ImportError(
            "jax writes and reads exported modules with flatbuffers, which is not installed: "
            "pip install 'jaxrmils[export]'"
        ) from error


def plain(tree: Any) -> Any:
    """A tree in dicts with str keys, lists, tuples and None, which every process can rebuild.

    Args:
      tree: of arrays, shapes or tracers.

    Returns:
      The tree itself if it has no other containers, else a flat dict of its leaves by name.

    >>> from collections import namedtuple
    >>> plain({"a": (1, None)}), plain(namedtuple("Pair", "left right")(1, 2))
    ({'a': (1, None)}, {'left': 1, 'right': 2})
    """
    if _is_plain(tree):
        return tree
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _is_plain(node: Any) -> bool:
    if type(node) in (list, tuple):
        return all(map(_is_plain, node))
    if type(node) is dict:
        return all(type(key) is str and _is_plain(child) for key, child in node.items())
    return node is None or jax.tree_util.all_leaves([node])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]

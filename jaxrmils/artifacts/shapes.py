"""Trees of shapes and tables of sites as JSON, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.artifacts.arrays import is_key
from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike
from jaxrmils.graph import Graph
from jaxrmils.graph.naming import leaf_names

_KEY = "key:"


class _OtherContainer(Exception):
    """A pytree node that JSON has no form for."""


def encode_tree(structs: Any) -> dict[str, Any]:
    """A tree of shapes: its containers, with numbers for leaves, and a table of the leaves.

    The containers are None where they are not dicts (with str or int keys), lists, tuples and None
    alone: such a tree can't be rebuilt without the code of its classes.

    >>> encode_tree({"b": (jax.ShapeDtypeStruct((2,), jnp.float32), None)})
    {'tree': {'dict': [['b', {'tuple': [0, None]}]]},
     'leaves': [{'name': 'b/0', 'dtype': 'float32', 'shape': [2]}]}
    """
    leaves, structure = jax.tree.flatten(structs)
    rows = [_row(name, leaf) for name, leaf in zip(leaf_names(structs), leaves, strict=True)]
    try:
        containers = _containers(structs, iter(range(len(leaves))))
        if jax.tree.structure(_rebuild(containers, leaves)) != structure:
            raise _OtherContainer
    except _OtherContainer:
        return {"tree": None, "structure": str(structure), "leaves": rows}
    return {"tree": containers, "leaves": rows}


def decode_tree(document: Any, what: str, path: PathLike) -> Any:
    """The tree of shapes that `encode_tree` wrote.

    Args:
      document: what it wrote.
      what: "params" or "inputs".
      path: for messages.

    Raises:
      ArtifactError: the tree has other containers, so the user must pass it.
    """
    if document["tree"] is None and document["leaves"]:
        raise ArtifactError(
            f"{path}: the {what} of this model are in containers other than dict, list and tuple "
            f"({document['structure'][:200]}); pass {what}=..., as arrays or jax.ShapeDtypeStruct"
        )
    return _rebuild(document["tree"], [_struct(row) for row in document["leaves"]])


def check_dtypes(document: Any, what: str, path: PathLike) -> None:
    """Raises ArtifactError if a leaf has 64 bits and jax is not set to hold them."""
    for row in document["leaves"]:
        dtype = _dtype(row)
        if not is_key(dtype) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ArtifactError(
                f"{path}: {what} {row['name']} is {dtype}, which jax can't hold as it is set now; "
                "call jax.config.update('jax_enable_x64', True) first"
            )


def differences(stored: Any, found: Any, what: str) -> list[str]:
    """How the leaves of two trees differ, by name; see `encode_tree`.

    >>> old = encode_tree({"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    >>> new = encode_tree({"w": jax.ShapeDtypeStruct((2, 4), jnp.float32)})
    >>> differences(old, new, "params")
    ['params w is float32[2, 3] in the artifact and float32[2, 4] in the given model']
    """
    old, new = (
        {row["name"]: f"{row['dtype']}{row['shape']}" for row in tree["leaves"]}
        for tree in (stored, found)
    )
    return _table_differences(old, new, what)


def site_table(graph: Graph) -> list[dict[str, Any]]:
    """The sites of a graph, with the shapes of their operands for one example."""
    return [
        {
            "name": site.name,
            "kind": site.kind,
            "layer": site.layer,
            "operands": [f"{o.role} {o.dtype}{list(o.shape)}" for o in site.operands],
        }
        for site in graph.sites
    ]


def site_differences(stored: Sequence[Any], found: Sequence[Any]) -> list[str]:
    """How two site tables differ, by name."""
    old, new = (
        {row["name"]: f"a {row['kind']} of {', '.join(row['operands'])}" for row in table}
        for table in (stored, found)
    )
    result = _table_differences(old, new, "site")
    if not result and list(old) != list(new):
        result.append("the sites run in another order")
    return result


def _table_differences(stored: dict[str, str], found: dict[str, str], what: str) -> list[str]:
    result = []
    for name, fact in stored.items():
        if name not in found:
            result.append(f"{what} {name} is only in the artifact")
        elif found[name] != fact:
            result.append(
                f"{what} {name} is {fact} in the artifact and {found[name]} in the given model"
            )
    return result + [
        f"{what} {name} is only in the given model" for name in found if name not in stored
    ]


def _row(name: str, leaf: Any) -> dict[str, Any]:
    dtype = str(leaf.dtype)
    if is_key(leaf):
        # Only a traced value tells the generator of a shape.
        generators: list[str] = []
        jax.eval_shape(lambda key: generators.append(str(jax.random.key_impl(key))), leaf)
        dtype = _KEY + generators[0]
    row: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(leaf.shape)}
    # Python scalars among the parameters promote as weak types do.
    return {**row, "weak_type": True} if getattr(leaf, "weak_type", False) else row


def _struct(row: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        tuple(row["shape"]), _dtype(row), weak_type=row.get("weak_type", False)
    )


def _dtype(row: Any) -> Any:
    if not row["dtype"].startswith(_KEY):
        return jnp.dtype(row["dtype"])
    generator = row["dtype"].removeprefix(_KEY)
    return jax.eval_shape(lambda: jax.random.key(0, impl=generator)).dtype


def _containers(node: Any, numbers: Any) -> Any:
    if node is None:
        return None
    if isinstance(node, jax.ShapeDtypeStruct):
        return next(numbers)
    if type(node) in (list, tuple):
        return {type(node).__name__: [_containers(child, numbers) for child in node]}
    if type(node) is dict and all(type(key) in (str, int) for key in node):
        # In jax's order of leaves; keys of both types have none, and jax refuses them.
        return {"dict": [[key, _containers(node[key], numbers)] for key in sorted(node)]}
    raise _OtherContainer


def _rebuild(document: Any, leaves: Sequence[Any]) -> Any:
    if document is None:
        return None
    if isinstance(document, int):
        return leaves[document]
    ((kind, children),) = document.items()
    if kind == "dict":
        return {key: _rebuild(child, leaves) for key, child in children}
    nodes = [_rebuild(child, leaves) for child in children]
    return tuple(nodes) if kind == "tuple" else nodes

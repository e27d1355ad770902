"""A quantized model's parameters as a flat dict of arrays, and back.

The names are those of a saved model's arrays file, such as `weights/Dense_0/kernel/values`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxrmils.lowering.integer_dot import Backend
from jaxrmils.lowering.quantized_model import QuantizedParams, QuantizedWeight
from jaxrmils.numerics import QTensor, pack_int4


def named_arrays(params: QuantizedParams) -> dict[str, Any]:
    """The arrays by name.

    Args:
      params: of a `QuantizedModel`; arrays, tracers or shapes.

    Returns:
      The same arrays: `leaves/{leaf}`, `weights/{weight}/values` (and `scale`, `zero_point`),
      `sums/{site}`, `grids/{site}/{operand}/scale` (and `zero_point`).

    >>> import jax.numpy as jnp
    >>> sorted(named_arrays(QuantizedParams({"bias": jnp.ones(2)}, {}, {})))
    ['leaves/bias']
    """
    names, arrays = jax.tree.leaves(_names(params)), jax.tree.leaves(params)
    return dict(zip(names, arrays, strict=True))


def from_named(like: QuantizedParams, arrays: Mapping[str, Any]) -> QuantizedParams:
    """The parameters that `named_arrays` took apart.

    Args:
      like: parameters of the same model; their values are not read.
      arrays: by name.

    Raises:
      KeyError: an array is missing.
    """
    return jax.tree.map(arrays.__getitem__, _names(like))


def at_rest(params: QuantizedParams) -> QuantizedParams:
    """The same codes in the one storage that all backends share: int4 two per byte.

    Args:
      params: of a model for any backend.
    """
    return _convert(params, _packed)


def for_backend(params: QuantizedParams, backend: Backend) -> QuantizedParams:
    """Parameters at rest in the storage of a backend: `jnp.int4` on TPU, as they are elsewhere.

    Args:
      params: from `at_rest`.
      backend: where they will be used.
    """
    if backend != "tpu":
        return params
    return _convert(params, lambda tensor: tensor.native_int4() if tensor.bits == 4 else tensor)


def _packed(tensor: QTensor) -> QTensor:
    if tensor.bits != 4 or tensor.packed:
        return tensor
    codes = tensor.codes()
    return dataclasses.replace(tensor, values=pack_int4(codes), packed_dim=codes.shape[-1])


def _convert(params: QuantizedParams, change: Any) -> QuantizedParams:
    weights = {
        name: dataclasses.replace(weight, tensor=change(weight.tensor))
        for name, weight in params.weights.items()
    }
    return dataclasses.replace(params, weights=weights)


def _names(params: QuantizedParams) -> Any:
    """The tree of parameters with a name in place of every array."""

    def weight(name: str, value: QuantizedWeight) -> QuantizedWeight:
        parts: dict[str, Any] = {
            part: f"weights/{name}/{part}"
            for part in ("values", "scale", "zero_point")
            if getattr(value.tensor, part) is not None
        }
        tensor = dataclasses.replace(value.tensor, **parts)
        return QuantizedWeight(tensor, {site: f"sums/{site}" for site in value.sums})

    def grids(site: str, values: Any) -> Any:
        prefixes = [f"grids/{site}/{operand}" for operand in range(len(values))]
        return tuple(
            dataclasses.replace(grid, scale=f"{prefix}/scale", zero_point=f"{prefix}/zero_point")
            for grid, prefix in zip(values, prefixes, strict=True)
        )

    return QuantizedParams(
        leaves={name: f"leaves/{name}" for name in params.leaves},
        weights={name: weight(name, value) for name, value in params.weights.items()},
        grids={site: grids(site, values) for site, values in params.grids.items()},
    )

"""What follows a product in the same kernel: see `kernels` for the order of its operations."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxrmils.lowering.native.functions import function_table, reach

Grid = tuple[Float32[Array, ""], Int32[Array, ""]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "offset", "correction", "residual", "residual_grid", "grid"],
    meta_fields=["low", "high", "function"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows a product; the module `kernels` says in what order.

    Attributes:
        scale: factor of every output channel.
        offset: added to every output channel, after the factor.
        correction: added to the int32 sums of (x + 128) w; see the function `correction`.
        residual: added then, of the output's shape: float32, or int8 codes.
        residual_grid: scale and zero point of a residual in codes, which stands for
            scale * (code - zero point).
        low: smallest value (static).
        high: largest value (static).
        function: f, by name (static); None for nothing.
        grid: scale and zero point of the result's codes; None for a result in float32.
    """

    scale: Float32[Array, " o"]
    offset: Float32[Array, " o"]
    correction: Int32[Array, " o"]
    residual: Array | None = None
    residual_grid: Grid | None = None
    low: float = -math.inf
    high: float = math.inf
    function: str | None = None
    grid: Grid | None = None

    def attributes(self) -> dict[str, Any]:
        """What does not change between calls."""
        return {
            "low": np.float32(self.low),
            "high": np.float32(self.high),
            "reach": np.float32(reach(self.function)),
        }

    def operands(self, shape: tuple[int, ...]) -> tuple[list[Array], Array, list[Array]]:
        """The arrays that kernels read for a result of a shape: vectors, residual, the rest.

        Raises:
            TypeError: if a dtype is not what it should be.
            ValueError: if a shape does not fit.
        """
        vectors = {"scale": jnp.float32, "offset": jnp.float32, "correction": jnp.int32}
        for name, dtype in vectors.items():
            check(f"epilogue.{name}", getattr(self, name), dtype, shape[-1:])
        # A residual without elements stands for none.
        residual = jnp.zeros((0,), jnp.int8)
        if self.residual is not None:
            residual = self.residual
            dtype = jnp.float32 if self.residual_grid is None else jnp.int8
            check("epilogue.residual", residual, dtype, shape)
        rest = [
            *_grid("epilogue.residual_grid", self.residual_grid),
            *_grid("epilogue.grid", self.grid),
            jnp.asarray(function_table(self.function)),
        ]
        return [self.scale, self.offset, self.correction], residual, rest

    def result(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """What a kernel returns."""
        return jax.ShapeDtypeStruct(shape, jnp.float32 if self.grid is None else jnp.int8)


def _grid(name: str, grid: Grid | None) -> Grid:
    if grid is None:
        return jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32)
    scale, zero_point = jnp.asarray(grid[0]), jnp.asarray(grid[1])
    check(f"the scale of {name}", scale, jnp.float32, ())
    check(f"the zero point of {name}", zero_point, jnp.int32, ())
    return scale, zero_point


def check(name: str, value: Array, dtype: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError for another dtype and ValueError for another shape, by name."""
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {jnp.dtype(dtype).name}, found {value.dtype}")
    if value.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, found {value.shape}")

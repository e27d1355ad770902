"""Products of two arrays of codes, such as those of attention, with what follows them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32

from jaxrmils.lowering.integer_dot import DotDimensionNumbers, check_accumulator, code_bound
from jaxrmils.lowering.native import build
from jaxrmils.lowering.native.batching import one_by_one
from jaxrmils.lowering.native.epilogue import Epilogue, check


def batched_dot(
    lhs: Int8[Array, ...],
    rhs: Int8[Array, ...],
    epilogue: Epilogue,
    *,
    lhs_zero: Int32[Array, ""],
    rhs_zero: Int32[Array, ""],
    dimension_numbers: DotDimensionNumbers,
) -> Array:
    """The product of two arrays of codes, each less its zero point, and what follows.

    S of the epilogue are the sums of (lhs - lhs_zero) (rhs - rhs_zero). One dim is contracted, and
    one of each operand is neither contracted nor batched. Dims may be in any order: operands are
    read where they are, not transposed.

    Args:
        lhs: codes.
        rhs: codes.
        epilogue: what follows; its vectors have one value per column of the right operand.
        lhs_zero: zero point of the left operand, int32.
        rhs_zero: zero point of the right operand, int32.
        dimension_numbers: as of `jax.lax.dot_general`.

    Returns:
        [*batch, rows, columns]: int8 codes if the epilogue has a grid, else float32.

    Raises:
        LoweringError: if the kernels cannot be compiled.
        TypeError: if a dtype is not what it should be.
        ValueError: if shapes do not fit, or sums could overflow int32.
    """
    contracted, batch = dimension_numbers
    left = _Operand("lhs", lhs, contracted[0], batch[0])
    right = _Operand("rhs", rhs, contracted[1], batch[1])
    if left.batch != right.batch or left.depth != right.depth:
        raise ValueError(
            f"operands of shapes {lhs.shape} and {rhs.shape} do not fit {dimension_numbers}"
        )
    bound = code_bound(8, zero_point=True)
    check_accumulator(left.depth, bound, bound)
    zeros = [jnp.asarray(zero, jnp.int32) for zero in (lhs_zero, rhs_zero)]
    for name, zero in zip(("lhs_zero", "rhs_zero"), zeros, strict=True):
        check(name, zero, jnp.int32, ())
    shape = (*left.batch, left.free, right.free)
    layout = {
        "batch": left.batch,
        "lhs_strides": left.strides,
        "rhs_strides": right.strides,
        "sizes": (left.free, right.free, left.depth),
    }
    attributes = {name: np.asarray(value, np.int64) for name, value in layout.items()}

    @jax.custom_batching.custom_vmap
    def run(lhs: Array, rhs: Array, epilogue: Epilogue, zeros: list[Array]) -> Array:
        vectors, residual, rest = epilogue.operands(shape)
        result = epilogue.result(shape)
        if 0 in shape:
            return jnp.zeros(result.shape, result.dtype)
        build.load()
        call = jax.ffi.ffi_call("jaxrmils_batched_dot", result)
        operands = (lhs, rhs, *vectors, residual, *rest, *zeros)
        return call(*operands, **epilogue.attributes(), **attributes)

    @run.def_vmap
    def over(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        """One more batched dim; one by one where more than the operands has it."""
        if any(jax.tree.leaves(batched[2:])):
            return one_by_one(run, operands, batched), True
        lhs, rhs = (
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(operands[:2], batched[:2], strict=True)
        )
        epilogue, (lhs_zero, rhs_zero) = operands[2:]
        if epilogue.residual is not None:
            residual = jnp.broadcast_to(epilogue.residual, (size, *shape))
            epilogue = dataclasses.replace(epilogue, residual=residual)
        left, right = ([d + 1 for d in dims] for dims in contracted)
        more, others = ((0, *(d + 1 for d in dims)) for dims in batch)
        zeros = {"lhs_zero": lhs_zero, "rhs_zero": rhs_zero}
        numbers = ((left, right), (more, others))
        result = batched_dot(lhs, rhs, epilogue, **zeros, dimension_numbers=numbers)
        return result, True

    return run(lhs, rhs, epilogue, zeros)


class _Operand:
    """Sizes and strides of one, in codes: its batched dims, the free one, the contracted one."""

    def __init__(self, name: str, x: Array, inner: Sequence[int], outer: Sequence[int]) -> None:
        check(name, x, jnp.int8, x.shape)
        free = sorted(set(range(x.ndim)) - {*inner, *outer})
        if len(inner) != 1 or len(free) != 1:
            raise ValueError(
                f"{name} of shape {x.shape} must have one contracted dim and one that is neither "
                f"contracted nor batched; found {tuple(inner)} contracted, {tuple(outer)} batched"
            )
        order = (*outer, *free, *inner)
        self.batch = tuple(x.shape[d] for d in outer)
        self.free, self.depth = x.shape[free[0]], x.shape[inner[0]]
        self.strides = [math.prod(x.shape[d + 1 :]) for d in order]

"""One quantized site: codes in, integer operation, float out.

The kernel is a parameter: the integer operation of a backend, or float operations that reach the
same int32 bit for bit (`exact_kernel`), which is what the simulation is made of.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax

from jaxrmils.graph import SiteCall, compat
from jaxrmils.graph.pending import settled
from jaxrmils.lowering.exact_float import exact_bilinear
from jaxrmils.lowering.integer_conv import conv_int32, conv_output_scale
from jaxrmils.lowering.integer_dot import Backend, code_bound, dot_int32, output_scale
from jaxrmils.lowering.max_pool import can_shift, shifted_max_pool
from jaxrmils.lowering.pending_product import codes_of
from jaxrmils.numerics import QTensor, QuantParams, Rounding, dequantize, quantize, row_params
from jaxrmils.numerics.formats import code_range


class LoweringError(ValueError):
    """A site that cannot run, or does not run, in integers."""


class Kernel(Protocol):
    """Exact int32 products of codes."""

    def __call__(
        self,
        call: SiteCall,
        codes: tuple[Any, Any],
        grids: tuple[QuantParams, QuantParams],
        sums: Any,
    ) -> Any:
        """In the operation's output layout, zero points subtracted: int32, or for a convolution
        on CUDA float32, which is exact below 2^24 (`conv_int32` bounds the rest).
        """
        ...


def integer_kernel(backend: Backend) -> Kernel:
    """The integer operations of a backend."""

    def kernel(
        call: SiteCall,
        codes: tuple[Any, Any],
        grids: tuple[QuantParams, QuantParams],
        sums: Any,
    ) -> Any:
        params, (lhs, rhs) = call.eqn.params, codes
        if call.site.kind == "dot":
            weight_first = call.site.weight is not None and call.site.weight.operand == 0
            return dot_int32(
                lhs,
                rhs,
                params["dimension_numbers"],
                lhs_zero_point=_zero_point(grids[0]),
                rhs_zero_point=_zero_point(grids[1]),
                lhs_sum=sums if weight_first else None,
                rhs_sum=None if weight_first else sums,
                lhs_bits=grids[0].bits,
                rhs_bits=grids[1].bits,
                backend=backend,
            )
        return conv_int32(
            lhs,
            rhs,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=params["dimension_numbers"],
            feature_group_count=params["feature_group_count"],
            batch_group_count=params["batch_group_count"],
            lhs_zero_point=_zero_point(grids[0]),
            kernel_sum=sums,
            lhs_bits=grids[0].bits,
            rhs_bits=grids[1].bits,
            backend=backend,
        )

    return kernel


def exact_kernel(
    call: SiteCall,
    codes: tuple[Any, Any],
    grids: tuple[QuantParams, QuantParams],
    sums: Any,
) -> Any:
    """The same int32 by float operations alone; zero points are subtracted from the codes."""
    shifted, bounds = [], []
    for values, grid in zip(codes, grids, strict=True):
        steps = values.astype(jnp.int32)
        shifted.append(steps if grid.symmetric else steps - grid.zero_point)
        bounds.append(code_bound(grid.bits, zero_point=not grid.symmetric))
    return exact_bilinear(
        call.bind_float32, shifted[0], shifted[1], products(call), bounds[0], bounds[1]
    )


def products(call: SiteCall) -> int:
    """How many products are summed in one output element."""
    shapes = [compat.abstract(var).shape for var in call.eqn.invars]
    numbers = call.eqn.params["dimension_numbers"]
    if call.site.kind == "dot":
        return math.prod(shapes[0][axis] for axis in numbers[0][0])
    return math.prod(shapes[1][axis] for axis in numbers.rhs_spec[1:])


def _zero_point(grid: QuantParams) -> Any:
    return None if grid.symmetric else grid.zero_point


def run_quantized(
    call: SiteCall,
    kernel: Kernel,
    weight: QTensor | None,
    sums: Any,
    grids: tuple[QuantParams | int, ...],
    roundings: tuple[Rounding, ...],
    keys: tuple[Hashable, ...] | None = None,
    *,
    shifts_pools: bool = False,
) -> tuple[Any, list[Any]]:
    """A site with every operand in integers.

    Args:
      call: the site.
      kernel: how to multiply.
      weight: its quantized weight in the weight's own layout; None for activation x activation.
      sums: precomputed sums of the weight's codes, see `weight_sums`.
      grids: grids of its activations, in order; of a dot also bits, for a grid of every row that is
        made here from the row's values.
      roundings: their rounding directions.
      keys: equal for operands with the same grid and rounding: where they are the same value, it is
        quantized once (the input of Q, K and V, or of a block and its shortcut). None for no two.
      shifts_pools: where an operand comes from max-pooling, quantize first and pool codes.

    Returns:
      The result in the model's dtype, and the activations' codes.
    """
    codes: list[Any] = [None, None]
    params: list[Any] = [None, None]
    activation_codes = []
    if keys is None:
        keys = tuple((call.site.name, index) for index in call.site.activations)
    for grid, rounding, key, index in zip(
        grids, roundings, keys, call.site.activations, strict=True
    ):
        if isinstance(grid, int):
            codes[index], params[index] = _rows(call, index, grid, rounding)
        else:
            codes[index] = _codes(call, index, key, grid, rounding, shifts_pools)
            params[index] = grid
        if index in call.shared:
            call.store(index, dequantize(codes[index], params[index]))
        activation_codes.append(codes[index])
    if weight is not None:
        assert call.site.weight is not None
        tensor = _in_operand_layout(call, weight)
        index = call.site.weight.operand
        codes[index] = tensor.values if tensor.values.dtype == jnp.int4 else tensor.codes()
        params[index] = tensor.params
    try:
        total = kernel(call, (codes[0], codes[1]), (params[0], params[1]), sums)
    except ValueError as error:  # It does not know the site's name.
        raise LoweringError(f"site {call.site.name}: {error}") from error
    scale = _output_scale(call, params[0].scale, params[1].scale)
    dtype = compat.abstract(call.eqn.outvars[0]).dtype
    return (total.astype(jnp.float32) * scale).astype(dtype), activation_codes


def _codes(
    call: SiteCall,
    index: int,
    key: Hashable,
    grid: QuantParams,
    rounding: Rounding,
    shifts_pools: bool,
) -> Any:
    """The codes of an operand on one grid."""
    pooled = call.pooled(index) if shifts_pools else None
    if pooled is None or not can_shift(pooled.eqn):
        return call.once(index, key, lambda x: codes_of(x, grid, rounding))
    lowest = code_range(grid.bits, grid.symmetric)[0]

    def make(_: Any) -> Any:
        return shifted_max_pool(codes_of(pooled.operand, grid, rounding), pooled.eqn, lowest)

    return call.once(index, key, make)


def _rows(call: SiteCall, index: int, bits: int, rounding: Rounding) -> tuple[Any, QuantParams]:
    """The codes of an operand's rows, and the grids that they are on."""
    axes = call.contracted(index)

    def make(x: Any) -> tuple[Any, QuantParams]:
        x = settled(x)
        grids = row_params(x, bits=bits, axes=axes)
        return quantize(x, grids, rounding), grids

    return call.once(index, ("rows", bits, rounding, axes), make)


def run_weight_only(call: SiteCall, weight: QTensor) -> Any:
    """A site whose weight is integer and whose other operand stays float."""
    assert call.site.weight is not None
    index = call.site.weight.operand
    tensor = _in_operand_layout(call, weight)
    dtype = compat.abstract(call.eqn.invars[index]).dtype
    if call.site.kind == "gather":
        return _gather_rows(call, tensor, dtype)
    operands = [call.operand(i) if i != index else None for i in range(2)]
    operands[index] = tensor.dequantize(dtype)
    return call.bind(*operands)


def _gather_rows(call: SiteCall, tensor: QTensor, dtype: Any) -> Any:
    """Looks up codes and scales, and dequantizes only the rows that were asked for."""
    params, indices = call.eqn.params, call.operand(1)

    def gather(table: Any, fill: Any) -> Any:
        return lax.gather(
            table,
            indices,
            params["dimension_numbers"],
            slice_sizes=(1, *table.shape[1:]),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=fill,
        )

    fill = params["fill_value"]
    rows = QTensor(
        gather(tensor.values, 0),
        # A scale of the fill value (NaN outside the table) marks the row as the float model does.
        gather(jnp.broadcast_to(tensor.scale, (tensor.shape[0], *tensor.scale.shape[1:])), fill),
        None,
        tensor.bits,
        tensor.packed_dim,
        tensor.group,
    )
    return rows.dequantize(dtype)


def _in_operand_layout(call: SiteCall, weight: QTensor) -> QTensor:
    assert call.site.weight is not None
    permutation = call.site.weight.permutation
    return weight if permutation is None else weight.transpose(permutation)


def _output_scale(call: SiteCall, lhs: Any, rhs: Any) -> Any:
    numbers = call.eqn.params["dimension_numbers"]
    if call.site.kind == "conv":
        return conv_output_scale(lhs, rhs, numbers)
    ranks = [len(compat.abstract(var).shape) for var in call.eqn.invars]
    return output_scale(lhs, rhs, numbers, ranks[0], ranks[1])

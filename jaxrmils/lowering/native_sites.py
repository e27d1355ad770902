"""A handler that runs sites on native kernels, each with what follows its product.

A product waits (`pending_product`) until what reads it is known. Sites without a kernel run as in
`QuantizedModel`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import SiteCall, compat
from jaxrmils.lowering.kernel_forms import is_depthwise, why_no_kernel
from jaxrmils.lowering.native import kernels
from jaxrmils.lowering.pending_product import Dequantized, Product, Tail, codes_of
from jaxrmils.lowering.quantized_model import QuantizedModel, run_site, site_scope
from jaxrmils.lowering.sites import integer_kernel
from jaxrmils.numerics import QuantParams, Rounding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "offset", "correction"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """What a kernel does by channel, of parameters alone; see `kernels.Epilogue`.

    Attributes:
      scale, offset: float32 [channels].
      correction: int32 [channels].
    """

    scale: Any
    offset: Any
    correction: Any


def run_native_site(
    model: QuantizedModel,
    roundings: Any,
    vectors: Mapping[str, Vectors],
    made: dict[str, list[Vectors]],
    call: SiteCall,
) -> tuple[Any, Any]:
    """A handler: the site's product, waiting for what follows it, and no record.

    Args:
      model: whose sites they are.
      roundings: per site, of its activations.
      vectors: per site, what its kernel does by channel, where that is known.
      made: collects, per site with a weight, what its kernel was asked to do by channel.
      call: the site; its weight is a `NativeWeight`, its state the grids.
    """
    weight, name = call.weight, call.site.name
    if weight is None and why_no_kernel(model, call.site, call.eqn) is None:
        return _activations_product(model, roundings[name], call), None
    if weight is None or name not in weight.packed:
        if weight is not None:
            call = dataclasses.replace(call, weight=weight.quantized)
        return run_site(
            model.plan, roundings, model.equal_grids, integer_kernel("cpu"), True, call
        )[0], None
    (grid,), (rounding,) = call.state, roundings[name]
    codes = _codes(model, call, 0, 0, rounding)
    return _product(call, codes, grid, vectors, made.setdefault(name, [])), None


def _codes(
    model: QuantizedModel, call: SiteCall, operand: int, number: int, rounding: Rounding
) -> Any:
    """The codes of an operand, the site's activation of some number."""
    name, grid = call.site.name, call.state[number]
    key = (model.equal_grids[name][number], rounding)
    with jax.named_scope(site_scope(name)):
        codes = call.once(operand, key, lambda x: codes_of(x, grid, rounding))
    if operand in call.shared:
        dtype = compat.abstract(call.eqn.invars[operand]).dtype
        call.store(operand, Dequantized(codes, grid, dtype))
    return codes


def _activations_product(
    model: QuantizedModel, roundings: tuple[Rounding, ...], call: SiteCall
) -> Product:
    """A product of two activations, to be computed with what follows it."""
    name, grids = call.site.name, call.state
    lhs, rhs = (_codes(model, call, number, number, roundings[number]) for number in range(2))
    shape = _output_shape(call)
    ones = jnp.ones(shape[-1:], jnp.float32)

    def emit(tail: Tail, grid: QuantParams | None) -> Any:
        with jax.named_scope(site_scope(name)):
            return kernels.batched_dot(
                lhs,
                rhs,
                _epilogue(tail, jnp.zeros(shape[-1:], jnp.int32), grid),
                lhs_zero=_zero(grids[0]),
                rhs_zero=_zero(grids[1]),
                dimension_numbers=call.eqn.params["dimension_numbers"],
            )

    scale = grids[0].scale.reshape(()) * grids[1].scale.reshape(())
    return Product(emit, Tail(scale * ones, jnp.zeros_like(ones)), shape)


def _epilogue(tail: Tail, correction: Any, grid: QuantParams | None) -> kernels.Epilogue:
    residual_grid = tail.residual_grid
    return kernels.Epilogue(
        scale=tail.scale,
        offset=tail.offset,
        correction=correction,
        residual=tail.residual,
        residual_grid=None if residual_grid is None else _pair(residual_grid),
        low=tail.low,
        high=tail.high,
        function=tail.function,
        grid=None if grid is None else _pair(grid),
    )


def _product(
    call: SiteCall,
    codes: Any,
    grid: QuantParams,
    vectors: Mapping[str, Vectors],
    made: list[Vectors],
) -> Product:
    """The site's product, to be computed with what follows it."""
    weight, name, params = call.weight, call.site.name, call.eqn.params
    packed, known = weight.packed[name], vectors.get(name)
    zero = _zero(grid)
    shape = _output_shape(call)
    if known is None:
        scale = grid.scale.reshape(()) * weight.scales[name]
        correction = kernels.correction(weight.sums[name], zero)
        start = Vectors(scale, jnp.zeros_like(scale), correction)
    else:
        start = known  # What its tail becomes is known, and not read.
    channels = start.scale.shape[0]

    def emit(tail: Tail, grid: QuantParams | None) -> Any:
        by_channel = known or Vectors(tail.scale, tail.offset, start.correction)
        made.append(by_channel)
        residual = tail.residual
        if residual is not None and not is_conv:
            residual = residual.reshape(-1, channels)
        whole = dataclasses.replace(
            tail, scale=by_channel.scale, offset=by_channel.offset, residual=residual
        )
        epilogue = _epilogue(whole, by_channel.correction, grid)
        with jax.named_scope(site_scope(name)):
            if not is_conv:
                flat = codes.reshape(-1, math.prod(codes.shape[-contracted:]))
                return kernels.dot(flat, packed, epilogue).reshape(shape)
            run = kernels.depthwise if is_depthwise(call.eqn) else kernels.conv
            return run(
                codes,
                packed,
                epilogue,
                x_zero=zero,
                strides=params["window_strides"],
                padding=params["padding"],
                dilation=params["rhs_dilation"],
            )

    is_conv = call.site.kind == "conv"
    contracted = 0 if is_conv else len(params["dimension_numbers"][0][0])
    tail = Tail(start.scale, start.offset)
    if not is_conv and len(shape) != codes.ndim - contracted + 1:
        # Features in several dims: nothing is by channel of the last one alone.
        return _Whole(emit, tail, shape)
    return Product(emit, tail, shape)


class _Whole(Product):
    """A product whose features lie in several dims; it takes along clamps alone."""

    def _by_channel(self, other: Any) -> Any:
        return None


def _zero(grid: QuantParams) -> Any:
    return jnp.zeros((), jnp.int32) if grid.symmetric else grid.zero_point.reshape(())


def _pair(grid: QuantParams) -> tuple[Any, Any]:
    return grid.scale.reshape(()), grid.zero_point.reshape(())


def _output_shape(call: SiteCall) -> tuple[int, ...]:
    """Of the site's result, at the batch size that runs."""
    return tuple(int(n) for n in compat.abstract(call.eqn.outvars[0]).shape)

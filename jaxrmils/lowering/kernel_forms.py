"""Which sites native kernels can run, by the form of their operation."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrmils.graph import Site, compat
from jaxrmils.lowering.quantized_model import QuantizedModel
from jaxrmils.lowering.table import Operation, conv_operation, has_kernel
from jaxrmils.policies.formats import FLOAT_BITS

_NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""`lax.ConvDimensionNumbers` of NHWC, HWIO, NHWC."""


def why_no_kernel(model: QuantizedModel, site: Site, eqn: compat.JaxprEqn) -> str | None:
    """Why a site has no native kernel; None if it has one."""
    layer = model.plan.layers[site.layer]
    if site.kind == "gather":
        return "a lookup"
    if site.weight is not None and layer.weight_bits == FLOAT_BITS:
        return "not in integers"
    if layer.activation_bits == FLOAT_BITS:
        return "float activations"
    if layer.dynamic and site.kind == "dot":
        return "grids made at run time"
    if site.loops:
        return "inside a scan"
    if (dtype := compat.abstract(eqn.outvars[0]).dtype) != jnp.float32:
        return f"{dtype} results"
    if any(grid.scale.size != 1 for grid in model.params.grids[site.name]):
        return "several grids for one input"
    bits = f"a{layer.activation_bits}"
    if site.weight is None:
        operation, reason = _activations_form(eqn)
    else:
        operation, reason = _conv_form(eqn) if site.kind == "conv" else _dot_form(site, eqn)
        bits = f"w{layer.weight_bits}{bits}"
    if reason is None and not has_kernel(operation, bits):
        return f"no kernel for {operation!r} in {layer.format}"
    return reason


def _conv_form(eqn: compat.JaxprEqn) -> tuple[Operation, str | None]:
    """A convolution's kind, and what of its form no kernel takes."""
    params = eqn.params
    channels, features = _features(eqn)
    groups = params["feature_group_count"]
    operation = conv_operation(
        channels,
        features,
        groups,
        batch_groups=params["batch_group_count"],
        dilated=set(params["rhs_dilation"]) != {1},
    )
    reason = None
    if tuple(params["dimension_numbers"]) != _NHWC:
        reason = "not a 2-D convolution in NHWC"
    elif set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        reason = "a dilated input or groups of the batch"
    elif groups == channels != 1 and features != channels:
        reason = "a depthwise convolution with several features for a channel"
    elif groups == 1 == channels:
        operation = "conv"  # Its one group is no reason to call it depthwise.
    return operation, reason


def _features(eqn: compat.JaxprEqn) -> tuple[int, int]:
    """Channels of a convolution's input and of its output, in NHWC."""
    return compat.abstract(eqn.invars[0]).shape[-1], compat.abstract(eqn.outvars[0]).shape[-1]


def _dot_form(site: Site, eqn: compat.JaxprEqn) -> tuple[Operation, str | None]:
    """A dot's kind, and what of its form no kernel takes."""
    assert site.weight is not None
    (lhs, _), (batch, _) = eqn.params["dimension_numbers"]
    rank = len(compat.abstract(eqn.invars[0]).shape)
    reason = None
    if site.weight.operand != 1 or batch:
        reason = "the weight comes first, or dims are batched"
    elif tuple(lhs) != tuple(range(rank - len(lhs), rank)):
        reason = "other dims than the last are contracted"
    return "dot", reason


def _activations_form(eqn: compat.JaxprEqn) -> tuple[Operation, str | None]:
    """The kind of a product of two activations, and what of its form no kernel takes."""
    if eqn.primitive.name != "dot_general":
        return "conv", "a convolution of two activations"
    contracted, batch = eqn.params["dimension_numbers"]
    ranks = [len(compat.abstract(var).shape) for var in eqn.invars]
    free = {r - len(c) - len(b) for r, c, b in zip(ranks, contracted, batch, strict=True)}
    if len(contracted[0]) != 1 or free != {1}:
        return "batched dot", "two activations of which not one dim each is contracted and left"
    return "batched dot", None


def is_depthwise(eqn: compat.JaxprEqn) -> bool:
    """Whether every channel of a convolution has a kernel of its own."""
    channels, _ = _features(eqn)
    return eqn.params["feature_group_count"] == channels != 1

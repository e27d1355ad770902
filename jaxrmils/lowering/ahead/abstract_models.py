"""Models as shapes: what a plan makes of a graph, without parameters, data or a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, SiteCall, interpret, tabulate, trace
from jaxrmils.lowering.hlo import planned_sites
from jaxrmils.lowering.integer_dot import Backend
from jaxrmils.lowering.quantized_model import QuantizedModel, quantize, site_scope
from jaxrmils.numerics import QuantParams, Ranges
from jaxrmils.numerics.formats import BITS
from jaxrmils.policies import Plan


def abstract_model(
    graph: Graph, plan: Plan, backend: Backend, *, symmetric: bool = False
) -> QuantizedModel:
    """The integer model that `quantize` would build, its parameters as `jax.ShapeDtypeStruct`.

    Args:
      graph: from `trace`.
      plan: for this graph.
      backend: where it would run.
      symmetric: whether the activations' grids have no zero points, as in `calibrate`.

    Returns:
      A model that can be lowered and compiled, not run.

    Raises:
      PlanError: the plan is for another model.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import trace, uniform
    >>> graph = trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    >>> model = abstract_model(graph, uniform(tabulate(graph), "int4"), "tpu")
    >>> model.params.weights["w"].tensor.values
    ShapeDtypeStruct(shape=(3, 2), dtype=int4)
    """
    ranges = _any_ranges(graph, plan, symmetric)

    def params(leaves: Any) -> Any:
        return quantize(graph, leaves, plan, ranges, backend=backend).params

    shapes = jax.eval_shape(params, graph.params)
    return QuantizedModel(graph, plan, shapes, backend, tabulate(graph))


def has_symmetric_grids(model: QuantizedModel) -> bool:
    """Whether all quantized activations of a model do without zero points."""
    grids = [grid for parts in model.params.grids.values() for grid in parts]
    return bool(grids) and all(grid.symmetric for grid in grids)


def _any_ranges(graph: Graph, plan: Plan, symmetric: bool) -> Ranges:
    """Ranges of the right shapes: the program does not depend on their values."""
    grids = {}
    for name in planned_sites(graph, plan):
        site = graph.site[name]
        shape = site.stacked_lengths
        scale, zero_point = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
        one = {bits: QuantParams(scale, zero_point, bits, symmetric) for bits in BITS}
        grids[name] = (one,) * len(site.activations)
    return Ranges({}, grids, "minmax", symmetric, 100.0, 0, graph.fingerprint)


def batch_shapes(graph: Graph, batch_size: int) -> Any:
    """The shapes of a batch of inputs.

    >>> import jax.numpy as jnp
    >>> graph = trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    >>> batch_shapes(graph, 8).shape
    (8, 3)
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), graph.example
    )


def float_graph(graph: Graph, dtype: Any) -> Graph:
    """The model with all floating parameters and inputs in another dtype, traced again.

    Args:
      graph: from `trace`.
      dtype: float32 or bfloat16.

    Raises:
      TraceError: the model can't be traced so, or has other sites then.
    """

    def cast(x: Any) -> Any:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype) if is_float else x.dtype)

    params, inputs = jax.tree.map(cast, graph.params), jax.tree.map(cast, graph.example)
    return trace(graph.apply, params, inputs, shortcuts=graph.shortcuts)


def labelled_apply(graph: Graph) -> Callable[[Any, Any], Any]:
    """The float model's function, whose sites can be found in the compiled program.

    Args:
      graph: from `trace`.

    Returns:
      `apply(params, inputs)`.
    """

    def handler(call: SiteCall) -> tuple[Any, None]:
        with jax.named_scope(site_scope(call.site.name)):
            return call.bind(*call.operands()), None

    def apply(params: Any, inputs: Any) -> Any:
        return interpret(graph, handler, jax.tree.leaves(params), inputs)[0]

    return apply

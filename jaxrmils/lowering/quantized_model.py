"""Plan to integer model: a pytree of integer parameters and a pure apply."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph, Site, SiteCall, interpret
from jaxrmils.graph.expression import evaluate, loops_of
from jaxrmils.graph.reads import MAX_POOL
from jaxrmils.graph.table import ModelTable, tabulate
from jaxrmils.lowering.cached_leaves import CachedLeaves, ReadOnlyMappings, register
from jaxrmils.lowering.integer_conv import kernel_sum
from jaxrmils.lowering.integer_dot import Backend, code_bound, operand_sum
from jaxrmils.lowering.max_pool import run_max_pool
from jaxrmils.lowering.sites import (
    Kernel,
    exact_kernel,
    integer_kernel,
    run_quantized,
    run_weight_only,
)
from jaxrmils.numerics import QTensor, QuantParams, Rounding, quantize_weight
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.policies import Plan, PlanError, check_plan, roundings_by_site
from jaxrmils.policies.formats import FLOAT_BITS

Mode = Literal["integer", "simulate"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tensor", "sums"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight(ReadOnlyMappings):
    """An integer weight and the sums of its codes that zero points need.

    Attributes:
      tensor: codes and scales, in the weight's own layout; stacked loops lead.
      sums: per site, sums of the codes along the contraction; int16 where they always fit, else
        int32.
    """

    tensor: QTensor
    sums: Mapping[str, Any]


@register
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedParams(CachedLeaves):
    """The parameters of a quantized model; to change some, make others with `dataclasses.replace`.

    Attributes:
      leaves: float leaves that are still read, by name; a leaf that exists only as integer codes
        is not here. Leaves that are only read together, such as a normalization's scale and
        variance, are one here, of what is made of them (`graph.folds`).
      weights: the integer weights, by name.
      grids: per site with quantized activations, one `QuantParams` per operand; none for rows that
        make their own.
    """

    leaves: Mapping[str, Any]
    weights: Mapping[str, QuantizedWeight]
    grids: Mapping[str, tuple[QuantParams, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A model that runs in integers where its plan says so.

    Attributes:
      graph: the traced model.
      plan: what every layer became.
      params: its parameters.
      backend: "cpu", "cuda" or "tpu"; chooses formulations, not results.
      sizes: the model's table, for sizes.
    """

    graph: Graph
    plan: Plan
    params: QuantizedParams
    backend: Backend
    sizes: ModelTable

    def __call__(self, inputs: Any) -> Any:
        """The outputs for a batch, with the model's own parameters."""
        return self.apply(self.params, inputs)

    def apply(self, params: QuantizedParams, inputs: Any, *, mode: Mode = "integer") -> Any:
        """A pure function of parameters and inputs; jit, vmap and shard it like any other.

        Args:
          params: `model.params`, or the same tree under your own sharding. Sites that read the same
            value and whose grids are equal in `model.params` share its codes.
          inputs: like the traced inputs, at any batch size.
          mode: "integer", or "simulate" for float operations on the same codes, which agree with
            the integer ones bit for bit at every site.

        Returns:
          What the float model's apply returns.
        """
        return self.apply_with_codes(params, inputs, mode=mode)[0]

    def apply_with_codes(
        self, params: QuantizedParams, inputs: Any, *, mode: Mode = "integer"
    ) -> tuple[Any, dict[str, list[Any]]]:
        """As `apply`, and the int8 codes of every quantized activation, by site."""
        if mode not in ("integer", "simulate"):
            raise ValueError(f"mode {mode!r}; expected 'integer' or 'simulate'")
        kernel = integer_kernel(self.backend) if mode == "integer" else exact_kernel
        roundings = roundings_by_site(self.graph, self.plan)
        shifts_pools = self.backend == "cpu"
        handler = functools.partial(
            run_site, self.plan, roundings, self.equal_grids, kernel, shifts_pools
        )
        leaves = [params.leaves.get(name) for name in self.graph.leaf_names]
        return interpret(
            self.graph,
            handler,
            leaves,
            inputs,
            weights=params.weights,
            state=params.grids,
            absent=lambda struct: jnp.zeros(struct.shape, struct.dtype),
            operations={MAX_POOL: run_max_pool} if shifts_pools else None,
            folded=folded_values(self.graph, params.leaves),
        )

    @functools.cached_property
    def equal_grids(self) -> Mapping[str, tuple[Hashable, ...]]:
        """Per site and operand, a key that operands with the same grid have in common."""
        grids = self.params.grids
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(grids)):
            return {site: tuple((site, i) for i in range(len(g))) for site, g in grids.items()}
        return {
            site: tuple(
                (grid.bits, grid.symmetric, grid.scale.shape, *map(np.ndarray.tobytes, values))
                for grid, values in zip(parts, jax.device_get(_values(parts)), strict=True)
            )
            for site, parts in grids.items()
        }

    @property
    def size_bits(self) -> int:
        """Size in bits: codes, scales, zero points and float leaves, each of them as in the model
        that was traced.
        """
        return self.sizes.size_bits(self.plan.formats())


def default_backend() -> Backend:
    """The backend that jax runs on: "cpu", "cuda" or "tpu"."""
    name = jax.default_backend()
    return "cuda" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"


def quantize(
    graph: Graph,
    params: Any,
    plan: Plan,
    ranges: Ranges | None,
    *,
    backend: Backend | None = None,
    unpacked: bool = False,
) -> QuantizedModel:
    """Builds the integer model that a plan describes.

    Args:
      graph: from `trace`.
      params: the float parameters.
      plan: from a policy.
      ranges: from `calibrate`, the ones that the plan's scores were made with; None for a plan
        whose activations are all float or dynamic.
      backend: where it will run; the default is where jax runs now. int4 weights are stored two per
        byte on "cpu" and "cuda" and unpacked to int8 inside jit; on "tpu" they are native int4.
      unpacked: hold int4 weights as int8 arrays on "cpu" and "cuda": twice the memory, and nothing
        to unpack in a call. Saved models are the same.

    Returns:
      The model; `model(inputs)` runs it.

    Raises:
      PlanError: the plan is for another model, or quantizes an activation that has no range.
      TraceError: params are not the traced model's.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, tabulate, trace, uniform
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> plan = uniform(tabulate(graph), "int8")
    >>> model = quantize(graph, params, plan, calibrate(graph, params, [x]))
    >>> model(x).shape
    (4, 2)
    """
    check_params(graph, params)
    table = tabulate(graph)
    check_plan(plan, table)
    if ranges is not None and ranges.fingerprint != graph.fingerprint:
        raise PlanError("the ranges were calibrated on another model; calibrate this one")
    backend = backend or default_backend()
    leaves = jax.tree.leaves(params)
    kept = set(table.float_leaves)
    quantized: list[str] = []
    grids: dict[str, tuple[QuantParams, ...]] = {}
    for name, sites in graph.layers.items():
        layer = plan.layers[name]
        if layer.weight_bits < FLOAT_BITS:
            quantized.append(name)
        elif graph.layers[name][0].weight is not None:
            kept |= set(graph.weights[name].leaves)
        if layer.activation_bits < FLOAT_BITS and not layer.dynamic:
            for site in sites:
                if site.activations:
                    grids[site.name] = _grids(site, ranges, layer.activation_bits)
    kept = kept.difference(*map(graph.folded_leaves, graph.folds))

    # One program for all weights: a program for every operation and shape takes longer to compile.
    @jax.jit
    def made(leaves: list[Any]) -> tuple[dict[str, Any], dict[str, QuantizedWeight]]:
        folded = {
            name: evaluate(graph.traced.folds[key].expressions[0], leaves)
            for name, key in graph.folds.items()
        }
        return folded, {
            n: _quantized_weight(graph, n, leaves, plan, backend, unpacked) for n in quantized
        }

    folded, weights = made(leaves)
    return QuantizedModel(
        graph=graph,
        plan=plan,
        params=QuantizedParams(
            leaves={graph.leaf_names[i]: jnp.asarray(leaves[i]) for i in sorted(kept)} | folded,
            weights=weights,
            grids=grids,
        ),
        backend=backend,
        sizes=table,
    )


def folded_values(graph: Graph, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's leaves that stand for several, by name; none in models of before."""
    if leaves.keys() <= set(graph.leaf_names):
        return {}
    return {name: leaves[name] for name in graph.folds if name in leaves}


def _grids(site: Site, ranges: Ranges | None, bits: int) -> tuple[QuantParams, ...]:
    if ranges is None:
        raise PlanError(
            f"site {site.name} is planned in int{bits} with a calibrated grid, but there are no "
            "ranges; pass those of `calibrate`, or plan dynamic activations"
        )
    if site.name not in ranges.grids:
        raise PlanError(
            f"site {site.name} is planned in int{bits}, but no calibration example reached it, so "
            "it has no range; skip it or calibrate on examples that reach it"
        )
    return tuple(grids[bits] for grids in ranges.grids[site.name])


def _quantized_weight(
    graph: Graph, name: str, leaves: list[Any], plan: Plan, backend: Backend, unpacked: bool
) -> QuantizedWeight:
    layer, weight = plan.layers[name], graph.weights[name]
    value = evaluate(graph.traced.expressions[name], leaves)
    tensor = quantize_weight(
        value,
        bits=layer.weight_bits,
        channel_axes=weight.channel_axes,
        rounding=layer.weight_rounding,
        pack=False if unpacked else None,
        group=layer.weight_group,
    )
    depth = len(loops_of(graph.traced.expressions[name]))
    sums = {}
    if layer.activation_bits < FLOAT_BITS:
        for site in graph.layers[name]:
            if site.activations:
                sums[site.name] = _sums(graph, site, tensor.codes(), layer.weight_bits, depth)
    if backend == "tpu" and layer.weight_bits == 4:
        tensor = tensor.native_int4()
    return QuantizedWeight(tensor, sums)


def _sums(graph: Graph, site: Site, codes: Any, bits: int, depth: int) -> Any:
    """Sums of the weight codes along a site's contraction, stacked loops leading.

    int16 where no sum of so many codes of so few bits leaves it, else int32.
    """
    assert site.weight is not None
    use, numbers = site.weight, graph.dimension_numbers(site.name)

    def one(codes: Any) -> Any:
        if use.permutation is not None:
            codes = codes.transpose(use.permutation)
        if site.kind == "conv":
            return kernel_sum(codes, numbers)
        return operand_sum(codes, numbers, "lhs" if use.operand == 0 else "rhs")

    for _ in range(depth):
        one = jax.vmap(one)
    sums = one(codes)
    # Most sums are short: as many int16 as there are channels, instead of int32.
    bound = (codes.size // max(sums.size, 1)) * code_bound(bits, zero_point=False)
    return sums.astype(jnp.int16) if bound <= -jnp.iinfo(jnp.int16).min else sums


def _values(grids: tuple[QuantParams, ...]) -> list[tuple[Any, Any]]:
    return [(grid.scale, grid.zero_point) for grid in grids]


def run_site(
    plan: Plan,
    roundings: Mapping[str, tuple[Rounding, ...]],
    equal_grids: Mapping[str, tuple[Hashable, ...]],
    kernel: Kernel,
    shifts_pools: bool,
    call: SiteCall,
) -> tuple[Any, Any]:
    """A handler: the site in its planned format, and the codes of its activations.

    Args:
      plan: the formats.
      roundings: per site, of its activations.
      equal_grids: see `QuantizedModel.equal_grids`.
      kernel: multiplies codes.
      shifts_pools: see `run_quantized`.
      call: the site; its weight is a `QuantizedWeight`, its state the grids.
    """
    site = call.site
    layer = plan.layers[site.layer]
    with jax.named_scope(site_scope(site.name)):
        if layer.activation_bits < FLOAT_BITS and site.activations:
            tensor, sums = None, None
            if call.weight is not None:
                tensor, sums = call.weight.tensor, call.weight.sums[site.name]
            own = roundings[site.name]
            if layer.dynamic:
                bits = (layer.activation_bits,) * len(own)
                return run_quantized(call, kernel, tensor, sums, bits, own)
            keys = tuple(zip(equal_grids[site.name], own, strict=True))
            return run_quantized(
                call, kernel, tensor, sums, call.state, own, keys, shifts_pools=shifts_pools
            )
        if layer.weight_bits < FLOAT_BITS:
            return run_weight_only(call, call.weight.tensor), None
        return call.bind(*call.operands()), None


# XLA cuts an operation's name at the first "@", which marks the second use of a weight.
_AT = "#"
SCOPE_PATTERN = re.compile(r"jaxrmils\[([^\]]*)\]")


def site_scope(name: str) -> str:
    """The name scope under which a site appears in the compiled program."""
    return f"jaxrmils[{name.replace('@', _AT)}]"


def scope_site(text: str) -> str:
    """The site's name, of what `SCOPE_PATTERN` finds."""
    return text.replace(_AT, "@")

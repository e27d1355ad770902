"""A quantized model on CPU kernels of its own, each of which also does what follows its product.

XLA's integer operations write int32 sums to memory and read them again to rescale them. Kernels
that rescale, normalize, add a shortcut, clamp and quantize while the sums are in registers write a
quarter of the bytes, once. `native` packs a model's weights for them; the interpreter offers every
product what follows it (`pending_product`). Operations that have no kernel here run as in
`QuantizedModel`, and `reasons` says which and why.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrmils.graph import Graph, Site, compat, interpret
from jaxrmils.graph.program import Call, Program, SiteStep
from jaxrmils.graph.reads import MAX_POOL
from jaxrmils.lowering.cached_leaves import CachedLeaves, ReadOnlyMappings, register
from jaxrmils.lowering.in_parts import examples_at_once, in_parts
from jaxrmils.lowering.integer_dot import BACKENDS
from jaxrmils.lowering.kernel_forms import is_depthwise, why_no_kernel
from jaxrmils.lowering.max_pool import run_max_pool
from jaxrmils.lowering.native import kernels
from jaxrmils.lowering.native_sites import Vectors, run_native_site
from jaxrmils.lowering.quantized_model import (
    QuantizedModel,
    QuantizedWeight,
    folded_values,
)
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.numerics import QTensor, QuantParams
from jaxrmils.policies import roundings_by_site

PART_OF_PROGRAM = 64_000_000
"""Bytes of parameters that a compiled program may hold."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["quantized", "packed", "scales", "sums"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class NativeWeight(ReadOnlyMappings):
    """An integer weight in the layouts of the kernels.

    Attributes:
      quantized: as in `QuantizedModel`, for sites that run there; None if there are none.
      packed: per site, the codes as its kernel reads them.
      scales: per site whose `Vectors` are not made yet, float32 [channels].
      sums: likewise, int32 or int16 [channels], sums of the codes, which zero points need.
    """

    quantized: QuantizedWeight | None
    packed: Mapping[str, Any]
    scales: Mapping[str, Any]
    sums: Mapping[str, Any]


@register
@dataclasses.dataclass(frozen=True, eq=False)
class NativeParams(CachedLeaves):
    """The parameters of a `NativeModel`.

    Attributes:
      leaves: as in `QuantizedParams`, without those that nothing but `vectors` is made of.
      grids: as in `QuantizedParams`.
      weights: packed, by name.
      vectors: per site, what its kernel does by channel, made of the leaves once.
    """

    leaves: Mapping[str, Any]
    weights: Mapping[str, NativeWeight]
    grids: Mapping[str, tuple[QuantParams, ...]]
    vectors: Mapping[str, Vectors]


@dataclasses.dataclass(frozen=True, eq=False)
class NativeModel:
    """A quantized model on native CPU kernels.

    Attributes:
      model: the quantized model.
      params: its parameters, packed.
      reasons: per site that has no native kernel, why.
      unread: names of leaves that the parameters lack, since vectors were made of them.
      at_once: how many examples run at a time; larger batches run in parts. None for all.
    """

    model: QuantizedModel
    params: NativeParams
    reasons: Mapping[str, str]
    unread: frozenset[str] = frozenset()
    at_once: int | None = None

    def __call__(self, inputs: Any) -> Any:
        """The outputs for a batch, with the model's own parameters, compiled for its shapes.

        Up to 64 MB of parameters are part of the compiled program: handing over hundreds of arrays
        takes time of its own.
        """
        return self._compiled(inputs)

    @functools.cached_property
    def _compiled(self) -> Any:
        if sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) <= PART_OF_PROGRAM:
            return jax.jit(lambda inputs: self.apply(self.params, inputs))
        return functools.partial(jax.jit(self.apply), self.params)

    def apply(self, params: NativeParams, inputs: Any) -> Any:
        """A pure function of parameters and inputs; works under `jit` and `vmap`, on CPU.

        Products are exact, as the quantized model's are. What follows them is rounded in another
        order (see `pending_product`), so that outputs differ in their last digits, and a code may
        differ where a value lies half-way between two.

        Args:
          params: `native_model.params`; parts of it were made of others, so they go together.
          inputs: like the traced inputs, at any batch size.

        Returns:
          What the float model's apply returns.
        """
        run = functools.partial(_run, self.model, params, made={}, unread=self.unread)
        return in_parts(run, inputs, self.at_once)


def _run(
    model: QuantizedModel,
    params: NativeParams,
    inputs: Any,
    made: dict[str, list[Vectors]],
    unread: frozenset[str] = frozenset(),
) -> Any:
    """The outputs; `made` collects what kernels do by channel."""
    roundings = roundings_by_site(model.graph, model.plan)
    handler = functools.partial(run_native_site, model, roundings, params.vectors, made)
    # What no output depends on is still read on the way.
    zeros = {
        name: jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in model.params.leaves.items()
        if name in unread
    }
    given = {**params.leaves, **zeros}
    leaves = [given.get(name) for name in model.graph.leaf_names]
    return interpret(
        model.graph,
        handler,
        leaves,
        inputs,
        weights=params.weights,
        state=params.grids,
        absent=lambda struct: jnp.zeros(struct.shape, struct.dtype),
        operations={MAX_POOL: run_max_pool},
        folded=folded_values(model.graph, given),
    )[0]


def native(model: QuantizedModel, *, at_once: int | Literal["auto"] | None = "auto") -> NativeModel:
    """The model on native CPU kernels, which are compiled when they are first used.

    Args:
      model: from `quantize` or `load_model`, for CPU.
      at_once: how many examples run at a time; larger batches run in parts, in a loop, with the
        same outputs and less memory. "auto" for as many as have 32 MB of temporaries, since glibc
        maps larger allocations anew in every call; None for all.

    Returns:
      A model with the same plan; the given one stays as it is.

    Raises:
      LoweringError: the model is for another backend, the kernels can't be compiled or run on this
        machine (it says why), or `at_once` is no number of examples.
    """
    if at_once not in ("auto", None) and not (type(at_once) is int and at_once > 0):
        raise LoweringError(
            f"at_once is {at_once!r}; expected a number of examples from 1 on, 'auto' or None"
        )
    if model.backend != "cpu":
        raise LoweringError(
            f"the model is for {model.backend!r} (of {', '.join(BACKENDS)}); native kernels are "
            "for 'cpu': quantize with backend='cpu'"
        )
    if (reason := kernels.available()) is not None:
        raise LoweringError(f"native kernels can't be used here: {reason}")
    graph, params = model.graph, model.params
    reasons = {
        site.name: reason
        for site, eqn in zip(graph.sites, graph.traced.eqns, strict=True)
        if (reason := why_no_kernel(model, site, eqn)) is not None
    }
    weights = {}
    for name, weight in params.weights.items():
        own = [site for site in graph.layers[name] if site.name not in reasons]
        others = len(own) < len(graph.layers[name])
        parts = {site.name: _packed(graph, site, weight) for site in own}
        weights[name] = NativeWeight(
            quantized=weight if others else None,
            packed={site: part[0] for site, part in parts.items()},
            scales={site: part[1] for site, part in parts.items()},
            sums={site: part[2] for site, part in parts.items()},
        )
    packed = NativeParams(params.leaves, weights, params.grids, {})
    vectors = _vectors(model, packed)
    weights = {name: _without(weight, vectors) for name, weight in weights.items()}
    packed = dataclasses.replace(packed, weights=weights, vectors=vectors)
    unread = _unread(model, packed)
    leaves = {name: leaf for name, leaf in params.leaves.items() if name not in unread}
    made = NativeModel(model, dataclasses.replace(packed, leaves=leaves), reasons, unread)
    if at_once == "auto":
        at_once = examples_at_once(made.apply, made.params, graph.example)
    return dataclasses.replace(made, at_once=at_once)


def _without(weight: NativeWeight, made: Mapping[str, Vectors]) -> NativeWeight:
    """A weight without what vectors were made of."""

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {site: value for site, value in values.items() if site not in made}

    return dataclasses.replace(weight, scales=kept(weight.scales), sums=kept(weight.sums))


def _unread(model: QuantizedModel, params: NativeParams) -> frozenset[str]:
    """The leaves that no output depends on any more."""
    inputs = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), model.graph.example)

    def outputs(leaves: Mapping[str, Any]) -> Any:
        return _run(model, dataclasses.replace(params, leaves=leaves), inputs, {})

    jaxpr = jax.make_jaxpr(outputs)(params.leaves).jaxpr
    read = {var for var in jaxpr.outvars if not isinstance(var, compat.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not read.isdisjoint(eqn.outvars):
            read |= {var for var in eqn.invars if not isinstance(var, compat.Literal)}
    # Leaves come in the order in which a dict is flattened: by name.
    names = sorted(params.leaves)
    return frozenset(n for n, var in zip(names, jaxpr.invars, strict=True) if var not in read)


def _vectors(model: QuantizedModel, params: NativeParams) -> Mapping[str, Vectors]:
    """What kernels do by channel, of sites whose kernel runs once and not inside a branch.

    It depends on parameters alone, so a call need not compute it again.
    """
    graph = model.graph
    outside = _outside(graph.traced.program)
    names = {site.name for index, site in enumerate(graph.sites) if index in outside}

    @jax.jit
    def collect(params: NativeParams) -> dict[str, Vectors]:
        made: dict[str, list[Vectors]] = {}
        inputs = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), graph.example)
        _run(model, params, inputs, made)
        return {n: each[0] for n, each in made.items() if n in names and len(each) == 1}

    return collect(params)


def _outside(program: Program) -> set[int]:
    """The numbers of a program's sites that no scan, branch or checkpoint holds."""
    found: set[int] = set()
    for step in program.steps:
        if isinstance(step, SiteStep):
            found.add(step.index)
        elif isinstance(step, Call) and step.kind == "inline":
            found |= _outside(step.programs[0])
    return found


def _packed(graph: Graph, site: Site, weight: QuantizedWeight) -> tuple[Any, Any, Any]:
    """A site's packed codes, and the scales and sums of its channels."""
    assert site.weight is not None
    tensor: QTensor = weight.tensor
    if site.weight.permutation is not None:
        tensor = tensor.transpose(site.weight.permutation)
    codes, eqn = tensor.codes(), graph.traced.eqns[graph.sites.index(site)]
    if site.kind == "conv":
        scale = tensor.scale.reshape(-1)
        pack = kernels.pack_depthwise if is_depthwise(eqn) else kernels.pack_conv
        packed = pack(codes)
        features = codes.shape[-1]
    else:
        (_, contracted), _ = eqn.params["dimension_numbers"]
        free = [d for d in range(codes.ndim) if d not in contracted]
        features = math.prod(codes.shape[d] for d in free)
        shape = [codes.shape[d] for d in free]
        flat = codes.transpose(*contracted, *free).reshape(-1, features)
        packed = kernels.pack_dot(flat)
        kept = tensor.scale.transpose(*contracted, *free).reshape(
            [tensor.scale.shape[d] for d in free]
        )
        scale = jnp.broadcast_to(kept, shape).reshape(-1)
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (features,))
    return packed, scale, jnp.asarray(weight.sums[site.name]).reshape(-1)

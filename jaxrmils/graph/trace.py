"""`trace(apply, params, inputs)`: from any JAX function to its quantizable sites."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import compat, naming
from jaxrmils.graph.builder import Traced, TraceError, build
from jaxrmils.graph.checks import check_apply, check_finite
from jaxrmils.graph.expression import evaluate
from jaxrmils.graph.interpreter import Frame, Handler, Operation, Records, Scope, run
from jaxrmils.graph.program import Call
from jaxrmils.graph.sites import Coverage, Site, Weight

Apply = Callable[[Any, Any], Any]
KEPT_PROGRAMS = 8
"""Of other input shapes than the traced one, per graph: tracing takes as long as compiling."""

Shortcuts = Literal["float", "codes"]
SHORTCUTS: tuple[Shortcuts, ...] = ("float", "codes")


@dataclass(frozen=True, eq=False)
class Graph:
    """A model's sites, as found by `trace`.

    Attributes:
      apply: the function that was traced, `apply(params, inputs) -> outputs`.
      example: shapes and dtypes of the inputs of one example (leading axis of 1).
      params: shapes and dtypes of the parameters.
      leaf_names: a readable name for every parameter leaf, in flattening order.
      traced: the program, for one example.
      shortcuts: "float" or "codes", see `trace`.
    """

    apply: Apply
    example: Any
    params: Any
    leaf_names: tuple[str, ...]
    traced: Traced
    shortcuts: Shortcuts = "float"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order in which they run."""
        return self.traced.sites

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weights that sites multiply by, by name."""
        return self.traced.weights

    @property
    def coverage(self) -> Coverage:
        """What became of every dot and convolution."""
        return self.traced.coverage

    @cached_property
    def site(self) -> Mapping[str, Site]:
        """The sites by name."""
        return {site.name: site for site in self.sites}

    def dimension_numbers(self, site: str) -> Any:
        """The dimension numbers of a site's operation, as in its `lax` primitive."""
        names = [s.name for s in self.sites]
        return self.traced.eqns[names.index(site)].params["dimension_numbers"]

    @cached_property
    def shortcut_sites(self) -> tuple[str, ...]:
        """The sites whose input something else reads after them, such as a shortcut."""
        shared: dict[int, frozenset[int]] = {}
        programs = [self.traced.program]
        while programs:
            program = programs.pop()
            shared.update(program.reads.shared)
            programs += [p for s in program.steps if isinstance(s, Call) for p in s.programs]
        none = frozenset[int]()
        return tuple(
            site.name
            for i, site in enumerate(self.sites)
            if shared.get(i, none) & set(site.activations)
        )

    @cached_property
    def _program_at(self) -> Callable[..., Traced]:
        """The program at some shapes of the inputs; the last few are kept."""

        @functools.lru_cache(maxsize=KEPT_PROGRAMS)
        def read(structure: Any, leaves: tuple[Any, ...], context: Any) -> Traced:
            return trace_at(self.apply, self.params, jax.tree.unflatten(structure, leaves))

        return read

    @cached_property
    def folds(self) -> Mapping[str, str]:
        """What can stand for leaves that nothing else reads: signatures in `traced.folds`, by name.

        Only what is the same for one example and for two, so that it is for any number.
        """
        found = self.traced.folds
        if found:
            two = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), self.example
            )
            other = _traced_for(self, two).folds
            found = {k: f for k, f in found.items() if k in other and other[k].leaves == f.leaves}
        return {
            naming.joined(self.leaf_names[i] for i in fold.leaves): key
            for key, fold in found.items()
        }

    def folded_leaves(self, name: str) -> frozenset[int]:
        """The leaves that one of `folds` stands for."""
        return self.traced.folds[self.folds[name]].leaves

    @cached_property
    def layers(self) -> Mapping[str, tuple[Site, ...]]:
        """The decisions to take: sites that share a weight belong to one layer."""
        layers: dict[str, tuple[Site, ...]] = {}
        for site in self.sites:
            layers[site.layer] = (*layers.get(site.layer, ()), site)
        return layers

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model's structure: sites, weights and the shapes of the parameters."""
        text = repr(
            (
                [
                    (s.name, s.kind, s.layer, [(o.role, o.dtype) for o in s.operands], s.weight)
                    for s in self.sites
                ],
                sorted((w.name, w.shape, w.dtype, w.channel_axes) for w in self.weights.values()),
                [
                    (name, tuple(leaf.shape), str(leaf.dtype))
                    for name, leaf in zip(
                        self.leaf_names, jax.tree.leaves(self.params), strict=True
                    )
                ],
            )
        )
        if self.shortcuts != "float":
            text += f", shortcuts {self.shortcuts}"
        return hashlib.sha256(text.encode()).hexdigest()

    def weight_values(self, params: Any) -> dict[str, Any]:
        """The float weights, by name, with a leading axis for every stacked loop."""
        leaves = jax.tree.leaves(params)
        return {n: jnp.asarray(evaluate(e, leaves)) for n, e in self.traced.expressions.items()}


def trace(apply: Apply, params: Any, inputs: Any, *, shortcuts: Shortcuts = "float") -> Graph:
    """Finds every dot, convolution and embedding lookup of a model.

    Args:
      apply: `apply(params, inputs) -> outputs`; pure, in evaluation mode, treating the examples
        of a batch independently. See `from_linen` and `from_nnx`.
      params: pytree of arrays (or `jax.ShapeDtypeStruct`); everything that is trained or loaded,
        other collections such as batch statistics included.
      inputs: pytree of arrays (or `jax.ShapeDtypeStruct`) with a leading batch axis. Concrete
        inputs with two or more examples are also used to check that examples do not mix.
      shortcuts: what is read by operations that share an input with a site and come after it,
        such as the addition at the end of a residual block: "float", the value itself, or "codes",
        what the first site to read it makes of it. With "codes" a quantized activation is kept in
        int8 alone, which is faster, and its noise goes both ways. A later `jit`, `remat`, `scan` or
        `cond` is such a reader, with all that is in it. Scores, plans and models are of one or the
        other.

    Returns:
      The graph, traced for a single example.

    Raises:
      TraceError: params do not fit apply, apply has no per-example output, draws random numbers
        or mixes examples; params or inputs hold NaN or inf.
      ValueError: unknown `shortcuts`.

    >>> import jax.numpy as jnp
    >>> graph = trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    >>> [site.name for site in graph.sites]
    ['w']
    """
    if shortcuts not in SHORTCUTS:
        raise ValueError(f"shortcuts is {shortcuts!r}; expected one of {', '.join(SHORTCUTS)}")
    check_finite(params, "params", naming.leaf_names(params))
    check_finite(inputs, "inputs", naming.leaf_names(inputs))
    example = one_example(inputs)
    check_apply(apply, params, example)
    structs = jax.tree.map(compat.abstract, params)
    graph = Graph(
        apply=apply,
        example=example,
        params=structs,
        leaf_names=naming.leaf_names(params),
        traced=trace_at(apply, structs, example),
        shortcuts=shortcuts,
    )
    return graph


def one_example(inputs: Any) -> Any:
    """Shapes and dtypes of a batch of one.

    Raises:
      TraceError: an input is a scalar, has no examples, or the batch sizes differ.
    """
    leaves = jax.tree.leaves(inputs)
    names = naming.leaf_names(inputs)
    if not leaves:
        raise TraceError("inputs hold no arrays")
    sizes = {}
    for name, leaf in zip(names, leaves, strict=True):
        shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
        if len(shape) == 0:
            raise TraceError(f"input {name} is a scalar; a leading batch axis was expected")
        sizes[name] = shape[0]
    if len(set(sizes.values())) > 1:
        raise TraceError(f"inputs disagree about the batch size: {sizes}")
    if next(iter(sizes.values())) == 0:
        raise TraceError("inputs hold no examples (the batch axis has length 0)")
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (1, *compat.abstract(x).shape[1:]), compat.abstract(x).dtype
        ),
        inputs,
    )


def trace_at(apply: Apply, params: Any, inputs: Any) -> Traced:
    """Reads the program of `apply` at the shapes of these inputs."""
    # A function of its own, since jax remembers what a function did: `apply` may read an object
    # that has changed, such as a module now in evaluation mode.
    read = jax.make_jaxpr(lambda p, x: apply(p, x), return_shape=True)
    closed, outputs = read(params, inputs)
    leaves = [compat.abstract(leaf) for leaf in jax.tree.leaves(params)]
    return build(closed, naming.leaf_names(params), leaves, jax.tree.structure(outputs))


def interpret(
    graph: Graph,
    handler: Handler,
    leaves: list[Any],
    inputs: Any,
    *,
    weights: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    steps: Mapping[str, Any] | None = None,
    absent: Callable[[jax.ShapeDtypeStruct], Any] | None = None,
    operations: Mapping[str, Operation] | None = None,
    folded: Mapping[str, Any] | None = None,
) -> tuple[Any, Records]:
    """Runs the model with a handler at its sites, at any batch size.

    Args:
      graph: the traced model.
      handler: see `jaxrmils.graph.interpreter`.
      leaves: the flattened parameters; None for leaves that the handler makes unnecessary.
      inputs: pytree like the traced inputs, with any batch size.
      weights: per weight name, what the handler finds as `call.weight`.
      state: per site name, what the handler finds as `call.state`.
      steps: per site name, what the handler finds as `call.step`; leaves lead with all loops.
      absent: see `Scope.absent`.
      operations: other ways to run operations that are no sites, by the primitive's name.
      folded: values of `graph.folds`, by name, instead of their leaves.

    Returns:
      The outputs of `apply` and the records by site name.

    Raises:
      TraceError: inputs do not look like the traced ones, or the sites change with the batch size.
    """
    traced = _traced_for(graph, inputs)
    frame = Frame(leaves, leaf_names=graph.leaf_names)
    for name, value in (folded or {}).items():
        fold = traced.folds.get(graph.folds[name])
        if fold is None:
            raise TraceError(
                f"parameters {name} are held as one, but at this input shape the model reads them "
                "otherwise than at the traced one. Trace it again with inputs like these."
            )
        for expression in fold.expressions:
            frame.give(expression, value)
    scope = Scope(
        handler=handler,
        sites=traced.sites,
        frame=frame,
        weights=weights or {},
        state=state or {},
        steps=steps or {},
        absent=absent or (lambda struct: jnp.zeros(struct.shape, struct.dtype)),
        shares=graph.shortcuts == "codes",
        operations=operations or {},
    )
    outs, records = run(traced.program, jax.tree.leaves(inputs), scope)
    return jax.tree.unflatten(traced.structure, outs), records


def _context() -> tuple[Any, ...]:
    """What equations depend on besides the shapes."""
    config = jax.config
    return (
        jax.sharding.get_abstract_mesh(),
        config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    )


def _traced_for(graph: Graph, inputs: Any) -> Traced:
    """The program at the inputs' shapes, checked to have the graph's sites."""
    structs = jax.tree.map(compat.abstract, inputs)
    expected = jax.tree.structure(graph.example)
    if jax.tree.structure(structs) != expected:
        raise TraceError(
            f"inputs have the structure {jax.tree.structure(structs)}; the model was traced "
            f"with {expected}"
        )
    if structs == graph.example:
        return graph.traced
    leaves, structure = jax.tree.flatten(structs)
    traced = graph._program_at(structure, tuple(leaves), _context())
    found, wanted = [s.name for s in traced.sites], [s.name for s in graph.sites]
    if found != wanted:
        difference = sorted(set(found) ^ set(wanted))[:5] or "their order"
        raise TraceError(
            "the model has other sites at this input shape than at the traced one; they differ in "
            f"{difference}. Trace it again with inputs like these."
        )
    return traced

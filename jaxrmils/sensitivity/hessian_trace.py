"""Traces of the Hessian of every weight and every activation operand, by Hutchinson's estimator.

For random signs v, E[v' H v] = tr H. One Hessian-vector product, forward over reverse, serves all
weights together: with v = (v_1, v_2, ...) drawn for all of them, v_i' (H v)_i is v_i' H_ii v_i plus
cross terms whose mean is zero. Activation operands have passes of their own, with signs for every
example.

The Hessian is that of the mean loss. It sees no kinks: between them, a network of ReLUs is
piecewise linear, and only what follows (the loss, other layers) bends.

References:
    Hutchinson, M. F. (1989). A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines. Communications in Statistics 18, 1059-1076.
    Dong, Z. et al. (2020). HAWQ-V2: Hessian aware trace-weighted quantization of neural networks.
    arXiv 1911.03852.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph, Site, SiteCall
from jaxrmils.numerics.calibration import check_params
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity.fisher_diagonal import with_added_weight
from jaxrmils.sensitivity.streaming import check_values, even_batches, over_recurrence
from jaxrmils.sensitivity.tangent import Loss, ScoreError, per_example

Vectors = tuple[Mapping[str, Any], Mapping[str, tuple[Any, ...]]]
"""By weight, float32 in its shape; by site and operand, float32 [batch, loops, operand's shape]."""


@dataclasses.dataclass(frozen=True, eq=False)
class HessianTraces:
    """Estimated traces of the Hessian of the mean loss.

    Attributes:
      weights: per weight, float64 [stacked loops].
      activations: per site, float64 [operands, stacked loops]: the mean of the examples' traces,
        summed over the steps of a recurrence. Empty if they were not asked for.
      weight_errors: standard errors of `weights`, over batches and probes; infinite for one.
      activation_errors: those of `activations`.
    """

    weights: Mapping[str, np.ndarray]
    activations: Mapping[str, np.ndarray]
    weight_errors: Mapping[str, np.ndarray]
    activation_errors: Mapping[str, np.ndarray]


def weight_stack(graph: Graph, name: str) -> tuple[int, ...]:
    """The weight's leading axes that loops slice: a layer each."""
    uses = graph.weights[name].uses
    site = graph.site[uses[0]].weight
    assert site is not None
    return graph.weights[name].shape[: len(site.loops)]


def quadratic_forms(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    vectors: Vectors,
    counts: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """v_i' (H v)_i of every weight and operand i, H being that of the sum of the losses.

    A pure function: jit it. One forward-over-reverse pass.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`, twice differentiable in the outputs.
      vectors: v, for some weights and some sites.
      counts: float32 [batch], the weight of every example in the sum.

    Returns:
      Per weight, float32 [stacked loops]; per site, float32 [operands, stacked loops].

    Raises:
      ScoreError: a loss that is not one value per example.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import trace
    >>> x, params = jnp.array([[1.0, 2.0]]), {"w": jnp.ones((2, 1))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> squares = lambda outputs, targets: jnp.sum(outputs**2, axis=-1)
    >>> v = {"w": jnp.array([[1.0], [0.0]])}, {}
    >>> print(quadratic_forms(graph, params, x, jnp.zeros(1), squares, v, jnp.ones(1))[0]["w"])
    2.0
    """
    leaves = jax.tree.leaves(params)

    def one(weights: Any, steps: Any, inputs: Any, targets: Any) -> Any:
        return per_example(
            graph, _shifted, loss, leaves, inputs, targets, weights=weights, steps=steps
        )

    def total(point: Vectors) -> Any:
        losses = jax.vmap(one, in_axes=(None, 0, 0, 0))(*point, inputs, targets)
        return jnp.sum(losses * counts)

    zeros = jax.tree.map(jnp.zeros_like, vectors)
    _, products = jax.jvp(jax.grad(total), (zeros,), (vectors,))
    weights, operands = jax.tree.map(jnp.multiply, vectors, products)
    return (
        {n: _inner_sum(v, len(weight_stack(graph, n))) for n, v in weights.items()},
        {
            name: jnp.stack([_operand_sum(graph.site[name], v) for v in values])
            for name, values in operands.items()
        },
    )


def _inner_sum(values: Any, kept: int) -> Any:
    """The sum over all axes but the first ones."""
    return values.sum(axis=tuple(range(kept, values.ndim)))


def _operand_sum(site: Site, values: Any) -> Any:
    """[batch, loops, shape] summed over all but stacked loops."""
    return over_recurrence(site, _inner_sum(values.sum(axis=0), len(site.loops)))


def _shifted(call: SiteCall) -> tuple[Any, None]:
    """The operation on operands to which `call.step` and `call.weight` are added."""
    operands = with_added_weight(call, list(call.operands()))
    for index, shift in zip(call.site.activations, call.step or (), strict=False):
        operands[index] = operands[index].astype(jnp.float32) + shift
    return call.bind_wide(*operands), None


def random_signs(graph: Graph, key: Any, batch: int, *, of_weights: bool) -> Vectors:
    """Signs for all weights, or for all activation operands of every example.

    Args:
      graph: from `trace`.
      key: a jax.random key.
      batch: number of examples.
      of_weights: for which of the two.

    Returns:
      float32 arrays of -1 and 1, as `quadratic_forms` takes them.
    """
    shapes: tuple[dict[str, tuple[int, ...]], dict[str, tuple[tuple[int, ...], ...]]] = ({}, {})
    if of_weights:
        shapes[0].update({name: weight.shape for name, weight in graph.weights.items()})
    else:
        for site in graph.sites:
            leading = (batch, *(loop.length for loop in site.loops))
            own = tuple((*leading, *site.operands[i].shape) for i in site.activations)
            shapes[1].update({site.name: own} if own else {})
    leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
    if not leaves:
        return {}, {}
    sizes = [math.prod(shape) for shape in leaves]
    # One draw: every draw of its own would take XLA about a second to compile.
    signs = jax.random.rademacher(key, (sum(sizes),), jnp.float32)
    parts = jnp.split(signs, np.cumsum(sizes)[:-1])
    shaped = [part.reshape(shape) for part, shape in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(each, int) for each in x)


@functools.partial(jax.jit, static_argnames=("graph", "loss", "of_weights"))
def probe_forms(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    key: Any,
    counts: Any,
    of_weights: bool,
) -> dict[str, Any]:
    """`quadratic_forms` of random signs, for all weights or for all operands."""
    signs = random_signs(graph, key, counts.shape[0], of_weights=of_weights)
    forms = quadratic_forms(graph, params, inputs, targets, loss, signs, counts)
    return forms[0] if of_weights else forms[1]


def hessian_traces(
    graph: Graph,
    params: Any,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    *,
    probes: int = 4,
    seed: int = 0,
    activations: bool = True,
    progress: Progress = silent,
) -> HessianTraces:
    """Hutchinson's estimates of the trace of every weight's and operand's Hessian.

    Args:
      graph: from `trace`.
      params: the float parameters.
      batches: `(inputs, targets)` batches.
      loss: `loss(outputs, targets) -> [batch]`, twice differentiable in the outputs.
      probes: vectors per batch, each a forward-over-reverse pass; more batches are more vectors.
      seed: of the random signs. The same seed and batches give the same estimates.
      activations: False leaves activation operands out, and half of the passes.
      progress: see `jaxrmils.progress`.

    Returns:
      The traces. They are unbiased and may be negative: nothing is cut off.

    Raises:
      ScoreError: fewer than one probe, no data, targets that do not fit, a trace that is not
        finite.
      TraceError: params or inputs that do not fit.
    """
    if probes < 1:
        raise ScoreError(f"probes is {probes}; one or more were expected")
    check_params(graph, params)
    estimates: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    counted: list[int] = []
    for number, inputs, targets, count in even_batches(
        graph, batches, "Hessian traces", progress=progress
    ):
        size = jax.tree.leaves(inputs)[0].shape[0]
        counts = (np.arange(size) < count).astype(np.float32)
        counted += [count] * probes
        for of_weights in (True, False) if activations else (True,):
            for probe in range(probes):
                key = jax.random.fold_in(jax.random.key(seed), number * probes + probe)
                key = jax.random.fold_in(key, int(of_weights))
                found = probe_forms(graph, params, inputs, targets, loss, key, counts, of_weights)
                sums = jax.device_get(found)
                check_values(sums, number, "Hessian's trace")
                estimates[of_weights].append(
                    jax.tree.map(lambda x, n=count: np.asarray(x, np.float64) / n, sums)
                )
    shares = np.asarray(counted, np.float64) / np.sum(counted)
    weights, weight_errors = _summed_up(estimates[True], shares)
    operands, operand_errors = _summed_up(estimates[False], shares)
    return HessianTraces(weights, operands, weight_errors, operand_errors)


def _summed_up(
    estimates: list[dict[str, Any]], shares: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Means of the estimates by name and their standard errors."""
    means, errors = {}, {}
    for name in estimates[0] if estimates else ():
        values = np.stack([each[name] for each in estimates])
        means[name] = np.tensordot(shares, values, axes=1)
        if len(values) < 2:
            errors[name] = np.full_like(means[name], np.inf)
            continue
        squares = np.tensordot(shares**2, (values - means[name]) ** 2, axes=1)
        errors[name] = np.sqrt(squares * len(values) / (len(values) - 1))
    return means, errors

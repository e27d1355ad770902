"""Curvature: the second-order term of the loss change, for every operand and candidate alone.

With H the Hessian of an example's loss with respect to an operand (or a weight), the noise eps_k
of candidate k changes the loss by <p, eps_k> + 1/2 eps_k' H eps_k + third order. The second term
is what rounding in a direction can ruin: all elements move the same way and their interactions
add up.

Multipliers a, all zero, scale the noise of every operand, z + a eps_k(z), with eps_k frozen at the
float point. The Hessian with respect to a has eps_i' H eps_i on its diagonal, and Hutchinson's
estimator reads it: for random signs s, E[s * (H_a s)] = diag(H_a). One probe is one
forward-over-reverse pass for all operands together.

Terms off the diagonal are the estimator's noise. Hence one pass per candidate: int4 noise at other
sites would drown the curvature of an int8 candidate, whose steps are 17 times smaller. Drawing one
candidate per example and reweighting is unbiased too, but K such passes have the variance
E[v^2] - E[v]^2 / K of an estimate v where one pass for each of the K candidates has
E[v^2] - E[v]^2. Weights have passes of their own for the same reason. Signs are drawn per example,
so that averaging over examples averages the estimator's noise too, and it is part of the standard
error.

The Hessian sees no kinks: between them, a network of ReLUs is piecewise linear, and what happens
where noise carries an element across one is missing here. The secant sees it.

References:
    Hutchinson, M. F. (1989). A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines. Communications in Statistics 18, 1059-1076.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph, SiteCall
from jaxrmils.graph.checks import check_finite
from jaxrmils.graph.naming import leaf_names
from jaxrmils.numerics.calibration import Ranges, check_params
from jaxrmils.numerics.placement import Placed, in_reading_order, spread, to_host, with_params
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity.candidates import ACTIVATION_CANDIDATES, WEIGHT_CANDIDATES, Candidate
from jaxrmils.sensitivity.contraction import grid_of
from jaxrmils.sensitivity.contraction import noise as activation_noise
from jaxrmils.sensitivity.scores import check_targets
from jaxrmils.sensitivity.tangent import (
    Loss,
    ScoreError,
    check_ranges,
    float32_operation,
    per_example,
    weight_noise,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["activations", "weights"],
    meta_fields=["activation_candidates", "weight_candidates"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class SecondOrder:
    """Estimates of 1/2 eps' H eps for every example of a batch, in the loss's unit.

    Attributes:
      activations: per site, float32 [batch, operands, candidates].
      weights: per weight, float32 [batch, weight candidates]; all its uses together.
      activation_candidates: the formats along the last axis of `activations` (static).
      weight_candidates: those of `weights` (static).
    """

    activations: Mapping[str, Any]
    weights: Mapping[str, Any]
    activation_candidates: tuple[Candidate, ...]
    weight_candidates: tuple[Candidate, ...]


def second_order(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    key: Any,
    *,
    start: Any = 0,
    probes: int = 1,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
) -> SecondOrder:
    """Unbiased estimates of 1/2 eps' H eps of every operand and weight, example by example.

    A pure function: jit it. An operand inside a loop is one operand: its noise in all iterations
    is scaled together; so is the noise of a weight at all sites that read it. A model with a
    single operand has nothing off the diagonal, and its estimate is exact.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`, twice differentiable in the outputs.
      ranges: from `calibrate`.
      key: a jax.random key for the signs.
      start: the number of the first example; example n has the signs of `fold_in(key, start + n)`.
      probes: estimates per example and candidate, of which the mean is returned.
      activation_candidates: formats for activations; empty to leave them out.
      weight_candidates: formats for weights; empty to leave them out.
      noise: `weight_noise(graph, params, weight_candidates)` if it is already known.

    Returns:
      The estimates. They cost `probes` forward-over-reverse passes for every candidate, in a loop
      inside the compiled function. XLA runs convolutions inside loops slowly on CPU; `curvature`
      loops outside of it.

    Raises:
      ScoreError: fewer than one probe, the ranges are another model's, or a loss that is not one
        value per example.

    References:
      Hutchinson (1989), see the module.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> found = second_order(
    ...     graph, params, x, jnp.zeros((4, 2)), lambda o, t: jnp.sum((o - t) ** 2, axis=-1),
    ...     calibrate(graph, params, [x]), jax.random.key(1),
    ... )
    >>> found.activations["w"].shape, found.weights["w"].shape
    ((4, 1, 6), (4, 2))
    """
    _check_probes(probes)
    check_ranges(graph, ranges)
    activation_candidates = tuple(activation_candidates)
    weight_candidates = tuple(weight_candidates)
    if noise is None:
        noise = weight_noise(graph, params, weight_candidates)

    count = jax.tree.leaves(inputs)[0].shape[0]
    data = (params, noise, inputs, targets, key, start + jnp.arange(count))

    def mean(candidates: tuple[Candidate, ...], of_weights: bool) -> dict[str, Any]:
        probe = functools.partial(_probe, graph, loss, ranges, candidates, of_weights, *data)
        count = len(candidates)
        if not count:
            return {}
        values = jax.lax.map(probe, jnp.arange(probes * count))
        return jax.tree.map(
            lambda v: jnp.moveaxis(v.reshape(probes, count, *v.shape[1:]).mean(0), 0, -1), values
        )

    return SecondOrder(
        mean(activation_candidates, False),
        mean(weight_candidates, True),
        activation_candidates,
        weight_candidates,
    )


def _check_probes(probes: int) -> None:
    """Raises ScoreError for fewer than one probe."""
    if probes < 1:
        raise ScoreError(f"probes is {probes}; one or more were expected")


def _probe(
    graph: Graph,
    loss: Loss,
    ranges: Ranges,
    candidates: tuple[Candidate, ...],
    of_weights: bool,
    params: Any,
    noise: Mapping[str, tuple[Any, ...]],
    inputs: Any,
    targets: Any,
    key: Any,
    examples: Any,
    number: Any,
) -> dict[str, Any]:
    """One estimate of half the Hessian's diagonal, for candidate `number` modulo their count.

    Args:
      examples: int32 [batch], the examples' numbers, which their signs are drawn by.

    Returns:
      Per site, float32 [batch, operands]; per weight with `of_weights`, float32 [batch].
    """
    candidate = number % len(candidates)
    if of_weights:
        zeros = {name: jnp.zeros((), jnp.float32) for name in graph.weights}
        handler = functools.partial(_noisy_weight, graph, candidate)
    else:
        zeros = {site: jnp.zeros(len(x), jnp.float32) for site, x in ranges.stats.items() if x}
        handler = functools.partial(_noisy_operands, candidates, candidate)
    values = {"weights": noise if of_weights else {}, "state": ranges.grids}
    leaves = jax.tree.leaves(params)

    def one(inputs: Any, targets: Any, example: Any) -> dict[str, Any]:
        def example_loss(multipliers: Any) -> Any:
            with_noise = functools.partial(handler, multipliers)
            return per_example(graph, with_noise, loss, leaves, inputs, targets, **values)

        own_key = jax.random.split(jax.random.fold_in(key, example))[int(of_weights)]
        signs = _signs(jax.random.fold_in(own_key, number), zeros)
        _, product = jax.jvp(jax.grad(example_loss), (zeros,), (signs,))
        return jax.tree.map(lambda sign, value: sign * value / 2, signs, product)

    if not zeros:
        return {}
    return jax.vmap(one)(inputs, targets, examples)


def _signs(key: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Random signs in the shape of the multipliers."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size for leaf in leaves]
    signs = jax.random.rademacher(key, (sum(sizes),), jnp.float32)
    parts = jnp.split(signs, np.cumsum(sizes)[:-1])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def _noisy_operands(
    candidates: tuple[Candidate, ...],
    candidate: Any,
    multipliers: Mapping[str, Any],
    call: SiteCall,
) -> tuple[Any, None]:
    """Every activation is z + a eps, with eps the noise of the candidate of that number."""
    site, operands = call.site, list(call.operands())
    for position, index in enumerate(site.activations if site.name in multipliers else ()):
        x, grids = jax.lax.stop_gradient(operands[index]), call.state[position]
        chosen = [grid_of(call, index, x, grids, c) for c in candidates]
        branches = [
            lambda x, c=c, g=grid: activation_noise(x, g, c)
            for c, grid in zip(candidates, chosen, strict=True)
        ]
        eps = jax.lax.switch(candidate, branches, x)
        operands[index] = _plus(operands[index], multipliers[site.name][position] * eps)
    return call.bind_highest(*operands), None


def _noisy_weight(
    graph: Graph, candidate: Any, multipliers: Mapping[str, Any], call: SiteCall
) -> tuple[Any, None]:
    """Every output is x (*) w + b (x (*) delta)."""
    site, operands = call.site, list(call.operands())
    result = call.bind_highest(*operands)
    if site.weight is None:
        return result, None
    branches = [lambda deltas, k=k: deltas[k] for k in range(len(call.weight))]
    delta = call.view(jax.lax.switch(candidate, branches, tuple(call.weight)))
    other = operands[1 - site.weight.operand]
    if len(graph.weights[site.weight.name].uses) == 1 and not site.loops:
        # x does not depend on this weight: its derivative would only add terms off the diagonal.
        other = jax.lax.stop_gradient(other)
    change = multipliers[site.weight.name] * float32_operation(call)(other, delta)
    return _plus(result, change), None


def _plus(x: Any, change: Any) -> Any:
    """x + change in float32, in the dtype of x."""
    return (x.astype(jnp.float32) + change).astype(x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    """Second-order terms of all operands and weights, per example.

    Attributes:
      fingerprint: the model's.
      activations: float32 [N, A, K], estimates of 1/2 eps' H eps.
      weights: float32 [N, W, Kw], all uses of a weight together.
      activation_rows: the (site, position) of every operand.
      weight_rows: the weights' names.
      activation_candidates: formats along the last axis of `activations`.
      weight_candidates: formats along the last axis of `weights`.
    """

    fingerprint: str
    activations: np.ndarray
    weights: np.ndarray
    activation_rows: tuple[tuple[str, int], ...]
    weight_rows: tuple[str, ...]
    activation_candidates: tuple[Candidate, ...]
    weight_candidates: tuple[Candidate, ...]

    def __len__(self) -> int:
        return len(self.activations)

    def activation(self, site: str, position: int, candidate: Candidate) -> np.ndarray:
        """float32 [N]: the estimates for one operand under one format."""
        row = self.activation_rows.index((site, position))
        return self.activations[:, row, self.activation_candidates.index(candidate)]

    def weight(self, name: str, candidate: Candidate) -> np.ndarray:
        """float32 [N]: the estimates for one weight under one format."""
        row = self.weight_rows.index(name)
        return self.weights[:, row, self.weight_candidates.index(candidate)]


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the examples and their standard errors.

    Args:
      values: [N, ...], for example `Curvature.activations`.

    Returns:
      float64 [...] twice; the error of a single example is infinite.

    >>> mean, error = mean_and_error(np.array([[1.0], [3.0]]))
    >>> print(mean, error)
    [2.] [1.]
    """
    n = len(values)
    mean = values.mean(axis=0, dtype=np.float64)
    if n < 2:
        return mean, np.full_like(mean, np.inf)
    return mean, values.std(axis=0, ddof=1, dtype=np.float64) / np.sqrt(n)


def curvature(
    graph: Graph,
    params: Any,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    ranges: Ranges,
    *,
    seed: int = 0,
    probes: int = 1,
    activation_candidates: Sequence[Candidate] = ACTIVATION_CANDIDATES,
    weight_candidates: Sequence[Candidate] = WEIGHT_CANDIDATES,
    sharding: NamedSharding | None = None,
    progress: Progress = silent,
) -> Curvature:
    """Second-order terms over a selection set; see `second_order`.

    Args:
      graph: from `trace`.
      params: concrete parameters.
      batches: `(inputs, targets)` batches of the selection data.
      loss: `loss(outputs, targets) -> [batch]`, twice differentiable.
      ranges: from `calibrate`, on other data.
      seed: of the random signs; the result does not depend on how examples are batched.
      probes: estimates per example and candidate.
      activation_candidates: formats for activations.
      weight_candidates: formats for weights.
      sharding: how the examples' axis is split over a mesh, as in `score`. On several hosts the
        signs are others than on one, and as good.
      progress: see `jaxrmils.progress`.

    Returns:
      The estimates per example; `mean_and_error` sums them up.

    Raises:
      ScoreError: no data, targets that do not fit, estimates that are not finite.
      TraceError: params are not the traced model's, NaN in inputs.
      PlacementError: a sharding by which batches can't be spread.
    """
    _check_probes(probes)
    params = with_params(params, sharding)
    check_params(graph, params)
    check_ranges(graph, ranges)
    activation_candidates = tuple(activation_candidates)
    weight_candidates = tuple(weight_candidates)
    noise = jax.jit(lambda p: weight_noise(graph, p, weight_candidates))(params)
    ranges = to_host(ranges)

    # One compiled pass for operands and one for weights, called for every candidate and probe.
    def compiled(candidates: tuple[Candidate, ...], of_weights: bool) -> Any:
        def step(params: Any, noise: Any, x: Any, y: Any, examples: Any, number: Any) -> Any:
            data = (params, noise, x, y, jax.random.key(seed), examples, number)
            return _probe(graph, loss, ranges, candidates, of_weights, *data)

        return len(candidates), jax.jit(step)

    steps = [compiled(activation_candidates, False), compiled(weight_candidates, True)]

    def estimate(placed: Placed, examples: np.ndarray, count: int, step: Any) -> dict[str, Any]:
        data = (params, noise, *placed.values, examples)
        found = [placed.taken(step(*data, np.int32(n))) for n in range(probes * count)]
        means = [
            jax.tree.map(lambda *v: np.mean(v, axis=0), *found[k::count]) for k in range(count)
        ]
        return jax.tree.map(lambda *v: np.stack(v, axis=-1), *means) if means else {}

    parts: list[SecondOrder] = []
    readers: list[np.ndarray] = []
    start = 0
    for number, placed in enumerate(spread(_read(graph, batches, progress), sharding)):
        count = placed.rows.size
        examples = np.zeros(jax.tree.leaves(placed.values)[0].shape[0], np.int32)
        examples[placed.rows] = np.arange(start, start + count)
        operands, weights = (estimate(placed, examples, *each) for each in steps)
        parts.append(SecondOrder(operands, weights, activation_candidates, weight_candidates))
        readers.append(placed.readers)
        _check_estimates(parts[-1], number)
        start += count
    if not parts:
        raise ScoreError("the selection data holds no examples")
    merged = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    merged = in_reading_order(np.concatenate(readers), merged)
    return _by_row(graph, ranges, merged, start)


def _read(graph: Graph, batches: Iterable[Any], progress: Progress) -> Iterator[tuple[Any, Any]]:
    """The batches; TraceError for values that are not finite, ScoreError for targets."""
    total = len(batches) if isinstance(batches, Sequence) else None
    for number, (inputs, targets) in enumerate(progress(batches, "second order", total)):
        check_finite(inputs, f"selection batch {number}", leaf_names(inputs))
        check_targets(graph, inputs, targets, number)
        yield inputs, targets


def _by_row(graph: Graph, ranges: Ranges, found: SecondOrder, count: int) -> Curvature:
    """The estimates of all examples as matrices."""
    rows = tuple((site, i) for site, stats in ranges.stats.items() for i in range(len(stats)))
    names = tuple(graph.weights)
    operands = [found.activations[site][:, i] for site, i in rows if found.activations]
    weights = [found.weights[name] for name in names if found.weights]
    return Curvature(
        fingerprint=graph.fingerprint,
        activations=_stack(operands, (count, len(rows), len(found.activation_candidates))),
        weights=_stack(weights, (count, len(names), len(found.weight_candidates))),
        activation_rows=rows,
        weight_rows=names,
        activation_candidates=found.activation_candidates,
        weight_candidates=found.weight_candidates,
    )


def _stack(columns: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """[N, rows, candidates] from [N, candidates] of every row."""
    return np.stack(columns, axis=1) if columns else np.zeros(shape, np.float32)


def _check_estimates(found: SecondOrder, number: int) -> None:
    for name, values in (*found.activations.items(), *found.weights.items()):
        if not np.isfinite(values).all():
            raise ScoreError(
                f"batch {number}: the second-order term of {name} is NaN or infinite; a loss or an "
                "activation function without a finite second derivative is a common cause"
            )

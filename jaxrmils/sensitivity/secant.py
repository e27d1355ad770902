"""Secant attribution: the exact total differential between the float and a quantized network.

Let z_i(t) be site i's input in a network where every quantized site adds t eps_i, with eps_i frozen
at Q(z_i) - z_i as it is in the fully quantized forward pass, and its weight is w_i + t delta_i. At
t = 0 this is the float network; at t = 1 it reproduces the quantized one, layer by layer. So

    l_q - l = sum_i  integral_0^1 <p_i(t), eps_i> + <g_i(t), (z_i(t) + t eps_i) (*) delta_i> dt

is an exact, additive attribution of the joint loss change, example by example. Gauss-Legendre
quadrature with T points costs one quantized forward and T forward and backward passes for all sites
together. It is exact where the path is differentiable and derivatives are the true ones; the rest
(quadrature, kinks, branches that depend on data) is returned as the residual.

The derivatives come from multipliers that are all zero: a site's input is z + (t + a) eps and its
output y(t) + b (x (*) delta), so that the gradient with respect to a and b is the integrand and no
weight gradient is ever formed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import Graph, SiteCall, interpret
from jaxrmils.numerics import switched_quant
from jaxrmils.numerics.calibration import Ranges
from jaxrmils.sensitivity.candidates import Candidate, CandidateSet
from jaxrmils.sensitivity.contraction import grid_of
from jaxrmils.sensitivity.contraction import noise as activation_noise
from jaxrmils.sensitivity.divergence import divergence
from jaxrmils.sensitivity.perturb import run_float, switched_noise
from jaxrmils.sensitivity.tangent import Loss, ScoreError, float32_operation, weight_noise


@dataclasses.dataclass(frozen=True)
class Formats:
    """What a network quantizes: every operand is on its own.

    A format is a candidate, known when the function is compiled, or a switch: an int32 scalar
    that may be traced, 0 for float and k + 1 for candidate k of the set. Switches let one compiled
    function serve every plan.

    Attributes:
      activations: per site, a candidate, None (float) or a switch for every activation operand.
      weights: per weight name, a candidate or a switch; missing means float.
      candidates: what switches mean; without more, `ACTIVATION_CANDIDATES` and
        `WEIGHT_CANDIDATES`.
    """

    activations: Mapping[str, Sequence[Any]]
    weights: Mapping[str, Any]
    candidates: CandidateSet = dataclasses.field(default_factory=CandidateSet)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["activations", "weights", "float_loss", "quantized_loss"],
    meta_fields=["points"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """The joint loss change of a quantized network, shared out among its sites.

    Attributes:
      activations: per site, float32 [batch, operands], in the loss's unit.
      weights: per site that reads a quantized weight, float32 [batch].
      float_loss: float32 [batch].
      quantized_loss: float32 [batch], of the simulated quantized network.
      points: number of quadrature points.
    """

    activations: Mapping[str, Any]
    weights: Mapping[str, Any]
    float_loss: Any
    quantized_loss: Any
    points: int

    def total(self) -> Any:
        """float32 [batch]: the sum over all sites."""
        parts = [jnp.sum(a, axis=1) for a in self.activations.values()]
        parts += list(self.weights.values())
        zero = jnp.zeros_like(self.float_loss)
        return functools.reduce(jnp.add, parts, zero)

    def residual(self) -> Any:
        """float32 [batch]: the measured joint change minus the sum over the sites."""
        return self.quantized_loss - self.float_loss - self.total()


def secant(
    graph: Graph,
    params: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    ranges: Ranges,
    formats: Formats,
    *,
    points: int = 2,
    noise: Mapping[str, tuple[Any, ...]] | None = None,
    float_loss: Any = None,
    slope: Any = None,
    scale: Any = 1.0,
    float_outputs: Any = None,
) -> Attribution:
    """Attributes the joint loss change of a quantized network to its sites, per example.

    A pure function: jit it.

    Args:
      graph: from `trace`.
      params: the float parameters.
      inputs: pytree with a leading batch axis.
      targets: pytree with the same leading axis.
      loss: `loss(outputs, targets) -> [batch]`.
      ranges: from `calibrate`.
      formats: what is quantized, and how.
      points: T, the number of Gauss-Legendre points.
      noise: `weight_noise(graph, params, formats.candidates.weights)` if it is already known; only
        switches read it.
      float_loss: float32 [batch], the float model's losses if they are already known; otherwise
        they cost a forward pass of their own.
      slope: a float scalar, may be traced, to attribute the divergence of the loss with so much of
        its slope at the float outputs (see `jaxrmils.sensitivity.divergence`): with 0, no label's
        luck is in it. `float_loss` is 0 then, and `quantized_loss` the divergence. None attributes
        the loss itself.
      scale: float scalar, may be traced; multiplies all noise. With a small one the network stays
        near the float one, also where the formats would destroy it, and shares of a divergence,
        over its square, are near their second order.
      float_outputs: the outputs of `float_network` if they are already known, a pytree with a
        leading batch axis; otherwise a slope costs a forward pass more.

    Returns:
      The attribution.

    Raises:
      ScoreError: fewer than one point, a site without ranges, or a loss that is not per example.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (4, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> int4 = Candidate(4)
    >>> found = secant(
    ...     graph, params, x, jnp.zeros((4, 2)), lambda o, t: jnp.sum((o - t) ** 2, axis=-1),
    ...     calibrate(graph, params, [x]), Formats({"w": (int4,)}, {"w": int4}),
    ... )
    >>> bool(jnp.abs(found.residual()).max() < 1e-5)
    True
    """
    if points < 1:
        raise ScoreError(f"points is {points}; one or more were expected")
    for site in formats.activations:
        if site not in ranges.grids:
            raise ScoreError(f"site {site} has no range: no calibration example reached it")
    leaves = jax.tree.leaves(params)
    deltas = _deltas(graph, params, formats, noise)
    scale = jnp.float32(scale)
    deltas = jax.tree.map(lambda delta: scale * delta, deltas)
    nodes, node_weights = (v.astype(np.float32) for v in np.polynomial.legendre.leggauss(points))
    times, shares = (nodes + 1) / 2, node_weights / 2

    def one(inputs: Any, targets: Any, known: Any, origin: Any) -> Attribution:
        batch, labels, origin = jax.tree.map(
            lambda x: jnp.asarray(x)[None], (inputs, targets, origin)
        )
        run = functools.partial(interpret, graph, leaves=leaves, inputs=batch, weights=deltas)

        if origin is None and (slope is not None or known is None):
            origin = run(handler=run_float)[0]
        measure = loss if slope is None else divergence(loss, origin, slope)

        def example_loss(outputs: Any) -> Any:
            value = measure(outputs, labels)
            if jnp.shape(value) != (1,):
                raise ScoreError(
                    f"loss returned shape {jnp.shape(value)} for one example; not (1,)"
                )
            return value[0].astype(jnp.float32)

        outputs, frozen = run(
            handler=functools.partial(_quantize, formats, scale), state=ranges.grids
        )
        quantized = example_loss(outputs)
        frozen = jax.lax.stop_gradient(frozen)

        def path(multipliers: Any, t: Any) -> Any:
            handler = functools.partial(_path, formats, multipliers, t)
            return example_loss(run(handler=handler, steps=frozen)[0])

        zeros = _multipliers(graph, formats)
        gradients = [jax.grad(path)(zeros, jnp.float32(t)) for t in times]
        total = jax.tree.map(
            lambda *values: sum(share * value for share, value in zip(shares, values, strict=True)),
            *gradients,
        )
        return Attribution(
            activations=total["activations"],
            weights=total["weights"],
            float_loss=example_loss(origin) if known is None else known,
            quantized_loss=quantized,
            points=points,
        )

    if float_loss is not None:
        float_loss = jnp.asarray(float_loss, jnp.float32)
    return jax.vmap(one)(inputs, targets, float_loss, float_outputs)


def path_outputs(
    graph: Graph, params: Any, inputs: Any, ranges: Ranges, formats: Formats, t: Any
) -> Any:
    """The outputs of the network at t on the path: float at 0, quantized at 1.

    Args:
      graph, params, inputs, ranges, formats: as for `secant`; inputs at any batch size.
      t: float32 scalar.
    """
    leaves, deltas = jax.tree.leaves(params), _deltas(graph, params, formats, None)
    run = functools.partial(interpret, graph, leaves=leaves, inputs=inputs, weights=deltas)
    quantize = functools.partial(_quantize, formats, jnp.float32(1.0))
    _, frozen = run(handler=quantize, state=ranges.grids)
    handler = functools.partial(_path, formats, _multipliers(graph, formats), jnp.float32(t))
    return run(handler=handler, steps=frozen)[0]


def _deltas(
    graph: Graph, params: Any, formats: Formats, known: Mapping[str, tuple[Any, ...]] | None
) -> dict[str, Any]:
    """Per quantized weight, its noise in the weight's own layout."""
    found: dict[str, Any] = {}
    fixed = {name: c for name, c in formats.weights.items() if isinstance(c, Candidate)}
    for candidate in set(fixed.values()):
        for name, (delta,) in weight_noise(graph, params, (candidate,)).items():
            if fixed.get(name) == candidate:
                found[name] = delta
    switched = {name: c for name, c in formats.weights.items() if name not in fixed}
    if switched:
        known = known or weight_noise(graph, params, formats.candidates.weights)
        for name, switch in switched.items():
            found[name] = switched_noise(known[name], switch)
    return found


def _multipliers(graph: Graph, formats: Formats) -> dict[str, dict[str, Any]]:
    weights = {s.name for s in graph.sites if s.weight and s.weight.name in formats.weights}
    return {
        "activations": {
            site: jnp.zeros(len(candidates), jnp.float32)
            for site, candidates in formats.activations.items()
        },
        "weights": {site: jnp.zeros((), jnp.float32) for site in sorted(weights)},
    }


def _quantize(formats: Formats, scale: Any, call: SiteCall) -> tuple[Any, Any]:
    """The simulated quantized network, its noise scaled; records the activations' noise."""
    site, operands = call.site, list(call.operands())
    record = []
    candidates = formats.activations.get(site.name, ())
    for position, candidate in enumerate(candidates):
        index = site.activations[position]
        eps = _eps(call, index, operands[index], call.state[position], candidate, formats)
        eps = scale * eps
        record.append(eps)
        if candidate is None:
            continue
        operands[index] = _plus(operands[index], eps)
    if site.weight is not None and site.weight.name in formats.weights:
        index = site.weight.operand
        operands[index] = _plus(operands[index], call.view(call.weight))
    return call.bind_wide(*operands), record or None


def _eps(
    call: SiteCall,
    index: int,
    x: Any,
    grids: Mapping[int, Any],
    candidate: Any,
    formats: Formats,
) -> Any:
    """Quantization noise of an operand, float32; `candidate` as in `Formats`."""
    if candidate is None:
        return jnp.zeros(x.shape, jnp.float32)
    if isinstance(candidate, Candidate):
        return activation_noise(x, grid_of(call, index, x, grids, candidate), candidate)
    known = formats.candidates.activations
    chosen = switched_quant(
        x.astype(jnp.float32),
        [grid_of(call, index, x, grids, c) for c in known],
        [c.rounding for c in known],
        candidate,
    )
    return chosen - x.astype(jnp.float32)


def _path(
    formats: Formats, multipliers: Mapping[str, Mapping[str, Any]], t: Any, call: SiteCall
) -> tuple[Any, Any]:
    """The network at t, with multipliers whose gradient is the integrand."""
    site, operands = call.site, list(call.operands())
    for position in range(len(formats.activations.get(site.name, ()))):
        index = site.activations[position]
        scale = t + multipliers["activations"][site.name][position]
        operands[index] = _plus(operands[index], scale * call.step[position])
    if site.weight is None or site.weight.name not in formats.weights:
        return call.bind_wide(*operands), None
    index, delta = site.weight.operand, call.view(call.weight)
    operands[index] = _plus(operands[index], t * delta)
    result = call.bind_wide(*operands)
    # The integrand's weight term: the derivative with respect to the operand is not wanted here.
    other = jax.lax.stop_gradient(operands[1 - index])
    share = multipliers["weights"][site.name] * float32_operation(call)(other, delta)
    return (result.astype(jnp.float32) + share).astype(result.dtype), None


def _plus(x: Any, change: Any) -> Any:
    """x + change in float32, whatever the dtype of x."""
    return x.astype(jnp.float32) + change

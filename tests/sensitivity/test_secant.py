"""The secant attribution is exact and additive, and its path ends at the quantized network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, loss
from stages import TARGETS, calibrated, traced

from jaxrmils.sensitivity import (
    Candidate,
    Formats,
    ScoreError,
    all_off,
    path_outputs,
    perturbed_losses,
    secant,
)

MIXED = {8: Candidate(8, "floor"), 4: Candidate(4)}


def formats_for(name, kind):
    """All in int4; or activations and weights in turns float, int8 rounded down and int4."""
    graph, _, _ = traced(name)
    sites = {s: len(stats) for s, stats in calibrated(name).stats.items() if stats}
    if kind == "int4":
        return Formats(
            {site: (Candidate(4),) * count for site, count in sites.items()},
            dict.fromkeys(graph.weights, Candidate(4)),
        )
    turns = (Candidate(8, "floor"), Candidate(4), None)
    activations = {
        site: tuple(turns[(i + j) % 3] for j in range(count))
        for i, (site, count) in enumerate(sites.items())
    }
    nearest = (Candidate(8), Candidate(4), None)
    weights = {w: nearest[i % 3] for i, w in enumerate(graph.weights) if nearest[i % 3]}
    return Formats(activations, weights)


@functools.cache
def attributed(name, kind, points=2):
    graph, params, inputs = traced(name)
    ranges, formats = calibrated(name), formats_for(name, kind)
    jitted = jax.jit(
        lambda p, x: secant(graph, p, x, TARGETS, loss, ranges, formats, points=points)
    )
    found = jitted(params, inputs)
    return jax.device_get(found)


def absolute(found):
    parts = [np.abs(a).sum(axis=1) for a in found.activations.values()]
    return sum(parts) + sum(np.abs(w) for w in found.weights.values())


# Two points step over the kinks of ReLU: up to 6 % of the absolute shares in networks this small,
# example by example. In bfloat16 the network's own rounding is the rest.
COARSE = {"cnn": 0.1, "separable_cnn": 0.1, "nnx_mlp": 0.1, "bfloat16_transformer": 0.1}
BY_KIND = [(name, "int4") for name in sorted(MODELS)]
BY_KIND += [(name, "mixed") for name in ("cnn", "scanned_stack", "experts", "nnx_transformer")]


@pytest.mark.parametrize(("name", "kind"), BY_KIND)
def test_the_sum_over_sites_is_the_joint_change(name, kind):
    found = attributed(name, kind)
    tolerance = COARSE.get(name, 0.01)
    assert np.abs(found.residual()).sum() <= tolerance * absolute(found).sum()


@pytest.mark.parametrize("name", ["scanned_stack", "tied_embedding"])
def test_more_points_leave_less(name):
    one, four = (np.abs(attributed(name, "int4", t).residual()).sum() for t in (1, 4))
    assert four <= 0.5 * one


def test_many_points_resolve_kinks():
    found = attributed("separable_cnn", "int4", 24)
    assert np.abs(found.residual()).sum() <= 0.02 * absolute(found).sum()


@pytest.mark.parametrize("name", ["cnn", "experts", "scanned_stack", "cond_data"])
def test_the_path_leads_from_the_float_to_the_quantized_network(name):
    graph, params, inputs = traced(name)
    ranges, formats = calibrated(name), formats_for(name, "mixed")
    ends = jax.jit(
        lambda p, x: [path_outputs(graph, p, x, ranges, formats, t) for t in (0.0, 1.0)]
    )(params, inputs)
    start, end = (np.asarray(loss(outputs, TARGETS)) for outputs in ends)
    np.testing.assert_allclose(start, loss(graph.apply(params, inputs), TARGETS), rtol=1e-5)
    activations, weights = all_off(graph, ranges)
    for site, candidates in formats.activations.items():
        order = [(8, "floor"), (4, "nearest")]
        switches = [0 if c is None else 1 + order.index((c.bits, c.rounding)) for c in candidates]
        activations[site] = jnp.asarray(switches, jnp.int32)
    for weight, candidate in formats.weights.items():
        weights[weight] = jnp.int32(1 + (8, 4).index(candidate.bits))
    expected = perturbed_losses(
        graph,
        params,
        inputs,
        TARGETS,
        loss,
        ranges,
        activations,
        weights,
        activation_candidates=tuple(MIXED.values()),
        weight_candidates=(Candidate(8), Candidate(4)),
    )
    np.testing.assert_allclose(end, expected, rtol=1e-4, atol=1e-6)
    quantized = attributed(name, "mixed").quantized_loss
    np.testing.assert_allclose(quantized, expected, rtol=1e-4, atol=1e-6)


def test_a_site_in_a_linear_network_has_its_own_share():
    """l = w2 w1 x: shares by hand, with the midpoint exact for a bilinear function."""
    from jaxrmils import calibrate, trace

    params = {"a": jnp.array([[0.3, -1.0]]), "b": jnp.array([[0.7], [0.2]])}
    x = jnp.array([[0.9], [-0.4], [0.1]])
    graph = trace(lambda p, x: (x @ p["a"]) @ p["b"], params, x)
    ranges = calibrate(graph, params, [x], estimator="minmax")
    formats = Formats({"b": (Candidate(4),)}, {})
    found = secant(graph, params, x, x, lambda o, t: o[:, 0], ranges, formats, points=1)
    hidden = np.asarray(x @ params["a"], np.float32)
    grid = ranges.grids["b"][0][4]
    steps = np.round(hidden / np.float32(grid.scale))
    noise = np.float32(grid.scale) * steps - hidden
    np.testing.assert_allclose(
        found.activations["b"][:, 0], (noise @ np.asarray(params["b"]))[:, 0], atol=1e-6
    )
    assert not found.weights


def test_bad_arguments_are_refused():
    graph, params, inputs = traced("plain")
    arguments = (graph, params, inputs, TARGETS, loss, calibrated("plain"))
    with pytest.raises(ScoreError, match="points is 0"):
        secant(*arguments, formats_for("plain", "int4"), points=0)
    with pytest.raises(ScoreError, match="site nowhere has no range"):
        secant(*arguments, Formats({"nowhere": (Candidate(8),)}, {}))

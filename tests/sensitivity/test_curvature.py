"""Second-order terms against dense Hessians, measured changes and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import BATCH, loss, random
from stages import TARGETS, calibrated, traced

from jaxrmils import calibrate, score, trace
from jaxrmils.graph import interpret
from jaxrmils.numerics import fake_quant
from jaxrmils.sensitivity import (
    Candidate,
    ScoreError,
    all_off,
    contributions,
    perturbed_losses,
    weight_noise,
)
from jaxrmils.sensitivity.curvature import curvature, mean_and_error, second_order
from jaxrmils.sensitivity.directions import directions, fisher

FLOOR, NEAREST = Candidate(4, "floor"), Candidate(4)
ONE_OF_EACH = {"activation_candidates": (FLOOR,), "weight_candidates": (NEAREST,)}


def squares(outputs, targets):
    return jnp.sum((outputs - targets) ** 2, axis=-1)


def linear(outputs, targets):
    return outputs[:, 0]


def small(apply, params, inputs):
    graph = trace(apply, params, inputs)
    return graph, params, inputs, calibrate(graph, params, [inputs], estimator="minmax")


def estimated(graph, params, inputs, targets, loss, ranges, seed=0, **options):
    """`second_order`, compiled."""

    @jax.jit
    def step(params, inputs, targets):
        key = jax.random.key(seed)
        return second_order(graph, params, inputs, targets, loss, ranges, key, **options)

    return step(params, inputs, targets)


def test_first_and_second_order_are_the_change_of_a_quadratic_function():
    graph, params, x, ranges = small(lambda p, x: x @ p["w"], {"w": random(3, 2)}, random(4, 3))
    targets = random(4, 2, seed=2)
    data = (graph, params, x, targets, squares, ranges)
    first, second = contributions(*data), estimated(*data)
    activations, weights = all_off(graph, ranges)
    base = squares(x @ params["w"], targets)
    for k in range(6):
        measured = perturbed_losses(*data, {"w": jnp.array([k + 1])}, weights) - base
        predicted = first.activations["w"][:, 0, k] + second.activations["w"][:, 0, k]
        np.testing.assert_allclose(predicted, measured, atol=2e-5)
        assert second.activations["w"][:, 0, k].min() > 0
    for k in range(2):
        measured = perturbed_losses(*data, activations, {"w": jnp.int32(k + 1)}) - base
        np.testing.assert_allclose(
            first.weights["w"][:, k] + second.weights["w"][:, k], measured, atol=2e-5
        )


def test_every_probe_is_a_row_of_the_dense_hessian():
    """With two operands an estimate is H_11 + H_12 or H_11 - H_12, as the signs fall."""
    params = {"a": random(3, 5, seed=3), "b": random(5, 2, seed=4)}
    graph, params, data, ranges = small(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, random(32, 3)
    )
    x, target = data[:1], random(1, 2, seed=5)

    def written_out(noise):
        hidden = jnp.tanh((x[0] + noise["a"]) @ params["a"]) + noise["b"]
        return squares((hidden @ params["b"])[None], target)[0]

    operands = {"a": x[0], "b": jnp.tanh(x @ params["a"])[0]}
    eps = {s: fake_quant(v, ranges.grids[s][0][4], "floor") - v for s, v in operands.items()}
    zeros = jax.tree.map(jnp.zeros_like, eps)
    dense = jax.hessian(written_out)(zeros)
    h = {i: {j: eps[i] @ dense[i][j] @ eps[j] / 2 for j in eps} for i in eps}

    @jax.jit
    def estimate(key):
        data = (graph, params, x, target, squares, ranges)
        return second_order(*data, key, activation_candidates=(FLOOR,)).activations

    found = jax.vmap(estimate)(jax.random.split(jax.random.key(0), 16))
    for site, other in (("a", "b"), ("b", "a")):
        expected = np.array([h[site][site] + sign * h[site][other] for sign in (1, -1)])
        assert abs(expected[0] - expected[1]) > 1e-3
        nearest = np.abs(found[site][:, 0, 0, :] - expected)
        assert nearest.min(axis=1).max() < 1e-5
        assert set(nearest.argmin(axis=1)) == {0, 1}


def recurrence():
    """A weight that every step of a loop reads."""

    def apply(params, x):
        def step(h, x):
            return jnp.tanh(x + h @ params["w"]), None

        return jax.lax.scan(step, jnp.ones((x.shape[1], 5)), x)[0]

    def batch_first(params, x):
        return apply(params, x.swapaxes(0, 1))

    return small(batch_first, {"w": random(5, 5, seed=2)}, random(BATCH, 6, 5))


def prepared(name):
    if name == "recurrence":
        return recurrence()
    return *traced(name), calibrated(name)


def operand_reference(graph, params, inputs, ranges):
    """Per site, [batch, operands]: the diagonal of the Hessian over all multipliers at once."""
    leaves = jax.tree.leaves(params)

    def float_noise(call):
        record = []
        for position, index in enumerate(call.site.activations):
            x = call.operand(index).astype(jnp.float32)
            record.append(fake_quant(x, call.state[position][4], "floor") - x)
        return call.bind(*call.operands()), record or None

    def one(inputs, target):
        inputs, target = jax.tree.map(lambda x: x[None], (inputs, target))
        _, eps = interpret(graph, float_noise, leaves, inputs, state=ranges.grids)
        zeros = {site: jnp.zeros(len(e)) for site, e in eps.items()}

        def total(multipliers):
            def handler(call):
                operands = list(call.operands())
                for position, index in enumerate(call.site.activations):
                    operands[index] += multipliers[call.site.name][position] * call.step[position]
                return call.bind(*operands), None

            return loss(interpret(graph, handler, leaves, inputs, steps=eps)[0], target)[0]

        dense = jax.jacrev(jax.jacrev(total))(zeros)
        return {site: jnp.diagonal(dense[site][site]) / 2 for site in zeros}

    return jax.jit(jax.vmap(one))(inputs, TARGETS)


def weight_reference(graph, params, inputs):
    """Per weight, [batch]: along the noise in the parameter itself, without any interpreter."""
    leaves, structure = jax.tree.flatten(params)
    noise = {w: delta for w, (delta,) in weight_noise(graph, params, (NEAREST,)).items()}

    def one(inputs, target):
        inputs, target = jax.tree.map(lambda x: x[None], (inputs, target))

        def along(weight, b):
            (leaf,) = graph.weights[weight].leaves
            moved = [x + b * noise[weight] if i == leaf else x for i, x in enumerate(leaves)]
            return loss(graph.apply(jax.tree.unflatten(structure, moved), inputs), target)[0]

        zero = jnp.float32(0)
        return {w: jax.jacrev(jax.jacrev(functools.partial(along, w)))(zero) / 2 for w in noise}

    return jax.jit(jax.vmap(one))(inputs, TARGETS)


# Attention, a stack of layers, a recurrence, a table read by two sites, two operands per site.
@pytest.mark.parametrize(
    "name", ["transformer", "scanned_stack", "recurrence", "tied_embedding", "experts"]
)
def test_estimates_are_unbiased(name):
    graph, params, inputs, ranges = prepared(name)
    data = (graph, params, inputs, TARGETS, loss, ranges)
    estimate = jax.vmap(lambda key: second_order(*data, key, **ONE_OF_EACH))
    found = jax.jit(estimate)(jax.random.split(jax.random.key(0), 200))
    operands = operand_reference(graph, params, inputs, ranges)
    weights = weight_reference(graph, params, inputs)
    expected = {
        **{site: value[..., None] for site, value in operands.items()},
        **{"weight " + w: value[..., None] for w, value in weights.items()},
    }
    estimates = {**found.activations, **{"weight " + w: v for w, v in found.weights.items()}}
    assert set(estimates) == set(expected)
    for which, values in estimates.items():
        mean, error = mean_and_error(np.asarray(values, np.float64))
        tolerance = 5 * error + 1e-4 * np.abs(expected[which]).max() + 1e-8
        assert (np.abs(mean - expected[which]) <= tolerance).all(), which
        # Not a test if the noise hides the value.
        assert error.max() <= np.abs(expected[which]).max(), which


def test_a_linear_network_of_relus_has_no_curvature():
    """The kinks that noise crosses are not seen."""
    params = {"a": random(3, 32, seed=3), "b": random(32, 2, seed=4)}
    apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    graph, params, x, ranges = small(apply, params, random(32, 3))
    data = (graph, params, x, x, linear, ranges)
    found = estimated(*data)
    assert all(not np.any(v) for v in found.activations.values())
    first = contributions(*data)
    switches, weights = all_off(graph, ranges)
    measured = perturbed_losses(*data, {**switches, "a": jnp.array([4])}, weights)
    rest = measured - linear(apply(params, x), x) - first.activations["a"][:, 0, 3]
    assert jnp.abs(rest).max() > 1e-2


def test_the_result_does_not_depend_on_the_batches():
    graph, params, inputs = traced("plain")
    ranges = calibrated("plain")
    data = (graph, params, inputs, TARGETS, loss, ranges)
    whole = estimated(*data, seed=7, probes=2, **ONE_OF_EACH)
    parts = [(inputs[:3], TARGETS[:3]), (inputs[3:], TARGETS[3:])]
    found = curvature(graph, params, parts, loss, ranges, seed=7, probes=2, **ONE_OF_EACH)
    assert len(found) == BATCH and found.fingerprint == graph.fingerprint
    for site, values in whole.activations.items():
        for position in range(values.shape[1]):
            one = found.activation(site, position, FLOOR)
            np.testing.assert_allclose(one, values[:, position, 0], rtol=1e-3, atol=1e-6)
    for name, values in whole.weights.items():
        np.testing.assert_allclose(found.weight(name, NEAREST), values[:, 0], rtol=1e-3, atol=1e-6)
    alone = curvature(
        graph, params, parts, loss, ranges, activation_candidates=(), weight_candidates=(NEAREST,)
    )
    assert alone.activations.shape == (BATCH, len(found.activation_rows), 0)


def test_bfloat16_gives_float32_terms():
    params = {"w": random(6, 6, dtype=jnp.bfloat16), "v": random(6, 2, dtype=jnp.bfloat16)}
    apply = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    inputs = random(4, 6, seed=2, dtype=jnp.bfloat16)
    graph, params, inputs, ranges = small(apply, params, inputs)
    data = (graph, params, inputs, TARGETS, loss, ranges)
    found = estimated(*data, **ONE_OF_EACH)
    for values in jax.tree.leaves(found):
        assert values.dtype == jnp.float32 and jnp.isfinite(values).all() and values.any()


def test_data_that_does_not_fit_is_refused():
    graph, params, inputs = traced("plain")
    ranges = calibrated("plain")
    data = (graph, params, inputs, TARGETS, loss, ranges)
    with pytest.raises(ScoreError, match="probes is 0"):
        second_order(*data, jax.random.key(0), probes=0)
    with pytest.raises(ScoreError, match="another model"):
        second_order(*data[:-1], calibrated("cnn"), jax.random.key(0))
    with pytest.raises(ScoreError, match="no examples"):
        curvature(graph, params, [], loss, ranges)
    with pytest.raises(ScoreError, match="for 4 inputs"):
        curvature(graph, params, [(inputs, TARGETS[:2])], loss, ranges)


def test_a_term_that_is_not_finite_is_refused():
    graph, params, x, ranges = small(lambda p, x: x @ p["w"], {"w": random(3, 2)}, random(4, 3))
    root = lambda outputs, targets: jnp.sum(jnp.maximum(outputs, 0) ** 0.5, axis=-1) * 0  # noqa: E731
    zeros = [(np.zeros_like(x), np.zeros(4))]
    with pytest.raises(ScoreError, match="second-order term of w is NaN or infinite"):
        curvature(graph, params, zeros, root, ranges)


@functools.cache
def regime(times_threshold):
    """alpha sum(o) + 1/2 (sum o)^2 of o = x: p . 1 is d alpha on average and 1'H1 is d^2."""
    d = 16
    x = jax.random.normal(jax.random.key(0), (512, d))
    graph, params, x, ranges = small(lambda p, x: x @ p["w"], {"w": jnp.eye(d)}, x)
    alpha = times_threshold * float(ranges.grids["w"][0][4].scale) * d / 4

    def loss(outputs, targets):
        total = jnp.sum(outputs, axis=-1)
        return alpha * total + total**2 / 2

    batches = [(x, x)]
    scores = score(graph, params, batches, loss, ranges)
    return scores, curvature(graph, params, batches, loss, ranges)


def test_a_direction_is_proposed_where_the_first_order_beats_the_second():
    assert directions(*regime(1.5))[4] == {"w": ("floor",)}
    assert directions(*regime(-1.5))[4] == {"w": ("ceil",)}
    assert directions(*regime(0.5))[4] == {"w": ("nearest",)}
    assert directions(*regime(1.5), errors=50)[4] == {"w": ("nearest",)}
    assert set(directions(*regime(1.5))) == {8, 4}


def test_directions_need_the_same_model_and_candidates():
    scores, _ = regime(1.5)
    graph, params, inputs = traced("plain")
    ranges = calibrated("plain")
    other = curvature(graph, params, [(inputs, TARGETS)], loss, ranges, **ONE_OF_EACH)
    with pytest.raises(ScoreError, match="another model"):
        directions(scores, other)
    own = score(graph, params, [(inputs, TARGETS)], loss, ranges)
    with pytest.raises(ScoreError, match="no width was scored"):
        directions(own, other)


def test_fisher_is_the_curvature_where_labels_are_the_models_own():
    """Softmax regression: the Hessian is the Fisher information."""
    x = random(4000, 5)
    params = {"w": random(5, 4, seed=2)}
    graph, params, x, ranges = small(lambda p, x: x @ p["w"], params, x)
    labels = jax.random.categorical(jax.random.key(3), x @ params["w"])

    def cross_entropy(logits, labels):
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]

    batches = [(x, labels)]
    scores = score(graph, params, batches, cross_entropy, ranges)
    empirical = fisher(scores)
    exact = curvature(graph, params, batches, cross_entropy, ranges)
    for kind in ("activations", "weights"):
        mean, error = mean_and_error(getattr(empirical, kind) - getattr(exact, kind))
        assert (np.abs(mean) <= 4 * error).all()
        assert (error <= 0.1 * getattr(exact, kind).mean(axis=0)).all()


def test_fisher_sums_the_uses_of_a_weight_before_it_squares():
    graph, params, inputs = traced("tied_embedding")
    scores = score(graph, params, [(inputs, TARGETS)], loss, calibrated("tied_embedding"))
    table = next(w.name for w in graph.weights.values() if len(w.uses) == 2)
    uses = scores.contributions().weights
    both = sum(uses[site][:, 1] for site in graph.weights[table].uses)
    np.testing.assert_allclose(fisher(scores).weight(table, NEAREST), both**2 / 2, rtol=1e-5)

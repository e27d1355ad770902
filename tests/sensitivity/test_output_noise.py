"""Output noise, squared and as a ratio, against models that are written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, random
from stages import TARGETS, calibrated, float64, traced
from written_out import FORWARD, changed_output, recurrence, tape, unrolled

from jaxrmils import calibrate, trace
from jaxrmils.graph import interpret
from jaxrmils.numerics import fake_quant
from jaxrmils.sensitivity import ScoreError, all_off, perturbed_outputs, weight_noise
from jaxrmils.sensitivity.output_noise import output_power, squared_output

FORMATS = ((8, 8), (4, 8), (4, 4), (4, 32))
EXACT = sorted(FORWARD)


@functools.cache
def squares(name):
    graph, params, inputs = traced(name)
    ranges = calibrated(name)
    run = jax.jit(lambda p, x: squared_output(graph, p, x, TARGETS, loss, ranges, FORMATS))
    return jax.device_get(run(params, inputs))


@functools.cache
def powers(name):
    graph, params, inputs = traced(name)
    ranges = calibrated(name)
    run = jax.jit(lambda p, x: output_power(graph, p, x, ranges, FORMATS))
    return jax.device_get(run(params, inputs))


@functools.cache
def by_hand(name):
    """[sites' names], then per site [batch, formats] for squares and noise, [batch] for signal."""
    result = {}
    for example in tape(name):
        for site, entry in example.items():
            g, y = float64(entry[3]), float64(entry[0](*entry[1]))
            changes = [changed_output(name, site, entry, bits) for bits in FORMATS]
            numbers = (
                [np.sum((g * c) ** 2) for c in changes],
                [np.sum(c**2) for c in changes],
                np.sum(y**2),
            )
            result.setdefault(site, []).append(numbers)
    return {site: tuple(map(np.array, zip(*rows, strict=True))) for site, rows in result.items()}


def layers_of(found, site):
    """The rows of a site by hand, which for a stack are those of its layers."""
    stack = [s for s in found if s.partition(":")[0] == site]
    return [found[s] for s in stack]


@pytest.mark.parametrize("name", EXACT)
def test_squared_outputs_are_those_of_a_backward_pass_by_hand(name):
    expected = by_hand(name)
    found = squares(name)
    assert set(found) == {site.partition(":")[0] for site in expected}
    for site, values in found.items():
        total = np.sum([row[0] for row in layers_of(expected, site)], axis=0)
        assert values.shape == total.shape
        np.testing.assert_allclose(values, total, rtol=2e-3, atol=1e-6 * total.max())


@pytest.mark.parametrize("name", EXACT)
def test_powers_are_those_of_the_outputs_by_hand(name):
    expected = by_hand(name)
    for site, (noise, signal) in powers(name).items():
        rows = layers_of(expected, site)
        shape = (len(TARGETS), len(rows))
        reference = np.stack([row[1] for row in rows], axis=1)
        np.testing.assert_allclose(
            noise.reshape(*shape, -1), reference, rtol=2e-3, atol=1e-6 * reference.max()
        )
        np.testing.assert_allclose(
            signal.reshape(shape), np.stack([row[2] for row in rows], axis=1), rtol=1e-5
        )


def test_a_format_changes_only_what_a_site_has():
    lookup = squares("tied_embedding")["Embed_0/embedding"]
    np.testing.assert_array_equal(lookup[:, 1], lookup[:, 3])  # w4a8 and w4
    product = squares("experts")["dot_0"]
    np.testing.assert_array_equal(product[:, 0], product[:, 1])  # w8a8 and w4a8
    assert np.all(product[:, 3] == 0)  # w4
    assert np.all(product[:, 2] > product[:, 1])


@functools.cache
def materialised(name):
    """Squares in w4a4 from gradients and changed outputs of the interpreter, site by site."""
    graph, params, inputs = traced(name)
    ranges, leaves = calibrated(name), jax.tree.leaves(params)
    noise = jax.jit(lambda p: weight_noise(graph, p))(params)

    def run(eps, x, target):
        def handler(call):
            operands = list(call.operands())
            y = call.bind_highest(*operands)
            for position, index in enumerate(call.site.activations):
                grid = call.state[position][4]
                operands[index] = fake_quant(operands[index].astype(jnp.float32), grid)
            if call.site.weight:
                delta = call.view(call.weight[1])
                index = call.site.weight.operand
                operands[index] = operands[index].astype(jnp.float32) + delta
            wide = [o.astype(jnp.float32) for o in call.operands()]
            change = call.bind_float32(*operands) - call.bind_float32(*wide)
            return y + eps[call.site.name] if eps else y, (y, change)

        outputs, records = interpret(
            graph, handler, leaves, x[None], weights=noise, state=ranges.grids
        )
        return loss(outputs, target[None])[0], records

    shapes = jax.eval_shape(lambda: run({}, inputs[0], TARGETS[0])[1])
    eps = {site: jnp.zeros(y.shape, y.dtype) for site, (y, _) in shapes.items()}
    gradient = jax.jit(jax.vmap(jax.grad(run, has_aux=True), in_axes=(None, 0, 0)))
    g, records = gradient(eps, inputs, TARGETS)
    result = {}
    for site, (_, change) in records.items():
        product = (float64(g[site]) * float64(change)) ** 2
        result[site] = product.reshape(len(TARGETS), -1).sum(axis=1)
    return result


@pytest.mark.parametrize(
    ("name", "tolerance"), [("separable_cnn", 1e-3), ("bfloat16_transformer", 0.1)]
)
def test_squared_outputs_equal_materialised_gradients(name, tolerance):
    for site, values in squares(name).items():
        assert values.dtype == np.float32
        expected = materialised(name)[site]
        np.testing.assert_allclose(
            values[:, 2], expected, rtol=tolerance, atol=tolerance * expected.mean()
        )


def test_the_last_layers_noise_is_what_the_simulated_model_returns():
    name, site = "plain", "einsum/1"
    graph, params, inputs = traced(name)
    ranges = calibrated(name)
    activations, weights = all_off(graph, ranges)
    base = perturbed_outputs(graph, params, inputs, ranges, activations, weights)
    # Nearest at 8 bits is the first candidate of activations, 4 bits the second of weights.
    on = {**activations, site: jnp.array([1])}, {**weights, site: jnp.int32(2)}
    changed = perturbed_outputs(graph, params, inputs, ranges, *on)
    noise, signal = powers(name)[site]
    np.testing.assert_allclose(noise[:, 1], np.sum((changed - base) ** 2, axis=1), rtol=1e-3)
    np.testing.assert_allclose(signal, np.sum(base**2, axis=1), rtol=1e-5)


def test_branches_that_an_example_does_not_take_add_nothing():
    _, _, inputs = traced("cond_data")
    taken = np.asarray(inputs[:, 0] > 0)
    for branch, reached in (("yes", taken), ("no", ~taken)):
        for values in (squares("cond_data")[branch], powers("cond_data")[branch][0]):
            # The loop over a batch's examples is one of a single iteration.
            assert np.array_equal(values.reshape(len(taken), -1).max(axis=1) > 0, reached)


def test_a_recurrence_is_the_sum_of_its_steps():
    """Weights alone, since the steps of an unrolled loop have ranges of their own."""
    found = []
    for apply in (recurrence, unrolled):
        params, inputs = {"w": random(5, 5, seed=2)}, random(4, 6, 5)
        graph = trace(apply, params, inputs)
        ranges = calibrate(graph, params, [inputs], estimator="minmax")
        data = (graph, params, inputs)
        squared = squared_output(*data, TARGETS, loss, ranges, ((4, 32),))
        power = output_power(*data, ranges, ((4, 32),))
        found.append((sum(squared.values()), sum(p[0] for p in power.values())))
        assert all(signal.shape == (4,) for _, signal in power.values())
    for one, other in zip(*found, strict=True):
        assert one.shape == (4, 1)
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_ranges_of_another_model_are_refused():
    graph, params, inputs = traced("plain")
    with pytest.raises(ScoreError, match="another model"):
        squared_output(graph, params, inputs, TARGETS, loss, calibrated("experts"), FORMATS)

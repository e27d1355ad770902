"""The Fisher information's diagonal against gradients of every example, by plain `jax.grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, model, random
from stages import TARGETS, calibrated, float64, traced
from written_out import activation_noise_by_hand, grid_of, recurrence, tape, unrolled

from jaxrmils import calibrate, trace
from jaxrmils.sensitivity import ScoreError, weight_noise
from jaxrmils.sensitivity.fisher_diagonal import fisher_diagonal
from jaxrmils.sensitivity.output_noise import NEAREST


def diagonal(name):
    graph, params, inputs = traced(name)
    ranges = calibrated(name)
    run = jax.jit(lambda p, x: fisher_diagonal(graph, p, x, TARGETS, loss, ranges))
    return jax.device_get(run(params, inputs))


def leaf_gradients(name):
    """Gradients of every example with respect to the parameters' leaves, [batch, ...]."""
    apply, params, inputs = model(name)
    one = lambda p, x, t: loss(apply(p, x[None]), t[None])[0]  # noqa: E731
    return jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))(params, inputs, TARGETS)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("cnn", 1e-3),
        ("tied_embedding", 1e-3),
        ("scanned_stack", 1e-3),
        ("bfloat16_transformer", 0.2),
    ],
)
def test_weights_are_those_of_parameter_gradients(name, tolerance):
    graph, params, _ = traced(name)
    found, _ = diagonal(name)
    gradients = jax.tree.leaves(leaf_gradients(name))
    noise = jax.jit(lambda p: weight_noise(graph, p, NEAREST))(params)
    for weight, values in found.items():
        (leaf,) = graph.weights[weight].leaves
        g = float64(gradients[leaf]).reshape(len(TARGETS), -1)
        expected = np.stack([(g * float64(d).reshape(1, -1)) ** 2 for d in noise[weight]], axis=-1)
        expected = expected.sum(axis=1)
        np.testing.assert_allclose(
            values, expected, rtol=tolerance, atol=tolerance * expected.mean()
        )


@pytest.mark.parametrize("name", ["plain", "scanned_stack", "experts"])
def test_activations_are_those_of_operand_gradients_by_hand(name):
    _, found = diagonal(name)
    expected = {site: np.zeros(values.shape) for site, values in found.items()}
    for number, example in enumerate(tape(name, shift_operands=True)):
        for site, (_, operands, reduced, gradients) in example.items():
            count = len(operands) - (reduced is not None)
            for position in range(count):
                for column, bits in enumerate((8, 4)):
                    eps = activation_noise_by_hand(
                        operands[position], grid_of(name, site, position, bits)
                    )
                    square = np.sum((float64(gradients[position]) * eps) ** 2)
                    expected[site.partition(":")[0]][number, position, column] += square
    for site, values in found.items():
        np.testing.assert_allclose(
            values, expected[site], rtol=2e-3, atol=1e-6 * expected[site].max()
        )


def test_a_weight_in_a_recurrence_has_one_gradient():
    found = []
    for apply in (recurrence, unrolled):
        params, inputs = {"w": random(5, 5, seed=2)}, random(4, 6, 5)
        graph = trace(apply, params, inputs)
        ranges = calibrate(graph, params, [inputs], estimator="minmax")
        found.append(fisher_diagonal(graph, params, inputs, TARGETS, loss, ranges)[0]["w"])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_mean_loss_is_refused():
    graph, params, inputs = traced("plain")
    mean = lambda outputs, targets: jnp.mean(loss(outputs, targets))  # noqa: E731
    with pytest.raises(ScoreError, match="one value per example"):
        fisher_diagonal(graph, params, inputs, TARGETS, mean, calibrated("plain"))

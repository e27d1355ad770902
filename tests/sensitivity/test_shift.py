import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss
from stages import TARGETS, calibrated, traced

from jaxrmils.graph import interpret
from jaxrmils.sensitivity import ScoreError, contributions, shift_secants


def shifted_losses(name, site, position, step):
    """The loss with one operand moved by `step`, by hand."""
    graph, params, inputs = traced(name)

    def handler(call):
        operands = list(call.operands())
        if call.site.name == site:
            index = call.site.activations[position]
            moved = step if np.ndim(step) == 0 else call.state
            operands[index] = operands[index] + jnp.asarray(moved, operands[index].dtype)
        return call.bind_highest(*operands), None

    state = {} if np.ndim(step) == 0 else {site: jnp.asarray(step)}
    outputs, _ = interpret(graph, handler, jax.tree.leaves(params), inputs, state=state)
    return np.float64(loss(outputs, TARGETS))


@pytest.mark.parametrize("name", ["plain", "experts", "scanned_stack"])
def test_secants_equal_finite_differences(name):
    graph, params, inputs = traced(name)
    ranges = calibrated(name)
    found = jax.jit(lambda p, x: shift_secants(graph, p, x, TARGETS, loss, ranges))(params, inputs)
    assert set(found) == set(ranges.stats)
    for site, grids in ranges.grids.items():
        assert found[site].shape == (4, len(grids), 2)
        for position, by_bits in enumerate(grids):
            for i, bits in enumerate((8, 4)):
                step = np.asarray(by_bits[bits].scale)
                base = shifted_losses(name, site, position, np.zeros_like(step))
                change = shifted_losses(name, site, position, step) - base
                expected = change / step.mean()
                # Two float32 losses are subtracted and divided by the step.
                rounding = 8 * 2.0**-23 * np.abs(base).max() / step.mean()
                actual = np.float64(found[site][:, position, i])
                np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=rounding)


def test_small_steps_approach_the_gradient_sum():
    graph, params, inputs = traced("plain")
    ranges = calibrated("plain")
    secants = shift_secants(graph, params, inputs, TARGETS, loss, ranges, bits=(8,))
    tangent = contributions(graph, params, inputs, TARGETS, loss, ranges).gradient_sum
    for site, value in secants.items():
        assert value.shape == (4, 1, 1)
        scale = np.abs(tangent[site]).max()
        np.testing.assert_allclose(value[:, :, 0], tangent[site], atol=0.05 * scale)


def test_ranges_of_another_model_are_refused():
    graph, params, inputs = traced("plain")
    with pytest.raises(ScoreError, match="another model"):
        shift_secants(graph, params, inputs, TARGETS, loss, calibrated("custom_rules"))

"""Traces against dense Hessians: exact over a basis, within errors from random signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, random
from stages import TARGETS, traced
from written_out import recurrence, unrolled

from jaxrmils import trace
from jaxrmils.sensitivity import ScoreError
from jaxrmils.sensitivity.hessian_trace import (
    hessian_traces,
    quadratic_forms,
    random_signs,
)


def small():
    """Two layers and a smooth loss."""

    def apply(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    params = {"a": random(3, 4, seed=3) * 0.7, "b": random(4, 2, seed=4)}
    return trace(apply, params, random(6, 3)), params, random(6, 3), jnp.linspace(-1, 1, 6)


def dense_traces():
    """Of the mean loss: by weight, and by operand from a forward written out."""
    graph, params, x, y = small()
    mean = lambda p: jnp.mean(loss(graph.apply(p, x), y))  # noqa: E731
    hessian = jax.hessian(mean)(params)
    weights = {
        n: float(np.trace(np.reshape(hessian[n][n], (w.size, -1)))) for n, w in params.items()
    }

    def example(eps, x, y):
        hidden = jnp.tanh((x + eps["a"]) @ params["a"]) + eps["b"]
        return loss((hidden @ params["b"])[None], y[None])[0]

    zeros = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    each = jax.vmap(jax.hessian(example), in_axes=(None, 0, 0))(zeros, x, y)
    operands = {n: float(jnp.mean(jnp.trace(each[n][n], axis1=1, axis2=2))) for n in zeros}
    return weights, operands


def test_all_basis_vectors_give_the_exact_traces():
    graph, params, x, y = small()
    expected, expected_operands = dense_traces()
    counts = jnp.ones(6)
    form = jax.jit(lambda v: quadratic_forms(graph, params, x, y, loss, v, counts))
    for name, w in params.items():
        basis = np.eye(w.size, dtype=np.float32).reshape(-1, *w.shape)
        total = sum(float(form(({name: v}, {}))[0][name]) for v in basis)
        np.testing.assert_allclose(total / 6, expected[name], rtol=1e-4)
    for site, size in (("a", 3), ("b", 4)):
        basis = np.eye(size, dtype=np.float32)[:, None, None]  # of a batch of one, for 6 examples
        basis = np.broadcast_to(basis, (size, 6, 1, size))
        total = sum(float(form(({}, {site: (v,)}))[1][site][0]) for v in basis)
        np.testing.assert_allclose(total / 6, expected_operands[site], rtol=1e-4)


def test_random_signs_come_to_the_traces_within_their_errors():
    graph, params, x, y = small()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = hessian_traces(graph, params, batches, loss, probes=200)
    expected, expected_operands = dense_traces()
    for values, errors, reference in (
        (found.weights, found.weight_errors, expected),
        (found.activations, found.activation_errors, expected_operands),
    ):
        for name, trace_ in reference.items():
            value, error = float(np.squeeze(values[name])), float(np.squeeze(errors[name]))
            assert abs(value - trace_) < 4 * error
            assert error < 0.4 * abs(trace_)
    again = hessian_traces(graph, params, batches, loss, probes=2)
    other = hessian_traces(graph, params, batches, loss, probes=2)
    np.testing.assert_array_equal(again.weights["a"], other.weights["a"])
    seeded = hessian_traces(graph, params, batches, loss, probes=2, seed=1, activations=False)
    assert seeded.weights["a"] != again.weights["a"]
    assert not seeded.activations


def forms(name, of_weights):
    graph, params, inputs = traced(name)
    signs = random_signs(graph, jax.random.key(0), len(TARGETS), of_weights=of_weights)
    counts = jnp.ones(len(TARGETS))
    run = jax.jit(lambda p, x, v: quadratic_forms(graph, p, x, TARGETS, loss, v, counts))
    return signs, jax.device_get(run(params, inputs, signs))


def test_a_stack_keeps_a_trace_for_every_layer():
    """Each layer's product with the dense Hessian of the stacked parameter."""
    graph, params, inputs = traced("scanned_stack")
    name = "layers/Dense_0/kernel"
    signs, (weights, _) = forms("scanned_stack", True)
    kernel = params["params"]["layers"]["Dense_0"]["kernel"]

    def total(kernel):
        dense = {"kernel": kernel, "bias": params["params"]["layers"]["Dense_0"]["bias"]}
        return jnp.sum(
            loss(graph.apply({"params": {"layers": {"Dense_0": dense}}}, inputs), TARGETS)
        )

    v = signs[0][name]
    product = v * jax.jvp(jax.grad(total), (kernel,), (v,))[1]
    np.testing.assert_allclose(weights[name], product.sum(axis=(1, 2)), rtol=1e-3, atol=1e-5)
    _, (_, operands) = forms("scanned_stack", False)
    assert operands[name].shape == (1, 3)


def test_a_weight_in_a_recurrence_has_one_trace():
    found = []
    for apply in (recurrence, unrolled):
        params, inputs = {"w": random(5, 5, seed=2)}, random(4, 6, 5)
        graph = trace(apply, params, inputs)
        signs = random_signs(graph, jax.random.key(0), 4, of_weights=True)
        data = (graph, params, inputs, TARGETS, loss, signs, jnp.ones(4))
        found.append(quadratic_forms(*data)[0]["w"])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_bfloat16_and_attention_are_those_of_float32_roughly():
    """The same block in both dtypes; its products of two activations have traces too."""
    signs, (weights, _) = forms("bfloat16_transformer", True)
    _, (_, operands) = forms("bfloat16_transformer", False)
    _, (expected, _) = forms("transformer", True)
    _, (_, expected_operands) = forms("transformer", False)
    for found, reference in ((weights, expected), (operands, expected_operands)):
        assert set(found) == set(reference)
        assert all(v.dtype == np.float32 for v in found.values())
        one, other = (
            np.concatenate([np.ravel(d[n]) for n in reference]) for d in (found, reference)
        )
        assert np.corrcoef(one, other)[0, 1] > 0.98
    assert operands["MultiHeadDotProductAttention_0/dot_0"].shape == (2,)
    assert set(np.unique(signs[0]["up/kernel"])) == {-1.0, 1.0}


def test_a_short_last_batch_counts_its_own_examples_alone():
    """A Hessian of one element: every sign gives it exactly."""
    x, params = jnp.array([[1.0], [2.0], [5.0]]), {"w": jnp.ones((1, 1))}
    graph = trace(lambda p, x: x @ p["w"], params, x)
    squares = lambda outputs, targets: jnp.sum(outputs**2, axis=-1)  # noqa: E731
    batches = [(x[:2], TARGETS[:2]), (x[2:], TARGETS[2:3])]
    found = hessian_traces(graph, params, batches, squares, probes=1)
    np.testing.assert_allclose(found.weights["w"], 2 * (1 + 4 + 25) / 3, rtol=1e-6)
    np.testing.assert_allclose(found.activations["w"], [2.0], rtol=1e-6)


def test_bad_input_is_refused():
    graph, params, x, y = small()
    with pytest.raises(ScoreError, match="probes is 0"):
        hessian_traces(graph, params, [(x, y)], loss, probes=0)
    root = lambda outputs, targets: jnp.sqrt(jnp.sum(outputs * 0, axis=-1))  # noqa: E731
    with pytest.raises(ScoreError, match="Hessian's trace of a is NaN"):
        hessian_traces(graph, params, [(x, y)], root, probes=1)

"""Activations that are several equations, found again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random
from test_interpret import rerun as on_graph

from jaxrmils import trace
from jaxrmils.graph import interpret
from jaxrmils.graph.functions import FUNCTIONS, MOST_EQUATIONS, Function
from jaxrmils.graph.pending import Pending

PARAMS = {name: random(5, 5, seed=i) for i, name in enumerate("ab")}
X = random(4, 5, seed=9)


def between(function):
    return lambda p, x: function(x @ p["a"]) @ p["b"]


def rerun(apply, params, x):
    return on_graph(trace(apply, params, x), params, x)[0]


def functions(apply, x=X):
    program = trace(apply, PARAMS, x).traced.program
    return [step.name for step in program.joined if isinstance(step, Function)]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *((function, name) for name, function in FUNCTIONS.items()),
        (nn.gelu, "gelu_tanh"),
        (lambda x: nn.gelu(x, approximate=False), "gelu"),
        (nn.silu, "silu"),  # a jit of its own
        (jax.jit(lambda x: jax.nn.gelu(x, approximate=False)), "gelu"),
        (lambda x: jax.nn.sigmoid(x) * x, None),  # not as it is usually written
    ],
)
def test_functions_are_found(function, name):
    assert functions(between(function)) == ([name] if name else [])
    apply = between(function)
    np.testing.assert_allclose(rerun(apply, PARAMS, X), apply(PARAMS, X), rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 0.4 * x * jax.scipy.special.erfc(-x * np.float32(np.sqrt(0.5))),
        lambda x: x * jax.nn.sigmoid(x + 1),
        lambda x: jnp.tanh(x) * jax.nn.sigmoid(x),
        lambda x: (x * jax.nn.sigmoid(x)) * jax.nn.sigmoid(jnp.tanh(x)),
    ],
)
def test_what_only_looks_like_one_is_left(function):
    apply = between(function)
    assert "gelu" not in functions(apply)
    np.testing.assert_allclose(rerun(apply, PARAMS, X), apply(PARAMS, X), rtol=1e-6)


def test_results_in_between_that_others_read():
    def gated(p, x):
        h = x @ p["a"]
        gate = jax.nn.sigmoid(h)
        return (h * gate) @ p["b"] + gate

    assert functions(gated) == []
    np.testing.assert_allclose(rerun(gated, PARAMS, X), gated(PARAMS, X), rtol=1e-6)

    def returned(p, x):
        h = x @ p["a"]
        gate = jax.nn.sigmoid(h)
        return (h * gate) @ p["b"], gate

    assert functions(returned) == []


def test_they_are_differentiated_as_they_are_written():
    apply = between(FUNCTIONS["gelu"])
    expected = jax.grad(lambda p: (apply(p, X) ** 2).sum())(PARAMS)
    derived = jax.grad(lambda p: (rerun(apply, p, X) ** 2).sum())(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), derived, expected)


class Later(Pending):
    """Waits, and takes a function along if it is asked to."""

    def __init__(self, array, takes):
        self.array, self.takes, self.asked = array, takes, []

    def value(self):
        return self.array

    def followed_by(self, eqn, inputs, position):
        return None

    def applied(self, name):
        self.asked.append(name)
        return Later(FUNCTIONS[name](self.array), self.takes) if self.takes else None


@pytest.mark.parametrize("takes", [True, False])
def test_what_waits_is_offered_the_function(takes):
    made = []

    def handler(call):
        made.append(Later(call.bind(*call.operands()), takes))
        return made[-1], None

    graph = trace(between(FUNCTIONS["silu"]), PARAMS, X)
    outputs = interpret(graph, handler, jax.tree.leaves(PARAMS), X)[0]
    assert [each.asked for each in made] == [["silu"], []]
    np.testing.assert_allclose(outputs, graph.apply(PARAMS, X), rtol=1e-6)


def test_no_function_has_more_equations():
    for function in FUNCTIONS.values():
        assert len(jax.make_jaxpr(function)(X).jaxpr.eqns) <= MOST_EQUATIONS

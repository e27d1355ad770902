"""On whole networks, two points share out the joint change, and the path ends where it should."""

import functools

import jax
import numpy as np
import pytest
import secant_points

import jaxrmils as jr
from jaxrmils.graph import interpret
from jaxrmils.numerics import fake_quant
from jaxrmils.policies.attribution import formats_of
from jaxrmils.sensitivity import path_outputs, weight_noise

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:transformers", "ignore:.*:FutureWarning:transformers"
)

MAKE = {
    "demo CNN": lambda: secant_points.demo_cnn(),
    "transformer block": lambda: secant_points.transformer_block(64),
    "FlaxBert": lambda: secant_points.flax_bert(32),
}


@functools.cache
def network(name):
    made = MAKE[name]()
    return made._replace(data=made.data[:2])


def plan_of(name, kind):
    made = network(name)
    table = jr.tabulate(made.graph)
    if kind == secant_points.INT4:
        return jr.uniform(table, "int4")
    return jr.uniform(table, "float", force=secant_points.mixed_formats(made, table))


# FlaxBert takes half a minute to compile; the experiment has it in mixed formats too.
CASES = [(name, secant_points.INT4) for name in MAKE]
CASES += [(name, secant_points.MIXED) for name in ("demo CNN", "transformer block")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_points_share_out_the_joint_change(name, kind):
    found = secant_points.attributed(network(name), plan_of(name, kind), 2)
    row = secant_points.row(name, kind, "T = 2", sum(found.layers.values()), found)
    assert np.abs(found.change).mean() > 1e-4
    assert row["rest"] <= 0.02
    assert row["correlation"] >= 0.99


def simulated(made, plan):
    """The quantized network by fake quantization, operand by operand."""
    graph, formats = made.graph, formats_of(made.graph, plan)

    def handler(call):
        operands = list(call.operands())
        for index, candidate, grids in zip(
            call.site.activations,
            formats.activations.get(call.site.name, ()),
            call.state or (),
            strict=False,
        ):
            operands[index] = fake_quant(operands[index], grids[candidate.bits], "nearest")
        weight = call.site.weight
        if weight is not None and weight.name in formats.weights:
            k = (8, 4).index(formats.weights[weight.name].bits)
            operands[weight.operand] += call.view(call.weight[k])
        return call.bind(*operands), None

    def run(params, inputs):
        leaves, noise = jax.tree.leaves(params), weight_noise(graph, params)
        return interpret(graph, handler, leaves, inputs, weights=noise, state=made.ranges.grids)[0]

    return run


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_path_ends_at_the_quantized_network(name, kind):
    made, plan = network(name), plan_of(name, kind)
    formats, reference = formats_of(made.graph, plan), simulated(made, plan)

    @jax.jit
    def both(params, inputs):
        end = path_outputs(made.graph, params, inputs, made.ranges, formats, 1.0)
        return end, reference(params, inputs), made.graph.apply(params, inputs)

    inputs = made.data[0][0]
    outputs = [jax.tree.leaves(each) for each in jax.device_get(both(made.params, inputs))]
    for end, quantized, unquantized in zip(*outputs, strict=True):
        change = np.abs(quantized - unquantized).max()
        assert np.abs(end - quantized).max() <= 1e-3 * change

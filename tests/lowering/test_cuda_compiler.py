"""What the CUDA compiler makes of integer models; skipped where it is not installed."""

import jax
import jax.numpy as jnp
import pytest
from plans import integer_site_names, plan_of
from stages import table_of, traced
from test_ahead import widen

from jaxrmils import uniform
from jaxrmils.lowering import LoweringError
from jaxrmils.lowering.ahead import (
    abstract_model,
    batch_shapes,
    check_target,
    compile_for,
    program_cost,
    site_costs,
    targets,
)

CONVOLUTION, DOT = "__cudnn$convForward", "dot"


@pytest.mark.parametrize(
    ("name", "kind", "kernels"),
    [
        ("cnn", "w4a8", {CONVOLUTION, DOT}),
        ("plain", "int4", {DOT}),
        ("scanned_stack", "int8", {DOT}),
    ],
)
def test_every_planned_site_multiplies_integer_codes(name, kind, kernels):
    model = abstract_model(traced(name)[0], plan_of(name, kind), "cuda")
    cost = check_target(model, batch_shapes(model.graph, 4), "cuda:h100")
    planned = integer_site_names(name, kind)
    assert planned == {n for n, site in cost.sites.items() if site.is_integer}
    assert {pair for n in planned for pair in cost.sites[n].operands} == {("s8", "s8")}
    assert {kernel for n in planned for kernel in cost.sites[n].kernels} == kernels
    assert cost.cycles is None and cost.sites[planned.pop()].cycles is None


def test_float_programs_beside_the_plan():
    graph = traced("plain")[0]
    plan = uniform(table_of("plain"), "int8", skip=("left",))
    found = site_costs(graph, plan, "cuda:a100", batch_shapes(graph, 4), beside=("float32",))
    for name, site in found.programs["float32"].sites.items():
        assert site.operands == (("f32", "f32"),), name
    assert found.plan.sites["left"].operands == (("f32", "f32"),)
    assert found.plan.sites["right"].is_integer
    assert found.plan.memory.arguments < found.programs["float32"].memory.arguments


def test_a_float_site_is_named(monkeypatch):
    widen(monkeypatch, "Dense_0/kernel", jnp.float32)
    model = abstract_model(traced("cnn")[0], plan_of("cnn", "int8"), "cuda")
    with pytest.raises(LoweringError, match=r"1 of 3 planned .* cuda:h100: Dense_0/kernel \(f32 x"):
        check_target(model, batch_shapes(model.graph, 4), "cuda:h100")


@pytest.mark.parametrize("name", [t.name for t in targets().values() if t.device.startswith("NV")])
def test_every_target_compiles(name):
    codes = jax.ShapeDtypeStruct((32, 128), jnp.int8)

    def dot(x, y):
        return jax.lax.dot(x, y.T, preferred_element_type=jnp.int32)

    assert program_cost(compile_for(name, dot, codes, codes)).memory.arguments == 2 * 32 * 128

"""What libtpu makes of integer models; skipped where it is not installed, no TPU is needed."""

import re

import jax
import jax.numpy as jnp
import pytest
from plans import integer_site_names, plan_of
from stages import table_of, traced
from test_ahead import widen

from jaxrmils import uniform
from jaxrmils.lowering import LoweringError
from jaxrmils.lowering.ahead import (
    THIS_PLAN,
    abstract_model,
    batch_shapes,
    check_compiled,
    check_target,
    compile_for,
    program_cost,
    site_costs,
    targets,
)


def model_of(name, kind):
    return abstract_model(traced(name)[0], plan_of(name, kind), "tpu")


@pytest.mark.parametrize(
    ("name", "kind", "operands"),
    [
        ("cnn", "w4a8", {("s8", "s4")}),
        ("plain", "int4", {("s4", "s4")}),
        ("transformer", "int8", {("s8", "s8")}),
        ("scanned_stack", "int8", {("s8", "s8")}),
    ],
)
def test_the_matrix_unit_gets_integer_codes_at_every_planned_site(name, kind, operands):
    model = model_of(name, kind)
    cost = check_target(model, batch_shapes(model.graph, 4), "tpu:v5e")
    planned = integer_site_names(name, kind)
    assert planned == {n for n, site in cost.sites.items() if site.is_integer}
    assert {pair for n in planned for pair in cost.sites[n].operands} == operands
    assert cost.unknown_loops == 0


def test_programs_side_by_side():
    graph = traced("cnn")[0]
    plan = uniform(table_of("cnn"), "int8", skip=("Dense_0/kernel",))
    found = site_costs(graph, plan, "tpu:v5e", batch_shapes(graph, 4), beside=("bfloat16", "int8"))
    assert list(found.programs) == [THIS_PLAN, "bfloat16", "int8"] and not found.refused
    dense = {name: cost.sites["Dense_0/kernel"] for name, cost in found.programs.items()}
    assert [dense[name].is_integer for name in found.programs] == [False, False, True]
    assert dense["bfloat16"].operands == (("bf16", "bf16"),)
    # One byte for a weight, or two: 1,328 of them, and layouts are padded.
    assert found.plan.memory.arguments > found.programs["int8"].memory.arguments
    check_compiled(graph, plan, found.plan, "tpu:v5e")


def test_what_is_estimated_adds_up():
    model = model_of("cnn", "int8")
    arguments = (model.params, batch_shapes(model.graph, 4))
    compiled = compile_for("tpu:v5e", model.apply, *arguments)
    cost, text = program_cost(compiled), compiled.as_text()
    numbers = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    assert cost.cycles == sum(numbers) > sum(s.cycles + s.overhead for s in cost.sites.values()) > 0
    assert all(site.cycles in numbers for site in cost.sites.values())
    assert cost.bytes_accessed > cost.memory.arguments > 0


def test_a_loop_takes_its_length_times_its_body():
    w, x = (jax.ShapeDtypeStruct((n, 256), jnp.bfloat16) for n in (256, 64))

    def recurrence(length):
        def run(w, x):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=length)[0]

        cost = program_cost(compile_for("tpu:v5e", run, w, x))
        assert cost.unknown_loops == 0
        return cost.cycles

    ten, twenty, thirty = recurrence(10), recurrence(20), recurrence(30)
    assert thirty - twenty == twenty - ten > 10 * 100


def test_a_single_row_is_multiplied_elementwise_and_is_still_integer():
    model = model_of("cnn", "int8")
    cost = check_target(model, batch_shapes(model.graph, 1), "tpu:v5e")
    assert cost.sites["Dense_0/kernel"].operands == ()
    assert cost.sites["Dense_0/kernel"].is_integer


def test_a_float_site_is_named(monkeypatch):
    widen(monkeypatch, "Dense_0/kernel", jnp.float32)
    model = model_of("cnn", "int8")
    with pytest.raises(LoweringError, match=r"1 of 3 planned .* tpu:v5e: Dense_0/kernel \("):
        check_target(model, batch_shapes(model.graph, 4), "tpu:v5e")


def test_what_the_compiler_refuses_is_said():
    huge = jax.ShapeDtypeStruct((1 << 34,), jnp.float32)
    with pytest.raises(LoweringError, match=r"for tpu:v5e refused the program: RESOURCE_EXHAUST"):
        compile_for("tpu:v5e", lambda x: x * 2, huge)


@pytest.mark.parametrize(
    "name", [t.name for t in targets().values() if t.platform == "tpu" and t.is_compiled]
)
def test_every_target_compiles(name):
    codes = jax.ShapeDtypeStruct((32, 128), jnp.int8)
    compiled = compile_for(name, lambda x, y: x @ y.T, codes, codes)
    assert program_cost(compiled).cycles > 0

"""Times of layers add up to those of programs, and predict another plan's."""

import jax
import jax.numpy as jnp
import pytest
from stages import calibrated, traced

import jaxrmils as jr
from jaxrmils.lowering import LoweringError
from jaxrmils.lowering.hlo import scoped_site
from jaxrmils.lowering.hlo_text import parse
from jaxrmils.lowering.native import kernels
from jaxrmils.lowering.profile import THIS_PLAN, Profile, ProgramTimes, _owners, profile
from jaxrmils.policies import LayerPlan, Plan, PlanError


@pytest.mark.parametrize("name", ["cnn", "transformer", "scanned_stack", "separable_cnn"])
def test_times_add_up(name):
    graph, params, inputs = traced(name)
    plan = jr.uniform(jr.tabulate(graph), "w8a8")
    options = {"formats": ("w8a8",), "plan": plan, "rounds": 3}
    found = profile(graph, params, calibrated(name), inputs, **options)
    assert set(found.programs) == {"float", "w8a8", THIS_PLAN}
    assert found.batch_size == 4 and found.peak > 0 and found.environment["backend"] == "cpu"
    for times in found.programs.values():
        assert set(times.layers) == set(graph.layers)
        total = times.rest + sum(times.layers.values())
        assert total == pytest.approx(times.seconds) and times.seconds > 0
        assert sum(seconds > 0 for seconds in times.layers.values()) > len(graph.layers) / 2
    table = found.latency_table()
    assert table.backend == "cpu" and "batches of 4" in table.source
    uniform = found.programs["w8a8"]
    expected = sum(uniform.layers.values()) + table.overhead
    assert found.predicted(plan) == pytest.approx(expected)
    with pytest.raises(PlanError, match="no 'w4a8'"):
        found.predicted(jr.uniform(jr.tabulate(graph), "w4a8"))


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
def test_native_kernels_are_timed_by_layer():
    graph, params, inputs = traced("cnn")
    options = {"formats": ("w8a8",), "rounds": 3, "kernels": "native"}
    found = profile(graph, params, calibrated("cnn"), inputs, **options)
    times = found.programs["w8a8"]
    assert sum(seconds > 0 for seconds in times.layers.values()) > len(graph.layers) / 2
    assert found.latency_table().source.endswith(", native kernels")


@pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))
def test_a_native_product_is_found_at_its_own_site():
    params = {n: jnp.ones((8, 8)) for n in "abc"}
    x = jnp.ones((4, 8))
    graph = jr.trace(lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"] @ p["c"], params, x)
    plan = jr.uniform(jr.tabulate(graph), "w8a8")
    model = jr.native(jr.quantize(graph, params, plan, jr.calibrate(graph, params, [x])))
    compiled = jax.jit(model.apply).lower(model.params, x).compile().as_text()
    instructions = parse(compiled).instructions.values()
    products = [scoped_site(each) for each in instructions if each.opcode == "custom-call"]
    assert sorted(products) == ["a", "b", "c"]


def test_refusals():
    graph, params, inputs = traced("plain")
    arguments = (graph, params, calibrated("plain"), inputs)
    with pytest.raises(LoweringError, match="rounds is 0"):
        profile(*arguments, rounds=0)
    with pytest.raises(LoweringError, match="kernels 'cuda'; expected one of xla, native"):
        profile(*arguments, kernels="cuda")
    with pytest.raises(PlanError, match="unknown format 'w3'"):
        profile(*arguments, formats=("w3",))
    plan = jr.uniform(jr.tabulate(traced("cnn")[0]))
    with pytest.raises(PlanError):
        profile(*arguments, plan=plan)
    own = jr.uniform(jr.tabulate(arguments[0]))
    with pytest.raises(PlanError, match="a plan is named 'w8a8', as another program"):
        profile(*arguments, plans={"w8a8": own})


def test_predictions_stand_beside_what_was_measured():
    def times(seconds, a, b):
        return ProgramTimes(seconds, {"a": a, "b": b}, seconds - a - b)

    def plan(*layers):
        return Plan(dict(zip("ab", layers, strict=True)), "f")

    eight, four = LayerPlan(8, 8, ("nearest",)), LayerPlan(4, 8, ("nearest",))
    found = Profile(
        {
            "float": times(10.0, 6.0, 3.0),
            "w8a8": times(4.0, 2.0, 1.0),
            "mixed": times(8.0, 6.0, 1.0),
            "other": times(3.0, 1.0, 1.0),
        },
        {
            "float": plan(LayerPlan(), LayerPlan()),
            "w8a8": plan(eight, eight),
            "mixed": plan(LayerPlan(), eight),
            "other": plan(four, eight),
        },
        1,
        {"backend": "cpu", "device": "none"},
        1.0,
        ("mixed", "other"),
    )
    base, uniform, mixed, other = found.predictions()
    assert base.is_uniform and uniform.is_uniform and not mixed.is_uniform
    assert (mixed.predicted, mixed.measured, mixed.ratio) == (6.0 + 1.0 + 1.0, 8.0, 1.0)
    assert other.predicted is None and other.ratio is None and "no 'w4a8'" in other.missing


HLO = """
%fused (p: f32[2,3]) -> f32[2,4] {
  %p = f32[2,3]{1,0} parameter(0)
  %a = f32[2,3]{1,0} dot(%p, %p), metadata={op_name="f/jaxrmils[first]/dot"}
  ROOT %b = f32[2,4]{1,0} dot(%a, %a), metadata={op_name="f/jaxrmils[second]/dot"}
}

ENTRY %main (x: f32[2,3]) -> f32[2,4] {
  %x = f32[2,3]{1,0} parameter(0)
  %before = f32[2,3]{1,0} negate(%x)
  %both = f32[2,4]{1,0} fusion(%before), kind=kCustom, calls=%fused
  %after = f32[2,4]{1,0} tanh(%both), metadata={op_name="f/tanh"}
  ROOT %third = f32[2,4]{1,0} dot(%after, %after), metadata={op_name="f/jaxrmils[third]/dot"}
}
"""


def test_whom_an_instruction_counts_for():
    text = parse(HLO)
    owners = {
        name: _owners(text, each)
        for (where, name), each in text.instructions.items()
        if where == "main"
    }
    assert owners["both"] == ["first", "second"] and owners["third"] == ["third"]
    assert owners["after"] == ["first"]  # What it reads is of both: the first counts.
    assert owners["before"] == ["first"]


def test_a_saved_table_is_the_same(tmp_path):
    table = jr.LatencyTable({"a": {"float": 2e-3, "w8a8": 1e-3}}, "cpu", "timed", overhead=1e-4)
    path = tmp_path / "latency.json"
    jr.save_latency(table, path)
    assert jr.load_latency(path) == table
    path.write_text(path.read_text().replace("0.002", "-1"))
    with pytest.raises(ValueError, match=r"latency\.json: .*-1\.0 seconds for a float"):
        jr.load_latency(path)
    path.write_text(path.read_text().replace('"seconds"', '"minutes"'))
    with pytest.raises(ValueError, match=r"latency\.json"):
        jr.load_latency(path)
    choice = jr.LatencyTable({"a": {jr.LayerPlan(): 1.0}}, "cpu", "timed")
    with pytest.raises(ValueError, match="only formats' names"):
        jr.save_latency(choice, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()

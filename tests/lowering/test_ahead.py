"""What integer models become on platforms that are not here, without their compilers."""

import os

import jax
import jax.numpy as jnp
import pytest
from models import random
from plans import integer_site_names, plan_of, quantized
from stages import table_of, traced

from jaxrmils import tabulate, trace, uniform
from jaxrmils.lowering import LoweringError, quantized_model
from jaxrmils.lowering.ahead import (
    THIS_PLAN,
    Comparison,
    abstract_model,
    batch_shapes,
    check_compiled,
    check_lowering,
    check_plan_lowering,
    compile_for,
    find_target,
    latency_table,
    targets,
    without_devices,
)
from jaxrmils.lowering.ahead.programs import text_cost

CODES = ("s8", "s8")


def shapes_of(tree):
    leaves = [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("kind", ["int8", "w4a8"])
@pytest.mark.parametrize("name", ["cnn", "separable_cnn", "plain", "transformer", "scanned_stack"])
def test_every_planned_site_multiplies_integer_codes(name, kind, platform):
    graph, plan = traced(name)[0], plan_of(name, kind)
    found = check_plan_lowering(graph, plan, batch_shapes(graph, 3), platform)
    assert set(found) == integer_site_names(name, kind)
    assert {pair for pairs in found.values() for pair in pairs} == {CODES}


def test_int4_is_native_in_the_dots_of_a_tpu_alone():
    graph, plan = traced("plain")[0], uniform(table_of("plain"), "int4")
    inputs = batch_shapes(graph, 3)
    for platform, codes in (("tpu", ("s4", "s4")), ("cuda", CODES)):
        found = check_plan_lowering(graph, plan, inputs, platform)
        assert {pair for pairs in found.values() for pair in pairs} == {codes}


def test_a_model_for_another_backend_can_be_asked():
    inputs = traced("plain")[2]
    assert check_lowering(quantized("plain", "int8"), inputs, "cuda")["left"] == [CODES]
    with pytest.raises(LoweringError, match=r"platform is 'cpu'; expected one of \('tpu', 'cuda'"):
        check_lowering(quantized("plain", "int8"), inputs, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("name", "kind"), [("plain", "int4"), ("scanned_stack", "mixed"), ("transformer", "w4a8")]
)
def test_an_abstract_model_has_the_shapes_of_the_real_one(name, kind, backend):
    real = quantized(name, kind, backend)
    made = abstract_model(traced(name)[0], plan_of(name, kind), backend)
    assert shapes_of(made.params) == shapes_of(real.params)


def widen(monkeypatch, name, dtype):
    """Makes one dot multiply its codes in another dtype, and no codes any more."""
    run = quantized_model.run_quantized

    def wide(call, codes, grids, sums):
        numbers = call.eqn.params["dimension_numbers"]
        return jax.lax.dot_general(*(each.astype(dtype) * dtype(300) for each in codes), numbers)

    def run_quantized(call, kernel, *arguments, **options):
        return run(call, wide if call.site.name == name else kernel, *arguments, **options)

    monkeypatch.setattr(quantized_model, "run_quantized", run_quantized)


@pytest.mark.parametrize(("dtype", "name"), [(jnp.float32, "f32"), (jnp.int32, "s32")])
def test_a_site_without_integer_codes_is_named(monkeypatch, dtype, name):
    widen(monkeypatch, "Dense_0/kernel", dtype)
    graph, plan = traced("cnn")[0], plan_of("cnn", "int8")
    message = rf"1 of 3 planned sites .* for tpu: Dense_0/kernel \({name} x {name}\)\. Leave them"
    with pytest.raises(LoweringError, match=message):
        check_plan_lowering(graph, plan, batch_shapes(graph, 3), "tpu")


def test_a_site_that_can_not_be_found_is_named(monkeypatch):
    monkeypatch.setattr(quantized_model, "site_scope", lambda name: "elsewhere")
    graph, plan = traced("plain")[0], plan_of("plain", "int8")
    with pytest.raises(LoweringError, match=r"4 of 4 .*: right \(no multiplication\), left"):
        check_plan_lowering(graph, plan, batch_shapes(graph, 3), "cuda")


# As libtpu writes it: dots are convolutions within fusions within fusions, and estimates stand on
# what is scheduled.
PROGRAM = """
HloModule jit_apply, is_scheduled=true

%inner (p: s8[4,4]) -> s8[4,4] {
  %p = s8[4,4]{1,0:T(8,128)(4,1)} parameter(0)
  ROOT %move = s8[4,4]{1,0:T(8,128)(4,1)} bitcast(%p)
}

%first (q: s8[4,4], v: s4[4,4]) -> f32[4,4] {
  %q = s8[4,4]{1,0:T(8,128)(4,1)} parameter(0)
  %v = s4[4,4]{1,0:T(8,128)(8,1)E(4)} parameter(1)
  %moved = s8[4,4]{1,0:T(8,128)(4,1)} fusion(%q), kind=kLoop, calls=%inner
  %dot.a = s32[4,4]{1,0:T(8,128)} convolution(%moved, %v), metadata={op_name="f/jaxrmils[a]/dot"}
  %dot.b = s32[4,4]{1,0:T(8,128)} convolution(%moved, %q), metadata={op_name="f/jaxrmils[b]/dot"}
  ROOT %y = f32[4,4]{1,0:T(8,128)} convert(%dot.b)
}

%second (r: f32[4,4]) -> f32[4,4] {
  %r = f32[4,4]{1,0:T(8,128)} parameter(0)
  ROOT %dot.c = f32[4,4]{1,0:T(8,128)} convolution(%r, %r), metadata={op_name="f/jaxrmils[c]/dot"}
}

%body (state: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %state = (s32[]{:T(256)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(256)} get-tuple-element(%state), index=0
  %x = f32[4,4]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %z = f32[4,4]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%second, CYCLES(30)
  %w = f32[4,4]{1,0:T(8,128)} negate(%z), metadata={op_name="f/jaxrmils[c]/neg"}, CYCLES(4)
  ROOT %next = (s32[]{:T(256)}, f32[4,4]{1,0:T(8,128)}) tuple(%i, %w)
}

%below (state: (s32[], f32[4,4])) -> pred[] {
  %state = (s32[]{:T(256)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(256)} constant(5)
  %i = s32[]{:T(256)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(1024)} compare(%i, %limit), direction=LT
}

%left (t: f32[4,4]) -> f32[4,4] {
  ROOT %t = f32[4,4]{1,0:T(8,128)} parameter(0), CYCLES(1000)
}

%right (u: f32[4,4]) -> f32[4,4] {
  ROOT %u = f32[4,4]{1,0:T(8,128)} parameter(0), CYCLES(2000)
}

ENTRY %main (h: f32[4,4], k: s4[4,4], n: s32[]) -> f32[4,4] {
  %h = f32[4,4]{1,0:T(8,128)} parameter(0)
  %k = s4[4,4]{1,0:T(8,128)(8,1)E(4)} parameter(1)
  %n = s32[]{:T(256)} parameter(2)
  %codes = s8[4,4]{1,0:T(8,128)(4,1)} convert(%h), metadata={op_name="f/jaxrmils[a]/convert"}, \
CYCLES(7)
  %both = f32[4,4]{1,0:T(8,128)} fusion(%codes, %k), kind=kOutput, calls=%first, CYCLES(100)
  %start = (s32[]{:T(256)}, f32[4,4]{1,0:T(8,128)}) tuple(%n, %both)
  %loop = (s32[]{:T(256)}, f32[4,4]{1,0:T(8,128)}) while(%start), condition=%below, body=%body
  %out = f32[4,4]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %end = f32[4,4]{1,0:T(8,128)} conditional(%n, %out, %out), \
branch_computations={%left, %right}
}
""".replace("CYCLES(", 'backend_config={"window_config":{"estimated_cycles":"')
PROGRAM = "\n".join(
    line[:-1] + '"}}' if "estimated_cycles" in line else line for line in PROGRAM.splitlines()
)


def test_estimates_are_summed_over_loops_and_found_through_fusions():
    cost = text_cost(PROGRAM)
    a, b, c = (cost.sites[name] for name in "abc")
    assert (a.operands, a.is_integer, a.cycles, a.overhead) == ((("s8", "s4"),), True, 100, 7)
    assert (b.operands, b.cycles, b.overhead, b.shares) == ((CODES,), 100, 0, ("a",))
    assert (c.operands, c.is_integer, c.cycles, c.overhead) == (
        (("f32", "f32"),),
        False,
        5 * 30,
        5 * 4,
    )
    assert a.shares == ("b",) and not c.shares
    codes, both = 64 + 16, 16 + 8 + 64  # f32[4,4] to s8; s8, s4 to f32
    assert (a.bytes, b.bytes, c.bytes) == (codes + both, both, 5 * 4 * 64)
    assert (cost.cycles, cost.unknown_loops) == (7 + 100 + 5 * 34 + 2000, 0)
    endless = text_cost(PROGRAM.replace("constant(5)", "parameter(1)"))
    assert (endless.cycles, endless.unknown_loops) == (7 + 100 + 34 + 2000, 1)


def three_layers():
    params = {name: random(4, 4, seed=i) for i, name in enumerate("abc")}
    return trace(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], params, random(2, 4))


def test_estimates_become_a_latency_table():
    whole, dear = text_cost(PROGRAM), text_cost(PROGRAM.replace('cycles":"7"', 'cycles":"9"'))
    assert (whole.sites["a"].divided, whole.sites["c"].divided) == (50, 150)
    programs = {THIS_PLAN: dear, "float32": dear, "bfloat16": dear, "w4a8": whole, "int8": whole}
    found = latency_table(Comparison("tpu:v5e", programs, {}), three_layers(), batch_size=2)
    formats = {"float": 59, "w4a8": 57, "w8a8": 57}
    assert found.seconds["a"] == {n: pytest.approx(c / 1.5e9) for n, c in formats.items()}
    assert found.seconds["b"]["w8a8"] == pytest.approx(50 / 1.5e9)
    assert found.seconds["c"]["float"] == pytest.approx(170 / 1.5e9)
    assert found.overhead == pytest.approx(2000 / 1.5e9)
    assert found.backend == "tpu" and "assumed clock of 1.5 GHz" in found.source
    slow = latency_table(
        Comparison("tpu:v5e", programs, {}), three_layers(), batch_size=2, clock=1e9
    )
    assert slow.overhead == pytest.approx(2e-6) and "1 GHz" in slow.source


@pytest.mark.parametrize(
    ("target", "names", "refused", "message"),
    [
        ("tpu:v4", ["w8a8"], {}, "needs float32 and a format"),
        ("tpu:v4", ["float32"], {"int4": "no"}, r"int4 could not be compiled \(no\)"),
        ("cuda:h100", ["float32", "w8a8"], {}, "estimates no cycles"),
    ],
)
def test_what_a_latency_table_lacks_is_said(target, names, refused, message):
    silent = PROGRAM.replace("estimated_cycles", "elapsed") if "cuda" in target else PROGRAM
    found = Comparison(target, dict.fromkeys(names, text_cost(silent)), refused)
    with pytest.raises(LoweringError, match=message):
        latency_table(found, three_layers(), batch_size=2)


def test_compiled_float_sites_are_named():
    graph = three_layers()
    plan = uniform(tabulate(graph), "int8")
    with pytest.raises(LoweringError, match=r"1 of 3 planned .* for tpu:v4: c \(f32 x f32\)"):
        check_compiled(graph, plan, text_cost(PROGRAM), "tpu:v4")
    check_compiled(
        graph, uniform(tabulate(graph), "int8", skip=("c",)), text_cost(PROGRAM), "tpu:v4"
    )


def test_targets_are_named_and_say_what_they_need(monkeypatch):
    with pytest.raises(LoweringError, match=r"'tpu:v5'; did you mean tpu:v5p\? Known .*tpu:v6e"):
        find_target("tpu:v5")
    with pytest.raises(LoweringError, match=r"lowered to StableHLO .* one of tpu:v4, tpu:v5e"):
        compile_for("cuda", jnp.sin, jnp.ones(2))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [t.name for t in targets().values() if t.is_installed] == ["tpu", "cuda"]
    with pytest.raises(ImportError, match=r"is not installed: pip install 'jaxrmils\[tpu"):
        compile_for("tpu:v5e", jnp.sin, jnp.ones(2))


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    before = dict(os.environ)
    with without_devices():
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert dict(os.environ) == before

"""What the compiled programs hold; run with the jax that is installed."""

import jax
import jax.numpy as jnp
import pytest
from models import MODELS, random, resized
from plans import integer_site_names, quantized
from stages import traced

from jaxrmils import calibrate, quantize, tabulate, trace, uniform
from jaxrmils.lowering import (
    EXACT_FLOAT,
    WIDENED,
    LoweringError,
    assert_integer,
    check_integer_sites,
    integer_sites,
    quantized_model,
)


def compiled_text(built, inputs, **kwargs):
    run = jax.jit(lambda params, inputs: built.apply(params, inputs, **kwargs))
    return run.lower(built.params, inputs).compile().as_text()


def expected_kinds(site, eqn):
    """The operations that a site may become."""
    if site.kind == "dot":
        batched = bool(eqn.params["dimension_numbers"][1][0])
        is_exact = batched and site.weight is None
        return {EXACT_FLOAT} if is_exact else {"dot", WIDENED["dot"], "multiply"}
    depthwise = eqn.params["feature_group_count"] == site.operands[0].shape[-1] > 1
    # A 1x1 convolution is a dot.
    return {"multiply"} if depthwise else {*WIDENED, *WIDENED.values()}


@pytest.mark.parametrize("kind", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_integer_operations_at_every_planned_site_and_no_other(name, kind):
    graph, _, inputs = traced(name)
    # One row takes other formulations than four.
    inputs = resized(inputs, 1) if kind == "int4" else inputs
    found = integer_sites(compiled_text(quantized(name, kind), inputs))
    assert set(found) == integer_site_names(name, kind)
    for site, eqn in zip(graph.sites, graph.traced.eqns, strict=True):
        if site.name in found:
            assert found[site.name] <= expected_kinds(site, eqn)


@pytest.mark.parametrize("name", ["cnn", "transformer", "lstm"])
def test_weight_only_and_simulation_hold_no_integer_operation(name):
    _, _, inputs = traced(name)
    assert integer_sites(compiled_text(quantized(name, "w8"), inputs)) == {}
    simulated = compiled_text(quantized(name, "int4"), inputs, mode="simulate")
    # The simulation multiplies the codes of short products as the model does on CPU.
    assert all(kinds == {EXACT_FLOAT} for kinds in integer_sites(simulated).values())


def test_vmap_keeps_integers():
    _, _, inputs = traced("tied_embedding")
    built = quantized("tied_embedding", "int8")
    run = jax.jit(jax.vmap(built.apply, in_axes=(None, 0)))
    text = run.lower(built.params, jnp.stack([inputs, inputs])).compile().as_text()
    assert set(integer_sites(text)) == integer_site_names("tied_embedding", "int8")


def test_large_dots_and_convolutions_reach_the_int8_kernels():
    params = {"conv": random(3, 3, 32, 32) * 0.1, "w": random(2048, 64, seed=2) * 0.1}

    def apply(params, x):
        layouts = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=layouts
        )
        return jnp.tanh(y.reshape(y.shape[0], -1) @ params["w"])

    x = random(4, 8, 8, 32)
    graph = trace(apply, params, x)
    ranges = calibrate(graph, params, [x], estimator="minmax")
    built = quantize(graph, params, uniform(tabulate(graph), "int8"), ranges, backend="cpu")
    assert check_integer_sites(built, x) == {"conv": {"convolution"}, "w": {"dot"}}
    if jax.__version_info__ >= (0, 12) and jax.default_backend() == "cpu":
        assert "__ynn_fusion" in compiled_text(built, x)


def test_missing_operations_are_named(monkeypatch):
    built = quantized("plain", "int8")
    inputs = traced("plain")[2]
    assert_integer(built, inputs)
    monkeypatch.setattr(quantized_model, "site_scope", lambda name: "elsewhere")
    with pytest.raises(LoweringError, match=r"4 of 4 planned sites hold no integer.*right, left"):
        assert_integer(built, inputs)


TEXT = """
HloModule jit_f

%body (state: (s32[], s32[4,4], f32[4,4])) -> (s32[], s32[4,4], f32[4,4]) {
  %state = (s32[], s32[4,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = s32[4,4]{1,0} get-tuple-element(%state), index=1
  %x = f32[4,4]{1,0} get-tuple-element(%state), index=2
  %codes = s8[4,4]{1,0} convert(%x)
  %wide = s32[4,4]{1,0} convert(%codes)
  %dot.1 = s32[4,4]{1,0} dot(%wide, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %y = f32[4,4]{1,0} convert(%dot.1), metadata={op_name="jit(f)/while/jaxrmils[a/kernel#1]/mul"}
  ROOT %next = (s32[], s32[4,4]{1,0}, f32[4,4]{1,0}) tuple(%i, %w, %y)
}

ENTRY %main (p: s8[4,4], q: f32[4,4], n: s32[4,4]) -> (s32[], s32[4,4], f32[4,4]) {
  %p = s8[4,4]{1,0} parameter(0)
  %q = f32[4,4]{1,0} parameter(1)
  %n = s32[4,4]{1,0} parameter(2)
  %hoisted = s32[4,4]{1,0} convert(%p)
  %zero = s32[] constant(0)
  %dot.2 = s32[4,4]{1,0} dot(%n, %hoisted), metadata={op_name="jit(f)/jaxrmils[b]/dot_general"}
  %dot.3 = f32[4,4]{1,0} dot(%q, %q), metadata={op_name="jit(f)/jaxrmils[c]/dot_general"}
  %multiply = s32[4,4]{1,0} multiply(%n, %n), metadata={op_name="jit(f)/jaxrmils[d]/mul"}
  %start = (s32[], s32[4,4]{1,0}, f32[4,4]{1,0}) tuple(%zero, %hoisted, %q)
  ROOT %loop = (s32[], s32[4,4]{1,0}, f32[4,4]{1,0}) while(%start), condition=%c, body=%body
}
"""


def test_operands_are_followed_out_of_loops_and_metadata_to_readers():
    # dot.2 multiplies an int32 that was never a code; dot.3 is float.
    assert integer_sites(TEXT) == {"a/kernel@1": {WIDENED["dot"]}}


def test_text_without_instructions():
    assert integer_sites("") == {}


def built_from(apply, params, x, format="w8a8"):
    graph = trace(apply, params, x)
    ranges = calibrate(graph, params, [x])
    return quantize(graph, params, uniform(tabulate(graph), format), ranges)


@pytest.mark.parametrize("format", ["w8a8", "w8a8d"])
@pytest.mark.parametrize(
    ("shape", "kind"), [((4, 6, 8), EXACT_FLOAT), ((4, 6, 1), "multiply"), ((4, 1, 8), "multiply")]
)
def test_products_of_two_activations(format, shape, kind):
    def apply(p, x):
        h = jnp.tanh(x * p["w"])
        return jax.lax.dot_general(h, h + 1, (((2,), (2,)), ((0,), (0,))))

    x = random(*shape)
    built = built_from(apply, {"w": jnp.float32(0.7)}, x, format)
    kinds = check_integer_sites(built, x)
    assert kinds == {"dot_0": {kind}}
    if kind == EXACT_FLOAT:
        with pytest.raises(
            LoweringError, match=r"1 of 1 planned sites multiply .* float32 .*dot_0"
        ):
            assert_integer(built, x)
    else:
        assert_integer(built, x)


def test_float_products_of_integer_inputs_are_not_products_of_codes():
    def apply(p, x):
        rows = p["e"][x]
        pixels = x.astype(jnp.float32)
        shifted = jnp.einsum("bt,bs->bts", pixels - p["m"], pixels + jnp.tanh(p["m"]))
        return jnp.einsum("btd,bsd->bts", rows, rows) + shifted

    params = {"e": random(9, 5), "m": random(7)}
    x = jnp.arange(21, dtype=jnp.uint8).reshape(3, 7) % 9
    assert integer_sites(compiled_text(built_from(apply, params, x, "float"), x)) == {}

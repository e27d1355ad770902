"""Every quantized site of every reference model, against numpy and against its simulation."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, model, resized
from plans import FORMATS, integer_site_names, quantized
from stages import calibrated, float64, table_of, traced

from jaxrmils import calibrate, load_model, quantize, save_model, tabulate, trace, uniform
from jaxrmils.graph import interpret
from jaxrmils.lowering.sites import exact_kernel, integer_kernel, run_quantized
from jaxrmils.numerics import dequantize, fake_quant
from jaxrmils.numerics import quantize as quantize_codes
from jaxrmils.numerics.packing import BITCASTS

INTEGER_FORMATS = [f for f in FORMATS if f not in ("w8", "w4")]


# Sites alone: the same operands for the integer and the simulated kernel


def site_results(name, kind):
    """Per integer site (operands, codes, integer output, simulated output), in one program."""
    graph, _, inputs = traced(name)
    built = quantized(name, kind)
    roundings = {}
    for layer, sites in graph.layers.items():
        remaining = iter(built.plan.layers[layer].rounding)
        for site in sites:
            roundings[site.name] = tuple(itertools.islice(remaining, len(site.activations)))
    wanted = integer_site_names(name, kind)

    def handler(call):
        if call.site.name not in wanted:
            if call.weight is None:
                return call.bind(*call.operands()), None
            operands = [
                call.view(call.weight.tensor.dequantize(jnp.dtype(o.dtype)))
                if o.role == "weight"
                else call.operand(i)
                for i, o in enumerate(call.site.operands)
            ]
            return call.bind(*operands), None
        tensor, sums = None, None
        if call.weight is not None:
            tensor, sums = call.weight.tensor, call.weight.sums[call.site.name]
        rest = (tensor, sums, call.state, roundings[call.site.name])
        integer, codes = run_quantized(call, integer_kernel("cpu"), *rest)
        simulated, again = run_quantized(call, exact_kernel, *rest)
        operands = [call.operand(i) for i in call.site.activations]
        fakes = [
            fake_quant(x, g, r) for x, g, r in zip(operands, call.state, rest[-1], strict=True)
        ]
        restored = [
            dequantize(c, g, x.dtype) for c, g, x in zip(codes, call.state, operands, strict=True)
        ]
        return integer, {
            "integer": integer,
            "simulated": simulated,
            "codes": codes,
            "codes again": again,
            "fake": fakes,
            "restored": restored,
            "grids": call.state,
        }

    def run(params, inputs):
        leaves = [params.leaves.get(leaf) for leaf in graph.leaf_names]
        folded = {name: params.leaves[name] for name in graph.folds}
        given = {"weights": params.weights, "state": params.grids, "folded": folded}
        return interpret(graph, handler, leaves, inputs, **given)[1]

    return jax.device_get(jax.jit(run)(built.params, inputs))


def numpy_dot(lhs, rhs, numbers):
    """An int64 dot, by einsum."""
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = numbers
    letters = iter("abcdefghijklmnop")
    left, right = [""] * lhs.ndim, [""] * rhs.ndim
    for axes in ((lhs_batch, rhs_batch), (lhs_contracting, rhs_contracting)):
        for i, j in zip(*axes, strict=True):
            left[i] = right[j] = next(letters)
    out = [left[i] for i in lhs_batch]
    for side in (left, right):
        for i, letter in enumerate(side):
            if not letter:
                side[i] = next(letters)
                out.append(side[i])
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", lhs, rhs)


def numpy_conv(lhs, rhs, params):
    """An int64 convolution of NHWC by HWIO, tap by tap."""
    assert params["lhs_dilation"] == params["rhs_dilation"] == (1, 1)
    lhs = np.pad(lhs, [(0, 0), *params["padding"], (0, 0)])
    groups, strides = params["feature_group_count"], params["window_strides"]
    taps, features = rhs.shape[:2], rhs.shape[3]
    sizes = [(n - t) // s + 1 for n, t, s in zip(lhs.shape[1:3], taps, strides, strict=True)]
    out = np.zeros((lhs.shape[0], *sizes, features), np.int64)
    inputs, outputs = rhs.shape[2], features // groups
    for (i, j), g in itertools.product(itertools.product(*map(range, taps)), range(groups)):
        rows, columns = (
            slice(start, start + (n - 1) * s + 1, s)
            for start, n, s in zip((i, j), sizes, strides, strict=True)
        )
        part = lhs[:, rows, columns, g * inputs : (g + 1) * inputs]
        here = slice(g * outputs, (g + 1) * outputs)
        out[..., here] += part @ rhs[i, j, :, here]
    return out


def reference_output(graph, built, site, record, index):
    """The output of one iteration: int64 products, then scales in float32.

    The weight's scales belong to the output's last axes, or lead where the weight is the left
    operand; `numpy_dot` of ones puts them there.
    """
    eqn = graph.traced.eqns[graph.sites.index(site)]
    codes, scales = [None, None], [None, None]
    stacked = tuple(i for i, loop in zip(index, site.loops, strict=True) if loop.stacked)
    for position, operand in enumerate(site.activations):
        grid = record["grids"][position]
        codes[operand] = record["codes"][position][index].astype(np.int64)
        codes[operand] = codes[operand] - np.asarray(grid.zero_point)[index]
        scales[operand] = np.broadcast_to(np.asarray(grid.scale)[index], codes[operand].shape)
    if site.weight is not None:
        tensor = built.params.weights[site.weight.name].tensor
        weight = np.asarray(tensor.codes(), np.int64)[stacked]
        scale = np.broadcast_to(np.asarray(tensor.scale), tensor.shape)[stacked]
        if site.weight.permutation is not None:
            weight, scale = (x.transpose(site.weight.permutation) for x in (weight, scale))
        codes[site.weight.operand], scales[site.weight.operand] = weight, scale
    if site.kind == "conv":
        act, kernel = float(scales[0].flat[0]), scales[1][0, 0, 0]
        return numpy_conv(*codes, eqn.params), np.float32(act) * kernel
    # Scales are constant along the contraction: the product of the operands' first slices.
    numbers = eqn.params["dimension_numbers"]
    firsts = []
    for scale, axes in zip(scales, numbers[0], strict=True):
        for axis in axes:
            scale = np.take(scale, [0], axis)
        firsts.append(scale)
    return numpy_dot(*codes, numbers), numpy_dot(*firsts, numbers)


def check_sites(name, kind):
    """Bit equality of every site's integer operation, its simulation and numpy."""
    graph, _, _ = traced(name)
    built = quantized(name, kind)
    results = site_results(name, kind)
    assert set(results) == integer_site_names(name, kind)
    for site in graph.sites:
        if site.name not in results:
            continue
        record = results[site.name]
        np.testing.assert_array_equal(record["integer"], record["simulated"])
        for one, two in (("codes", "codes again"), ("fake", "restored")):
            for a, b in zip(record[one], record[two], strict=True):
                np.testing.assert_array_equal(a, b)
        for codes, grid in zip(record["codes"], record["grids"], strict=True):
            assert codes.dtype == np.int8
            assert np.abs(codes.astype(int)).max() <= 2 ** (grid.bits - 1)
        shape = record["integer"].shape[: len(site.loops)]
        for index in np.ndindex(*shape):
            if not any(np.any(f[index]) for f in record["fake"]):
                continue  # A branch that was not taken leaves zeros.
            total, scale = reference_output(graph, built, site, record, index)
            expected = total.astype(np.int32).astype(np.float32) * scale.astype(np.float32)
            expected = expected.astype(record["integer"].dtype)
            np.testing.assert_array_equal(record["integer"][index], expected)


@pytest.mark.parametrize("kind", INTEGER_FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_sites_bit_for_bit(name, kind):
    check_sites(name, kind)


# The whole model


@pytest.mark.parametrize("name", ["cnn", "nnx_transformer", "scanned_stack", "cond_data"])
def test_the_model_and_its_simulation(name):
    _, _, inputs = traced(name)
    built = quantized(name, "mixed")
    run = jax.jit(built.apply_with_codes, static_argnames="mode")
    outputs, codes = run(built.params, inputs)
    simulated, simulated_codes = run(built.params, inputs, mode="simulate")
    # The float parts compile differently, so a code may move by one where it was between two.
    alone = {site: record["codes"] for site, record in site_results(name, "mixed").items()}
    assert codes.keys() == simulated_codes.keys() == alone.keys()
    for site, values in codes.items():
        for a, b, c in zip(values, simulated_codes[site], alone[site], strict=True):
            for other in (b, c):
                difference = np.abs(np.int32(a) - np.int32(other))
                assert difference.max() <= 1 and difference.mean() < 0.01
    np.testing.assert_allclose(float64(outputs), float64(simulated), atol=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_weight_only_is_the_float_model_on_dequantized_weights(name):
    graph, params, inputs = traced(name)

    def handler(call):
        operands = [
            call.view(call.weight).astype(o.dtype)
            if o.role == "weight" and call.weight is not None
            else call.operand(i)
            for i, o in enumerate(call.site.operands)
        ]
        return call.bind(*operands), None

    def outputs(built, quantized_params, leaves, inputs):
        weights = {n: w.tensor.dequantize() for n, w in quantized_params.weights.items()}
        expected = interpret(graph, handler, leaves, inputs, weights=weights)[0]
        return built.apply(quantized_params, inputs), expected

    models = [quantized(name, "w8"), quantized(name, "w4")]
    run = jax.jit(
        lambda params, leaves, inputs: [
            outputs(built, p, leaves, inputs) for built, p in zip(models, params, strict=True)
        ]
    )
    results = run([built.params for built in models], jax.tree.leaves(params), inputs)
    for found, expected in results:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert found.dtype == expected.dtype
        tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            float64(found), float64(expected), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("name", ["transformer", "cnn", "lstm", "tied_embedding"])
def test_int8_is_close_to_float(name):
    apply, params, inputs = model(name)
    ranges = calibrate(traced(name)[0], params, [inputs], estimator="minmax")
    built = quantize(traced(name)[0], params, uniform(table_of(name), "int8"), ranges)
    expected = float64(apply(params, inputs))
    error = np.abs(float64(jax.jit(built)(inputs)) - expected).max() / np.abs(expected).max()
    assert error < 0.05


@pytest.mark.parametrize("name", ["tied_embedding", "scanned_stack", "cond_data"])
def test_other_batch_sizes_and_vmap(name):
    _, _, inputs = traced(name)
    built = quantized(name, "mixed")
    whole = np.asarray(jax.jit(built)(inputs))
    one = np.asarray(jax.jit(built)(resized(inputs, 1)))
    np.testing.assert_allclose(one, whole[:1], atol=1e-5)
    seven = np.asarray(jax.jit(built)(resized(inputs, 7)))
    np.testing.assert_allclose(seven, whole[np.arange(7) % 4], atol=1e-5)
    pair = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), inputs)
    mapped = np.asarray(jax.jit(jax.vmap(built.apply, in_axes=(None, 0)))(built.params, pair))
    np.testing.assert_allclose(mapped, np.stack([whole, whole[::-1]]), atol=1e-5)


def quantizations(built, params, inputs):
    """How many arrays are made codes of."""
    text = str(jax.make_jaxpr(built.apply)(params, inputs))
    return len(re.findall(r"= convert_element_type\[\s*new_dtype=int8", text))


@pytest.mark.parametrize("name", ["transformer", "nnx_transformer", "scanned_stack"])
def test_an_input_of_several_sites_is_quantized_once(name):
    _, _, inputs = traced(name)
    built = quantized(name, "int8")
    # Every grid moved a little on its own: now no two sites have one in common.
    factors = iter(np.linspace(1.0, 1.01, 2 * len(built.params.grids), dtype=np.float32))
    grids = {
        site: tuple(dataclasses.replace(g, scale=g.scale * next(factors)) for g in parts)
        for site, parts in built.params.grids.items()
    }
    params = dataclasses.replace(built.params, grids=grids)
    apart = dataclasses.replace(built, params=params)
    operands = sum(map(len, grids.values()))
    assert quantizations(apart, params, inputs) == operands
    queries = sum("query" in site for site in grids)
    assert quantizations(built, built.params, inputs) == operands - 2 * queries
    codes = built.apply_with_codes(built.params, inputs)[1]
    assert set(codes) == set(grids)


def test_rows_outside_an_embedding_table_are_what_they_are_in_float():
    apply, params, inputs = model("tied_embedding")
    outside = inputs.at[1, 0].set(99)
    wanted = np.isnan(apply(params, outside))
    assert wanted.any() and not wanted.all()
    for kind in ("w8", "w4"):
        built = quantized("tied_embedding", kind)
        np.testing.assert_array_equal(np.isnan(jax.jit(built)(outside)), wanted)


def test_jit_equals_eager():
    _, _, inputs = traced("plain")
    built = quantized("plain", "mixed")
    np.testing.assert_allclose(jax.jit(built)(inputs), built(inputs), atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "w4", "mixed"])
def test_bfloat16_stays_bfloat16(kind):
    apply, params, inputs = model("bfloat16_transformer")
    built = quantized("bfloat16_transformer", kind)
    found = jax.eval_shape(built.apply, built.params, inputs)
    assert found == jax.eval_shape(apply, params, inputs)
    assert found.dtype == jnp.bfloat16


# Parameters and sizes


@pytest.mark.parametrize(
    "name", ["separable_cnn", "transformer", "scanned_stack", "tied_embedding"]
)
def test_int4_weights_unpacked_once(name, tmp_path):
    apply, params, inputs = model(name)
    packed = quantized(name, "w4a8")
    plan, ranges = packed.plan, calibrated(name)
    wide = quantize(traced(name)[0], params, plan, ranges, backend="cpu", unpacked=True)
    np.testing.assert_array_equal(jax.jit(wide)(inputs), jax.jit(packed)(inputs))
    assert wide.size_bits == packed.size_bits
    text = str(jax.make_jaxpr(wide.apply)(wide.params, inputs))
    assert "shift" not in text and "shift" in str(jax.make_jaxpr(packed)(inputs))
    save_model(wide, tmp_path / "wide")
    save_model(packed, tmp_path / "packed")
    files = [(tmp_path / n / "arrays.safetensors").read_bytes() for n in ("wide", "packed")]
    assert files[0] == files[1]
    loaded = load_model(tmp_path / "packed", apply, params=params, unpacked=True)
    np.testing.assert_array_equal(jax.jit(loaded)(inputs), jax.jit(packed)(inputs))
    for found in (wide, loaded):
        bytes_of = {w.tensor.values.dtype.name for w in found.params.weights.values()}
        assert bytes_of == {"int8"}


@pytest.mark.skipif(not BITCASTS, reason="seen by the bitcast, which is for later versions of jax")
@pytest.mark.parametrize("kind", ["w4a8", "w4"])
def test_int4_codes_are_not_unpacked_for_every_pixel(kind):
    built = quantized("separable_cnn", kind)
    compiled = jax.jit(built.apply).lower(built.params, traced("separable_cnn")[2]).compile()
    unpacking = [part for part in compiled.as_text().split("\n\n") if "s4[" in part]
    assert len(unpacking) >= sum(w.tensor.packed for w in built.params.weights.values())
    # Nothing else is in those loops: they end with the codes, in the shape of the bytes.
    for loop in unpacking:
        assert re.search(r"ROOT \S+ = s8\[[\d,]+,2\]\S* convert\(", loop), loop


@pytest.mark.parametrize(
    "form, rows, dtype",
    [
        ("w8a8", 256, "int16"),
        ("w8a8", 257, "int32"),
        ("w4a8", 4096, "int16"),
        ("w4a8", 4097, "int32"),
    ],
)
def test_sums_of_codes_are_as_short_as_they_fit(form, rows, dtype):
    params = {"w": jnp.stack([-jnp.ones(rows), jnp.ones(rows)], axis=-1)}
    inputs = jax.random.uniform(jax.random.key(0), (3, rows), minval=-1.0, maxval=5.0)
    graph = trace(lambda params, x: x @ params["w"], params, inputs)
    plan = uniform(tabulate(graph), form)
    built = quantize(graph, params, plan, calibrate(graph, params, [inputs]))
    (weight,) = built.params.weights.values()
    (sums,) = weight.sums.values()
    codes = np.asarray(weight.tensor.codes(), np.int64)
    assert sums.dtype == dtype and abs(codes).max() == (127 if form == "w8a8" else 7)
    np.testing.assert_array_equal(sums, codes.sum(axis=0))
    ((grid,),) = built.params.grids.values()
    shifted = np.asarray(quantize_codes(inputs, grid), np.int64) - int(grid.zero_point)
    scale = np.asarray(weight.tensor.scale, np.float64).ravel() * float(grid.scale)
    np.testing.assert_allclose(jax.jit(built)(inputs), (shifted @ codes) * scale, rtol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_size_and_storage_by_hand(name, kind):
    graph, params, _ = traced(name)
    built = quantized(name, kind)
    # Leaves that are one in the model count as they were.
    floats = [leaf for n, leaf in built.params.leaves.items() if n not in graph.folds]
    floats += [jax.tree.leaves(params)[i] for n in graph.folds for i in graph.folded_leaves(n)]
    size = sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in floats)
    for weight_name, stored in built.params.weights.items():
        bits = built.plan.layers[weight_name].weight_bits
        weight = graph.weights[weight_name]
        assert stored.tensor.values.dtype == (jnp.uint8 if bits == 4 else jnp.int8)
        rows = int(np.prod(weight.shape[:-1]))
        per_row = -(-weight.shape[-1] // 2) if bits == 4 else weight.shape[-1]
        assert stored.tensor.values.size == rows * per_row
        size += bits * weight.size + 32 * stored.tensor.scale.size
    for grids in built.params.grids.values():
        size += sum((32 + 8) * grid.scale.size for grid in grids)
    assert built.size_bits == size
    # A leaf is kept in float only if something reads it in float.
    quantized_leaves = {
        leaf
        for n, w in graph.weights.items()
        if built.plan.layers[n].weight_bits < 32
        for leaf in w.leaves
    }
    float_leaves = set(graph.traced.float_leaves) | {
        leaf
        for n, w in graph.weights.items()
        if built.plan.layers[n].weight_bits == 32
        for leaf in w.leaves
    }
    for index in quantized_leaves - float_leaves:
        assert graph.leaf_names[index] not in built.params.leaves
    assert len(built.params.leaves) <= len(jax.tree.leaves(params))

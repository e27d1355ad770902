"""Quantized models: bit-identical outputs after a round trip, and no wrong model in silence."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

from jaxrmils import calibrate, from_linen, quantize, tabulate, trace, uniform
from jaxrmils.artifacts import (
    ArtifactError,
    describe,
    load_model,
    load_plan,
    load_scores,
    save_model,
    save_plan,
)

CASES = [
    ("scanned_stack", "w4a8"),
    ("nnx_stack", "int4"),
    ("tied_embedding", "w4"),
    ("bfloat16", "w4a8"),
    ("cond_data", "int8"),
    ("experts", "int4"),
]
NEW_PROCESS = ("bfloat16", "scanned_stack", "tied_embedding")
"""Models whose outputs are compared with those of a new process."""


def bfloat16():
    """Parameters, inputs and outputs in bfloat16."""

    def apply(params, x):
        x = jnp.tanh(x @ params["first"] + params["bias"])
        return x @ params["second"]

    params = {
        "first": models.random(6, 7, seed=4, dtype=jnp.bfloat16),
        "bias": models.random(7, seed=5, dtype=jnp.bfloat16),
        "second": models.random(7, 5, seed=6, dtype=jnp.bfloat16),
    }
    return apply, params, models.random(4, 6, dtype=jnp.bfloat16)


def example(name):
    """A model by name."""
    return bfloat16() if name == "bfloat16" else models.model(name)


def quantized(apply, params, inputs, format, **options):
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs], estimator="minmax")
    return quantize(graph, params, uniform(tabulate(graph), format), ranges, **options)


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture(scope="module")
def dense():
    """apply, params, inputs and a w4a8 model of one layer with a bias."""

    def apply(params, x):
        return x @ params["w"] + params["b"]

    params = {"w": models.random(6, 5), "b": models.random(5, seed=2)}
    inputs = models.random(4, 6, seed=3)
    return apply, params, inputs, quantized(apply, params, inputs, "w4a8")


@pytest.mark.parametrize("name, format", CASES)
def test_round_trip(tmp_path, name, format):
    apply, params, inputs = example(name)
    model = quantized(apply, params, inputs, format)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", apply)
    assert_identical(loaded.params, model.params)
    assert loaded.plan == model.plan and loaded.sizes == model.sizes
    assert loaded.backend == model.backend and loaded.size_bits == model.size_bits
    if name not in NEW_PROCESS:
        expected = jax.jit(model.apply)(model.params, inputs)
        assert_identical(jax.jit(loaded.apply)(loaded.params, inputs), expected)
    save_model(loaded, tmp_path / "again")
    for file in ("arrays.safetensors", "plan.json", "manifest.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


SCRIPT = """
import sys
import jax, numpy as np
jax.config.update("jax_numpy_dtype_promotion", "strict")
from test_model_file import example
from jaxrmils.artifacts import load_model
folder, *names = sys.argv[1:]
for name in names:
    apply, _, inputs = example(name)
    loaded = load_model(f"{folder}/{name}", apply)
    outputs = jax.tree.leaves(jax.jit(loaded.apply)(loaded.params, inputs))
    np.savez(f"{folder}/{name}.npz", *[np.asarray(x).view(np.uint8) for x in outputs])
"""


def test_a_new_process_gives_the_same_bits(tmp_path):
    expected = {}
    for name in NEW_PROCESS:
        apply, params, inputs = example(name)
        model = quantized(apply, params, inputs, "w4a8")
        save_model(model, tmp_path / name)
        expected[name] = jax.tree.leaves(jax.jit(model.apply)(model.params, inputs))
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *NEW_PROCESS],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for name in NEW_PROCESS:
        with np.load(tmp_path / f"{name}.npz") as found:
            assert len(found.files) == len(expected[name])
            for key, want in zip(found.files, expected[name], strict=True):
                assert_identical(found[key], np.asarray(want).view(np.uint8))


@pytest.mark.parametrize("format", ["int8", "int4", "w4a8"])
def test_the_arrays_take_the_size_that_is_reported(tmp_path, format):
    def apply(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    params = [models.random(511, 511, seed=i) / 20.0 for i in range(3)]
    model = quantized(apply, params, models.random(4, 511), format)
    save_model(model, tmp_path / "m")
    on_disk = (tmp_path / "m" / "arrays.safetensors").stat().st_size
    # The sums for zero points, the header, and half a byte for every row of an odd length.
    assert model.size_bits / 8 <= on_disk <= 1.03 * model.size_bits / 8
    assert describe(tmp_path / "m")["sizes"]["size_bits"] == model.size_bits


def test_another_backend(tmp_path, dense):
    apply, params, inputs, on_cpu = dense
    on_tpu = quantized(apply, params, inputs, "w4a8", backend="tpu")
    assert on_tpu.params.weights["w"].tensor.values.dtype == jnp.int4
    save_model(on_cpu, tmp_path / "cpu")
    save_model(on_tpu, tmp_path / "tpu")
    arrays = [(tmp_path / b / "arrays.safetensors").read_bytes() for b in ("cpu", "tpu")]
    assert arrays[0] == arrays[1]  # int4 at rest is two per byte wherever it was made
    for folder in ("cpu", "tpu"):
        for backend, expected in (("cpu", on_cpu), ("tpu", on_tpu)):
            loaded = load_model(tmp_path / folder, apply, backend=backend)
            assert loaded.backend == backend
            assert_identical(loaded.params, expected.params)
    assert load_model(tmp_path / "tpu", apply).backend == "tpu"
    with pytest.raises(ArtifactError, match="backend is 'gpu'; expected one of"):
        load_model(tmp_path / "cpu", apply, backend="gpu")


def test_trees_of_dicts_lists_tuples_and_none(tmp_path):
    def apply(params, inputs):
        (w, nothing), scale = params["layers"][0], params[1] if 1 in params else params["scale"]
        return {"out": (inputs["x"][0] @ w * scale,), "none": nothing}

    params = {"layers": [(models.random(6, 5), None), ()], "scale": 2.0}
    inputs = {"x": [models.random(4, 6)], "none": None}
    model = quantized(apply, params, inputs, "int8")
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", apply)
    assert jax.tree.structure(loaded.graph.params) == jax.tree.structure(model.graph.params)
    assert jax.tree.leaves(loaded.graph.params) == jax.tree.leaves(model.graph.params)
    assert_identical(loaded(inputs), model(inputs))


def test_other_containers_are_passed_by_the_user(tmp_path):
    module, inputs = nn.Dense(3), models.random(4, 6)
    apply, params = from_linen(module, freeze(module.init(jax.random.key(0), inputs)))
    model = quantized(apply, params, inputs, "int8")
    save_model(model, tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"FrozenDict.*pass params=\.\.\.") as caught:
        load_model(tmp_path / "m", apply)
    assert "manifest.json" in str(caught.value)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for given in (params, structs):
        loaded = load_model(tmp_path / "m", apply, params=given, inputs=inputs)
        assert_identical(loaded(inputs), model(inputs))
    with pytest.raises(ArtifactError, match="params kernel is only in the artifact"):
        load_model(tmp_path / "m", apply, params={"params": {"bias": params["params"]["bias"]}})


def test_prng_keys_among_the_parameters_come_back(tmp_path):
    def apply(params, x):
        return x @ params["w"]

    params = {"w": models.random(6, 5), "rng": jax.random.key(7, impl="rbg")}
    inputs = models.random(4, 6)
    model = quantized(apply, params, inputs, "int8")
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", apply)
    assert loaded.params.leaves["rng"].dtype == params["rng"].dtype
    expected = jax.random.key_data(params["rng"])
    assert (jax.random.key_data(loaded.params.leaves["rng"]) == expected).all()
    assert_identical(loaded(inputs), model(inputs))


def test_leaves_that_can_not_be_saved_are_named(tmp_path):
    params = {"w": models.random(6, 5), "extra": jnp.ones(3, jnp.int4)}
    model = quantized(lambda p, x: x @ p["w"], params, models.random(4, 6), "int8")
    with pytest.raises(ArtifactError, match="leaves/extra has the dtype int4, which can't be"):
        save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_64_bits_need_a_jax_that_holds_them(tmp_path):
    def apply(params, x):
        return x @ params["w"] + params["b"].astype(jnp.float32)

    inputs = models.random(4, 6)
    with jax.enable_x64(True):
        params = {"w": models.random(6, 5), "b": jnp.ones(5, jnp.float64) / 3.0}
        model = quantized(apply, params, inputs, "int8")
        save_model(model, tmp_path / "m")
        assert_identical(load_model(tmp_path / "m", apply)(inputs), model(inputs))
    with pytest.raises(ArtifactError, match=r"params b is float64.*jax_enable_x64"):
        load_model(tmp_path / "m", apply)


@pytest.mark.parametrize(
    "apply, message",
    [
        (lambda p, x: x @ p["v"], "can't be traced at the shapes of the saved model: .*KeyError"),
        (lambda p, x: x[:, :3] @ p["w"][:3] + p["b"], "site w is a dot of .* in the given model"),
        (lambda p, x: x * 2.0 + p["b"][0], "site w is only in the artifact"),
        (lambda p, x: (x @ p["w"]) @ (p["b"][:, None]), "site b is only in the given model"),
    ],
)
def test_another_function_is_refused(tmp_path, dense, apply, message):
    save_model(dense[3], tmp_path / "m")
    with pytest.raises(ArtifactError, match=message) as caught:
        load_model(tmp_path / "m", apply)
    assert str(tmp_path / "m") in str(caught.value)


def test_params_of_another_shape_are_named(tmp_path, dense):
    apply, params, _, model = dense
    save_model(model, tmp_path / "m")
    wider = {"w": jnp.ones((6, 7)), "b": jnp.ones(7)}
    expected = r"another model .*params w is float32\[6, 5\] in the artifact and float32\[6, 7\]"
    with pytest.raises(ArtifactError, match=expected):
        load_model(tmp_path / "m", apply, params=wider)
    with pytest.raises(ArtifactError, match="params c is only in the given model"):
        load_model(tmp_path / "m", apply, params={**params, "c": jnp.ones(1)})


def test_another_stride_is_seen_though_no_parameter_changes(tmp_path):
    def convolution(stride):
        def apply(params, x):
            for w in params:
                x = jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME")
            return x

        return apply

    params, inputs = [models.random(3, 3, 3, 3)] * 2, models.random(4, 3, 8, 8)
    model = quantized(convolution(1), params, inputs, "int8")
    save_model(model, tmp_path / "m")
    assert_identical(load_model(tmp_path / "m", convolution(1)).params, model.params)
    with pytest.raises(ArtifactError, match=r"site 1 is a conv of activation .*8, 8.* 4, 4"):
        load_model(tmp_path / "m", convolution(2))


def test_inputs_of_another_size_may_be_given(tmp_path):
    def apply(params, x):
        return jnp.mean(x @ params["w"], axis=1)

    model = quantized(apply, {"w": models.random(6, 5)}, models.random(4, 3, 6), "int8")
    save_model(model, tmp_path / "m")
    longer = models.random(2, 9, 6)
    loaded = load_model(tmp_path / "m", apply, inputs=longer)
    assert loaded.graph.example.shape == (1, 9, 6)
    assert_identical(loaded(longer), model(longer))


def test_other_artifacts_and_damage_are_refused(tmp_path, dense):
    apply, _, _, model = dense
    folder = tmp_path / "m"
    save_model(model, folder)
    with pytest.raises(ArtifactError, match=r"'jaxrmils model'; .*use load_model"):
        load_scores(folder)
    with pytest.raises(ArtifactError, match="a folder that holds a 'jaxrmils model'"):
        load_plan(folder)
    save_plan(model.plan, tmp_path / "plan.json")
    with pytest.raises(ArtifactError, match=r"plan\.json is a file"):
        load_model(tmp_path / "plan.json", apply)
    assert load_plan(folder / "plan.json") == model.plan
    plan = folder / "plan.json"
    plan.write_text(plan.read_text().replace("nearest", "ceil"))
    with pytest.raises(ArtifactError, match="A model's plan can't be edited"):
        load_model(folder, apply)
    save_model(model, folder)
    arrays = folder / "arrays.safetensors"
    data = arrays.read_bytes()
    for length in (0, 7, 8, 100, len(data) - 1):
        arrays.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=f"{arrays} has {length} bytes"):
            load_model(folder, apply)


def test_a_manifest_without_any_of_its_entries_is_an_error(tmp_path, dense):
    save_model(dense[3], tmp_path / "m")
    path = tmp_path / "m" / "manifest.json"
    document = json.loads(path.read_text())
    # Models of earlier versions do not say what shortcuts read: float.
    for key in document.keys() - {"versions", "info", "plan", "sizes", "shortcuts"}:
        path.write_text(json.dumps({k: v for k, v in document.items() if k != key}))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            load_model(tmp_path / "m", dense[0])


def test_a_failed_save_keeps_the_older_model(tmp_path, dense, monkeypatch):
    apply, params, inputs, model = dense
    save_model(model, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    other = quantized(apply, params, inputs, "int8")

    def fail(path, data):
        path.write_bytes(data[:10])
        if path.name == "plan.json":
            raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("jaxrmils.artifacts.files.write_bytes", fail)
        save_model(other, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    save_model(other, tmp_path / "m")
    assert_identical(load_model(tmp_path / "m", apply)(inputs), other(inputs))


def test_a_folder_has_no_path_of_this_machine(tmp_path, dense):
    save_model(dense[3], tmp_path / "m")
    for file in (tmp_path / "m").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()

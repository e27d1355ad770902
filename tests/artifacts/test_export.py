"""Exported models run elsewhere, bit for bit, and say what is wrong when they can't."""

import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random
from stages import calibrated, table_of, traced, unreached

import jaxrmils as jr
from jaxrmils.artifacts import ArtifactError
from jaxrmils.lowering import BACKENDS

ROOT = Path(__file__).parents[2]


@functools.cache
def quantized(name, format, backend="cpu"):
    graph, params, _ = traced(name)
    plan = jr.uniform(table_of(name), format, skip=unreached(name))
    return jr.quantize(graph, params, plan, calibrated(name), backend=backend)


def equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def jitted(model, inputs):
    return jax.jit(model.apply)(model.params, inputs)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of an exported dense network, w4a8, for all platforms."""
    folder = tmp_path_factory.mktemp("dense") / "exported"
    jr.export_model(quantized("plain", "w4a8"), folder, info={"seed": 0})
    return folder


@pytest.mark.parametrize("batch", [1, 3])
def test_it_computes_what_the_model_computes_at_any_batch_size(dense, batch):
    model, inputs = quantized("plain", "w4a8"), traced("plain")[2][:batch]
    equal(jr.load_exported(dense)(inputs), jitted(model, inputs))
    equal(jr.load_exported(dense)(inputs), model(inputs))


@pytest.mark.parametrize(("name", "kind"), [("plain", "int8"), ("cnn", "w4a8")])
def test_formats_and_convolutions(tmp_path, name, kind):
    model, inputs = quantized(name, kind), traced(name)[2]
    jr.export_model(model, tmp_path, platforms=("cpu",))
    equal(jr.load_exported(tmp_path)(inputs), jitted(model, inputs))


def test_the_manifest_tells_what_is_there(dense):
    manifest = json.loads((dense / "manifest.json").read_text())
    assert {p.name for p in dense.iterdir()} == {"manifest.json", *manifest["files"]}
    assert set(manifest["platforms"]) == set(BACKENDS) == {"cpu", "cuda", "tpu"}
    assert manifest["inputs"] == [{"name": "inputs", "dtype": "float32", "shape": ["batch", 6]}]
    assert manifest["outputs"][0]["shape"] == ["batch", 6]
    assert manifest["versions"]["jax"] == jax.__version__ and manifest["info"] == {"seed": 0}
    assert manifest["fingerprint"] == traced("plain")[0].fingerprint


def test_the_plans_hash_is_that_of_the_saved_models_plan(dense, tmp_path):
    jr.save_model(quantized("plain", "w4a8"), tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "manifest.json").read_text())
    exported = json.loads((dense / "manifest.json").read_text())
    assert exported["plan"]["sha256"] == saved["files"]["plan.json"]["sha256"]


def test_every_platform_multiplies_integers_of_its_own_width(tmp_path):
    jr.export_model(quantized("plain", "int4"), tmp_path)
    products = {}
    for platform in BACKENDS:
        data = (tmp_path / f"{platform}.jaxexport").read_bytes()
        module = jax.export.deserialize(bytearray(data))
        assert module.platforms == (platform,)
        dots = re.findall(r"dot_general.*\(tensor<([^>]*)>, tensor<([^>]*)>", module.mlir_module())
        products[platform] = {t.rpartition("x")[2] for pair in dots for t in pair}
    assert products == {"cpu": {"i8"}, "cuda": {"i8"}, "tpu": {"i4"}}


def test_a_model_made_for_tpu_is_exported_for_cpu(tmp_path):
    model = quantized("plain", "int4", "tpu")
    assert model.params.weights["right"].tensor.values.dtype == jnp.int4
    jr.export_model(model, tmp_path, platforms=("cpu",))
    inputs = traced("plain")[2]
    equal(jr.load_exported(tmp_path)(inputs), jitted(quantized("plain", "int4"), inputs))


def documented_loader():
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "deserialize" in b]
    return block


_ALONE = """
import pathlib, sys, types

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jaxrmils", "flax"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
import numpy

folder = pathlib.Path(sys.argv[1])
digits = types.SimpleNamespace(inputs=numpy.load(folder / "inputs.npy"))
exec(sys.stdin.read())
assert not {"jaxrmils", "flax"} & {name.partition(".")[0] for name in sys.modules}
numpy.save(folder / "outputs.npy", outputs)
"""


def test_the_documented_loader_needs_neither_jaxrmils_nor_flax(tmp_path):
    model, inputs = quantized("plain", "w4a8"), traced("plain")[2]
    jr.export_model(model, tmp_path / "exported")
    np.save(tmp_path / "inputs.npy", inputs)
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tmp_path)],
        input=documented_loader(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    equal(np.load(tmp_path / "outputs.npy"), np.asarray(jitted(model, inputs)))


class Pair(NamedTuple):
    left: object
    right: object


def test_other_containers_become_flat_dicts_by_name(tmp_path):
    def apply(params, x):
        seed = jax.random.key_data(params["key"])[-1].astype(jnp.float32)
        return Pair(x.left @ params["w"], {"sum": x.right + seed})

    params = {"w": random(6, 3).astype(jnp.bfloat16), "key": jax.random.key(3)}
    inputs = Pair(random(4, 6, dtype=jnp.bfloat16), random(4, 3))
    graph = jr.trace(apply, params, inputs)
    plan = jr.uniform(jr.tabulate(graph), "int8", skip=["*"])
    model = jr.quantize(graph, params, plan, jr.calibrate(graph, params, [inputs]))
    jr.export_model(model, tmp_path, platforms=("cpu",))
    outputs = jr.load_exported(tmp_path)({"left": inputs.left, "right": inputs.right})
    expected = jitted(model, inputs)
    equal(outputs, {"left": expected.left, "right/sum": expected.right["sum"]})


def test_a_batch_size_where_the_code_must_know_it(tmp_path):
    model, inputs = quantized("cond_data", "int8"), traced("cond_data")[2]
    with pytest.raises(ArtifactError, match=r"cpu and any batch size.*batch_size="):
        jr.export_model(model, tmp_path / "a", platforms=("cpu",))
    assert not (tmp_path / "a").exists()
    jr.export_model(model, tmp_path / "a", platforms=("cpu",), batch_size=4)
    loaded = jr.load_exported(tmp_path / "a")
    equal(loaded(inputs), jitted(model, inputs))
    with pytest.raises(ArtifactError, match=r"float32\[2, 6\] was given, float32\[4, 6\]"):
        loaded(inputs[:2])


def test_other_lengths_than_the_traced_ones(tmp_path):
    model, inputs = quantized("scanned_stack", "int8"), traced("scanned_stack")[2]
    longer = jnp.tile(inputs[:, None], (1, 5, 1))
    jr.export_model(model, tmp_path, longer, platforms=("cpu",))
    equal(jr.load_exported(tmp_path)(longer), jitted(model, longer))


def test_wrong_inputs_are_named(dense):
    model = jr.load_exported(dense)
    for inputs, message in (
        (jnp.ones((2, 7)), r"inputs: float32\[2, 7\] was given, float32\[batch, 6\] was exported"),
        (jnp.ones((2, 6), jnp.int32), "int32"),
        (jnp.ones((0, 6)), r"float32\[0, 6\]"),
        (jnp.ones(6), r"float32\[6\]"),
        ({"x": jnp.ones((2, 6))}, "structure"),
    ):
        with pytest.raises(ArtifactError, match=message):
            model(inputs)


def test_wrong_platforms_are_named(dense, tmp_path):
    model = quantized("plain", "int8")
    jr.export_model(model, tmp_path, platforms=("tpu",))
    with pytest.raises(ArtifactError, match="exported for tpu, not for cpu"):
        jr.load_exported(tmp_path)
    with pytest.raises(ArtifactError, match="jax finds no tpu here"):
        jr.load_exported(dense, platform="tpu")
    for wrong in ((), ("gpu",), ("cpu", "cpu"), "cpu"):
        with pytest.raises(ArtifactError, match="platforms is"):
            jr.export_model(model, tmp_path / "new", platforms=wrong)


def test_damage_is_found(dense, tmp_path):
    contents = {p.name: p.read_bytes() for p in dense.iterdir()}

    def load(name, data):
        for each, content in contents.items():
            (tmp_path / each).write_bytes(content)
        if data is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(data)
        return jr.load_exported(tmp_path)

    module, manifest = contents["cpu.jaxexport"], contents["manifest.json"]
    flipped = module[:-9] + bytes([module[-9] ^ 1]) + module[-8:]
    for name, data, message in (
        ("cpu.jaxexport", flipped, "cpu.jaxexport is damaged"),
        ("cpu.jaxexport", module[:50], "has 50 bytes"),
        ("cpu.jaxexport", None, "cpu.jaxexport is missing"),
        ("weights.safetensors", b"", "weights.safetensors has 0 bytes"),
        ("manifest.json", None, "holds no manifest.json"),
        ("manifest.json", manifest[:40], "no valid JSON"),
        ("manifest.json", manifest.replace(b"jaxrmils export", b"jaxrmils model"), "kind"),
        ("manifest.json", manifest.replace(b'"files"', b'"fils"'), "incomplete"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load(name, data)
    load("tpu.jaxexport", b"never read here")


def test_a_module_that_this_jax_can_not_read_says_which_one_wrote_it(dense, tmp_path):
    model = quantized("plain", "int8")
    jr.export_model(model, tmp_path, platforms=("cpu",))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["versions"]["jax"] = "99.1.2"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    inputs = traced("plain")[2]
    equal(jr.load_exported(tmp_path)(inputs), jitted(model, inputs))
    unknown = b"operations of a later version" * 10
    (tmp_path / "cpu.jaxexport").write_bytes(unknown)
    facts = {"bytes": len(unknown), "sha256": hashlib.sha256(unknown).hexdigest()}
    manifest["files"]["cpu.jaxexport"] = facts
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"can't be read by jax {jax.__version__}.*99.1.2"):
        jr.load_exported(tmp_path)


def test_only_an_older_export_is_replaced(dense, tmp_path):
    model = quantized("plain", "int8")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        jr.export_model(model, tmp_path, platforms=("cpu",))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    jr.export_model(model, tmp_path / "new", platforms=("tpu",))
    jr.export_model(model, tmp_path / "new", platforms=("cpu",))
    names = {p.name for p in (tmp_path / "new").iterdir()}
    assert names == {"manifest.json", "weights.safetensors", "cpu.jaxexport"}


def test_a_missing_flatbuffers_is_named(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"jaxrmils\[export\]"):
        jr.load_exported(dense)
    with pytest.raises(ImportError, match=r"jaxrmils\[export\]"):
        jr.export_model(quantized("plain", "int8"), tmp_path / "new")

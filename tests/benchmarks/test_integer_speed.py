"""The benchmark runs, and all that it times compute the same; times are not looked at."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.lowering.native import kernels
from jaxrmils.zoo import MobileNetV2
from jaxrmils.zoo.layers import ConvNorm, batch_norm

ROOT = Path(__file__).parents[2]
INT4 = ("w4a8", "unpacked")


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder, which can import the others, as when it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def run(*options, **variables):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "benchmarks/integer_speed.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def installed(*packages):
    return all(importlib.util.find_spec(name) is not None for name in packages)


def test_quick_run_writes_results_and_keeps_those_of_others(tmp_path):
    output = tmp_path / "result.json"
    output.write_text(json.dumps({"resnet18, batch 1": {"rows": {}}}))
    tunables = "glibc.malloc.hugetlb=1"
    done = run("--quick", "--output", str(output), GLIBC_TUNABLES=tunables)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results.pop("resnet18, batch 1") == {"rows": {}}
    assert set(results.pop("call overhead")) >= {"float", "w8a8", "over_same_program", "jax"}
    assert set(results) == {"tiny_resnet, batch 2", "tiny_bert, batch 2"}
    for result in results.values():
        rows = result["rows"]
        assert result["GLIBC_TUNABLES"] == tunables
        assert {"float", "w8a8", "w4a8"} <= set(rows)
        assert all(len(times) == 2 for times in result["seconds"].values())
        assert rows["float"]["error"] == 0
        assert 0 < max(row["error"] for n, row in rows.items() if n not in INT4) < 0.06
        assert rows["unpacked"]["error"] == rows["w4a8"]["error"]
        packed, unpacked = (rows[name]["buffer_bytes"] for name in INT4)
        assert packed < unpacked == pytest.approx(rows["w8a8"]["buffer_bytes"], rel=0.02)
        assert rows["w4a8"]["buffer_bytes"] < rows["w8a8"]["buffer_bytes"]
        assert rows["w8a8"]["buffer_bytes"] < 0.5 * rows["float"]["buffer_bytes"]
        assert result["absent"]["depthwise"] == "no depthwise convolution"
        assert ("native" in rows) == (kernels.available() is None)
        for name, is_there in (
            ("qwix", installed("qwix")),
            ("onnxruntime", installed("onnx", "onnxruntime")),
        ):
            assert (name in rows, name in result["absent"]) == (is_there, not is_there)


@pytest.mark.parametrize("option", ["--models", "--against"])
def test_unknown_names_are_refused(option):
    done = run(option, "nothing")
    assert done.returncode == 2
    assert "unknown: nothing; expected" in done.stderr


def test_float_is_run_with_shifted_products_where_there_are_groups(script):
    speed, models = script("integer_speed"), script("speed_models")
    module = ConvNorm(6, 3, batch_norm(False), groups=3)
    make_inputs = models.images(8)
    variables = module.init(jax.random.key(0), jnp.asarray(make_inputs(1)))
    work = models.Workload("depthwise", module, variables, make_inputs)
    functions = speed.quantized(work, frozenset(["depthwise"]))
    apply, params = functions["depthwise"]
    x = make_inputs(2)
    np.testing.assert_allclose(apply(params, x), work.apply(variables, x), atol=1e-5)
    programs = [
        jax.jit(function).lower(arrays, x).compile().as_text()
        for function, arrays in ((apply, params), (work.apply, variables))
    ]
    assert [" convolution(" in (program or "") for program in programs] == [False, True]
    assert "depthwise" not in speed.quantized(work, frozenset())


def test_a_folded_convolution_is_the_convolution_and_its_normalization(script):
    fold = script("onnx_models").fold
    module = ConvNorm(5, 3, batch_norm(False, epsilon=1e-3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 4)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    keys = iter(range(100))
    variables = jax.tree.map(
        lambda leaf: jax.random.uniform(jax.random.key(next(keys)), leaf.shape) + 0.1, shapes
    )
    kernel = variables["params"]["0"]["kernel"]
    norm = variables["params"]["1"], variables["batch_stats"]["1"], 1e-3
    folded, bias = fold(np.asarray(kernel), *norm)
    convolved = jax.lax.conv_general_dilated(
        x, jnp.asarray(folded), (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected: Any = module.apply(variables, x)
    assert jnp.mean((expected > 0) & (expected < 6)) > 0.3  # relu6 hides little of it
    np.testing.assert_allclose(np.clip(convolved + bias, 0, 6), expected, rtol=1e-4, atol=1e-5)


def test_what_is_slow_runs_in_three_rounds(script):
    speed = script("integer_speed")
    ran = []
    contestants = {
        name: speed.Contestant(lambda name=name: ran.append(name)) for name in ("one", "other")
    }
    seconds = speed.time_in_turns(contestants, 5, slow=0.0)
    assert {name: len(times) for name, times in seconds.items()} == {"one": 3, "other": 3}
    assert ran[4:8] == ["other", "one", "one", "other"]
    assert len(speed.time_in_turns(contestants, 5, slow=60.0)["one"]) == 5


def test_networks_are_the_zoos_and_unknown_ones_are_named(script):
    models = script("speed_models")
    module, make_inputs = models.NETWORKS["mobilenet_v2"]()
    assert module == MobileNetV2()
    assert make_inputs(3).shape == (3, 224, 224, 3)
    with pytest.raises(ValueError, match="no network 'x'; expected one of resnet18"):
        models.workload("x")


@pytest.mark.skipif(kernels.available() is not None, reason="no native kernels")
def test_whole_batches_beside_parts(tmp_path):
    output = tmp_path / "result.json"
    done = run(
        *("--models", "tiny_resnet", "--batches", "2", "--rounds", "1", "--calls", "2"),
        *("--against", "native,whole", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["tiny_resnet, batch 2"]["rows"]
    assert rows["native whole"]["error"] == rows["native"]["error"]

"""Scores and ranges: bit-identical, and enough for policies without running the model."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from jaxrmils import Limits, budget, calibrate, predict, rmils, score, trace, uniform
from jaxrmils.artifacts import (
    ArtifactError,
    describe,
    load_moments,
    load_ranges,
    load_scores,
    save_moments,
    save_ranges,
    save_scores,
)
from jaxrmils.artifacts.folder import check_header
from jaxrmils.sensitivity import Scores
from jaxrmils.sensitivity.moments import moments_of

ARRAYS = ("loss", "activations", "weights", "gradient_sum", "gradient_square", "shift")


@pytest.fixture(scope="module")
def scored():
    """Graph and scores of a stack of layers, with the shift probe."""
    apply, params, inputs = models.model("scanned_stack")
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs], estimator="minmax")
    batches = [(inputs, jnp.arange(4.0)), (inputs * 1.5, jnp.arange(4.0))]
    return graph, score(graph, params, batches, models.loss, ranges, shift_probe=True)


@pytest.fixture
def saved(scored, tmp_path):
    save_scores(scored[1], tmp_path / "scores", info={"seed": 3})
    return tmp_path / "scores"


def assert_same_arrays(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_scores_come_back_bit_for_bit(scored, saved):
    _, scores = scored
    loaded = load_scores(saved)
    for name in ARRAYS:
        assert_same_arrays(getattr(loaded, name), getattr(scores, name))
    assert_same_arrays(loaded.ranges, scores.ranges)
    for name in ("table", "activation_rows", "weight_rows"):
        assert getattr(loaded, name) == getattr(scores, name)
    assert loaded.activation_candidates == scores.activation_candidates
    assert loaded.weight_candidates == scores.weight_candidates


def test_moments_come_back_bit_for_bit(scored, tmp_path):
    moments = moments_of(scored[1])
    save_moments(moments, tmp_path / "m", info={"seed": 3})
    loaded = load_moments(tmp_path / "m")
    assert len(loaded) == len(moments) == 8 and loaded.table == moments.table
    assert_same_arrays(loaded.ranges, moments.ranges)
    for name in ("mean", "products"):
        assert_same_arrays(getattr(loaded.moments, name), getattr(moments.moments, name))
    for name in ("activation_rows", "weight_rows", "activation_candidates", "weight_candidates"):
        assert getattr(loaded, name) == getattr(moments, name)
    assert budget(loaded, Limits(weight_bits=8)) == budget(moments, Limits(weight_bits=8))
    with pytest.raises(ArtifactError, match="use load_moments"):
        load_scores(tmp_path / "m")
    fewer = dataclasses.replace(moments, weight_candidates=moments.weight_candidates[:1])
    save_moments(fewer, tmp_path / "fewer")
    with pytest.raises(ArtifactError, match="Save the moments again"):
        load_moments(tmp_path / "fewer")


def test_policies_need_nothing_but_loaded_scores(scored, saved, monkeypatch):
    graph, scores = scored
    expected = [rmils(graph, scores, mu=0.01, probe=probe) for probe in ("tangent", "shift")]
    predicted = [predict(scores, plan) for plan in expected]

    def run(*_):
        raise AssertionError("the model was run")

    # Not by its dotted name, which is that of the function `trace`.
    monkeypatch.setattr(sys.modules["jaxrmils.graph.trace"], "run", run)
    loaded = load_scores(saved)
    for plan, probe, prediction in zip(expected, ("tangent", "shift"), predicted, strict=True):
        assert rmils(graph, loaded, mu=0.01, probe=probe) == plan
        assert not plan.layers["layers/Dense_0/kernel"].is_float
        found = predict(loaded, plan)
        assert all((found[name] == prediction[name]).all() for name in prediction)
        assert loaded.table.size_bits(plan.formats()) == scores.table.size_bits(plan.formats())
    assert uniform(loaded.table, "w4a8") == uniform(scores.table, "w4a8")


def test_scores_without_shift_probe_and_without_activations(tmp_path):
    graph = trace(lambda p, x: p["table"][x] * 2.0, {"table": models.random(5, 3)}, jnp.arange(4))
    params, inputs = {"table": models.random(5, 3)}, jnp.arange(4)
    ranges = calibrate(graph, params, [inputs])
    scores = score(graph, params, [(inputs, jnp.ones(4))], models.loss, ranges)
    save_scores(scores, tmp_path / "s")
    loaded = load_scores(tmp_path / "s")
    assert loaded.shift is None and scores.shift is None
    assert loaded.activations.shape == scores.activations.shape
    assert_same_arrays(loaded.ranges, scores.ranges)


@pytest.mark.parametrize("estimator", ["minmax", "percentile"])
def test_ranges_come_back_bit_for_bit(tmp_path, estimator):
    apply, params, inputs = models.model("transformer")
    graph = trace(apply, params, inputs)
    ranges = calibrate(
        graph, params, [inputs], estimator=estimator, symmetric=True, percentile=99.5
    )
    save_ranges(ranges, tmp_path / "r", info={"data": "random"})
    loaded = load_ranges(tmp_path / "r")
    assert_same_arrays(loaded, ranges)  # settings are part of the tree's structure
    assert (loaded.percentile, loaded.symmetric, loaded.examples) == (99.5, True, 4)
    assert describe(tmp_path / "r")["info"] == {"data": "random"}


def test_description(scored, saved):
    found = describe(saved)
    assert (found["kind"], found["loader"]) == ("jaxrmils scores", "load_scores")
    assert (found["format_version"], found["info"], found["examples"]) == (1, {"seed": 3}, 8)
    assert found["fingerprint"] == scored[0].fingerprint
    assert set(found["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy", "jaxrmils"}
    assert found["files"]["arrays.safetensors"]["bytes"] > 0


def test_the_wrong_loader_names_the_right_one(saved):
    with pytest.raises(ArtifactError, match=r"'jaxrmils scores'; .*: use load_scores"):
        load_ranges(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_truncated_arrays_are_an_error(saved, share):
    path = saved / "arrays.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: min(int(share * len(data)), len(data) - 1)])
    with pytest.raises(ArtifactError, match=f"{path} has .* bytes; {len(data)} were saved"):
        load_scores(saved)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_one_changed_bit_is_an_error(saved, share):
    path = saved / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"arrays\.safetensors is damaged: its sha256"):
        load_scores(saved)


def test_truncated_manifests_are_an_error(saved):
    path = saved / "manifest.json"
    data = path.read_bytes()
    for length in range(0, len(data) - 2, 97):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"manifest\.json is no valid JSON"):
            load_scores(saved)


def test_a_manifest_without_any_of_its_entries_is_an_error(saved):
    path = saved / "manifest.json"
    document = json.loads(path.read_text())
    for key in document.keys() - {"versions", "info", "examples"}:
        path.write_text(json.dumps({k: v for k, v in document.items() if k != key}))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            load_scores(saved)
    for key in document.keys() - {"versions", "info", "examples", "weight_rows"}:
        path.write_text(json.dumps({**document, key: [[3]]}))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            load_scores(saved)


def test_rows_that_do_not_fit_the_arrays_are_an_error(saved):
    path = saved / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "weight_rows": []}))
    with pytest.raises(ArtifactError, match=r"weights has the shape \(8, 1, 2\); .* \(8, 0, 2\)"):
        load_scores(saved)


def test_files_outside_the_folder_are_not_read(saved):
    path = saved / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="and no folders"):
        load_scores(saved)


def test_missing_parts_are_an_error(saved, tmp_path):
    (saved / "arrays.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"arrays\.safetensors is missing"):
        load_scores(saved)
    (saved / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        load_scores(saved)
    with pytest.raises(ArtifactError, match="absent does not exist"):
        load_scores(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="file is a file"):
        load_scores(tmp_path / "file")
    saved.rename(tmp_path / ".scores.0123abcd.old")
    with pytest.raises(ArtifactError, match=r"interrupted: rename \.scores\.0123abcd\.old"):
        load_scores(saved)


def test_saving_never_deletes_what_it_did_not_write(scored, saved, tmp_path):
    _, scores = scored
    with pytest.raises(ArtifactError, match="would delete; give another folder"):
        save_ranges(scores.ranges, saved)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"\['notes.txt'\]"):
        save_scores(scores, saved)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "app"}')
    with pytest.raises(ArtifactError, match="kind None"):
        save_scores(scores, tmp_path / "web")
    with pytest.raises(ArtifactError, match="info has the entry 'seed'"):
        save_scores(scores, tmp_path / "new", info={"seed": np.int32(3)})
    assert not (tmp_path / "new").exists()


def test_a_damaged_artifact_can_be_saved_again(scored, saved):
    (saved / "manifest.json").write_text("{")
    save_scores(scored[1], saved)
    assert isinstance(load_scores(saved), Scores)


def test_a_newer_format_is_described_but_not_read(saved):
    path = saved / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "format_version": 2}))
    with pytest.raises(ArtifactError, match=r"format version 2; this jaxrmils reads 1\. Install"):
        load_scores(saved)
    assert describe(saved)["format_version"] == 2
    path.write_text(json.dumps({**document, "kind": "jaxrmils dream"}))
    with pytest.raises(ArtifactError, match="'jaxrmils dream'; expected one of jaxrmils plan"):
        describe(saved)


def test_a_header_of_the_right_kind_passes(tmp_path):
    check_header({"kind": "jaxrmils plan", "format_version": 1}, tmp_path, "jaxrmils plan")

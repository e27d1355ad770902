"""Plans as JSON: exact round trips, legal edits, and every illegal one."""

import dataclasses
import json
import math

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrmils import Plan, quantize, tabulate, trace, uniform
from jaxrmils.artifacts import ArtifactError, load_plan, save_plan
from jaxrmils.artifacts.plan_file import parse_plan, plan_bytes
from jaxrmils.numerics import calibrate
from jaxrmils.policies import LayerPlan

ROUNDINGS = st.sampled_from(["nearest", "floor", "ceil"])
BITS = st.sampled_from([4, 8, 32])
LAYERS = st.builds(
    LayerPlan,
    weight_bits=BITS,
    activation_bits=BITS,
    rounding=st.lists(ROUNDINGS, max_size=3).map(tuple),
    weight_rounding=ROUNDINGS,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PLANS = st.builds(
    Plan,
    layers=st.dictionaries(st.text(), LAYERS, max_size=4),
    fingerprint=st.text(),
    policy=st.dictionaries(st.text(), VALUES, max_size=3),
)
PLAN = Plan(
    {
        "Conv_0/kernel": LayerPlan(8, 8, ("floor",)),
        "Attention_0/dot_0": LayerPlan(32, 4, ("ceil", "nearest")),
        "Dense_0/kernel": LayerPlan(),
    },
    "f00d",
    {"name": "rmils", "mu": math.inf, "skip": []},
)


@settings(max_examples=200, deadline=None)
@given(PLANS)
def test_any_plan_comes_back_equal_and_in_order(plan):
    loaded = parse_plan(plan_bytes(plan, "plan.json"), "plan.json")
    assert loaded == plan
    assert list(loaded.layers) == list(plan.layers)
    assert plan_bytes(loaded, "plan.json") == plan_bytes(plan, "plan.json")


def test_the_file_has_one_line_for_each_layer_in_model_order(tmp_path):
    save_plan(PLAN, tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    layers = [line.split('"')[1] for line in lines if '"weight_bits"' in line]
    assert layers == list(PLAN.layers)
    changed = dataclasses.replace(
        PLAN, layers={**PLAN.layers, "Dense_0/kernel": LayerPlan(8, 8, ("ceil",))}
    )
    save_plan(changed, tmp_path / "changed.json")
    other = (tmp_path / "changed.json").read_text().splitlines()
    assert sum(a != b for a, b in zip(lines, other, strict=True)) == 1


def edited(tmp_path, edit):
    path = tmp_path / "plan.json"
    save_plan(PLAN, path)
    document = json.loads(path.read_text())
    edit(document, document["layers"]["Conv_0/kernel"])
    path.write_text(json.dumps(document))
    return path


def test_hand_edits_are_read(tmp_path):
    def edit(document, layer):
        layer.update(format="w4a8", weight_bits=4, rounding=["ceil"])
        del document["layers"]["Dense_0/kernel"]["format"]

    plan = load_plan(edited(tmp_path, edit))
    assert plan.layers["Conv_0/kernel"] == LayerPlan(4, 8, ("ceil",))
    assert plan.layers["Dense_0/kernel"] == LayerPlan()


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "plan.json"
    save_plan(PLAN, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_plan(path) == PLAN


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda d, _: d.update(polcy={}), "unknown key 'polcy'; did you mean policy"),
        (lambda _, x: x.update(weights_bits=4), "Conv_0.*'weights_bits'; did you mean weight_bits"),
        (lambda d, _: d.pop("fingerprint"), "fingerprint missing"),
        (lambda _, x: x.pop("rounding"), "Conv_0.*rounding missing"),
        (lambda d, _: d.update(fingerprint=3), "fingerprint is 3; a str"),
        (lambda d, _: d.update(policy=[]), r"policy is \[\]; a dict"),
        (lambda d, _: d.update(layers=None), "layers is None"),
        (lambda d, _: d["layers"].update(x=8), "layer 'x' is 8; an object"),
        (lambda _, x: x.update(weight_bits=6), "weight_bits is 6; 4, 8 or 32"),
        (lambda _, x: x.update(weight_bits=8.0), "weight_bits is 8.0"),
        (lambda _, x: x.update(activation_bits=True), "activation_bits is True"),
        (lambda _, x: x.update(activation_bits="8"), "activation_bits is '8'"),
        (lambda _, x: x.update(rounding="floor"), "rounding is 'floor'; a list"),
        (lambda _, x: x.update(rounding=["flor"]), "rounding 'flor'; did you mean floor"),
        (lambda _, x: x.update(rounding=[1]), "rounding 1; nearest, floor or ceil"),
        (lambda _, x: x.update(weight_rounding="stochastic"), "rounding 'stochastic'"),
        (lambda _, x: x.update(weight_rounding=["floor"]), "nearest, floor or ceil"),
        (lambda _, x: x.update(weight_bits=4), "format is 'w8a8', but its bits are of 'w4a8'"),
        (lambda d, _: d.update(kind="other"), "'other'.*'jaxrmils plan' was expected"),
        (lambda d, _: d.update(kind="jaxrmils scores"), "use load_scores"),
        (lambda d, _: d.update(kind=["x"]), "it is no artifact"),
        (lambda d, _: d.pop("kind"), "kind None"),
        (lambda d, _: d.update(format_version=2), "format version 2; this jaxrmils reads 1"),
        (lambda d, _: d.update(format_version=True), "format version True"),
    ],
)
def test_wrong_edits_name_file_and_place(tmp_path, edit, message):
    path = edited(tmp_path, edit)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_plan(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "plan.json"
    save_plan(PLAN, path)
    data = path.read_bytes()
    for length in range(len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"plan\.json"):
            load_plan(path)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"\xff\xfe{}", "no valid JSON"),
        (b"[1]", "a JSON list; an object"),
        (b'{"kind": "jaxrmils plan", "kind": "x"}', "'kind' is there twice"),
        (b"[" * 100_000, "no valid JSON"),
    ],
)
def test_what_is_no_json_object_is_an_error(tmp_path, text, message):
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=message):
        load_plan(tmp_path / "plan.json")


def test_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_plan(tmp_path / "absent.json")
    with pytest.raises(ArtifactError, match="is a folder; the file of a plan"):
        load_plan(tmp_path)
    with pytest.raises(ArtifactError, match="is a folder"):
        save_plan(PLAN, tmp_path)


@pytest.mark.parametrize("value", [(1, 2), math.nan, {1: 2}, {3}, object()])
def test_settings_that_json_would_change_are_refused(tmp_path, value):
    plan = dataclasses.replace(PLAN, policy={"name": "mine", "setting": value})
    with pytest.raises(ArtifactError, match="policy has the entry 'setting'"):
        save_plan(plan, tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_that_could_not_be_read_is_not_written(tmp_path):
    plan = Plan({"a": LayerPlan(8, 8, ("stochastic",))}, "f00d")
    with pytest.raises(ArtifactError, match="'stochastic'"):
        save_plan(plan, tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_loaded_plan_makes_the_same_model(tmp_path):
    apply, params, inputs = models.model("plain")
    graph = trace(apply, params, inputs)
    plan = uniform(tabulate(graph), "w4a8", skip=["left"])
    save_plan(plan, tmp_path / "new" / "plan.json")
    loaded = load_plan(tmp_path / "new" / "plan.json")
    assert loaded == plan
    ranges = calibrate(graph, params, [inputs], estimator="minmax")
    expected = quantize(graph, params, plan, ranges)(inputs)
    assert (quantize(graph, params, loaded, ranges)(inputs) == expected).all()

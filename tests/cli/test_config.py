"""Config files and overrides: every mistake is named, with near matches."""

import jax
import numpy as np
import pytest

import jaxrmils as jr
from jaxrmils.artifacts import save_plan
from jaxrmils.cli import commands
from jaxrmils.cli.checks import candidates_of
from jaxrmils.cli.config import ConfigError, apply_overrides, load_config, resolve_function
from jaxrmils.cli.defaults import base_config
from jaxrmils.sensitivity import ACTIVATION_CANDIDATES, Candidate

GOOD = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.seed = 7
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "my_config.py"
    path.write_text(GOOD)
    return path


def test_overrides_are_applied_with_their_types(config_file):
    config = load_config(
        config_file,
        ["--config.policy.mu=0.4", "config.policy.bits=(8, 4)", "--config.ranges.symmetric=true"],
    )
    assert (config.seed, config.policy.mu, config.policy.bits) == (7, 0.4, (8, 4))
    assert config.ranges.symmetric is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("('a', 'b')", ("a", "b")),
        ("a,b", ("a", "b")),
        ("Dense_*", ("Dense_*",)),
        ("()", ()),
    ],
)
def test_a_tuple_can_be_written_in_several_ways(text, expected):
    assert apply_overrides(base_config(), [f"--config.policy.skip={text}"]).policy.skip == expected


def test_the_original_config_is_left_alone():
    config = base_config()
    apply_overrides(config, ["--config.seed=3"])
    assert config.seed == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.policy.muu=1", "unknown config field 'policy.muu'; did you mean policy.mu"),
        ("--config.mu=1", "did you mean policy.mu"),
        ("--config.policy.mu=abc", "'abc' is no float"),
        ("--config.seed=1.5", "'1.5' is no int"),
        ("--config.policy.mu", "write --config.field=value"),
        ("--policy.mu=1", "write --config.field=value"),
    ],
)
def test_a_bad_override_is_named(override, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        apply_overrides(base_config(), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 3", "returned int, not a ConfigDict"),
        ("x = 1", r"has no function get_config\(\)"),
        ("import nothing_of_that_name", "failed: ModuleNotFoundError"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "missing.py")


def test_a_task_is_found_beside_its_config(tmp_path, config_file):
    (tmp_path / "my_task.py").write_text("def build(config, progress): return config.seed")
    function = resolve_function("my_task.py:build", config_file)
    assert function(load_config(config_file), None) == 7
    assert resolve_function("jaxrmils.zoo:mnist_cnn_task").__name__ == "mnist_cnn_task"


@pytest.mark.parametrize("name", ["mnist", "no.such.module:f", "jaxrmils.zoo:f", "missing.py:f"])
def test_a_task_that_does_not_exist_is_an_error(name):
    with pytest.raises(ConfigError):
        resolve_function(name)


def test_only_what_a_config_names_is_scored(tmp_path):
    graph = jr.trace(lambda p, x: x @ p["w"], {"w": np.ones((3, 2), "f")}, np.ones((4, 3), "f"))
    by_row = Candidate(8, dynamic=True)

    def scored(*overrides):
        config = apply_overrides(base_config(), [f"--config.policy.{each}" for each in overrides])
        return candidates_of(config, graph).activations

    assert scored() == scored("name=rmils", "formats=w8a8d") == ACTIVATION_CANDIDATES
    save_plan(jr.uniform(jr.tabulate(graph), "w8a8d"), tmp_path / "plan.json")
    for named in (
        ("name=budget", "formats=w8a8,w8a8d"),
        ("name=lossless", "formats=w4a8d"),
        ("name=uniform", "format=w8a8d"),
        ("name=rmils", "force=w*=w8a8d"),
        ("name=file", f"file={tmp_path}/plan.json"),
    ):
        assert scored(*named) == (*ACTIVATION_CANDIDATES, by_row), named


def test_a_config_that_names_what_convolutions_lack_is_told():
    params = {"conv": np.ones((3, 2, 2), "f"), "dense": np.ones((2, 3), "f")}

    def apply(params, x):
        layout = ("NWC", "WIO", "NWC")
        h = jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", None, None, layout)
        return h @ params["dense"]

    graph = jr.trace(apply, params, np.ones((4, 5, 2), "f"))
    dense = jr.trace(lambda p, x: x @ p["dense"], params, np.ones((4, 2), "f"))
    config = apply_overrides(base_config(), ["--config.policy.formats=w8a8,w8a8d"])
    (note,) = commands._layer_notes(config, graph)
    assert "w8a8d and w4a8d they become w8a8" in note
    assert commands._layer_notes(base_config(), graph) == ()
    assert commands._layer_notes(config, dense) == ()

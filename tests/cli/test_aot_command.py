"""`jaxrmils aot` as a user meets it, with the compiler or without."""

import json
import shutil
from pathlib import Path

import pytest

from jaxrmils.artifacts import load_latency
from jaxrmils.cli.main import BAD_INPUT, OK, USAGE, main
from jaxrmils.lowering import quantized_model
from jaxrmils.lowering.ahead import find_target
from jaxrmils.lowering.sites import exact_kernel

CONFIG = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "tiny_task.py:build"
    config.batch_size = 50
    config.policy.name = "uniform"
    config.policy.skip = ("Dense_1/*",)
    for name in ("layers", "attribute", "controls"):
        config.verify[name] = False
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    (folder / "config.py").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "tiny_task.py", folder / "tiny_task.py")
    return folder / "config.py"


@pytest.fixture(scope="module")
def run(config):
    out = config.parent / "run"
    assert main(["quantize", "--config", str(config), "--out", str(out), "--quiet"]) == OK
    return out


def test_a_run_is_compiled_where_its_compiler_is_installed(run, capsys):
    capsys.readouterr()
    table = run / "latency.json"
    options = ["--target", "tpu:v5e", "--beside", "bfloat16", "--json"]
    if find_target("tpu:v5e").is_installed:
        options += ["--latency", str(table), "--config.policy.formats=w8a8"]
    assert main(["aot", str(run), *options]) == OK
    data = json.loads(capsys.readouterr().out)
    assert (data["target"], data["batch_size"]) == ("tpu:v5e", 8)
    assert data["compiled"] == find_target("tpu:v5e").is_installed
    if data["compiled"]:
        assert data["formats"] == {"Dense_0/kernel": "w8a8", "Dense_1/kernel": "float"}
        assert list(data["programs"]) == ["float32", "bfloat16", "w8a8", "this plan"]
        latency = load_latency(table)
        assert set(latency.seconds["Dense_1/kernel"]) == {"float", "w8a8"}
        assert latency.backend == "tpu" and "1.5 GHz" in latency.source
        own = data["latency"]
        assert own["predicted"] == pytest.approx(own["compiled"], rel=0.5) and own["compiled"] > 0
        sites = data["programs"]["this plan"]["sites"]
        assert sites["Dense_0/kernel"]["operands"] == "s8 x s8"
        assert not sites["Dense_1/kernel"]["is_integer"]
        assert data["programs"]["bfloat16"]["cycles"] > 0
        assert all(site["bytes"] > 0 for site in sites.values())
        assert main(["aot", "--artifact", str(run), "--beside", "bfloat16"]) == OK
        printed = capsys.readouterr().out
        for words in (
            "read and write",
            "whole program",
            "s8 x s8",
            "share of bfloat16",
            "estimates, not measure",
        ):
            assert words in printed
    else:
        assert [site["name"] for site in data["sites"]] == ["Dense_0/kernel", "Dense_1/kernel"]


def test_without_the_compiler_operands_are_shown_and_what_is_missing(
    config, run, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    capsys.readouterr()
    assert main(["aot", str(run)]) == OK
    printed = " ".join(capsys.readouterr().out.split())
    assert "Dense_0/kernel" in printed and "s8 x s8" in printed
    assert "pip install 'jaxrmils[tpu-aot]'" in printed and "cycles" in printed
    assert main(["aot", str(run), "--latency", f"{run}/never.json"]) == BAD_INPUT
    error = " ".join(capsys.readouterr().err.split())
    assert "--latency needs the compiler for tpu:v5e, which is not installed: pip" in error
    assert not (run / "never.json").exists()


def test_a_plan_for_a_config_needs_no_run(config, run, capsys):
    capsys.readouterr()
    base = ["aot", "--config", str(config), "--target", "cuda", "--json"]
    for plan, operands in ((f"{run}/plan.json", [["s8", "s8"]]), ("w8", [])):
        assert main([*base, "--plan", plan]) == OK
        data = json.loads(capsys.readouterr().out)
        assert data["sites"][0]["operands"] == operands
        assert data["sites"][1]["operands"] == [] and not data["compiled"]


def test_a_planned_site_in_float_is_an_error_that_names_it(config, capsys, monkeypatch):
    monkeypatch.setattr(quantized_model, "integer_kernel", lambda backend: exact_kernel)
    arguments = ["aot", "--config", str(config), "--plan", "int8", "--target", "tpu"]
    assert main(arguments) == BAD_INPUT
    assert "2 of 2 planned sites" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "tpu:v9"], USAGE, "Known targets: tpu:v4, tpu:v5e"),
        (["--batch-size", "0"], USAGE, "--batch-size is 0"),
        (["--target", "cuda", "--latency", "x"], USAGE, "expected one of tpu:v4, tpu:v5e"),
        (["--artifact", "other"], USAGE, "--artifact other and RUN"),
        (["--beside", "int3"], USAGE, "unknown format 'int3'"),
        (["--plan", "nowhere.json"], BAD_INPUT, "nowhere.json does not exist"),
        (["--bach-size", "4"], USAGE, "did you mean --batch-size"),
    ],
)
def test_errors_name_the_culprit(run, capsys, arguments, code, message):
    assert main(["aot", str(run), *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_something_to_compile_must_be_named(config, capsys):
    assert main(["aot"]) == USAGE
    assert main(["aot", "--config", str(config)]) == USAGE
    assert "aot needs a RUN, or --config FILE and --plan FILE" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert main(["aot", "--help"]) == OK
    out = capsys.readouterr().out
    assert "tpu:v6e" in out and "not measurements" in out and "exit codes" in out

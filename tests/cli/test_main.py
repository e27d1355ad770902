"""The command line as a user meets it: output, files, exit codes, errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrmils.cli.main import BAD_INPUT, NOT_LOSSLESS, OK, USAGE, main

CONFIG = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "tiny_task.py:build"
    config.batch_size = 50
    config.policy.name = "rmils"
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "tiny_task.py", folder / "tiny_task.py")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    out = folder / "run"
    assert main(["quantize", "--config", f"{folder}/config.py", "--out", str(out)]) == OK
    return out


def test_quantize_writes_a_run_that_people_and_machines_can_read(run):
    plan = json.loads((run / "plan.json").read_text())
    report = json.loads((run / "report.json").read_text())
    assert list(plan["layers"]) == ["Dense_0/kernel", "Dense_1/kernel"]
    assert report["quantized_bits"] < report["float_bits"]
    names = [control["name"] for control in report["controls"]]
    assert names[0] == "this plan" and {"uniform int8", "uniform int4"} < set(names)
    assert report["attributed"]["n"] == report["residual"]["n"] == 150
    assert [point["examples"] for point in report["curve"]] == [50, 100]
    pages = {"report.html", "layers.csv", "controls.csv", "metrics.csv"}
    assert {"plan.json", "scores", "model", "run.json", "report.json"} | pages == {
        path.name for path in run.iterdir()
    }


def test_the_package_is_the_command_too(run):
    command = [sys.executable, "-m", "jaxrmils", "compare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=run)
    assert done.returncode == OK and done.stdout.startswith("usage: jaxrmils compare")
    done = subprocess.run([*command[:3], "report", "nothing"], capture_output=True, check=False)
    assert done.returncode == BAD_INPUT


def test_a_tasks_metrics_are_reported_of_the_test_split(folder, capsys):
    out = folder / "judged"
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", str(out)]
    options = ["--config.task=tiny_task.py:judged", "--config.policy.name=uniform"]
    options += ["--config.policy.format=int4"]
    options += [f"--config.verify.{each}=False" for each in ("layers", "attribute", "controls")]
    assert main([*arguments, *options, "--quiet"]) == OK
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    first, second = report["metrics"]
    assert (first["name"], second["name"]) == ("Acc@1", "1/rank")
    assert first["float_mean"] == report["float_accuracy"] == 1.0 == second["float_mean"]
    assert first["accuracy"]["lost"] == report["accuracy"]["lost"] > 0
    assert 0 < second["drop_upper"] < first["drop_upper"] and first["change"]["n"] == 150
    assert "\nAccuracy" not in printed and "\nAcc@1" in printed and "\n1/rank" in printed
    assert len((out / "metrics.csv").read_text().splitlines()) == 3
    assert main(["evaluate", str(out), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["metrics"] == {m["name"]: m["quantized_mean"] for m in report["metrics"]}
    for again, metric in zip(data["metric_changes"], report["metrics"], strict=True):
        assert again["change"]["mean"] == metric["change"]["mean"]
        assert again["drop_upper"] == metric["drop_upper"]
    assert main(["evaluate", str(out), "--no-float", "--split", "selection"]) == OK
    printed = capsys.readouterr().out
    assert "\nAcc@1 " in printed and "1/rank     9" in printed and "Accuracy" not in printed


def test_lossless_tests_a_sequence_on_the_confirmation_split(folder, capsys):
    out = folder / "lossless"
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", str(out)]
    options = ["--config.policy.name=lossless", "--config.verify.margin=0.05"]
    options += ["--config.policy.rounds=1", "--config.curvature=True"]
    assert main([*arguments, *options]) == OK
    printed = " ".join(capsys.readouterr().out.split())
    report = json.loads((out / "report.json").read_text())
    steps = report["lossless"]["steps"]
    assert report["lossless"]["words"] in printed
    assert "2nd order" in printed and "Plans tested in this order" in printed
    curvatures = [layer["curvature"] for layer in report["layers"] if layer["format"] != "float"]
    assert all(each["n"] == 100 for each in curvatures)
    assert steps[0]["test"]["n"] == 60
    assert steps[0]["selection"]["n"] == 100
    assert report["test"]["margin"] == report["lossless"]["margin"] == 0.05
    chosen = [step for step in steps if step["chosen"]]
    assert [step["size_bits"] for step in chosen] == [report["quantized_bits"]] * len(chosen)
    assert main(["report", str(out)]) == OK


def test_without_labels(folder, capsys):
    out = folder / "kl"
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", str(out)]
    lossless = ["--config.policy.name=lossless", "--config.policy.rounds=1"]
    assert main([*arguments, *lossless, "--config.loss=kl"]) == OK
    report = json.loads((out / "report.json").read_text())
    assert not (out / "scores").exists()
    assert abs(report["float_loss"]) < 1e-6
    assert 0 < report["measured"]["mean"] < 0.01
    capsys.readouterr()
    assert main(["evaluate", str(out), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["change"]["mean"] == pytest.approx(report["test"]["mean"], abs=1e-7)
    assert main(["evaluate", str(out), "--no-float"]) == USAGE
    assert "leave out --no-float" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, "--config.loss=kl"]) == USAGE
    assert "tangent is zero" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, *lossless, "--config.loss=squared"]) == USAGE
    assert "set verify.margin" in " ".join(capsys.readouterr().err.split())


def test_quantize_prints_the_table_and_the_verdict(folder, capsys):
    code = main(
        ["quantize", "--config", f"{folder}/config.py", "--out", f"{folder}/again", "--quiet"]
    )
    out = capsys.readouterr().out
    assert code == OK
    for words in ("Dense_0/kernel", "w8a8", "predicted", "measured", "naive", "Verdict", "Files"):
        assert words in out


def test_json_goes_to_stdout_alone(folder, capsys):
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", f"{folder}/json", "--json"]
    assert main(arguments) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] and data["layers"][0]["name"] == "Dense_0/kernel"


def test_a_threshold_that_nothing_reaches_is_said(folder, capsys):
    out = f"{folder}/float"
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", out]
    assert main([*arguments, "--config.policy.mu=1000"]) == OK
    assert "no layer's mu reaches the threshold 1000" in capsys.readouterr().out


def test_inspect_lists_layers_and_coverage(folder, capsys):
    assert main(["inspect", "--config", f"{folder}/config.py"]) == OK
    out = capsys.readouterr().out
    assert "2 of 2 dots and convolutions can be quantized" in out
    int4 = "int4 weights are smaller but not faster on CPU: every call unpacks them to int8"
    assert f"Note {int4}" in " ".join(out.split())
    assert main(["inspect", "--config", f"{folder}/config.py", "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert len(data["layers"]) == 2
    assert int4 in data["notes"]


def test_shortcuts_that_read_codes(folder, capsys):
    options = ["--config", f"{folder}/config.py", "--config.task=tiny_task.py:residual"]
    codes = [*options, "--config.shortcuts=codes"]
    assert main(["inspect", *options]) == OK
    assert (
        "Shortcuts  1 of 3 inputs are read again behind their layer, in float"
        in capsys.readouterr().out
    )
    assert main(["inspect", *codes, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)["shortcuts"]
    assert found == {"read": "codes", "sites": ["Dense_1/kernel"]}
    run = folder / "codes"
    fast = [f"--config.verify.{each}=False" for each in ("layers", "attribute", "controls")]
    uniform = ["--config.policy.name=uniform", "--out", str(run), "--quiet"]
    assert main(["quantize", *codes, *uniform, *fast]) == OK
    report = json.loads((run / "report.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == OK
    again = json.loads(capsys.readouterr().out)["change"]["mean"]
    assert again == pytest.approx(report["test"]["mean"], abs=1e-7)
    assert main(["inspect", *options, "--config.shortcuts=code"]) == USAGE
    assert "config field shortcuts is 'code'; did you mean 'codes'?" in capsys.readouterr().err


def test_evaluate_repeats_the_report(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    report = json.loads((run / "report.json").read_text())
    assert data["examples"] == 150
    assert data["change"]["mean"] == pytest.approx(report["test"]["mean"], abs=1e-7)


def test_evaluate_on_another_split_gives_no_certificate(run, capsys):
    arguments = ["evaluate", str(run), "--split", "selection", "--require-lossless"]
    assert main(arguments) == NOT_LOSSLESS
    assert "no certificate" in capsys.readouterr().out


def test_evaluate_refuses_other_splits(run, capsys):
    assert main(["evaluate", str(run), "--config.seed=1"]) == BAD_INPUT
    assert "fingerprint" in capsys.readouterr().err


def test_evaluate_names_a_damaged_file(run, folder, capsys):
    damaged = folder / "damaged"
    shutil.copytree(run, damaged)
    arrays = next((damaged / "model").glob("*.safetensors"))
    arrays.write_bytes(arrays.read_bytes()[:-7])
    assert main(["evaluate", str(damaged)]) == BAD_INPUT
    assert arrays.name in capsys.readouterr().err.replace("\n", "")
    assert main(["evaluate", str(folder / "nowhere")]) == BAD_INPUT


def test_require_lossless_is_an_exit_code(folder):
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", f"{folder}/strict"]
    uniform = ["--config.policy.name=uniform", "--config.policy.format=int4"]
    assert main([*arguments, "--require-lossless", *uniform, "--config.verify.margin=1e-9"]) == (
        NOT_LOSSLESS
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.policy.muu=1"], USAGE, "did you mean policy.mu"),
        (["--oot", "x"], USAGE, "unknown argument '--oot'; did you mean --out"),
        (["--config.policy.skip=Dens_0*"], USAGE, "matches no layer; near matches: Dense_0/kernel"),
        (["--config.policy.force=Dense_0/*=w3"], USAGE, "unknown format 'w3'"),
        (["--config.policy.force=Dense_0"], USAGE, "write glob=format"),
        (["--config.policy.name=hawq"], USAGE, "policy.name is 'hawq'"),
        (["--config.ranges.estimator=kl"], USAGE, "ranges.estimator is 'kl'"),
        (["--config.policy.bits=(16,)"], USAGE, "policy.bits is (16,); expected 8, 4 or both"),
        (["--config.verify.points=0"], USAGE, "verify.points is 0"),
        (["--config.policy.weights=int3"], USAGE, "policy.weights is 'int3'"),
        (["--config.batch_size=-1"], USAGE, "batch_size -1"),
        (["--config.batch_size=401"], USAGE, "batch_size is 401, but the data set has 400"),
        (["--config.task=tiny_task.py:broken_data"], BAD_INPUT, "NaN"),
        (["--config.task=tiny_task.py:not_a_task"], USAGE, "not a Task"),
        (["--config.task=tiny_task.py:nothing"], USAGE, "has no function nothing"),
    ],
)
def test_errors_name_the_culprit_and_write_nothing(folder, capsys, arguments, code, message):
    out = folder / "never"
    found = main(
        ["quantize", "--config", f"{folder}/config.py", "--out", str(out), "--quiet", *arguments]
    )
    assert found == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_quantize_without_out_says_so(folder, capsys):
    assert main(["quantize", "--config", f"{folder}/config.py"]) == USAGE
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["inspect"], ["quantize"], ["evaluate"]])
def test_help_teaches(command, capsys):
    assert main([*command, "--help"]) == OK
    out = capsys.readouterr().out
    assert "exit codes" in out and "usage: jaxrmils" in out


def test_help_is_not_indented_after_its_first_line(capsys):
    for command in ("quantize", "pareto", "profile"):
        assert main([command, "--help"]) == OK
        lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
        assert len(lines) > 2 and not any(line.startswith(" ") for line in lines)


def test_controls_and_attribution_can_be_left_out(folder):
    out = f"{folder}/bare"
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", out]
    off = [f"--config.verify.{name}=False" for name in ("controls", "attribute", "layers")]
    assert main([*arguments, *off]) == OK
    report = json.loads(Path(out, "report.json").read_text())
    assert report["controls"] == [] and report["attributed"] is None
    assert all(row["measured"] is None for row in report["layers"])


def test_a_batch_larger_than_a_split_is_cut_down(folder):
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", f"{folder}/large"]
    assert main([*arguments, "--config.batch_size=400"]) == OK

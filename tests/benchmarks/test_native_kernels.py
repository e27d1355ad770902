"""The benchmark of native kernels runs, and compares results that agree."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from jaxrmils.lowering.native import kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
native_kernels = importlib.import_module("native_kernels")

REASON = kernels.available()
if REASON is None and kernels.instructions() != "avx512_vnni":
    REASON = "the peak is that of AVX512-VNNI"


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_it_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "native.json"
    cases = (
        native_kernels.dot_case(2, 9, 20),
        native_kernels.batched_case(2, 5, 8, 9),
        native_kernels.conv_case(5, 3, 3, 4, 2),
        native_kernels.conv_case(5, 3, 8, 0),
    )
    monkeypatch.setattr(native_kernels, "CASES", cases)
    options = ["--rounds", "1", "--seconds", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["native_kernels.py", *options])
    native_kernels.main()
    record = json.loads(out.read_text())
    assert list(record["rows"]) == [case.name for case in cases]
    assert record["command"].startswith("python benchmarks/native_kernels.py")
    assert "of the peak" in capsys.readouterr().out

"""CSV files: what a CSV reader gives back is what the report has."""

import csv
import io
import re

import pytest
from evaluation import saved_reports

from jaxrmils.evaluation import EvaluationError
from jaxrmils.evaluation.spreadsheet import controls_csv, layers_csv, metrics_csv


def rows(text):
    assert text.endswith("\r\n") and not re.search(r"(?<!\r)\n", text)
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_layers_come_back_exactly():
    report = saved_reports.full()
    report["layers"][1]["name"] = 'a "quoted", name'
    found = rows(layers_csv(report))
    assert [row["layer"] for row in found] == [layer["name"] for layer in report["layers"]]
    for row, layer in zip(found, report["layers"], strict=True):
        assert int(row["quantized_bits"]) == layer["quantized_bits"]
        assert row["rounding"].split() == layer["rounding"]
        for name in ("predicted", "attributed", "measured", "curvature"):
            for part in ("mean", "lower", "upper", "standard_error", "n"):
                cell = row[f"{name}_{part}"]
                estimate = layer.get(name)
                assert (float(cell) if cell else None) == (estimate and estimate[part])
    assert float(found[0]["mu_int8"]) == 0.012 and found[4]["mu_int8"] == ""


def test_controls_come_back_exactly():
    report = saved_reports.full()
    found = rows(controls_csv(report))
    assert found[0]["kind"] == "this plan" and found[0]["groups"] == "300"
    for row, control in zip(found, report["controls"], strict=True):
        assert row["name"] == control["name"] and row["note"] == control["note"]
        assert int(row["size_bits"]) == control["size_bits"]
        assert float(row["share"]) == control["size_bits"] / report["float_bits"]
        assert row["passed"] == str(control["test"]["passed"]).lower()
        for part in ("mean", "lower_bound", "upper_bound", "margin"):
            assert float(row[part]) == control["test"][part]


def test_metrics_come_back_exactly():
    report = saved_reports.with_metrics()
    found = rows(metrics_csv(report))
    assert [row["name"] for row in found] == ["Acc@1", "<F1>"]
    for row, metric in zip(found, report["metrics"], strict=True):
        for part in ("float_mean", "quantized_mean", "drop_upper", "alpha"):
            assert float(row[part]) == metric[part]
        for part in ("mean", "lower", "upper"):
            assert float(row[f"change_{part}"]) == metric["change"][part]
        assert row["change_groups"] == "300"
    assert [row["lost"] for row in found] == ["5", ""]
    assert rows(metrics_csv(saved_reports.minimal())) == []


def test_columns_are_the_same_for_every_report():
    kinds = (saved_reports.full, saved_reports.minimal, saved_reports.with_metrics)
    for make in (layers_csv, controls_csv, metrics_csv):
        headers = {make(r()).splitlines()[0] for r in kinds}
        assert len(headers) == 1


def test_what_an_older_report_does_not_have_is_empty():
    row = rows(controls_csv(saved_reports.minimal()))[1]
    assert row["lower_bound"] == "" and row["accuracy_difference"] == ""
    assert float(row["upper_bound"]) == 0.0129


def test_a_wrong_report_is_refused():
    with pytest.raises(EvaluationError, match="field layers is missing"):
        layers_csv({})

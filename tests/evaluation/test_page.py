"""Pages: strict HTML that loads nothing, charts that show the numbers, reports of all ages."""

import base64
import copy
import dataclasses
import hashlib
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from evaluation import saved_reports
from evaluation.pages import Page, assert_accessible, assert_self_contained

from jaxrmils import evaluation
from jaxrmils.evaluation import EvaluationError, LayerReport, Report
from jaxrmils.evaluation.page import (
    NamedReport,
    compare,
    compare_page,
    read_report,
    read_run,
    report_page,
)
from jaxrmils.evaluation.page.saved import (
    Control,
    CurvePoint,
    Estimate,
    SavedAccuracy,
    SavedLayer,
    SavedMetric,
    SavedReport,
    SavedTest,
)
from jaxrmils.statistics import AccuracyChange, Interval, MetricChange, NonInferiority

RUN = read_run(saved_reports.RUN, "20975982")
SAMPLES = ("full", "large", "minimal", "undecided", "with_metrics")


@pytest.fixture(scope="module")
def pages():
    return {name: Page(report_page(getattr(saved_reports, name)(), RUN)) for name in SAMPLES}


def comparison(**changes):
    first = NamedReport("a", read_report(saved_reports.full()), RUN)
    other = saved_reports.full()
    other["layers"][1]["rounding"] = ["nearest"]
    run = read_run(saved_reports.RUN | changes.pop("run", {}), "20975982")
    return compare([first, NamedReport("b <i>", read_report(other | changes), run)])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page_is_strict_self_contained_and_accessible(pages, name):
    assert_self_contained(pages[name])
    assert_accessible(pages[name])


def test_the_compared_page_is_strict_self_contained_and_accessible():
    page = Page(compare_page(comparison()))
    assert_self_contained(page)
    assert_accessible(page)


def test_the_security_policy_allows_this_script_and_style_alone(pages):
    page = pages["full"]
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for kind in ("style", "script"):
        text = "".join(page.words(kind))
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_sections_follow_what_the_report_has(pages):
    assert pages["full"].sections == [
        "sequence",
        "controls",
        "bounds",
        "sizes",
        "contributions",
        "agreement",
        "curve",
        "numbers",
        "coverage",
        "run",
    ]
    assert pages["minimal"].sections == [
        "controls",
        "sizes",
        "contributions",
        "agreement",
        "numbers",
        "coverage",
        "run",
    ]


def test_a_report_alone_renders_without_its_run():
    report = saved_reports.minimal() | {"comparisons": []}
    assert "controls" not in Page(report_page(report)).sections


def test_names_cannot_become_markup():
    hostile = "</th><script>alert(1)</script>\"'&\x00\ud800"
    report = saved_reports.full()
    report["layers"][1]["name"] = report["controls"][1]["name"] = hostile
    report["notes"], report["lossless"]["words"] = [hostile], hostile
    report["verdict"] = hostile
    run = read_run(saved_reports.RUN | {"config": {hostile: hostile}})
    page = Page(report_page(report, run))
    assert len(page.all("script")) == 1
    shown = hostile.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    for tag in ("th", "p", "li", "td"):
        assert any(shown in text for text in page.words(tag)), tag


def axis_of(page, table):
    """Slope and offset of a strip table's axis, from its printed ticks."""
    start = page.source.index(table)
    head = page.source[start : page.source.index("</thead>", start)]
    found = re.findall(r'x="([\d.]+)%"[^>]*>(-?[\d.]+)<', head)
    at, values = np.array([[float(x), float(value)] for x, value in found]).T
    return np.polyfit(values, at, 1)


def test_marks_stand_where_their_numbers_are_on_the_printed_axis(pages):
    page, report = pages["full"], saved_reports.full()
    slope, offset = axis_of(page, 'id="contributions-table"')
    for layer in report["layers"][1:]:
        for series in ("attributed", "predicted", "measured"):
            e = layer[series]
            group = next(
                chart
                for chart in page.charts
                for g in [chart.find(f"g[@class='mark {series}']")]
                if g is not None and g.get("data-tip").startswith(f"{layer['name']}: ")
            ).find(f"g[@class='mark {series}']")
            bar, use = group.find("line"), group.find("use")
            drawn = [float(x[:-1]) for x in (bar.get("x1"), use.get("x"), bar.get("x2"))]
            expected = [slope * e[key] + offset for key in ("lower", "mean", "upper")]
            np.testing.assert_allclose(drawn, expected, atol=0.05)


def test_a_plan_far_off_is_an_arrow_and_leaves_room_for_the_others(pages):
    page = pages["full"]
    slope, _ = axis_of(page, "forest")
    assert slope * saved_reports.MARGIN > 8, "the margin is at least 8 % of the width from zero"
    far = [c for c in page.charts if (c.get("aria-label") or "").startswith("ceil everywhere")]
    uses = [use.get("href") for use in far[0].iter("use")]
    assert uses and set(uses) == {"#arrow-right"}


def test_nothing_is_drawn_outside_its_chart(pages):
    for page in pages.values():
        for value in re.findall(r'(?:x|x1|x2|cx)="(-?[\d.]+)%"', page.source):
            assert 0.0 <= float(value) <= 100.0


def test_bars_of_sizes_are_proportional(pages):
    report = saved_reports.full()
    largest = max(layer["float_bits"] for layer in report["layers"])
    label = f"{report['layers'][1]['name']}: w8a8, "
    chart = next(c for c in pages["full"].charts if (c.get("aria-label") or "").startswith(label))
    before, after = (float(rect.get("width")[:-1]) for rect in chart.iter("rect"))
    assert before == pytest.approx(100 * report["layers"][1]["float_bits"] / largest, abs=0.01)
    assert after == pytest.approx(100 * report["layers"][1]["quantized_bits"] / largest, abs=0.01)


def test_the_sequence_marks_the_chosen_plan_and_pales_the_untested(pages):
    source = pages["full"].source
    plot = source[source.index('id="sequence"') : source.index('id="controls"')]
    assert plot.count('class="mark selection pale"') == 2
    assert plot.count('class="mark test"') == 4 + 1, "four tests and the legend"
    assert plot.count('class="chosen"') == 1


@pytest.mark.parametrize(
    ("name", "words"), [("full", "Lossless"), ("undecided", "No evidence either way")]
)
def test_the_verdict_comes_first(pages, name, words):
    assert pages[name].words("strong")[0] == words


def test_a_plan_that_lost_is_called_so():
    report = saved_reports.minimal()
    report["test"] |= {"passed": False, "lower_bound": 0.1, "upper_bound": 0.2, "mean": 0.15}
    assert Page(report_page(report)).words("strong")[0] == "Not lossless"


def test_two_thousand_layers_are_cut_to_the_largest_changes_and_say_so():
    page = Page(report_page(saved_reports.large(2000)))
    assert_self_contained(page)
    assert "The 400 of 2000 layers with the largest changes are shown" in page.source


def test_numbers_that_are_no_numbers_break_no_chart():
    report = saved_reports.full()
    report["layers"][1]["measured"] |= {"mean": math.nan, "lower": math.nan, "upper": math.nan}
    report["layers"][2]["predicted"] |= {"lower": -math.inf, "upper": math.inf}
    report["measured"] |= {"mean": 0.0, "lower": 0.0, "upper": 0.0}
    report["controls"][1]["test"] |= {"lower_bound": -math.inf, "upper_bound": math.inf}
    report["layers"][4]["measured"]["upper"] = math.nan
    report["curve"] = report["curve"][:2]
    report["curve"][0]["sign_agreement"] = math.nan
    report["lossless"]["steps"] = report["lossless"]["steps"][2:3]
    page = Page(report_page(report, RUN))
    assert not re.search(r'(?:x|x1|x2|y|y1|y2|cx|cy|width)="[^"]*(?:nan|inf)', page.source)


def test_layers_all_in_float_leave_no_empty_charts():
    report = saved_reports.minimal()
    report["layers"] = [saved_reports.old_layer("Dense_0/kernel", "float", [], 4608)]
    assert "agreement" not in Page(report_page(report)).sections


def _set(document, path, value):
    *parents, last = path
    for key in parents:
        document = document[key]
    if value is KeyError:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("test",), KeyError, "field test is missing"),
        (("test", "margin"), "wide", "field test.margin is 'wide'; a number"),
        (("layers", 1, "name"), 3, "field layers[1].name is 3; a string"),
        (("layers", 1, "rounding"), ["up"], "field layers[1].rounding[0] is 'up'; one of"),
        (("layers", 1, "predicted", "lower"), KeyError, "field layers[1].predicted.lower is mis"),
        (("layers",), {}, "field layers is {}; a list"),
        (("quantized_bits",), 1.5, "field quantized_bits is 1.5; an integer"),
        (("float_loss",), None, "field float_loss is None; a number"),
        (("test", "passed"), 1, "field test.passed is 1; true or false"),
        (("test", "bounds", "t"), [0.0], "field test.bounds['t'] is [0.0]; a list of 2"),
        (("curve", 2, "examples"), True, "field curve[2].examples is True; an integer"),
        (("lossless", "steps", 0, "selection"), [], "lossless.steps[0].selection is []; an object"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    report = copy.deepcopy(saved_reports.full())
    _set(report, path, value)
    with pytest.raises(EvaluationError, match=re.escape(message)):
        read_report(report)


@pytest.mark.parametrize(
    "field", ["controls", "curve", "lossless", "mu", "residual", "notes", "metrics"]
)
def test_optional_fields_may_be_null_or_absent(field):
    report = saved_reports.with_metrics()
    assert Page(report_page(report | {field: None}))
    del report[field]
    assert Page(report_page(report))


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (SavedReport, Report),
        (SavedLayer, LayerReport),
        (SavedTest, NonInferiority),
        (SavedAccuracy, AccuracyChange),
        (SavedMetric, MetricChange),
        (Estimate, Interval),
        (Control, evaluation.Control),
        (CurvePoint, evaluation.CurvePoint),
    ],
)
def test_what_a_page_needs_is_what_verify_writes(saved, live):
    needed = {
        f.name
        for f in dataclasses.fields(saved)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    assert needed and needed <= {f.name for f in dataclasses.fields(live)}


def test_an_older_files_comparisons_become_controls():
    controls = read_report(saved_reports.minimal()).controls
    assert [c.name for c in controls] == ["this plan", "uniform int4"]
    assert controls[1].test.mean == 0.00689 and math.isnan(controls[1].test.lower_bound)


def test_comparing_finds_the_layer_that_differs():
    found = comparison()
    assert found.differing == 1 and found.warnings == () and found.settings == {}
    page = Page(compare_page(found))
    assert page.source.count('aria-label="differs: "') == 1
    assert "b <i>" in page.words("th")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"splits": "0" * 64}}, "different splits"),
        ({"test": saved_reports.full()["test"] | {"margin": 0.01}}, "different margins"),
        ({"test": saved_reports.full()["test"] | {"n": 1400}}, "different numbers of examples"),
        ({"float_loss": 0.08}, "different float losses on the same data"),
    ],
)
def test_comparing_warns_where_numbers_are_not_paired(changes, words):
    warnings = comparison(**changes).warnings
    assert len(warnings) == 1 and words in warnings[0]
    assert warnings[0] in Page(compare_page(comparison(**changes))).words("li")


def test_comparing_shows_every_metric_and_accuracy_once():
    named = [
        NamedReport(name, read_report(report), RUN)
        for name, report in (("a", saved_reports.with_metrics()), ("b", saved_reports.full()))
    ]

    def cells(runs):
        page = Page(compare_page(compare(runs)))
        heads = [text for text in page.words("th") if text.endswith(" change")]
        return heads, [text for text in page.words("td") if "the drop is below" in text]

    heads, found = cells(named)
    assert heads == ["loss change", "accuracy change", "Acc@1 change", "<F1> change"]
    assert found == [
        "-0.13 points (float 97.60 %; at 95 % the drop is below 0.47 points)",
        "-0.13 points (float 98.00 %; at 95 % the drop is below 0.31 points)",
    ]
    heads, found = cells([named[0], named[0]])
    assert heads == ["loss change", "Acc@1 change", "<F1> change"] and len(found) == 4


def test_one_run_is_nothing_to_compare():
    with pytest.raises(EvaluationError, match="two or more"):
        compare(comparison().runs[:1])


BROWSERS = [p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p]


def _open(browser, folder, text):
    """Standard error's console lines and the page's elements after its script ran."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={folder}/profile", "--dump-dom", "page.html"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


if BROWSERS:

    def test_a_browser_opens_pages_without_a_message(pages, tmp_path):
        messages, document = _open(BROWSERS[0], tmp_path, pages["full"].source)
        assert messages == []
        assert 'id="tip"' in document, "the script ran to its first lines"
        assert 'class="tools" data-table' in document, "and to its last: the tools are shown"
        assert _open(BROWSERS[0], tmp_path, compare_page(comparison()))[0] == []

    def test_the_browser_would_tell_of_a_broken_page(pages, tmp_path):
        broken = pages["full"].source.replace("</main>", "<script>alert(1)</script></main>")
        assert _open(BROWSERS[0], tmp_path, broken)[0] != []

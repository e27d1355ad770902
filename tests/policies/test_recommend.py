"""Which plans are picked, from lists that are easy and lists that are not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrmils.policies import PlanError
from jaxrmils.policies.recommend import MeasuredPoint, recommend


def point(size, change, error=0.001, name=""):
    return MeasuredPoint(name, size, change, change - error, change + error)


def picks(points, **options):
    found = recommend(points, **options)
    return found.quality.index, found.balanced.index, found.compact.index


def test_three_different_picks():
    # Below 5 margins, size falls to 3 for little, then the loss rises.
    sizes = [10, 8, 6, 4, 3, 2, 1]
    changes = [-0.001, 0.002, 0.0035, 0.005, 0.006, 0.018, 0.3]
    points = [point(s, c) for s, c in zip(sizes, changes, strict=True)]
    assert picks(points) == (2, 4, 5)
    assert picks(points, tolerance=0.01) == (2, 3, 4)
    assert picks(points, float_loss=2.0) == (4, 4, 5)  # margin 0.01
    assert picks(points[::-1]) == (4, 2, 1)


def test_the_sentences_hold_the_numbers():
    found = recommend([point(6e6, 0.001), point(4e6, 0.006), point(3e6, 0.015)])
    assert found.quality.reason.startswith("6.00 MB: the smallest plan shown to be as good as")
    assert "+0.001 nats (interval +0 to +0.002)" in found.quality.reason
    assert "margin of 0.005" in found.quality.reason
    assert "saves 67% of the bytes" in found.balanced.reason
    assert "36% of the loss" in found.balanced.reason
    assert "tolerance of 0.02" in found.compact.reason
    assert all(p.reason.count("\n") == 0 for p in (found.quality, found.balanced, found.compact))


def test_predictions_are_not_shown_to_be_anything():
    points = [point(6e6, 0.001), point(4e6, 0.006), point(3e6, 0.015)]
    found = recommend(points, measured=False)
    start = "6.00 MB: the smallest plan predicted to be as good as float; its loss is predicted to"
    assert found.quality.reason.startswith(start)
    words = [pick.reason for pick in (found.quality, found.balanced, found.compact)]
    words.append(recommend([point(5, 0.9)], measured=False).quality.reason)
    words.append(recommend([point(5, 0.001)], measured=False).balanced.reason)
    assert all("predicted" in each and "shown" not in each for each in words)
    assert "no plan is predicted to be as good as float" in words[3]


def test_a_wide_interval_is_no_evidence():
    # The interval of the small plan holds 0, and the margin's tenfold.
    points = [point(5, 0.001), point(2, 0.001, error=0.05)]
    found = recommend(points)
    assert (found.quality.index, found.compact.index) == (0, 0)
    assert found.quality.qualifies and found.compact.qualifies


def test_nothing_qualifies():
    points = [point(5, 0.5), point(3, 0.4), point(2, 0.9)]
    found = recommend(points)
    assert picks(points) == (1, 1, 1)
    assert not found.quality.qualifies and not found.compact.qualifies
    assert "no plan is shown to be as good as float" in found.quality.reason
    assert "margin of 0.005" in found.quality.reason
    # Within the tolerance only.
    points = [point(5, 0.009), point(3, 0.012), point(2, 0.015)]
    found = recommend(points)
    assert (found.quality.index, found.quality.qualifies) == (0, False)
    assert (found.compact.index, found.compact.qualifies) == (2, True)


def test_one_point_and_ties():
    assert picks([point(5, 0.0)]) == (0, 0, 0)
    assert picks([point(5, 0.9)]) == (0, 0, 0)
    assert picks([point(5, 0.001)] * 3) == (0, 0, 0)
    assert picks([point(5, 0.002), point(5, 0.001)]) == (1, 1, 1)
    assert picks([point(5, 0.0, error=0.0), point(3, 0.0, error=0.0)]) == (1, 1, 1)
    # On a straight line none is a knee.
    assert picks([point(5, 0.0), point(4, 0.008), point(3, 0.016)]) == (0, 0, 2)


def test_the_balanced_plan_is_within_the_tolerance_too():
    points = [point(6, 0.001), point(3, 0.002, error=0.05), point(2, 0.015)]
    assert picks(points) == (0, 0, 2)


POINTS = st.lists(
    st.tuples(st.floats(0, 10), st.floats(-0.01, 0.05), st.floats(0, 0.02)), min_size=1, max_size=9
)


@given(POINTS, st.floats(0.001, 0.01), st.floats(1, 8))
def test_sizes_fall_and_promises_are_kept(drawn, margin, factor):
    points = [point(*each) for each in drawn]
    tolerance = margin * factor
    found = recommend(points, margin=margin, tolerance=tolerance)
    quality, balanced, compact = found.quality.point, found.balanced.point, found.compact.point
    assert quality.size_bytes >= balanced.size_bytes >= compact.size_bytes
    for pick, bound in ((found.quality, margin), (found.compact, tolerance)):
        assert pick.qualifies == any(p.upper <= bound for p in points)
        if pick.qualifies:
            assert pick.point.upper <= bound
            assert not any(
                p.upper <= bound and p.size_bytes < pick.point.size_bytes for p in points
            )
    if found.compact.qualifies and balanced != quality:
        assert balanced.upper <= tolerance


@pytest.mark.parametrize(
    "points, options, message",
    [
        ([], {}, "no points"),
        ([point(math.nan, 0.0)], {}, "point 0 has size"),
        ([point(-1, 0.0)], {}, "point 0 has size"),
        ([point(1, 0.0), point(1, math.inf)], {}, "point 1"),
        ([MeasuredPoint("x", 1, 0.5, 0.6, 0.7)], {}, "outside its interval"),
        ([point(1, 0.0)], {"margin": 0.0}, "margin 0.0"),
        ([point(1, 0.0)], {"margin": 0.1, "tolerance": 0.05}, "expected 0 < margin <= tolerance"),
        ([point(1, 0.0)], {"margin": math.nan}, "margin nan"),
        ([point(1, 0.0)], {"unit": "mm2"}, "no margin is known in mm2"),
    ],
)
def test_refusals(points, options, message):
    with pytest.raises(PlanError, match=message):
        recommend(points, **options)


def test_other_units():
    found = recommend([point(1, 0.0)], unit="mm2", float_loss=10.0)
    assert "mm2" in found.quality.reason and "margin of 0.05" in found.quality.reason

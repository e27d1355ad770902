"""Calibration-size curves against means of the same scores."""

import dataclasses

import numpy as np
import pytest
from stages import scored

import jaxrmils as jr
from jaxrmils.evaluation import EvaluationError, calibration_curve
from jaxrmils.policies import predict
from jaxrmils.statistics import StatisticsError, mean_interval

N = 400


def made(**fields):
    """The "plain" model's scores with numbers of our own."""
    real = scored("plain")
    empty = {
        "activations": np.zeros((N, *real.activations.shape[1:]), np.float32),
        "weights": np.zeros((N, *real.weights.shape[1:]), np.float32),
        "gradient_sum": np.zeros((N, 4), np.float32),
        "loss": np.ones(N, np.float32),
    }
    return dataclasses.replace(real, **{**empty, **fields})


@pytest.fixture(scope="module")
def given():
    random = np.random.default_rng(0)
    values = random.normal(0.1, 1, (N, 4, 6)).astype(np.float32)
    # The sign of the first is clear, that of the second is noise, the others never move.
    sums = np.zeros((N, 4), np.float32)
    sums[:, 0], sums[:, 1] = random.normal(3, 1, N), random.normal(0.02, 1, N)
    scores = made(activations=values, gradient_sum=sums)
    return scores, jr.uniform(scores.table, "int8")


def test_the_last_point_is_the_reports_prediction(given):
    scores, plan = given
    curve = calibration_curve(scores, plan)
    assert [point.examples for point in curve] == [50, 100, 200, 400]
    whole = mean_interval(sum(predict(scores, plan).values()))
    assert curve[-1].predicted.mean == pytest.approx(whole.mean)
    assert curve[-1].predicted.upper == pytest.approx(whole.upper)
    assert curve[-1].sign_agreement == 1
    widths = [point.predicted.upper - point.predicted.lower for point in curve]
    assert widths == sorted(widths, reverse=True)


def test_signs_agree_where_they_are_clear(given):
    scores, plan = given
    few = calibration_curve(scores, plan, sizes=(10,))[0].sign_agreement
    # Three of four operands always agree, the noisy one in part of the shuffles.
    assert 0.75 < few < 1
    clear = dataclasses.replace(scores, gradient_sum=np.abs(scores.gradient_sum))
    assert calibration_curve(clear, plan, sizes=(10,))[0].sign_agreement == 1


def test_points_are_nested_prefixes_of_one_shuffle(given):
    scores, plan = given
    change = np.zeros((N, 4, 6), np.float32)
    change[:, 0, 0] = np.arange(N) < 200
    marked = dataclasses.replace(scores, activations=change)
    few, more = calibration_curve(marked, plan, sizes=(30, 31), seed=5)
    added = 31 * more.predicted.mean - 30 * few.predicted.mean  # One example, 0 or 1.
    assert min(abs(added), abs(added - 1)) < 1e-6
    assert (few, more) == calibration_curve(marked, plan, sizes=(31, 30), seed=5)
    assert (few, more) != calibration_curve(marked, plan, sizes=(31, 30), seed=6)


def test_bad_sizes_are_refused(given):
    scores, plan = given
    with pytest.raises(EvaluationError, match="from 2 to 400"):
        calibration_curve(scores, plan, sizes=(401,))
    with pytest.raises(EvaluationError, match="from 2 to 400"):
        calibration_curve(scores, plan, sizes=(1, 50))
    with pytest.raises(EvaluationError, match="two or more"):
        calibration_curve(made(loss=np.ones(1, np.float32)), plan)
    with pytest.raises(StatisticsError, match="one group"):
        calibration_curve(scores, plan, groups=np.zeros(N, int))

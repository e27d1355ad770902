"""The walk from float to the smallest plan against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import table_of

from jaxrmils.policies.frontier import Estimate, Option, path, saving
from jaxrmils.policies.plan import FLOAT_LAYER, LayerPlan

COSTS = st.integers(-20, 60).map(lambda i: i / 8)
GAINS = st.integers(1, 12).map(lambda i: i / 4)


@st.composite
def problems(draw):
    options, costs = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        count = draw(st.integers(0, 3))
        gains = [0.0, *draw(st.lists(GAINS, min_size=count, max_size=count))]
        options[name] = [Option(LayerPlan(), gain) for gain in gains]
        costs[name] = [0.0, *draw(st.lists(COSTS, min_size=count, max_size=count))]
    return options, costs


def totals(options, costs, plan):
    gain = sum(options[name][i].saving for name, i in plan.items())
    return gain, sum(costs[name][i] for name, i in plan.items())


@settings(max_examples=200, deadline=None)
@given(problems())
def test_every_plan_is_optimal_for_some_price(problem):
    options, costs = problem
    plans = path(options, costs)
    every = [
        dict(zip(options, choice, strict=True))
        for choice in itertools.product(*(range(len(o)) for o in options.values()))
    ]
    points = [totals(options, costs, plan) for plan in every]
    found = [totals(options, costs, plan) for plan in plans]
    assert plans[0] == dict.fromkeys(options, 0)
    assert found[-1][0] == max(gain for gain, _ in points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(found)]
    assert slopes == sorted(slopes)
    for i, (gain, cost) in enumerate(found):
        # Any price between the slopes on either side makes the plan the cheapest of all.
        around = slopes[max(i - 1, 0) : i + 1]
        for price in [*around, np.mean(around)] if around else []:
            best = min(c - price * g for g, c in points)
            assert cost - price * gain == pytest.approx(best, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_plans_are_nested(problem):
    for before, after in itertools.pairwise(path(*problem)):
        assert sum(before[name] != after[name] for name in before) == 1


def test_saving_counts_size_and_work():
    table = table_of("plain")
    row = table.layers[0]
    int4 = LayerPlan(4, 8, ("nearest",))
    sizes = table.layer_bits(row.name, 32) - table.layer_bits(row.name, 4)
    work = row.macs * (32 * 32 - 4 * 8) / (sum(r.macs for r in table.layers) * 32 * 32)
    found = saving(table, row.name, int4, 0.5)
    assert found == pytest.approx(sizes / table.float_bits + 0.5 * work)
    assert saving(table, row.name, FLOAT_LAYER, 0.5) == 0.0


def test_a_product_of_activations_saves_work_alone():
    table = table_of("nnx_transformer")
    name = next(row.name for row in table.layers if not row.has_weight)
    int8 = LayerPlan(32, 8, ("nearest", "nearest"))
    assert saving(table, name, int8, 0.0) == 0.0
    assert saving(table, name, int8, 0.1) > 0.0


@pytest.mark.parametrize(
    ("estimate", "caution", "expected"),
    [
        (Estimate(0.01, 0.0), 1.0, 0.01),  # known exactly
        (Estimate(-0.01, 0.02), 0.0, 0.0),  # drowned in noise
        (Estimate(0.0, 0.02), 1.0, 0.02),
        (Estimate(0.01, 0.005), 2.0, 0.0075 + 0.01),
        (Estimate(-0.01, 0.004), 0.0, -0.0036),  # a gain, shrunk twice as hard
    ],
)
def test_costs_are_shrunk_and_cautious(estimate, caution, expected):
    assert estimate.cost(caution) == pytest.approx(expected)

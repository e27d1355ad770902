"""Fixed-sequence testing and its words."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import random
from stages import scored

import jaxrmils as jr
from jaxrmils.policies import PlanError, Search, Simulator, lossless, steps_of
from jaxrmils.sensitivity import ScoreError

COUNT = 256


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def squares(outputs, targets):
    return jnp.sum((outputs - targets) ** 2, axis=-1)


def setup(noise=0.5):
    """A network, and targets that are its own outputs with noise."""
    params = {"a": random(8, 16), "b": random(16, 4)}
    x = random(3 * COUNT, 8)
    rng = np.random.default_rng(0)
    y = np.float32(apply(params, x) + noise * rng.normal(size=(3 * COUNT, 4)))
    graph = jr.trace(apply, params, x[:2])
    ranges = jr.calibrate(graph, params, [x[:COUNT]])
    parts = [[(x[i : i + COUNT], y[i : i + COUNT])] for i in (COUNT, 2 * COUNT)]
    return graph, params, *parts, ranges


def run(margin, **options):
    graph, params, selection, confirmation, ranges = setup()
    return lossless(
        graph, params, selection, confirmation, squares, ranges, margin=margin, **options
    )


def test_the_last_plan_that_passed_is_returned():
    found = run(0.05)
    tests = [step.test for step in found.steps]
    passed = [test is not None and test.passed for test in tests]
    assert found.chosen is not None
    assert passed == [True] * (found.chosen + 1) + [False] * (len(passed) - found.chosen - 1)
    assert found.plan is found.steps[found.chosen].plan
    assert all(test is None for test in tests[found.chosen + 2 :])
    sizes = [step.size_bits for step in found.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert "lossless within 0.05 nats at 95 %" in found.words


def test_every_test_is_that_of_its_plan_on_the_confirmation_data():
    graph, params, selection, confirmation, ranges = setup()
    simulator = Simulator(graph, squares)
    found = lossless(
        graph, params, selection, confirmation, squares, ranges, margin=0.05, simulator=simulator
    )
    on_confirmation = simulator.on(params, ranges, confirmation)
    for step in found.steps:
        if step.test is not None:
            change = on_confirmation.change(step.plan)
            expected = jr.statistics.noninferiority(change, margin=0.05, alpha=0.05)
            assert step.test == expected
    # The simulated change is the integer model's.
    model = jr.quantize(graph, params, found.plan, ranges)
    ((x, y),) = confirmation
    measured = float(np.mean(squares(model(x), y) - squares(apply(params, x), y)))
    assert found.steps[found.chosen].test.mean == pytest.approx(measured, abs=1e-5)


def test_an_impossible_margin_is_said_to_be_one():
    found = run(0.0, search=Search(formats=("w4a4",)))
    assert found.chosen is None
    assert all(layer.is_float for layer in found.plan.layers.values())
    assert "every layer stays float: not possible at this margin" in found.words


def test_too_little_data_is_said_to_be_that():
    graph, params, selection, confirmation, ranges = setup(noise=3.0)
    few = [(x[:8], y[:8]) for x, y in confirmation]
    found = lossless(
        graph, params, selection, few, squares, ranges, margin=0.01, search=Search(("w4a8",))
    )
    assert found.chosen is None
    assert "no evidence either way: about" in found.words
    assert "confirmation examples are needed" in found.words


def test_the_margin_is_set_by_the_selection_data():
    graph, params, selection, confirmation, ranges = setup()
    found = lossless(graph, params, selection, confirmation, squares, ranges)
    ((x, y),) = selection
    expected = jr.statistics.default_margin(float(np.mean(squares(apply(params, x), y))))
    assert found.margin == pytest.approx(expected, rel=1e-5)


def test_another_unit_has_another_default_margin():
    graph, params, selection, confirmation, ranges = setup()
    arguments = (graph, params, selection, confirmation, squares, ranges)
    found = lossless(*arguments, unit="mm2", search=Search(("w8a8",), rounds=0))
    ((x, y),) = selection
    expected = 0.005 * float(np.mean(squares(apply(params, x), y)))
    assert found.margin == pytest.approx(expected, rel=1e-5)
    assert "mm2" in found.words and "nats" not in found.words


def test_groups_widen_the_bounds_of_dependent_examples():
    alone = run(0.05).steps[0].test
    # Every example three times: no more evidence than one.
    graph, params, selection, ((x, y),), ranges = setup()
    thrice = [(jnp.concatenate([x] * 3), np.concatenate([y] * 3))]
    arguments = (graph, params, selection, thrice, squares, ranges)
    groups = np.tile(np.arange(COUNT), 3)
    grouped = lossless(*arguments, margin=0.05, groups=groups).steps[0].test
    blind = lossless(*arguments, margin=0.05).steps[0].test
    assert grouped.groups == COUNT
    assert grouped.upper_bound == pytest.approx(alone.upper_bound, rel=0.02)
    assert blind.upper_bound < grouped.upper_bound


def test_the_record_is_plain():
    found = run(0.05)
    record = steps_of(found)
    assert record["words"] == found.words
    assert [step["chosen"] for step in record["steps"]].index(True) == found.chosen
    assert sum(record["steps"][0]["formats"].values()) == 2
    assert record["steps"][0]["test"]["passed"] is True


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="margin is -1"):
        run(-1.0)
    with pytest.raises(ValueError, match=r"alpha is 0\.7"):
        run(0.1, alpha=0.7)
    with pytest.raises(PlanError, match="matches no layer"):
        run(0.1, skip=("nothing",))
    graph, params, selection, _, ranges = setup()
    with pytest.raises(ScoreError, match="no batches"):
        lossless(graph, params, selection, [], squares, ranges)
    with pytest.raises(ScoreError, match="the same examples"):
        lossless(graph, params, selection, selection, squares, ranges)
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        run(0.1, groups=np.arange(3))
    with pytest.raises(PlanError, match="made for another model"):
        run(0.1, scores=scored("plain"))
    with pytest.raises(PlanError, match="another graph or loss"):
        run(0.1, simulator=Simulator(graph, squares))

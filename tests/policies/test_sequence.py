"""The search for a sequence of plans, on a made-up network whose truth is known."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LAYERS, scores, setup

from jaxrmils import tabulate
from jaxrmils.policies import PlanError, Search, plan_sequence
from jaxrmils.policies.attribution import PlanAttribution
from jaxrmils.policies.sequence import MeasuredPlan, _thinned
from jaxrmils.sensitivity import ScoreError

COUNT = 400


@dataclasses.dataclass(frozen=True)
class Graphed:
    graph: object


class MadeUp:
    """A simulation whose loss change is a sum of chosen costs, and of one of a pair of layers."""

    def __init__(self, costs, together=0.0, noise=0.0):
        graph, self.ranges = setup()
        self.simulator = Graphed(graph)
        self.costs, self.together, self.noise = costs, together, noise
        self.attributed = []
        self.float_loss = np.ones(COUNT)

    def attribute(self, plan):
        self.attributed.append(plan)
        rng = np.random.default_rng(len(self.attributed))
        layers = {
            name: self.costs[name, layer.format] + self.noise * rng.normal(size=COUNT)
            for name, layer in plan.layers.items()
            if not layer.is_float
        }
        if all(plan.layers[name].activation_bits == 4 for name in LAYERS[:2]):
            layers[LAYERS[0]] = layers[LAYERS[0]] + self.together / 2
            layers[LAYERS[1]] = layers[LAYERS[1]] + self.together / 2
        change = sum(layers.values(), np.zeros(COUNT))
        return PlanAttribution(layers, np.ones(COUNT), 1.0 + change, 2)

    def change(self, plan):
        return self.attribute(plan).change


FORMATS = ("w8a8", "w4a4")


def made_up(values, **options):
    names = [(name, f) for name in LAYERS for f in ("8", "4")]
    costs = {}
    for (name, bits), value in zip(names, values, strict=True):
        costs[name, f"w{bits}a{bits}" if name != "dot_0" else f"a{bits}"] = value
    return MadeUp(costs, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12).map(lambda i: i / 1000), min_size=6, max_size=6),
    st.sampled_from([0.0, 0.004]),
)
def test_the_sequence_holds_the_best_plan(values, together):
    simulation = made_up(values, together=together)
    found = plan_sequence(simulation, margin=0.005, search=Search(formats=FORMATS, length=50))
    table = tabulate(simulation.simulator.graph)
    bounds = [each.bound(1.0) for each in found]
    savings = [each.saving for each in found]
    assert savings == sorted(savings)
    assert bounds == sorted(bounds)
    # The greedy walk with exact costs loses at most one layer's step to the best of all plans.
    best, widest = 0.0, 0.0
    for formats in itertools.product((None, "8", "4"), repeat=3):
        total, saved = 0.0, 0.0
        for name, bits in zip(LAYERS, formats, strict=True):
            if bits is None:
                continue
            key = f"w{bits}a{bits}" if name != "dot_0" else f"a{bits}"
            total += simulation.costs[name, key]
            weight = int(bits) if name != "dot_0" else 32
            size = table.layer_bits(name, 32) - table.layer_bits(name, weight)
            saved += size / table.float_bits
            widest = max(widest, size / table.float_bits)
        if formats[0] == formats[1] == "4":
            total += together
        if total <= 0.005:
            best = max(best, saved)
    reached = max((each.saving for each in found if each.bound(1.0) <= 0.005), default=0.0)
    assert reached >= best - widest - 0.1


def test_layers_that_cost_much_fall_back():
    simulation = made_up([0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    found = plan_sequence(simulation, margin=0.005, search=Search(formats=FORMATS))
    last = [each for each in found if each.bound(0.0) <= 0.005][-1]
    assert [last.plan.layers[name].format for name in LAYERS] == ["w4a4", "w8a8", "a4"]


def test_a_first_path_comes_from_the_tangent():
    simulation = made_up([0.0] * 6)
    plan_sequence(
        simulation,
        margin=0.005,
        # Nearest int4 of the second layer is terrible, to first order.
        scores=scores({(1, 3): np.full(8, 5.0)}),
        search=Search(formats=FORMATS, rounds=0),
    )
    first = simulation.attributed[0]
    assert first.layers["second"].format != "w4a4"
    assert first.layers["first"].format == "w4a4"


def test_proposed_directions_are_an_option():
    simulation = made_up([0.0] * 6)
    directions = {4: {"first": ("floor",)}}
    plan_sequence(
        simulation,
        margin=0.005,
        directions=directions,
        search=Search(formats=FORMATS, rounds=0),
    )
    roundings = {plan.layers["first"].rounding for plan in simulation.attributed}
    assert ("floor",) in roundings
    assert all(plan.layers["second"].rounding != ("floor",) for plan in simulation.attributed)


def test_hopeless_plans_are_left_out_but_never_all():
    simulation = made_up([1.0] * 6)
    found = plan_sequence(simulation, margin=0.005, search=Search(formats=FORMATS))
    assert len(found) == 1
    assert found[0].change.mean() >= 1.0


def test_long_sequences_are_thinned_by_clearance():
    margin, error = 0.01, 0.001
    clearances = [9.5, 9.0, 8.5, 7.0, 5.0, 3.0, 2.0, 1.2, 0.9, 0.5, 0.0, -1.0, -1.9]
    plans = [
        MeasuredPlan(None, float(i), np.full(4, margin - error * z), error)
        for i, z in enumerate(clearances)
    ]
    (only,) = _thinned(plans, margin, Search(length=1))
    assert round(only.clearance(margin), 6) == 1.2
    for length in range(2, len(plans)):
        kept = _thinned(plans, margin, Search(length=length))
        found = [round(each.clearance(margin), 6) for each in kept]
        assert len(found) == length
        assert found == sorted(found, reverse=True)
        assert found[0] == 9.5  # a plan to fall back on
        if length >= 6:
            # The most compressed that is safe, that fits, and one that only other data can judge.
            assert {8.5, 1.2} <= set(found)
            assert found[-1] < 1.0


def test_skip_and_force_hold():
    simulation = made_up([0.0] * 6)
    found = plan_sequence(
        simulation,
        margin=0.005,
        skip=("first",),
        force={"second": "w8a8"},
        search=Search(formats=FORMATS),
    )
    for each in found:
        assert each.plan.layers["first"].is_float
        assert each.plan.layers["second"].format == "w8a8"


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (Search(formats=()), "formats is empty"),
        (Search(formats=("w9",)), "unknown format 'w9'"),
        (Search(formats="w8a8"), "formats is 'w8a8'; expected some"),
        (Search(rounds=-1), "rounds -1"),
        (Search(length=0), "length 0"),
        (Search(caution=float("nan")), "caution nan"),
    ],
)
def test_bad_options_are_refused(search, message):
    with pytest.raises(PlanError, match=message):
        plan_sequence(made_up([0.0] * 6), margin=0.005, search=search)


def test_forced_layers_are_attributed_too():
    simulation = made_up([0.001] * 6)
    found = plan_sequence(
        simulation, margin=0.005, force={"first": "w8a8"}, skip=("second", "dot_0")
    )
    assert [each.plan.layers["first"].format for each in found] == ["w8a8"]


def test_groups_widen_the_bounds():
    changes = np.random.default_rng(0).normal(size=COUNT // 4)
    simulation = made_up([np.tile(changes, 4)] + [0.0] * 5)
    search = Search(formats=("w8a8",), rounds=0)
    groups = np.tile(np.arange(COUNT // 4), 4)
    options = {"margin": 1.0, "search": search, "skip": ("second", "dot_0")}
    alone = plan_sequence(simulation, **options)[-1]
    grouped = plan_sequence(simulation, **options, groups=groups)[-1]
    assert grouped.standard_error == pytest.approx(2 * alone.standard_error, rel=0.01)


def test_nothing_to_plan_is_refused():
    with pytest.raises(PlanError, match="every layer is skipped"):
        plan_sequence(made_up([0.0] * 6), margin=0.005, skip=("*",))


def test_one_example_is_too_few(monkeypatch):
    monkeypatch.setitem(globals(), "COUNT", 1)
    simulation = made_up([0.0] * 6)
    with pytest.raises(ScoreError, match="holds 1 example"):
        plan_sequence(simulation, margin=0.005)

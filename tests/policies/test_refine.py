"""The secant refinement, on networks of invented numbers and on a real one."""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import chain, models, options, scores
from models import loss, nnx_mlp

import jaxrmils as jr
from jaxrmils.policies import LayerPlan, Plan, PlanError, Simulator, uniform
from jaxrmils.policies.attribution import PlanAttribution
from jaxrmils.policies.budget import InfeasibleBudgetError, Limits, budget, usage
from jaxrmils.policies.budget.choices import Rules
from jaxrmils.policies.budget.solve import programme_of
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.objectives import layer_options, tangent_costs
from jaxrmils.policies.plan import predict
from jaxrmils.policies.refine import refined
from jaxrmils.policies.refine_search import RefinementSearch, believed, tangents_of
from jaxrmils.policies.rest import Rest, is_linear
from jaxrmils.sensitivity import WEIGHT_CANDIDATES
from jaxrmils.statistics import StatisticsError

SIZES = (400, 320, 240, 400, 160, 240)
FORMATS = ("w8a8", "w4a8")
INT4 = next(c for c in WEIGHT_CANDIDATES if c.bits == 4)
COUNT = 200


class Invented:
    """Layers with a slope and a divergence each, and pairs that cost more together in 4 bits.

    With `linear`, the loss is linear in the outputs: divergences are 0.
    """

    def __init__(self, seed=0, together=None, examples=COUNT, sizes=SIZES, linear=False):
        self.scores = scores(chain(*sizes), examples, seed)
        for name in ("activations", "weights"):  # The mean slope of a trained network.
            values = getattr(self.scores, name)
            self.scores = dataclasses.replace(self.scores, **{name: values - values.mean(axis=0)})
        self.table = self.scores.table
        self.simulator = SimpleNamespace(graph=SimpleNamespace(fingerprint="invented"))
        self.float_loss = np.ones(examples)
        self.together = together or {}
        self.linear, self.slope = linear, 1.0
        self.counts = {"attributions": 0, "passes": 0}

    def holding(self, formats):
        return self

    def divergences(self, slope=0.0):
        other = copy.copy(self)
        other.slope = slope
        return other

    def first(self, plan):
        found = predict(self.scores, plan)
        return {name: self.slope * found[name] for name in found if not plan.layers[name].is_float}

    def parts(self, plan):
        """A divergence of half the mean square; of a linear loss, a slope that no layer shows."""
        rest = self.slope if self.linear else 1.0
        found = {n: first + 0.0 for n, first in self.first(plan).items()}
        for name, slopes in predict(self.scores, plan).items():
            if name in found:
                found[name] += rest * 0.5 * np.mean(slopes**2)
        for pair, cost in self.together.items():
            if all(plan.layers[name].weight_bits == 4 for name in pair):
                for name in pair:
                    found[name] = found[name] + rest * cost / 2
        return found

    def attribute(self, plan, scale=1.0):
        self.counts["attributions"] += 1
        first, parts = self.first(plan), self.parts(plan)
        parts = {n: scale * first[n] + scale**2 * (p - first[n]) for n, p in parts.items()}
        change = sum(parts.values(), np.zeros(len(self.float_loss)))
        return PlanAttribution(parts, self.float_loss, 1 + change, 2)

    def change(self, plan):
        self.counts["passes"] += 1
        return sum(self.parts(plan).values(), np.zeros(len(self.float_loss)))

    def mean(self, layers):
        """What a plan costs in truth; all slopes are 0."""
        return float(np.mean(self.change(Plan(layers, "invented"))))

    def best(self, limits):
        """The least cost of all plans within limits that leave nothing in float."""
        own = [options(row, FORMATS)[1:] for row in self.table.layers]
        plans = (dict(zip(self.table.layer, c, strict=True)) for c in itertools.product(*own))
        return min(self.mean(p) for p in plans if fits(self.table, p, limits))


def fits(table, layers, limits):
    used = usage(table, layers)
    return all(used[name] <= value * (1 + 1e-12) for name, value in limits.given().items())


def refine(simulation, limits, **settings):
    return refined(simulation, simulation.scores, limits, **{"formats": FORMATS, **settings})


LIMITS = Limits(weight_bits=6)


def worse_together(seed, count=1):
    """A network in which pairs of layers of the one-shot plan cost a lot, and that plan."""
    network = Invented(seed, sizes=(*SIZES, 300, 200))
    one_shot = budget(network.scores, LIMITS, objective="squared", formats=FORMATS).layers
    names = [name for name, layer in one_shot.items() if layer.weight_bits == 4]
    network.together = {tuple(names[2 * i : 2 * i + 2]): 0.3 for i in range(count)}
    return network, one_shot


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_layers_that_are_worse_together_are_taken_apart(seed, linear):
    network, one_shot = worse_together(seed)
    network.linear = linear
    found = refine(network, LIMITS)
    assert found.rounds[0].plan.layers == one_shot
    assert found.rounds[0].selection.mean > 0.3
    assert found.selection.mean <= network.best(LIMITS) + 0.01
    assert found.chosen > 0


def test_what_the_tangent_knows_is_not_made_worse():
    for seed in range(5):
        network = Invented(seed)
        found = refine(network, LIMITS)
        assert found.selection.mean <= network.mean(found.rounds[0].plan.layers) + 1e-9
        assert found.selection.mean <= network.best(LIMITS) + 0.01


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, -0.5]),
    st.sampled_from(
        [
            Limits(weight_bits=4),
            Limits(weight_bits=5),
            Limits(size_share=0.25, activation_bits=8),
            Limits(bops_share=0.04),
        ]
    ),
    st.booleans(),
    st.sampled_from(["mean", "chance"]),
)
def test_uniform_plans_never_beat_it_and_it_keeps_to_the_budget(
    seed, strength, limits, held, guard
):
    network = Invented(seed, {("a", "c"): strength}, examples=40, sizes=SIZES[:4])
    rng = np.random.default_rng(seed)
    # An objective that knows nothing.
    wild = Costs(
        "wild",
        "nats",
        {
            r.name: {p: 0.0 if p.is_float else rng.random() for p in options(r, (*FORMATS, "w4a4"))}
            for r in network.table.layers
        },
    )
    force = {"a": "w4a8"} if held else {}
    found = refine(
        network,
        limits,
        objective=wild,
        formats=(*FORMATS, "w4a4"),
        force=force,
        rounds=2,
        guard=guard,
    )
    plans = [found.plan, *(r.plan for r in found.rounds), *(u.plan for u in found.uniforms)]
    for plan in plans:
        assert fits(network.table, plan.layers, limits)
        assert not held or plan.layers["a"].format == "w4a8"
    assert found.selection.mean == pytest.approx(network.mean(found.plan.layers))
    for name in ("float", *FORMATS, "w4a4"):
        plan = uniform(network.table, name, force=force)
        if fits(network.table, plan.layers, limits):
            worse = network.change(found.plan) - network.change(plan)
            assert guard == "chance" or worse.mean() <= 1e-12
            assert worse.mean() - 2.03 * worse.std(ddof=1) / np.sqrt(40) <= 1e-12
            assert name in {u.format for u in found.uniforms}
    assert found.uniform is None or found.uniform.selection.mean == min(
        u.selection.mean for u in found.uniforms
    )


def test_steps_stay_in_the_trust_region_and_are_judged_by_what_is_believed():
    network, _ = worse_together(3)
    found = refine(network, LIMITS, rounds=6, radius=3)
    first, *rest = found.rounds
    assert first.radius is None and first.is_improvement
    best = first
    for each in rest:
        differ = sum(p != best.plan.layers[n] for n, p in each.plan.layers.items())
        assert differ == each.changed <= each.radius
        assert each.is_improvement == (each.estimate.mean < best.estimate.mean)
        if each.is_improvement:
            best = each
    assert any(each.changed for each in rest)
    assert found.estimate == best.estimate or found.chosen is None


def test_the_cost_is_an_attribution_and_two_passes_for_every_plan():
    class Counting(Invented):
        def change(self, plan):
            self.seen.append((self.slope, tuple(plan.layers.items())))
            return super().change(plan)

    network = Counting(0)
    network.seen = []
    found = refine(network, LIMITS, rounds=3)
    assert network.counts["attributions"] <= len(FORMATS) + len(found.rounds)
    # A simulation keeps what it measured. The first plan also shows whether the loss is linear.
    tried = [r.plan for r in found.rounds] + [u.plan for u in found.uniforms]
    assert len(set(network.seen)) <= 2 * len(tried) + 1
    assert {plan for _, plan in network.seen} == {tuple(p.layers.items()) for p in tried}


def test_the_same_arguments_give_the_same_result():
    first, second = (refine(Invented(5), LIMITS) for _ in range(2))
    assert first.plan == second.plan
    assert [r.estimate for r in first.rounds] == [r.estimate for r in second.rounds]


def test_groups_share_a_format_in_every_plan():
    network = Invented(1)
    found = refine(network, Limits(weight_bits=6), groups=[["a", "b", "e"]])
    for plan in (found.plan, *(r.plan for r in found.rounds), *(u.plan for u in found.uniforms)):
        assert len({plan.layers[n].format for n in "abe"}) == 1


def test_skipped_layers_stay_float_in_uniform_plans_too():
    found = refine(Invented(1), Limits(size_share=0.5), skip=["b"], groups=[["b", "c"]])
    for plan in (found.plan, *(u.plan for u in found.uniforms)):
        assert plan.layers["b"].is_float and plan.layers["c"].is_float
    assert {u.format for u in found.uniforms} == set(FORMATS)


def test_clusters_of_copies_count_once():
    network = Invented(2, examples=80)
    plain = refine(network, LIMITS)
    values = {
        n: np.concatenate([getattr(network.scores, n)] * 4)
        for n in ("activations", "weights", "loss", "gradient_sum", "gradient_square")
    }
    network.scores = dataclasses.replace(network.scores, **values)
    network.float_loss = np.ones(320)
    copied = refine(network, LIMITS, clusters=np.tile(np.arange(80), 4))
    assert copied.plan.layers == plain.plan.layers
    assert copied.selection.standard_error == pytest.approx(plain.selection.standard_error)
    for one, other in zip(plain.rounds, copied.rounds, strict=True):
        assert other.estimate.mean == pytest.approx(one.estimate.mean)


def test_luck_of_the_first_order_chooses_nothing():
    # Every layer costs the same; slopes differ on these examples alone.
    network = Invented(0, sizes=(100,) * 6)
    rng = np.random.default_rng(0)
    values = rng.normal(size=network.scores.weights.shape).astype(np.float32)
    network.scores = dataclasses.replace(
        network.scores, weights=values, activations=0 * network.scores.activations
    )
    found = refine(network, LIMITS)
    one_shot = budget(network.scores, LIMITS, objective="signed", formats=FORMATS)
    lucky = network.change(one_shot).mean()
    # Choosing by the signed mean finds a gain that isn't there, shrinkage knows it.
    assert found.estimate.mean > lucky + 2 * found.estimate.standard_error


def with_slope(network, name, mean):
    """Every example's loss falls along the noise of this layer's weight in 4 bits."""
    place = network.scores.weight_rows.index(name), network.scores.weight_candidates.index(INT4)
    values = network.scores.weights.copy()
    values[:, *place] = np.random.default_rng(1).normal(mean, 0.1, len(values))
    network.scores = dataclasses.replace(network.scores, weights=values)
    return network


def test_a_slope_that_every_example_shows_is_taken():
    # 8 bits would be allowed everywhere, and squares know no sign.
    network = with_slope(Invented(3), "b", -0.4)
    found = refine(network, Limits(weight_bits=8))
    assert found.rounds[0].plan.layers["b"].weight_bits == 8
    assert found.plan.layers["b"].weight_bits == 4
    assert found.selection.mean == pytest.approx(network.best(Limits(weight_bits=8)), abs=0.01)
    assert found.estimate.upper < -0.2


def test_a_slope_is_believed_as_far_as_its_format_shows_slopes():
    network = with_slope(Invented(3), "b", -0.4)
    costs = tangent_costs(network.scores, "squared", layer_options(network.scores, FORMATS))
    programme = programme_of(network.table, costs, Rules(FORMATS), 60.0)
    tangents = tangents_of(network.scores, programme)
    kept, mean = believed(tangents, programme, None)
    # int4 has nearly all of the noise.
    assert mean == pytest.approx(max(kept[1:]), abs=0.01)
    for name in ("float", *FORMATS):
        own = [i for i, (_, p) in enumerate(programme.columns) if p.format == name]
        assert len(set(kept[own])) == 1
        values = tangents[:, own]
        if name == "w4a8":
            squares = values.mean(axis=0) ** 2 / (values.var(axis=0, ddof=1) / len(values))
            assert kept[own[0]] == pytest.approx(1 - 1 / squares.mean()) and kept[own[0]] > 0.9
        else:  # Slopes are 0 by construction.
            assert kept[own[0]] == (name == "float")
    # What the plan is believed to cost has both parts.
    rest = Rest(network, network.scores, 0.5)
    search = RefinementSearch(network, rest, programme, LIMITS, None, tangents, kept)
    beliefs = np.arange(1.0, 1 + tangents.shape[1])
    found = search.costs(beliefs) - beliefs
    np.testing.assert_allclose(found, kept * tangents.mean(axis=0), atol=1e-12)
    # And so has what is believed of a plan.
    plan = programme.minimise({}, np.arange(tangents.shape[1])[::-1])
    layers = Plan(programme.layers(plan), "invented")
    slopes = sum(kept[i] * tangents[:, i] for i in plan.columns)
    np.testing.assert_allclose(search.estimate(plan), rest.change(layers) + slopes)


@pytest.mark.parametrize(("linear", "kept"), [(False, 0.0), (False, 0.3), (True, 1.0)])
def test_the_rest_is_what_is_believed_beyond_first_order_slopes(linear, kept):
    network = Invented(4, linear=linear)
    plan = uniform(network.table, "w4a8")
    assert is_linear(network, network.scores, plan) == linear
    rest, slopes = Rest(network, network.scores, kept), predict(network.scores, plan)
    for scale in (1.0, 0.2):
        for name, share in rest.shares(plan, scale).items():
            expected = np.full(COUNT, 0.5 * np.mean(slopes[name] ** 2))
            np.testing.assert_allclose(share, expected, atol=1e-9)
    total = sum(rest.shares(plan).values())
    np.testing.assert_allclose(rest.change(plan), total, atol=1e-12)


@pytest.mark.parametrize(
    ("guard", "noise", "taken"),
    [("chance", 10.0, False), ("chance", 0.01, True), ("mean", 10.0, True), ("mean", 0.01, True)],
)
def test_by_chance_a_uniform_plan_that_is_only_lucky_is_not_taken(guard, noise, taken):
    class Lucky(Invented):
        def change(self, plan):
            found = super().change(plan)
            if all(layer.weight_bits == 4 for layer in plan.layers.values()):
                luck = np.random.default_rng(0).normal(size=found.size)
                found = found + noise * (luck - luck.mean()) - found.mean() - 0.5
            return found

    found = refine(Lucky(0), LIMITS, guard=guard)
    # The least measured change is the uniform plan's, either way.
    assert found.uniform.selection.mean == pytest.approx(-0.5)
    assert found.selection.mean == pytest.approx(-0.5) or not taken
    assert (found.chosen is None) == taken


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(0, 3), st.randoms())
def test_the_programme_keeps_to_a_trust_region(model, radius, random):
    table, costs = model
    programme = programme_of(table, costs, Rules(), 60.0)
    columns = np.array(
        [random.choice(np.flatnonzero(programme.layer_of == i)) for i in range(len(table.layers))]
    )
    center = dataclasses.replace(programme.minimise({}), columns=columns)
    found = programme.minimise({}, near=(center, radius))
    assert (found.columns != columns).sum() <= radius
    savings = [
        costs_of[columns[i]] - costs_of[programme.layer_of == i].min()
        for costs_of in [programme.costs]
        for i in range(len(columns))
    ]
    expected = programme.costs[columns].sum() - sum(sorted(savings)[::-1][:radius])
    assert programme.costs[found.columns].sum() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rounds": -1}, PlanError, "rounds -1"),
        ({"guard": "luck"}, PlanError, "guard 'luck'; expected one of mean, chance"),
        ({"radius": 0}, PlanError, "radius 0"),
        ({"objective": "signed"}, PlanError, "not negative"),
        ({"objective": "nonsense"}, PlanError, "objective 'nonsense'"),
        ({"clusters": [0, 1]}, StatisticsError, "one group per example"),
        ({"clusters": np.zeros(COUNT, int)}, StatisticsError, "in one group"),
        ({"formats": ("w9",)}, PlanError, "unknown format"),
    ],
)
def test_bad_options_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        refine(Invented(), LIMITS, **settings)


def test_of_one_example_nothing_is_said():
    with pytest.raises(PlanError, match="of one example, what is luck can't be told"):
        refine(Invented(examples=1), LIMITS)


def test_a_budget_that_nothing_meets_says_what_would():
    with pytest.raises(InfeasibleBudgetError, match="weight_bits") as caught:
        refine(Invented(), Limits(weight_bits=3))
    assert caught.value.reach["weight_bits"].alone == 4


def test_scores_of_something_else_are_refused():
    network, other = Invented(), Invented(examples=COUNT // 2)
    with pytest.raises(PlanError, match="other examples"):
        refined(network, other.scores, LIMITS)
    network.simulator.graph.fingerprint = "another"
    with pytest.raises(PlanError, match="another model"):
        refine(network, LIMITS)
    zero = Invented()
    zero.scores = dataclasses.replace(
        zero.scores, weights=0 * zero.scores.weights, activations=0 * zero.scores.activations
    )
    with pytest.raises(PlanError, match="0 for every option"):
        refine(zero, LIMITS)


def test_a_real_network():
    apply, params, _ = nnx_mlp()
    x = jax.random.normal(jax.random.key(0), (48, 6))
    targets = jnp.linspace(-1, 1, 48)
    graph = jr.trace(apply, params, x[:4])
    ranges = jr.calibrate(graph, params, [x])
    data = [(x[:24], targets[:24]), (x[24:], targets[24:])]
    simulation = Simulator(graph, loss).on(params, ranges, data)
    found = refined(
        simulation,
        jr.score(graph, params, data, loss, ranges),
        Limits(weight_bits=5, bops_share=0.02),
        rounds=2,
    )
    assert found.plan.policy["used"]["weight_bits"] <= 5
    np.testing.assert_allclose(found.selection.mean, simulation.change(found.plan).mean())
    assert {u.format for u in found.uniforms} == {"w4a4"}
    assert found.plan.policy["refinement"]["rounds"][0]["radius"] is None
    assert LayerPlan() not in found.plan.layers.values()

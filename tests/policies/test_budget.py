"""Budgets against all plans of small models, one by one."""

import dataclasses
import itertools
import math
import time

import invented
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stages import scored, table_of

from jaxrmils import load_plan, save_plan
from jaxrmils.policies import LayerPlan, PlanError, check_plan
from jaxrmils.policies.budget import (
    CAPABILITIES,
    InfeasibleBudgetError,
    LatencyTable,
    Limits,
    budget,
    solve,
    usage,
)
from jaxrmils.policies.budget.groups import resolve_groups
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import FORMATS, fit, parse_format
from jaxrmils.policies.plan import layer_prediction

LIMITS = [field.name for field in dataclasses.fields(Limits)]


def seconds(table):
    """A latency table in which every layer and format has a time of its own."""
    times = {
        row.name: {
            p.format: 1e-4 * (7 * i + 3 * j + 1) for j, p in enumerate(invented.options(row))
        }
        for i, row in enumerate(table.layers)
    }
    return LatencyTable(times, "cpu", "invented", overhead=5e-4)


def by_hand(table, latency, layers):
    """What a plan uses, from the definitions."""
    rows = table.layer
    size = table.size_bits({n: (p.weight_bits, p.activation_bits) for n, p in layers.items()})
    weights = sum(r.weight_size for r in table.layers)
    entering = {n: sum(a.size * a.iterations for a in rows[n].activations) for n in rows}
    work = sum(
        rows[n].macs
        * p.activation_bits
        * (p.weight_bits if rows[n].weight_size else p.activation_bits)
        for n, p in layers.items()
    )
    found = {
        "size_bytes": size / 8,
        "size_share": size / table.float_bits,
        "latency": latency.overhead
        + math.fsum(latency.seconds[n][p.format] for n, p in layers.items()),
    }
    if weights:
        used = sum(rows[n].weight_size * p.weight_bits for n, p in layers.items())
        found["weight_bits"] = used / weights
    if sum(entering.values()):
        used = sum(entering[n] * p.activation_bits for n, p in layers.items())
        found["activation_bits"] = used / sum(entering.values())
    if work:
        found["bops"] = work
        found["bops_share"] = work / (1024 * sum(r.macs for r in table.layers))
    return found


def agree(table, layers, group):
    """Is there a format that all layers of a group have, as they can have it?"""
    return any(
        all(fit(table.layer[n], parse_format(name)) == layers[n].bits for n in group)
        for name in ("float", *invented.FORMATS)
    )


def allowed(table, costs, groups=()):
    """`(cost, use, layers)` of every plan in which groups agree."""
    latency = seconds(table)
    return [
        (costs.total(layers), by_hand(table, latency, layers), layers)
        for layers in invented.every(costs)
        if all(agree(table, layers, group) for group in groups)
    ]


def check(table, costs, given_limits, groups=()):
    """Solves, and compares with every plan."""
    plans = allowed(table, costs, resolve_groups(table, groups))
    limits = Limits(**given_limits)

    def best(limits, merit):
        within = [
            merit(p) for p in plans if all(p[1][n] <= v * (1 + 1e-9) for n, v in limits.items())
        ]
        return min(within, default=None)

    expected = best(given_limits, lambda plan: plan[0])
    options = {"latency": seconds(table), "groups": groups, "formats": invented.FORMATS}
    if expected is not None:
        plan = solve(table, costs, limits, **options)
        assert costs.total(plan.layers) == pytest.approx(expected, abs=1e-5)
        used = by_hand(table, seconds(table), plan.layers)
        assert all(used[n] <= v * (1 + 1e-9) for n, v in given_limits.items())
        assert all(agree(table, plan.layers, group) for group in resolve_groups(table, groups))
        assert plan.policy["used"] == pytest.approx(used)
        check_plan(plan, table)
        return
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(table, costs, limits, **options)
    for name, reach in caught.value.reach.items():
        others = {n: v for n, v in given_limits.items() if n != name}
        assert reach.alone == pytest.approx(best({}, lambda plan: plan[1][name]))  # noqa: B023
        together = best(others, lambda plan: plan[1][name])  # noqa: B023
        assert reach.together == (None if together is None else pytest.approx(together))
    conflict = caught.value.conflict
    assert best({n: given_limits[n] for n in conflict}, lambda plan: plan[0]) is None
    for name in conflict:
        rest = {n: given_limits[n] for n in conflict if n != name}
        assert best(rest, lambda plan: plan[0]) is not None


def some_limits(draw, table, count):
    """Limits somewhere between what the smallest and the float plan use, and a little below."""
    latency = seconds(table)
    ends = []
    for choose in (max, min):
        layers = {
            r.name: choose(invented.options(r), key=lambda p: p.weight_bits * p.activation_bits)
            for r in table.layers
        }
        ends.append(by_hand(table, latency, layers))
    names = draw(
        st.lists(st.sampled_from(sorted(set(ends[0]) & set(ends[1]))), min_size=count,
                 max_size=count, unique=True)
    )  # fmt: skip
    found = {}
    for name in names:
        high, low = ends[0][name], ends[1][name]
        value = low + draw(st.integers(-5, 50)) / 50 * (high - low)
        most = {"size_share": 1, "bops_share": 1, "weight_bits": 32, "activation_bits": 32}
        found[name] = min(max(value, 1e-9), most.get(name, math.inf))
    return found


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_one_limit(data):
    table, costs = data.draw(invented.models())
    check(table, costs, some_limits(data.draw, table, 1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_several_limits(data):
    table, costs = data.draw(invented.models())
    check(table, costs, some_limits(data.draw, table, data.draw(st.integers(2, 3))))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_agree(data):
    table, costs = data.draw(invented.models())
    assume(len(table.layers) > 2)
    groups = data.draw(st.sampled_from([["block_0/*"], ["*"], [("block_0/0", "block_1/*")]]))
    check(table, costs, some_limits(data.draw, table, 1), groups)


@pytest.mark.parametrize("name", LIMITS)
def test_a_value_that_a_plan_has_is_met_and_a_little_less_is_not(name):
    table = invented.chain(24, 40, 7)
    costs = invented.costs(table, {n: {"w8a8": 1, "w4a8": 3, "w4": 2, "w4a4": 5} for n in "abc"})
    for _, used, layers in allowed(table, costs):
        if all(p.is_float for p in layers.values()):
            continue
        plan = solve(table, costs, Limits(**{name: used[name]}), latency=seconds(table))
        assert plan.policy["used"][name] <= used[name] * (1 + 1e-9)
        assert costs.total(plan.layers) <= costs.total(layers) + 1e-5
    least = min(used[name] for _, used, _ in allowed(table, costs))
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(table, costs, Limits(**{name: least * (1 - 1e-7)}), latency=seconds(table))
    # What the error reports can be asked for, exactly and as it is printed.
    reach = caught.value.reach[name].alone
    assert reach == pytest.approx(least)
    printed = str(caught.value).split("can't go below ")[1].split()[0]
    for value in (reach, float(printed)):
        solve(table, costs, Limits(**{name: value}), latency=seconds(table))


def test_a_limit_a_hair_below_many_plans_is_kept():
    # All layers alike: many plans use the same, one part in 1e8 above the limit.
    table = invented.chain(*[1000] * 8)
    costs = invented.costs(
        table, {n: {"w8a8": 1, "w4a8": 2, "w4": 2, "w4a4": 2} for n in "abcdefgh"}
    )
    plan = solve(table, costs, Limits(weight_bits=6 * (1 - 1e-8)), formats=("w8a8", "w4a8"))
    assert plan.policy["used"]["weight_bits"] == 5.5
    # Times have no common step: plans just above are cut off one by one.
    times = {n: {"float": 3.0, "w8a8": 1.0 + 1e-9 * i} for i, n in enumerate("abcdefgh")}
    latency = LatencyTable(times, "cpu", "invented")
    plan = solve(table, costs, Limits(latency=16.0 + 6e-9), latency=latency, formats=("w8a8",))
    assert plan.policy["used"]["latency"] <= 16.0 + 6e-9
    assert plan.counts() == {"float": 4, "w8a8": 4}


def test_the_scale_of_costs_does_not_matter():
    table = invented.chain(24, 40, 7, 12)
    rng = np.random.default_rng(0)
    drawn = {n: dict(zip(("w8a8", "w4a8", "w4a4", "w4"), rng.uniform(0, 1, 4))) for n in "abcd"}  # noqa: B905
    plans = set()
    for scale in (1e-9, 1.0, 1e6):
        values = {n: {f: scale * c for f, c in own.items()} for n, own in drawn.items()}
        plans.add(str(solve(table, invented.costs(table, values), Limits(size_share=0.3)).layers))
    assert len(plans) == 1
    # One option that costs a fortune does not drown the others.
    values = {n: dict(own) for n, own in drawn.items()}
    values["a"]["w4a4"] = 1e12
    assert str(solve(table, invented.costs(table, values), Limits(size_share=0.3)).layers) in plans


def test_of_equal_costs_the_smaller():
    table = invented.chain(24, 40, 7)
    plan = solve(table, invented.costs(table, {}), Limits(bops_share=0.9))
    assert plan.policy["used"]["weight_bits"] == 4
    # Across layers too: one of the two has to go, and both cost the same.
    table = invented.chain(24, 40)
    costs = invented.costs(table, {n: {"w8a8": 1, "w4a8": 9, "w4a4": 9, "w4": 9} for n in "ab"})
    plan = solve(table, costs, Limits(size_share=0.9))
    assert plan.layers["a"].is_float and plan.layers["b"].format == "w8a8"


def test_a_shared_leaf_is_stored_once():
    rows = [invented.row(n, "dense", 16, (0,)) for n in "ab"]
    table = invented.table(*rows, leaf_bits=[1024])
    assert usage(table, {"a": LayerPlan(), "b": LayerPlan()})["size_bytes"] == 128
    costs = invented.costs(table, {"a": {"w8a8": 5, "w4a8": 6, "w4a4": 7, "w4": 6}})
    # Quantizing b alone saves nothing, since a keeps the leaf.
    plan = solve(table, costs, Limits(size_bytes=127))
    assert not plan.layers["a"].is_float and not plan.layers["b"].is_float
    assert solve(table, costs, Limits(size_bytes=128)).layers["a"].is_float
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(table, costs, Limits(size_bytes=1))
    assert caught.value.reach["size_bytes"].alone == 2 * (16 * 4 + 2 * 32) / 8  # w4, w4


def test_roundings_are_chosen_and_may_differ_in_a_group():
    table = invented.chain(8, 8)
    up, down = (LayerPlan(8, 8, (r,)) for r in ("ceil", "floor"))
    table_costs = {"a": {LayerPlan(): 0, up: 2, down: 1}, "b": {LayerPlan(): 0, up: 1, down: 2}}
    plan = solve(table, Costs("x", "nats", table_costs), Limits(weight_bits=8), groups=["*"])
    assert plan.layers == {"a": down, "b": up}


def test_skip_and_force():
    table = invented.chain(24, 40, 7)
    costs = invented.costs(table, {n: {"w8a8": 1, "w4a8": 3, "w4a4": 5, "w4": 2} for n in "abc"})
    plan = solve(
        table, costs, Limits(size_share=0.7), skip=["a"], force={"b": "w4a4"}, formats=("w8a8",)
    )
    assert plan.layers["a"].is_float and plan.layers["b"].format == "w4a4"
    assert plan.layers["c"].format in ("float", "w8a8")
    with pytest.raises(PlanError, match="matches no layer"):
        solve(table, costs, Limits(), skip=["z*"])
    with pytest.raises(PlanError, match="has no cost for"):
        solve(table, costs, Limits(), force={"b": "w8a4"})
    with pytest.raises(PlanError, match="no format is possible in all layers of the group"):
        solve(table, costs, Limits(), skip=["a"], force={"b": "w8a8"}, groups=["*"])
    with pytest.raises(PlanError, match="contradict each other"):
        both = {"skip": ["a"], "force": {"c": "w8a8"}, "groups": [("a", "b"), ("b", "c")]}
        solve(table, costs, Limits(), **both)


def test_capabilities():
    table = invented.chain(24, 40)
    costs = invented.costs(table, {})
    formats = ("w8a8", "w4a8", "w4a4")
    assert solve(table, costs, Limits(), formats=formats).counts() == {"w4a8": 2}
    for backend, least in (("cpu", 8), ("cuda", 8), ("tpu", 4)):
        with pytest.raises(InfeasibleBudgetError) as caught:
            solve(table, costs, Limits(activation_bits=1), formats=formats, capabilities=backend)
        assert caught.value.reach["activation_bits"].alone == least
    plan = solve(table, costs, Limits(), formats=formats, capabilities=["w8a8"])
    assert plan.counts() == {"w8a8": 2} and plan.policy["capabilities"] == ["w8a8"]
    assert set().union(*CAPABILITIES.values()) <= set(FORMATS)
    for options, message in (
        ({"capabilities": "gpu"}, r"unknown backend 'gpu'"),
        ({"capabilities": "npu-9"}, r"unknown backend 'npu-9'\. Capabilities are known for cpu"),
        ({"capabilities": ["int3"]}, "unknown format 'int3'"),
        ({"capabilities": "cpu", "formats": ["w4a4"]}, "none besides float"),
        ({"capabilities": "cpu", "force": {"a": "w4a4"}}, "forced to w4a4"),
    ):
        with pytest.raises(PlanError, match=message):
            solve(table, costs, Limits(), **options)


@pytest.mark.parametrize(
    "name, expected", [("transformer", 1), ("nnx_transformer", 1), ("bfloat16_transformer", 1)]
)
def test_query_key_value_share_a_format(name, expected):
    table = table_of(name)
    groups = resolve_groups(table, "qkv")
    assert len(groups) == expected
    for group in groups:
        assert [n.split("/")[-2] for n in group] == ["query", "key", "value"]
    every = [p.format for p in invented.options(table.layer[groups[0][0]])]
    prices = {n: dict(zip(every, (0, 1, 2, 3, 4), strict=True)) for n in table.layer}
    prices[groups[0][0]] = dict(zip(every, (0, 9, 9, 9, 9), strict=True))
    costs = invented.costs(table, prices)
    free = solve(table, costs, Limits(size_share=0.5))
    tied = solve(table, costs, Limits(size_share=0.5), groups="qkv")
    assert len({tied.layers[n].format for n in groups[0]}) == 1
    assert costs.total(free.layers) <= costs.total(tied.layers)


def test_names_of_projections():
    rows = [
        invented.row(f"{place}/{n}_proj/kernel", "dense", 8, (0,))
        for place in ("layers/0", "layers/1")
        for n in "qkvo"
    ]
    table = invented.table(*rows, leaf_bits=[256])
    assert resolve_groups(table, ["qkv"]) == tuple(
        tuple(f"{place}/{n}_proj/kernel" for n in "qkv") for place in ("layers/0", "layers/1")
    )


def test_a_tied_weight_and_a_scanned_stack_are_one_layer():
    tied = table_of("tied_embedding").layer["Embed_0/embedding"]
    assert tied.kinds == ("gather", "dot")
    (stack,) = table_of("scanned_stack").layers
    assert stack.activations[0].grids > 1
    with pytest.raises(PlanError, match="are one layer"):
        resolve_groups(table_of("scanned_stack"), ["*"])


@pytest.mark.parametrize(
    "groups, message",
    [
        (["z*"], "matches no layer"),
        ([("a",)], "holds 1 layer"),
        ("qkv", "found no three layers"),
        ([(1, 2)], "no glob"),
    ],
)
def test_groups_that_are_refused(groups, message):
    with pytest.raises(PlanError, match=message):
        resolve_groups(invented.chain(8, 8), groups)


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"size_bytes": -1}, "size_bytes is -1; expected a number above 0: bytes"),
        ({"size_bytes": 0}, "above 0"),
        ({"size_share": 1.5}, "at most 1"),
        ({"bops_share": float("nan")}, "bops_share is nan"),
        ({"latency": float("inf")}, "latency is inf"),
        ({"weight_bits": 33}, "at most 32"),
        ({"activation_bits": True}, "activation_bits is True"),
        ({"bops": "many"}, "bops is 'many'"),
    ],
)
def test_limits_that_make_no_sense(limits, message):
    with pytest.raises(PlanError, match=message):
        Limits(**limits)


def test_limits_by_name():
    assert Limits.named({"size_share": 0.5}) == Limits(size_share=0.5)
    with pytest.raises(PlanError, match=r"unknown limit 'x'\. Limits: size_bytes"):
        Limits.named({"x": 1.0})
    with pytest.raises(PlanError, match="unknown limit 'sizeshare'; did you mean size_share"):
        Limits.named({"sizeshare": 0.5})


def test_latency_tables():
    table = invented.chain(24, 40)
    costs, limits = invented.costs(table, {}), Limits(latency=1.0)
    with pytest.raises(PlanError, match="needs a table of seconds"):
        solve(table, costs, limits)
    with pytest.raises(PlanError, match="has no layer 'b'"):
        only = LatencyTable({"a": dict.fromkeys(("float", "w8a8"), 1.0)}, "cpu", "timed")
        solve(table, costs, limits, latency=only, formats=("w8a8",))
    with pytest.raises(PlanError, match="has no 'w4a4' for layer 'a', only float, w8a8"):
        both = {n: {"float": 0.1, "w8a8": 0.1} for n in "ab"}
        solve(table, costs, limits, latency=LatencyTable(both, "cpu", "timed"), formats=["w4a4"])
    with pytest.raises(PlanError, match="nan seconds for a float"):
        LatencyTable({"a": {"float": float("nan")}}, "cpu", "timed")
    with pytest.raises(PlanError, match="-1 seconds for the overhead"):
        LatencyTable({}, "cpu", "timed", overhead=-1)
    # One choice of roundings may have a time of its own; skipped layers need float's alone.
    floor = LayerPlan(8, 8, ("floor",))
    own = LatencyTable({"a": {"float": 1.0, "w8a8": 0.5, floor: 0.25}, "b": {"float": 2}}, "c", "t")
    assert own.of("a", floor) == 0.25 and own.of("a", LayerPlan(8, 8, ("ceil",))) == 0.5
    plan = solve(table, costs, Limits(latency=2.5), latency=own, formats=["w8a8"], skip=["b"])
    assert plan.policy["used"]["latency"] == 2.5 and plan.policy["latency"]["source"] == "t"


def test_costs_that_do_not_fit():
    table = invented.chain(24, 40)
    good = invented.costs(table, {}).options
    for options, message in (
        ({"a": good["a"]}, "another model's"),
        ({**good, "b": {LayerPlan(8, 8, ("nearest",)): 0.0}}, "no cost for float"),
        ({**good, "b": {**good["b"], LayerPlan(4): math.nan}}, "layer b: w4 costs nan"),
    ):
        with pytest.raises(PlanError, match=message):
            solve(table, Costs("x", "nats", options), Limits())
    with pytest.raises(PlanError, match="no layer has a cost for w8a4"):
        solve(table, Costs("x", "nats", good), Limits(), formats=["w8a8", "w8a4"])
    with pytest.raises(PlanError, match="formats is 'w8a8'"):
        solve(table, Costs("x", "nats", good), Limits(), formats="w8a8")
    with pytest.raises(PlanError, match="time_limit is 0"):
        solve(table, Costs("x", "nats", good), Limits(), time_limit=0)


def test_what_the_model_has_nothing_of():
    dots = invented.table(invented.row("a", "dot"), leaf_bits=[64], float_leaves=(0,))
    with pytest.raises(PlanError, match="weight_bits limits nothing"):
        solve(dots, invented.costs(dots, {}), Limits(weight_bits=8))
    lookups = invented.table(invented.row("a", "lookup", 8, (0,)), leaf_bits=[256])
    assert set(usage(lookups, {"a": LayerPlan(4)})) == {"size_bytes", "size_share", "weight_bits"}
    with pytest.raises(PlanError, match="activation_bits limits nothing"):
        solve(lookups, invented.costs(lookups, {}), Limits(activation_bits=8))


def test_the_message_of_limits_that_exclude_each_other():
    table = invented.chain(24, 40)
    costs = invented.costs(table, {})
    times = {n: {"float": 1.0, "w8a8": 2.0} for n in "ab"}  # Integers are slow here.
    options = {"latency": LatencyTable(times, "cpu", "timed"), "formats": ["w8a8"]}
    limits = Limits(weight_bits=10, latency=3.0, size_share=0.999)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(table, costs, limits, **options)
    error = caught.value
    assert set(error.conflict) == {"weight_bits", "latency"}
    assert error.reach["latency"].together == 4.0 and error.reach["latency"].alone == 2.0
    assert error.reach["weight_bits"].together == 17.0  # the larger in int8
    assert "weight_bits <= 10 and latency <= 3 exclude each other" in str(error)
    assert "latency (asked: 3): 2 alone, 4 with the other limits kept (seconds)" in str(error)


# The policy on scores.


def test_budget_records_what_it_did(tmp_path):
    scores = scored("transformer")
    plan = budget(scores, Limits(size_share=0.4), objective="squared", groups="qkv")
    check_plan(plan, scores.table)
    changes = sum(layer_prediction(scores, n, p) for n, p in plan.layers.items())
    predicted = plan.policy["predicted"]
    assert predicted["mean"] == pytest.approx(changes.mean())
    error = changes.std(ddof=1) / np.sqrt(len(changes))
    assert predicted["standard_error"] == pytest.approx(error)
    assert plan.policy["objective"] == "squared" and plan.policy["gap"] == 0
    assert plan.policy["used"]["size_share"] <= 0.4
    again = budget(scores, Limits(size_share=0.4), objective="squared", groups="qkv")
    assert again == plan
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_clusters_count_in_the_errors():
    table = invented.chain(24, 40, 7)
    scores = invented.scores(table, shared=1.0)
    twice = dataclasses.replace(
        scores,
        **{
            name: np.repeat(getattr(scores, name), 2, axis=0)
            for name in ("loss", "activations", "weights", "gradient_sum", "gradient_square")
        },
    )
    numbers = np.repeat(np.arange(len(scores)), 2)
    one = budget(scores, Limits(size_share=0.3), objective="upper_bound")
    both = budget(twice, Limits(size_share=0.3), objective="upper_bound", clusters=numbers)
    assert both.layers == one.layers
    for name in ("mean", "standard_error"):
        assert both.policy["predicted"][name] == pytest.approx(one.policy["predicted"][name])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0.0, 3.0),
    st.floats(0.35, 0.8),
    st.sampled_from([1.0, 1.645, 4]),
)
def test_the_joint_bound_is_the_best_of_all_plans(seed, shared, share, z):
    table = invented.chain(24, 40, 7, 12)
    scores = invented.scores(table, examples=12, seed=seed, shared=shared)

    def bound(layers):
        changes = sum(layer_prediction(scores, n, p) for n, p in layers.items())
        return changes.mean() + z * np.std(changes, ddof=1) / np.sqrt(12)

    formats = ("w8a8", "w4a8")
    rows = [invented.options(row, formats) for row in table.layers]
    plans = [dict(zip("abcd", each, strict=True)) for each in itertools.product(*rows)]
    limits = Limits(size_share=share)
    settings = {"formats": formats, "z": z}
    best = min(bound(p) for p in plans if usage(table, p)["size_share"] <= share)
    summed = budget(scores, limits, objective="upper_bound", **settings)
    plan = budget(scores, limits, objective="joint_upper_bound", **settings)
    joint = plan.policy["joint"]
    assert plan.policy["cost"] == pytest.approx(bound(plan.layers))
    assert joint["start"] == pytest.approx(bound(summed.layers))
    assert plan.policy["cost"] <= joint["start"] + 1e-12
    # Close to the best where the rounds sufficed, and never above what it claims.
    assert joint["lower_bound"] <= best + 1e-6 * abs(best) + 1e-9
    slack = 1e-4 * max(abs(plan.policy["cost"]), abs(joint["start"])) + 1e-7
    if joint["rounds"] < 10:
        assert plan.policy["cost"] <= best + slack


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "sqnr"}, "objective 'sqnr'; expected one of signed"),
        ({"objective": "upper_bound", "z": 0}, "z is 0"),
        ({"objective": "joint_upper_bound", "z": -1}, "z is -1"),
        ({"rounding": "up"}, "rounding 'up'"),
        ({"formats": ["int3"]}, "unknown format"),
        ({"formats": []}, "none besides float"),
    ],
)
def test_budget_refuses(options, message):
    with pytest.raises(PlanError, match=message):
        budget(invented.scores(invented.chain(8, 8)), Limits(size_share=0.5), **options)


def test_two_hundred_layers():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(8, 1.5, 200)).astype(int)
    table = invented.chain(*sizes.tolist(), names=[f"l{i}" for i in range(200)])
    roundings = ("nearest", "floor", "ceil")
    names = ("w8a8", "w8a4", "w4a8", "w4a4")
    values = {
        r.name: {
            p: 0.0 if p.is_float else float(rng.lognormal() / p.weight_bits**2 / p.activation_bits)
            for p in invented.options(r, names, roundings)
        }
        for r in table.layers
    }
    costs = Costs("drawn", "nats", values)
    start = time.perf_counter()
    plan = solve(table, costs, Limits(size_share=0.18, activation_bits=7))
    assert time.perf_counter() - start < 30  # On a busy machine; 0.2 s on an idle one.
    assert plan.policy["gap"] == 0 and plan.policy["used"]["size_share"] > 0.1799
    # No cheaper than the Lagrangian bound at any price, and close to the best of them.
    best = -math.inf
    for price in np.geomspace(1e-12, 1e-3, 200):
        bound = -price * 0.18 * table.float_bits + price * 64
        for r in table.layers:
            bound += min(
                c
                + price * (table.layer_bits(r.name, p.weight_bits) + 40 * (p.activation_bits < 32))
                for p, c in values[r.name].items()
            )
        best = max(best, bound)
    assert costs.total(plan.layers) >= best * (1 - 1e-9)
    relaxed = solve(table, costs, Limits(size_share=0.18))
    assert best * (1 - 1e-9) <= costs.total(relaxed.layers) <= best * 1.05

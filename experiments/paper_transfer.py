"""How much of what selection examples say holds on others: subsets, signs, the paper's rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from scipy.special import ndtr
from scipy.stats import rankdata

import jaxrmils as jr
from jaxrmils.policies import LayerPlan, Plan, Simulation
from jaxrmils.progress import bars
from jaxrmils.sensitivity import Scores
from jaxrmils.statistics import mean_interval

ZS = (0.0, 0.5, 1.0, 2.0, 3.0, np.inf)
SPLITS = 50
RANDOM_PLANS = 10


class Known(Protocol):
    """What is asked here of a `paper_questions.Network`."""

    @property
    def scores(self) -> Scores: ...
    @property
    def truth(self) -> Scores: ...
    @property
    def chosen(self) -> Simulation: ...
    @property
    def held_out(self) -> Simulation: ...
    @property
    def shares(self) -> Mapping[str, Mapping[str, np.ndarray]]: ...
    @property
    def true_shares(self) -> Mapping[str, np.ndarray]: ...


def curve(net: Known, smallest: int, subsets: int, measured: int, seed: int) -> dict[str, Any]:
    """What subsets of the selection examples say, from `smallest` doubling up to all.

    Returns:
      `predictions`: a row for every size and uniform plan, mean and standard deviation over subsets
      of its tangent and of its measured change on the subset. `ranks`: Spearman's correlation of
      the layers' mean tangents and secant shares in w4a8 with those of all selection examples and
      of the held-out ones. `plans`: held-out changes of plans with half of the weights in int4, the
      layers that cost least on a subset; `random` the same of layers in random order.
    """
    random, n = np.random.default_rng(seed), len(net.scores)
    sizes = [*(smallest << k for k in range(20) if smallest << k < n), n]
    parts = {
        size: [random.permutation(n)[:size] for _ in range(subsets if size < n else 1)]
        for size in sizes
    }
    tangents = {name: predicted(net.scores, name) for name in net.shares}
    secants = {name: stacked(shares) for name, shares in net.shares.items()}
    truths = {"tangent": predicted(net.truth, "w4a8"), "secant": stacked(net.true_shares)}
    scores = {"tangent": tangents, "secant": secants}
    changes = {name: net.chosen.change(jr.uniform(net.scores.table, name)) for name in tangents}
    predictions, ranks = [], []
    for size, subset in parts.items():
        for plan in tangents:
            means = {
                "tangent": [tangents[plan][part].sum(axis=1).mean() for part in subset],
                "measured": [changes[plan][part].mean() for part in subset],
            }
            spread = {k: [float(np.mean(v)), float(np.std(v))] for k, v in means.items()}
            predictions.append({"examples": size, "plan": plan, **spread})
        for kind, by_plan in scores.items():
            values, rank = by_plan["w4a8"], {}
            for whole, other in (("selection", values), ("held_out", truths[kind])):
                found = [spearman(values[part].mean(0), other.mean(0)) for part in subset]
                rank[whole] = [float(np.mean(found)), float(np.std(found))]
            ranks.append({"examples": size, "score": kind, **rank})
    plans, lucky = chosen_plans(net, scores, parts, measured, random)
    return {"predictions": predictions, "ranks": ranks, "plans": plans, "random": lucky}


def chosen_plans(
    net: Known,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    parts: Mapping[int, Sequence[np.ndarray]],
    measured: int,
    random: np.random.Generator,
) -> tuple[list[dict], list[float]]:
    """Held-out changes of half-int4 plans chosen by each score on subsets, and at random."""
    known: dict[tuple[str, ...], float] = {}

    def change(order: np.ndarray) -> float:
        plan = half_int4(net.scores, order)
        key = tuple(layer.format for layer in plan.layers.values())
        if key not in known:
            known[key] = float(net.held_out.change(plan).mean())
        return known[key]

    layers = net.scores.table.layers
    sizes = np.array([max(row.weight_size, 1) for row in layers], np.float64)
    rows = []
    jobs = [(kind, size) for kind in scores for size in parts]
    for kind, size in bars(jobs, "plans from subsets", len(jobs)):
        cost = scores[kind]["w4a8"] - scores[kind]["int8"]
        found = [change(np.argsort(cost[p].mean(0) / sizes)) for p in parts[size][:measured]]
        rows.append({"examples": size, "score": kind, "changes": found})
    return rows, [change(random.permutation(len(layers))) for _ in range(RANDOM_PLANS)]


def half_int4(scores: Scores, order: np.ndarray) -> Plan:
    """Int8 with int4 weights in the first layers of an order, at most half of all weights."""
    table = scores.table
    plan, narrow = (jr.uniform(table, name) for name in ("int8", "w4a8"))
    layers, left = dict(plan.layers), sum(row.weight_size for row in table.layers) / 2
    for row in (table.layers[i] for i in order):
        if row.weight_size <= left:
            layers[row.name], left = narrow.layers[row.name], left - row.weight_size
    return dataclasses.replace(plan, layers=layers)


def predicted(scores: Scores, name: str) -> np.ndarray:
    """float64 [N, layers]: tangents of a uniform plan."""
    return stacked(jr.predict(scores, jr.uniform(scores.table, name)))


def stacked(layers: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [N, layers], from one array for every layer."""
    return np.stack(list(layers.values()), axis=1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation of two lists of scores."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def signs(scores: Scores, truth: Scores, seed: int) -> list[dict]:
    """How often a mean contribution has the same sign on held-out examples, by its |z|.

    All examples are dealt out anew, `SPLITS` times, into as many selection and held-out ones. What
    has no noise (pixels on an int8 grid) is left out. Intervals are over layers, whose
    contributions are not independent. `expected` is what independent examples would give if true
    means were spread much more widely than their standard errors: Phi(|z| / sqrt(1 + n / m)), with
    n selection and m held-out examples.

    Returns:
      A row for every kind of contribution and range of |z|, and one for each kind's total.
    """
    n, random = len(scores), np.random.default_rng(seed)
    kinds, layers, pool = zip(*contributions(scores, truth), strict=True)
    kinds, layers, pool = np.array(kinds), np.array(layers), np.stack(pool, axis=1)
    z, same = [], []
    for _ in range(SPLITS):
        order = random.permutation(len(pool))
        here, there = pool[order[:n]], pool[order[n:]]
        mean = here.mean(axis=0)
        z.append(np.abs(mean) / (here.std(axis=0, ddof=1) / np.sqrt(n)))
        same.append(np.sign(mean) == np.sign(there.mean(axis=0)))
    zs, agrees = np.stack(z), np.stack(same).astype(np.float64)
    owner = np.broadcast_to(layers, zs.shape)
    expected = ndtr(zs / np.sqrt(1 + n / len(truth)))
    rows = []
    for kind in dict.fromkeys(kinds):
        bins = [(0.0, np.inf), *pairwise(ZS)]
        for low, high in bins:
            inside = (zs >= low) & (zs < high) & (kinds == kind)
            if len(set(owner[inside])) < 2:
                continue
            found = mean_interval(agrees[inside], method="t", groups=owner[inside])
            row = {"kind": str(kind), "from": low, "to": None if np.isinf(high) else high}
            row |= {"share": float(inside.sum() / (kinds == kind).sum() / SPLITS)}
            row |= {"same": [found.mean, max(found.lower, 0.0), min(found.upper, 1.0)]}
            row |= {"z": float(zs[inside].mean()), "expected": float(expected[inside].mean())}
            rows.append({**row, "contributions": int((kinds == kind).sum())})
    return rows


def contributions(scores: Scores, truth: Scores) -> Iterator[tuple[str, str, np.ndarray]]:
    """Kind, layer and float64 [N + M] values of every contribution with noise."""
    of_site = {site: row.name for row in scores.table.layers for site in row.sites}

    def noisy(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
        both = np.concatenate([a, b]).astype(np.float64)
        return both if np.abs(both).mean() > 1e-9 else None

    for site, position in scores.activation_rows:
        for candidate in scores.activation_candidates:
            both = noisy(*(s.activation(site, position, candidate) for s in (scores, truth)))
            way = "to nearest" if candidate.rounding == "nearest" else "down or up"
            if both is not None:
                yield f"activations, {way}", of_site[site], both
    for row in scores.table.layers:
        for candidate in scores.weight_candidates if row.has_weight else ():
            both = noisy(*(s.weight(row.name, candidate) for s in (scores, truth)))
            if both is not None:
                yield "weights, to nearest", row.name, both


def rules(net: Known) -> list[dict]:
    """Plans that take contributions that look negative, beside plans that do not look.

    Returns:
      A row for every plan: predicted and measured change on selection and on held-out examples.
    """
    graph, table = net.chosen.simulator.graph, net.scores.table
    plans = {}
    for words, bits in (("int8", (8,)), ("int8 or int4", (8, 4))):
        taken = jr.rmils(graph, net.scores, mu=0.0, variant="balanced", bits=bits)
        plans[f"negative ones, {words}"] = taken
        plans[f"the same layers to nearest, {words}"] = to_nearest(taken)
        plans[f"negative with t > 2, {words}"] = jr.rmils(
            graph, net.scores, mu=2.0, variant="balanced", normalization="t", bits=bits
        )
    plans |= {f"uniform {name}, to nearest": jr.uniform(table, name) for name in ("int8", "int4")}
    rows = []
    for name, plan in bars(plans.items(), "rules", len(plans)):
        rows.append(
            {
                "name": name,
                "formats": plan.counts(),
                "size": table.size_bits(plan.formats()) / table.float_bits,
                "tangent": total(net.scores, plan),
                "measured": interval(net.chosen.change(plan)),
                "held_out_tangent": total(net.truth, plan),
                "held_out_measured": interval(net.held_out.change(plan)),
            }
        )
    return rows


def to_nearest(plan: Plan) -> Plan:
    """The plan with no rounding directions."""
    layers = {
        name: LayerPlan(
            layer.weight_bits, layer.activation_bits, ("nearest",) * len(layer.rounding)
        )
        for name, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def total(scores: Scores, plan: Plan) -> list[float]:
    """The interval of a plan's tangent prediction."""
    return interval(stacked(jr.predict(scores, plan)).sum(axis=1))


def interval(values: np.ndarray) -> list[float]:
    """Mean and the two ends of its 95 % interval."""
    found = mean_interval(values)
    return [found.mean, found.lower, found.upper]

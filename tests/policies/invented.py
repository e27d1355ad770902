"""Tables, costs and scores with invented numbers, and every plan of a small one."""

import itertools

import numpy as np
from hypothesis import strategies as st

from jaxrmils.graph import ActivationRow, LayerRow, ModelTable
from jaxrmils.numerics import Ranges
from jaxrmils.policies import LayerPlan
from jaxrmils.policies.costs import Costs
from jaxrmils.policies.formats import fit, parse_format
from jaxrmils.sensitivity import ACTIVATION_CANDIDATES, WEIGHT_CANDIDATES, Scores

FORMATS = ("w8a8", "w4a8", "w4a4", "w4")


def row(name, kind, weight=8, leaves=(), elements=(4,), macs=16, iterations=1):
    """A layer: "dense", "dot" (two activations) or "lookup"."""
    operands = {"dense": 1, "dot": 2, "lookup": 0}[kind]
    elements = (elements * 2)[:operands]
    return LayerRow(
        name=name,
        sites=(name,),
        kinds=("gather" if kind == "lookup" else "dot",),
        weight_size=0 if kind == "dot" else weight,
        weight_scales=0 if kind == "dot" else 2,
        weight_leaves=() if kind == "dot" else leaves,
        activations=tuple(
            ActivationRow(name, i, size, 1, iterations) for i, size in enumerate(elements)
        ),
        macs=0 if kind == "lookup" else macs,
    )


def table(*rows, leaf_bits, float_leaves=()):
    """A model of these layers."""
    names = tuple(f"leaf_{i}" for i in range(len(leaf_bits)))
    return ModelTable(rows, names, tuple(leaf_bits), tuple(float_leaves), "invented")


def chain(*sizes, names="abcdefgh"):
    """Dense layers of these many weights, as many MACs, and biases of 64 bits."""
    rows = [row(n, "dense", s, (i,), macs=s) for i, (n, s) in enumerate(zip(names, sizes))]  # noqa: B905
    bits = [32 * s for s in sizes] + [64]
    return table(*rows, leaf_bits=bits, float_leaves=(len(sizes),))


def options(table_row, formats=FORMATS, roundings=("nearest",)):
    """Float and the formats that a layer can have."""
    found = [LayerPlan()]
    for name in formats:
        weight, activation, *_ = fit(table_row, parse_format(name))
        for rounding in roundings if activation < 32 else (None,):
            repeated = (rounding,) * len(table_row.activations) if rounding else ()
            found.append(LayerPlan(weight, activation, repeated))
    return list(dict.fromkeys(found))


def costs(model, values):
    """Costs by layer and format name; what is not given costs 0."""
    return Costs(
        "by hand",
        "nats",
        {
            r.name: {p: float(values.get(r.name, {}).get(p.format, 0)) for p in options(r)}
            for r in model.layers
        },
    )


def every(table_costs):
    """All plans' layers."""
    names = list(table_costs.options)
    for choice in itertools.product(*(list(table_costs.options[n]) for n in names)):
        yield dict(zip(names, choice, strict=True))


@st.composite
def models(draw, most=4):
    """`(table, costs)` of a few layers; some share a parameter leaf, or have one read elsewhere."""
    count = draw(st.integers(1, most))
    rows, bits = [], [32 * draw(st.integers(1, 9))]
    for i in range(count):
        kind = draw(st.sampled_from(["dense", "dense", "dense", "dot", "lookup"]))
        size = draw(st.integers(1, 40))
        shares = kind != "dot" and draw(st.integers(0, 4)) == 0
        leaf = draw(st.integers(0, len(bits) - 1)) if shares else len(bits)
        if leaf == len(bits):
            bits.append(32 * size)
        rows.append(
            row(
                f"block_{i % 2}/{i}",
                kind,
                size,
                (leaf,),
                elements=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
                macs=draw(st.integers(1, 99)),
                iterations=draw(st.integers(1, 3)),
            )
        )
    model = table(*rows, leaf_bits=bits, float_leaves=(0,))
    cost = st.integers(-8, 40).map(lambda i: i / 16)
    values = {
        r.name: {
            p: 0.0 if p.is_float else draw(cost) for p in options(r, roundings=("nearest", "floor"))
        }
        for r in model.layers
    }
    return model, Costs("drawn", "nats", values)


def scores(model, examples=40, seed=0, shared=0.0):
    """Contributions that are normal numbers, with a part that all layers share."""
    rng = np.random.default_rng(seed)
    rows = tuple((a.site, a.position) for r in model.layers for a in r.activations)
    sites = tuple(r.name for r in model.layers if r.has_weight)
    common = shared * rng.normal(size=(examples, 1, 1))

    def values(count, candidates):
        steps = np.array([1 / 16 if c.bits == 4 else 1 / 256 for c in candidates])
        means = rng.normal(0.3, 0.5, (1, count, len(candidates)))
        noise = rng.normal(size=(examples, count, len(candidates)))
        return (steps * (means + noise + common)).astype(np.float32)

    reached = {r.name: () for r in model.layers if r.activations}
    return Scores(
        table=model,
        ranges=Ranges({}, reached, "minmax", False, 0.0, examples, "invented"),
        loss=np.ones(examples, np.float32),
        activations=values(len(rows), ACTIVATION_CANDIDATES),
        weights=values(len(sites), WEIGHT_CANDIDATES),
        gradient_sum=np.zeros((examples, len(rows)), np.float32),
        gradient_square=np.ones((examples, len(rows)), np.float32),
        shift=None,
        activation_rows=rows,
        weight_rows=sites,
        activation_candidates=ACTIVATION_CANDIDATES,
        weight_candidates=WEIGHT_CANDIDATES,
    )

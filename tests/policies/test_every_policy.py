"""What every policy must do: a complete and valid plan for every reference model."""

import pytest
from models import MODELS
from stages import SHIFTED, scored, traced

from jaxrmils import predict, rmils, uniform
from jaxrmils.policies import FORMATS, check_plan

POLICIES = {
    **{f"uniform {f}": lambda graph, scores, f=f: uniform(scores.table, f) for f in FORMATS},
    "rmils radical": lambda graph, scores: rmils(graph, scores, mu=0.01),
    "rmils everything": lambda graph, scores: rmils(graph, scores, mu=0.0, lookups="int4"),
    "rmils balanced": lambda graph, scores: rmils(graph, scores, mu=0.0, variant="balanced"),
    "rmils t": lambda graph, scores: rmils(graph, scores, mu=2.0, normalization="t"),
    "rmils cosine": lambda graph, scores: rmils(graph, scores, mu=0.01, normalization="cosine"),
    "rmils shift": lambda graph, scores: rmils(graph, scores, mu=0.01, probe="shift"),
    "rmils w8a4": lambda graph, scores: rmils(graph, scores, mu=0.0, weights="int8"),
    "rmils float weights": lambda graph, scores: rmils(graph, scores, mu=0.0, weights="float"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_complete_and_valid_plan(name):
    graph, scores = traced(name)[0], scored(name)
    for policy, make in POLICIES.items():
        if policy == "rmils shift" and name not in SHIFTED:
            continue
        plan = make(graph, scores)
        check_plan(plan, scores.table)
        assert list(plan.layers) == list(graph.layers), policy
        assert plan.fingerprint == graph.fingerprint, policy
        assert plan.policy["name"] == policy.split()[0]
        assert sum(plan.counts().values()) == len(graph.layers)
        assert scores.table.size_bits(plan.formats()) > 0
        if policy.startswith("rmils"):  # Only what was scored is chosen.
            assert set(predict(scores, plan)) == set(graph.layers)


def test_sizes_follow_the_formats():
    scores = scored("transformer")
    sizes = [scores.table.size_bits(uniform(scores.table, f).formats()) for f in FORMATS]
    by_format = dict(zip(FORMATS, sizes, strict=True))
    assert by_format["int4"] < by_format["w8a4"] <= by_format["int8"] < by_format["float"]
    assert by_format["w4"] < by_format["w4a8"] < by_format["w8"] < by_format["float"]
    assert by_format["float"] == scores.table.float_bits

import pytest
import synthetic

from jaxrmils import tabulate
from jaxrmils.policies import Constraints, LayerPlan, PlanError
from jaxrmils.policies.plan import FLOAT_LAYER


def resolve(**kwargs):
    return Constraints(**kwargs).resolve(tabulate(synthetic.setup()[0]))


def test_skip_and_force_by_glob():
    assert resolve() == {}
    assert resolve(skip=("f*",)) == {"first": FLOAT_LAYER}
    found = resolve(skip=("first",), force={"dot_*": "int4", "sec?nd": "w4a8"})
    assert found == {
        "first": FLOAT_LAYER,
        "dot_0": LayerPlan(32, 4, ("nearest", "nearest")),
        "second": LayerPlan(4, 8, ("nearest",)),
    }


def test_the_first_pattern_that_matches_counts():
    found = resolve(force={"first": "float", "*": "w8"})
    assert found["first"].is_float and found["second"] == LayerPlan(8, 32)
    # Weight-only leaves a product of activations in float.
    assert found["dot_0"].is_float


@pytest.mark.parametrize("kwargs", [{"skip": ("frist",)}, {"force": {"frist": "int8"}}])
def test_a_pattern_without_matches_is_an_error_with_near_names(kwargs):
    with pytest.raises(PlanError, match=r"'frist' matches no layer; near matches: first.*3 layers"):
        resolve(**kwargs)


def test_an_unknown_format_is_an_error_with_near_names():
    with pytest.raises(PlanError, match="unknown format 'int7'; did you mean"):
        resolve(force={"first": "int7"})


def test_skipped_and_forced_is_a_conflict():
    with pytest.raises(PlanError, match=r"layer first is both skipped \(f\*\) and forced"):
        resolve(skip=("f*",), force={"first": "int8"})
    assert resolve(skip=("f*",), force={"first": "float"}) == {"first": FLOAT_LAYER}


def test_names_with_brackets_match_literally():
    table = tabulate(synthetic.setup()[0])
    with pytest.raises(PlanError, match="matches no layer"):
        Constraints(skip=("[first]",)).resolve(table)

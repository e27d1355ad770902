import pytest
import synthetic
from stages import table_of

from jaxrmils import tabulate, uniform
from jaxrmils.policies import FORMATS, PlanError, check_plan


@pytest.mark.parametrize("format", FORMATS)
def test_every_layer_has_the_format_as_far_as_it_can(format):
    table = tabulate(synthetic.setup()[0])
    plan = uniform(table, format)
    check_plan(plan, table)
    wanted = FORMATS[format]
    for name in ("first", "second"):
        layer = plan.layers[name]
        assert layer.bits == wanted
        assert layer.rounding == (("nearest",) if wanted.activation_bits < 32 else ())
    product = plan.layers["dot_0"]
    assert (product.weight_bits, product.activation_bits) == (32, wanted.activation_bits)
    assert product.dynamic == wanted.dynamic


def test_a_lookup_has_no_activations():
    plan = uniform(table_of("tied_embedding"), "int8")
    table = plan.layers["Embed_0/embedding"]
    # The table is read by a lookup and by the output dot, whose input is quantized.
    assert table.format == "w8a8" and table.rounding == ("nearest",)


def test_exceptions_and_the_record():
    table = tabulate(synthetic.setup()[0])
    plan = uniform(table, "int4", skip=("dot_*",), force={"first": "w8"})
    assert plan.layers["dot_0"].is_float and plan.layers["first"].format == "w8"
    assert plan.layers["second"].format == "w4a4"
    assert plan.policy == {
        "name": "uniform",
        "format": "int4",
        "skip": ["dot_*"],
        "force": {"first": "w8"},
    }
    with pytest.raises(PlanError, match=r"unknown format 'int5'[.;].* Formats: float"):
        uniform(table, "int5")

"""Every backend has one formulation for every operation and format, and the page shows them all."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxrmils.lowering import BACKENDS
from jaxrmils.lowering.table import (
    DOTS,
    DYNAMIC,
    GROUPED,
    INTEGER,
    NATIVE,
    TABLE,
    WEIGHTS,
    conv_operation,
    row_of,
)

FORMATS = {
    **dict.fromkeys(
        ("dot", "one row", "one column", "batched dot", "short batched dot"), (*DOTS, *DYNAMIC)
    ),
    **dict.fromkeys(("conv", "stem", "depthwise", "grouped"), INTEGER),
    "weights only": (*WEIGHTS, *GROUPED),
}


def test_one_row_for_every_case():
    wanted = {
        (backend, operation, name)
        for backend in BACKENDS
        for operation, names in FORMATS.items()
        for name in names
    }
    found = [(row.backend, row.operation, name) for row in TABLE for name in row.formats]
    assert set(found) == wanted and len(found) == len(wanted)
    for case in wanted:
        assert row_of(*case) in TABLE
    with pytest.raises(KeyError, match=r"'dot' in 'w3a8' on 'cpu'"):
        row_of("cpu", "dot", "w3a8")


def test_the_page_shows_every_row():
    page = (Path(__file__).parents[2] / "docs" / "lowering.md").read_text()
    for row in (*TABLE, *NATIVE):
        cells = (row.operation, ", ".join(row.formats), row.formulation, row.speed, row.reason)
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(
    ("channels", "features", "groups", "options", "operation"),
    [
        (3, 64, 1, {}, "stem"),
        (3, 16, 1, {}, "conv"),
        (3, 64, 1, {"dilated": True}, "conv"),
        (4, 64, 1, {}, "conv"),
        (1, 32, 1, {}, "depthwise"),
        (96, 192, 96, {}, "depthwise"),
        (96, 96, 96, {"batch_groups": 2}, "conv"),
        (256, 256, 32, {}, "grouped"),
        (256, 256, 128, {}, "conv"),
    ],
)
def test_kinds_of_convolutions(channels, features, groups, options, operation):
    assert conv_operation(channels, features, groups, **options) == operation


def int8_kernels(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text().count("__ynn_fusion")


def has_int8_kernels():
    def dot(lhs, rhs):
        return lax.dot(lhs, rhs, preferred_element_type=jnp.int32)

    return int8_kernels(dot, (256, 256), (256, 256)) > 0


def test_formulations_on_cpu_reach_the_int8_kernels():
    """What the table promises, in the compiled program, wherever XLA has such kernels."""
    from jaxrmils.lowering.integer_conv import conv_int32
    from jaxrmils.lowering.integer_dot import dot_int32

    def dot(lhs, rhs, summed=0, batched=()):
        dims = (((lhs.ndim - 1,), (summed,)), (batched, batched))
        return dot_int32(lhs, rhs, dims)

    def conv(groups, stride):
        def function(lhs, rhs):
            layouts = ("NHWC", "HWIO", "NHWC")
            return conv_int32(
                lhs,
                rhs,
                window_strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                lhs_dilation=(1, 1),
                rhs_dilation=(1, 1),
                dimension_numbers=lax.conv_dimension_numbers(lhs.shape, rhs.shape, layouts),
                feature_group_count=groups,
            )

        return function

    cases = [
        (dot, (64, 128), (128, 64)),
        (dot, (1, 512), (512, 512)),
        (dot, (512, 512), (512, 1)),
        (dot, (8, 16, 128), (128, 64)),
        (dot, (1, 64, 128), (128, 64)),
        (functools.partial(dot, summed=1), (64, 128), (64, 128)),
        (functools.partial(dot, summed=1), (8, 16, 128), (64, 128)),
        (functools.partial(dot, summed=1, batched=(0,)), (12, 128, 64), (12, 64, 128)),
        (conv(1, 1), (2, 16, 16, 32), (3, 3, 32, 32)),
        (conv(1, 2), (2, 32, 32, 3), (3, 3, 3, 32)),
        (conv(1, 1), (2, 32, 32, 3), (3, 3, 3, 32)),
        (conv(8, 1), (2, 16, 16, 64), (3, 3, 8, 64)),
    ]
    expected = 1 if has_int8_kernels() else 0
    found = [int8_kernels(*case) for case in cases]
    assert found == list(itertools.repeat(expected, len(cases)))

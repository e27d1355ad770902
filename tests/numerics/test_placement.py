"""How batches are spread and filled up; several devices and processes are in tests/integration."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxrmils.numerics.placement import (
    Layout,
    PlacementError,
    in_reading_order,
    spread,
    spread_exactly,
    with_params,
)


def sharding(*spec):
    return NamedSharding(jax.make_mesh((1, 1), ("data", "model")), PartitionSpec(*spec))


BATCHES = [(np.arange(start, start + n), np.ones((n, 2))) for start, n in ((0, 4), (4, 0), (4, 3))]


@pytest.mark.parametrize("spread_over", [None, sharding("data"), sharding(("data", "model"))])
def test_batches_are_filled_up_and_what_comes_of_it_is_dropped(spread_over):
    placed = list(spread(BATCHES, spread_over))
    assert [jax.tree.map(np.shape, p.values) for p in placed] == [((4,), (4, 2))] * 2
    taken = [p.taken({"x": p.values[0]})["x"] for p in placed]
    np.testing.assert_array_equal(np.concatenate(taken), np.arange(7))
    assert [p.per_device for p in placed] == [4, 4]
    assert next(iter(spread(BATCHES[2:], spread_over, rows=4))).values[0].shape == (4,)


@pytest.mark.parametrize("spread_over", [None, sharding("data")])
def test_sums_need_batches_without_filling(spread_over):
    found = list(spread_exactly(BATCHES[::2], spread_over))
    assert [count for _, count in found] == [4, 3]
    np.testing.assert_array_equal(found[1][0][0], [4, 5, 6])


def test_rows_of_two_readers():
    layout = Layout(sharding("data"))
    layout.readers = [(0, 2), (1,)]
    rows, readers = layout.valid([3, 2], 2)
    np.testing.assert_array_equal(rows, [0, 1, 4, 2, 3])
    np.testing.assert_array_equal(readers, [0, 0, 0, 1, 1])


def test_reading_order_is_reader_by_reader():
    readers = np.array([0, 0, 1, 0, 1, 1])
    found = in_reading_order(readers, {"x": np.arange(6)})
    np.testing.assert_array_equal(found["x"], [0, 1, 3, 2, 4, 5])


def test_parameters_on_the_mesh_stay():
    everywhere = sharding()
    there = jax.device_put(np.ones(3), Layout(everywhere).replicated)
    assert with_params({"w": there}, sharding("data"))["w"] is there
    assert with_params({"w": there}, None)["w"] is there
    # NumPy's would be copied to the device in every call.
    assert isinstance(with_params({"w": np.ones(3)}, None)["w"], jax.Array)


@pytest.mark.parametrize(
    "wrong",
    [sharding("data", "model"), sharding(None, "data"), SingleDeviceSharding(jax.devices()[0])],
)
def test_other_shardings_are_refused(wrong):
    with pytest.raises(PlacementError, match="examples' axis"):
        next(spread(BATCHES, wrong))


def test_an_error_of_the_reader_is_passed_on():
    def broken():
        yield BATCHES[0]
        raise OSError("the disk is gone")

    batches = spread(broken(), sharding("data"))
    next(batches)
    with pytest.raises(OSError, match="disk"):
        next(batches)


def test_explicit_axes_that_are_set_are_refused():
    """Operations of a traced program have automatic axes, and JAX refuses a mix of both."""
    there = jax.device_put(np.ones(3), sharding())
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        with pytest.raises(PlacementError, match=r"explicit axes, \('data',\).* outside of it"):
            with_params({"w": np.ones(3)}, sharding("data"))
        with pytest.raises(PlacementError, match=r"AxisType\.Auto"):
            with_params({"w": there}, None)
        assert with_params({"w": np.ones(3)}, None)["w"].sum() == 3
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        assert with_params({"w": there}, sharding("data"))["w"].sum() == 3

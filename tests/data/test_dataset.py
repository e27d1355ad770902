import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.data import DataError, Dataset, check_labels


def tokens_and_mask(n):
    return {"tokens": np.arange(n * 3).reshape(n, 3), "mask": np.ones((n, 3), np.float32)}


def test_batches_cover_the_data_in_order_with_a_smaller_last_one():
    dataset = Dataset(tokens_and_mask(7), np.arange(7), None, "text")
    batches = list(dataset.batches(3))
    assert [len(targets) for _, targets in batches] == [3, 3, 1]
    np.testing.assert_array_equal(
        np.concatenate([inputs["tokens"] for inputs, _ in batches]), dataset.inputs["tokens"]
    )
    assert batches[0][0]["mask"].dtype == np.float32


def test_take_keeps_examples_together():
    dataset = Dataset(tokens_and_mask(5), np.arange(5), np.array([0, 0, 1, 1, 2]), "text")
    taken = dataset.take(np.array([4, 1]))
    np.testing.assert_array_equal(taken.inputs["tokens"], [[12, 13, 14], [3, 4, 5]])
    np.testing.assert_array_equal(taken.targets, [4, 1])
    np.testing.assert_array_equal(taken.groups, [2, 0])
    assert taken.name == "text"


def test_jax_arrays_become_numpy():
    dataset = Dataset(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros(2, jnp.int32))
    assert isinstance(dataset.inputs, np.ndarray)
    assert dataset.inputs.dtype == jnp.bfloat16


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size):
    with pytest.raises(DataError, match=f"batch_size is {batch_size}; expected at least 1"):
        Dataset(np.ones((4, 2)), np.ones(4)).batches(batch_size)


def test_batch_larger_than_the_data_names_both_numbers():
    with pytest.raises(DataError, match="batch_size is 9 but there are only 4 examples"):
        Dataset(np.ones((4, 2)), np.ones(4)).batches(9)


def test_empty():
    with pytest.raises(DataError, match=r"empty \(inputs has shape \(0, 2\)\)"):
        Dataset(np.ones((0, 2)), np.ones(0))
    with pytest.raises(DataError, match="the inputs hold no array"):
        Dataset({}, np.ones(3))


def test_different_leading_sizes_name_both():
    with pytest.raises(DataError, match=r"inputs\['a'\] has 4 examples but targets has 3"):
        Dataset({"a": np.ones((4, 2))}, np.ones(3))
    with pytest.raises(DataError, match="inputs has 4 examples but groups has 5"):
        Dataset(np.ones((4, 2)), np.ones(4), np.ones(5))


def test_scalar_has_no_example_axis():
    with pytest.raises(DataError, match=r"inputs\['b'\] is a scalar"):
        Dataset({"a": np.ones(2), "b": np.float32(1)}, np.ones(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_nan_and_infinity_are_counted_and_located(dtype):
    inputs = np.ones((6, 4)).astype(dtype)
    inputs[3, 1], inputs[5, 0] = np.nan, np.inf
    with pytest.raises(DataError, match=r"holds 2 values .* first in example 3"):
        Dataset(inputs, np.ones(6))


def test_integer_inputs_are_not_checked_for_nan():
    assert len(Dataset(np.arange(4), np.arange(4))) == 4


@pytest.mark.parametrize("indices", [[5], [-1]])
def test_take_out_of_range(indices):
    with pytest.raises(DataError, match=rf"index {indices[0]} .* outside the 5 examples"):
        Dataset(np.ones(5), np.ones(5)).take(indices)


def test_take_refuses_masks_and_nothing():
    dataset = Dataset(np.ones(2), np.ones(2))
    with pytest.raises(DataError, match="flatnonzero"):
        dataset.take(np.array([True, False]))
    with pytest.raises(DataError, match="no index"):
        dataset.take([])


def test_labels():
    check_labels(np.array([0, 4]), 5)
    with pytest.raises(DataError, match="2 labels are out of range: the first is -1 at example 2"):
        check_labels(np.array([0, 4, -1, 5]), 5)
    with pytest.raises(DataError, match="first is 7 at example 1; expected 0 to 4"):
        check_labels(np.array([[0, 1], [2, 7]]), 5)
    with pytest.raises(DataError, match="found dtype float64"):
        check_labels(np.array([0.0, 1.0]), 5)

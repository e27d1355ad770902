"""Rows that are made when asked for: as an array that holds them, without holding them."""

import threading

import numpy as np
import pytest

from jaxrmils.data import Batches, DataError, Dataset, LazyRows, join

VALUES = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float32)


class Source:
    """Counts what is read, and by whom."""

    def __init__(self, values=VALUES):
        self.values, self.read, self.threads = values, [], set()

    def __call__(self, number):
        self.read.append(number)
        self.threads.add(threading.current_thread())
        return self.values[number]

    def rows(self, **options):
        return LazyRows(self, self.values.shape, self.values.dtype, **options)


def test_rows_are_those_of_the_array():
    rows = Source().rows()
    assert (rows.shape, rows.ndim, rows.dtype, len(rows)) == ((10, 2, 3), 3, np.float32, 10)
    np.testing.assert_array_equal(rows[2:5], VALUES[2:5])
    np.testing.assert_array_equal(rows[np.array([7, 0, 7])], VALUES[[7, 0, 7]])
    np.testing.assert_array_equal(rows[3], VALUES[3])
    np.testing.assert_array_equal(np.asarray(rows), VALUES)
    some = rows.take([8, 1, 4]).take(np.array([2, 0]))
    np.testing.assert_array_equal(some[:], VALUES[[4, 8]])


def test_rows_are_kept_up_to_the_limit():
    source = Source()
    rows = source.rows(keep_bytes=3 * VALUES[0].nbytes)
    taken = rows.take(np.arange(4))
    assert not source.read
    assert rows[:4].tolist() == taken[:].tolist() == VALUES[:4].tolist()
    assert source.read == [0, 1, 2, 3, 3]


def test_a_row_of_another_form():
    rows = LazyRows(lambda row: np.zeros(row + 1, np.float32), (3, 1), np.float32)
    with pytest.raises(ValueError, match=r"row 2 is float32 of shape \(3,\); expected .*\(1,\)"):
        rows[2:]


def lazy_dataset(source, **options):
    labels = np.arange(len(source.values))
    return Dataset({"x": source.rows(**options), "n": labels}, labels % 3, labels // 2, "lazy")


def test_a_lazy_data_set_gives_the_same_batches():
    eager = Dataset({"x": VALUES, "n": np.arange(10)}, np.arange(10) % 3, np.arange(10) // 2)
    for indices in (np.arange(10), np.array([9, 2, 3, 0, 5])):
        lazy = lazy_dataset(Source(), keep_bytes=0).take(indices)
        batches = lazy.batches(4)
        assert isinstance(lazy.inputs["x"], LazyRows) and len(batches) == -(-len(indices) // 4)
        np.testing.assert_array_equal(lazy.groups, eager.groups[indices])
        expected = list(eager.take(indices).batches(4))
        passes = [list(batches), list(batches), [batches[n] for n in range(len(batches))]]
        for found in passes:
            for (inputs, targets), (x, y) in zip(found, expected, strict=True):
                np.testing.assert_array_equal(inputs["x"], x["x"])
                np.testing.assert_array_equal(inputs["n"], x["n"])
                np.testing.assert_array_equal(targets, y)
        for inputs, (x, _) in zip(batches.inputs(), expected, strict=True):
            np.testing.assert_array_equal(inputs["x"], x["x"])


def test_few_batches_are_read_ahead_and_no_thread_stays():
    source = Source(np.zeros((100, 1), np.float32))
    running = threading.active_count()
    for _ in lazy_dataset(source).batches(10):
        break
    assert threading.active_count() == running
    assert source.read == list(range(len(source.read))) and 10 <= len(source.read) <= 40
    assert threading.main_thread() not in source.threads


def test_data_in_memory_need_no_thread():
    iterator = iter(Dataset(VALUES, np.arange(10)).batches(4))
    running = threading.active_count()
    next(iterator)
    assert threading.active_count() == running


def test_errors_of_the_reader_reach_the_consumer():
    def read(number):
        if number == 7:
            raise DataError("photo 7 is broken")
        return VALUES[number]

    running = threading.active_count()
    seen = []
    with pytest.raises(DataError, match="photo 7 is broken"):
        for _, targets in Dataset(
            LazyRows(read, VALUES.shape, VALUES.dtype), np.arange(10)
        ).batches(3):
            seen.extend(targets.tolist())
    assert seen == [0, 1, 2, 3, 4, 5]
    assert threading.active_count() == running


def test_lazy_values_that_are_not_finite_are_found_by_their_example():
    values = VALUES.copy()
    values[8, 1, 1] = np.nan
    data = lazy_dataset(Source(values))
    with pytest.raises(DataError, match=r"lazy: inputs\['x'\] holds 1 .* first in example 8;"):
        list(data.batches(3))
    assert len(list(data.take(np.arange(8)).batches(3))) == 3


def test_lazy_rows_must_match_the_targets():
    with pytest.raises(DataError, match="inputs has 10 examples but targets has 9"):
        Dataset(Source().rows(), np.arange(9))


def test_batches_by_number():
    batches = Batches(lambda window: np.arange(7)[window], 7, 3)
    assert batches[-1].tolist() == [6]
    assert [b.tolist() for b in batches[:2]] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(IndexError):
        batches[3]


def test_joined_data_stay_lazy():
    first, second = Source(), Source(VALUES + 100)
    both = join(lazy_dataset(first), lazy_dataset(second))
    assert not first.read and not second.read
    assert len(both) == 20 and both.name == "lazy"
    inputs, targets = both.take([12, 3]).batches(2)[0]
    np.testing.assert_array_equal(inputs["x"], np.stack([VALUES[2] + 100, VALUES[3]]))
    np.testing.assert_array_equal(targets, [2, 0])
    assert (first.read, second.read) == ([3], [2])
    # The groups of the two have nothing to do with each other.
    np.testing.assert_array_equal(both.groups, np.arange(20) // 2)
    in_memory = Dataset({"x": VALUES, "n": np.arange(10)}, np.arange(10), np.arange(10))
    mixed = join(in_memory, lazy_dataset(Source()))
    np.testing.assert_array_equal(mixed.inputs["x"][9:11], VALUES[[9, 0]])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Dataset(VALUES[:, :1], np.arange(10)), r"inputs are float32\[2, 3\] .* float32\[1, 3\]"),
        (Dataset(VALUES.astype(np.float64), np.arange(10)), r"float32\[2, 3\] .* float64"),
        (Dataset(VALUES, {"y": np.arange(10)}), r"targets are int64\[\] .* \{'y': 'int64\[\]'\}"),
        (Dataset(VALUES, np.arange(10), np.arange(10)), "only one of .* has groups"),
    ],
)
def test_data_that_cannot_be_joined(second, message):
    with pytest.raises(DataError, match=message):
        join(Dataset(VALUES, np.arange(10)), second)

"""Rows that are made when they are asked for, and batches of them that are made ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

# Photos of 224 x 224 take 150 kB each: some 7,000 are kept.
KEEP_BYTES = 2**30
AHEAD = 2


class LazyRows:
    """An array whose rows are made when they are asked for, such as photos in files.

    A row that was made is kept while all kept rows together take less than `keep_bytes`, so that
    further passes over a small data set cost nothing and a large one never lies in memory. What
    `take` returns shares the kept rows.

    Args:
        read: the row of a number, an array of shape `shape[1:]` and of `dtype`; called by one
            thread or another.
        shape: `(rows, ...)`.
        dtype: of the rows.
        keep_bytes: of rows that are kept, in bytes; 0 for none.

    >>> squares = LazyRows(lambda row: np.full(2, row * row), (5, 2), np.int64)
    >>> squares.shape, squares[1:3].tolist(), squares.take([4, 0])[:].tolist()
    ((5, 2), [[1, 1], [4, 4]], [[16, 16], [0, 0]])
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        shape: Sequence[int],
        dtype: Any,
        *,
        keep_bytes: int = KEEP_BYTES,
    ):
        self._read, self._kept = read, {}
        self._row_shape, self.dtype = tuple(shape[1:]), np.dtype(dtype)
        row_bytes = int(np.prod(self._row_shape)) * self.dtype.itemsize
        self._capacity = keep_bytes // max(1, row_bytes)
        self._numbers = np.arange(shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """As of a NumPy array that holds all rows."""
        return (len(self._numbers), *self._row_shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return 1 + len(self._row_shape)

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, indices: Any) -> LazyRows:
        """The rows at these integers `[chosen]`, still to be made."""
        chosen = object.__new__(LazyRows)
        chosen.__dict__ |= self.__dict__
        chosen._numbers = self._numbers[np.asarray(indices)]
        return chosen

    def __getitem__(self, index: Any) -> np.ndarray:
        """The rows of a slice or of integers `[chosen]`, made now; of one integer, a single row."""
        numbers = self._numbers[index]
        if np.ndim(numbers) == 0:
            return self._row(int(numbers))
        rows = np.empty((len(numbers), *self._row_shape), self.dtype)
        for row, number in zip(rows, numbers, strict=True):
            row[...] = self._row(int(number))
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def _row(self, number: int) -> np.ndarray:
        if number in self._kept:
            return self._kept[number]
        row = np.asarray(self._read(number))
        if row.shape != self._row_shape or row.dtype != self.dtype:
            raise ValueError(
                f"row {number} is {row.dtype} of shape {row.shape}; expected {self.dtype} of shape "
                f"{self._row_shape}"
            )
        if len(self._kept) < self._capacity:
            self._kept[number] = row
        return row


Rows = np.ndarray | LazyRows


def take_rows(rows: Rows, indices: np.ndarray) -> Rows:
    """The rows at `indices` of either kind; lazy ones stay lazy."""
    return rows.take(indices) if isinstance(rows, LazyRows) else rows[indices]


def joined_rows(first: Rows, second: Rows) -> Rows:
    """The rows of both, lazy where one of them is; shapes and dtypes must agree.

    >>> lazy = LazyRows(lambda row: np.full(2, row), (3, 2), np.int64)
    >>> joined_rows(np.zeros((1, 2), np.int64), lazy)[:].tolist()
    [[0, 0], [0, 0], [1, 1], [2, 2]]
    """
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.concatenate([first, second])
    start, count = len(first), len(first) + len(second)

    def read(number: int) -> np.ndarray:
        return first[number] if number < start else second[number - start]

    # Each part keeps its own rows.
    return LazyRows(read, (count, *first.shape[1:]), first.dtype, keep_bytes=0)


class Batches(Sequence[Any]):
    """Consecutive examples of a data set in batches, made anew in every pass.

    Args:
        read: what a batch holds, by the window of its examples.
        examples: how many there are.
        size: of a batch; the last one may be smaller.
        ahead: make the next batches in a background thread while one is in use.

    >>> batches = Batches(lambda window: list(range(7))[window], 7, 3)
    >>> len(batches), batches[0], list(batches)
    (3, [0, 1, 2], [[0, 1, 2], [3, 4, 5], [6]])
    """

    def __init__(
        self, read: Callable[[slice], Any], examples: int, size: int, *, ahead: bool = False
    ):
        self._read, self._ahead = read, ahead
        self._examples, self._size = examples, size

    def __len__(self) -> int:
        return -(-self._examples // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._batch(number) for number in range(len(self))[index]]
        return self._batch(range(len(self))[index])

    def __iter__(self) -> Iterator[Any]:
        return self._made_ahead() if self._ahead else map(self._batch, range(len(self)))

    def inputs(self) -> Batches:
        """The inputs of `(inputs, targets)` batches, as `calibrate` takes them."""
        read = self._read
        return Batches(
            lambda window: read(window)[0], self._examples, self._size, ahead=self._ahead
        )

    def _batch(self, number: int) -> Any:
        start = number * self._size
        return self._read(slice(start, start + self._size))

    def _made_ahead(self) -> Iterator[Any]:
        # Leaving the block waits for the thread, also where the reader stops early.
        with ThreadPoolExecutor(1, "jaxrmils-batches") as pool:
            pending: deque[Future[Any]] = deque()
            try:
                for number in range(len(self)):
                    pending.append(pool.submit(self._batch, number))
                    if len(pending) > AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

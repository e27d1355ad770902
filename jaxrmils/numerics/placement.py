"""Batches over several devices and hosts: how they are spread, and how results come back.

A pass over data takes one batch per round. Each process reads its own examples, the sharding says
which devices get which rows, and every process gets every result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_ENDED, _FAILED = -1, -2  # in place of a number of examples


class PlacementError(ValueError):
    """A sharding, or parts of the data on several hosts, by which no batch can be spread."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A batch on its devices.

    Attributes:
      values: the pytree that was read, filled up to a number of rows that all devices share.
      rows: int64 [examples], which rows are examples and not filling.
      readers: int32 [examples], whose examples they are; see `in_reading_order`.
      per_device: rows of each part of the batch.
    """

    values: Any
    rows: np.ndarray
    readers: np.ndarray
    per_device: int

    def taken(self, results: Any) -> Any:
        """The results of the examples alone, as NumPy arrays on every process.

        Args:
          results: pytree of arrays whose leading axis is the batch's.
        """
        return jax.tree.map(lambda x: x[self.rows], to_host(results))


class Layout:
    """Which process fills which part of a batch.

    Args:
      sharding: of the examples' axis, such as `NamedSharding(mesh, PartitionSpec("data"))`.

    Raises:
      PlacementError: it splits another axis, leaves a process without devices, gives two
        processes parts that overlap without being the same, or a mesh with explicit axes is set.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> Layout(NamedSharding(mesh, PartitionSpec("data"))).shards
    1
    """

    def __init__(self, sharding: NamedSharding):
        if not isinstance(sharding, NamedSharding) or any(sharding.spec[1:]):
            raise PlacementError(
                f"sharding is {sharding}; expected how the examples' axis, and no other, is split "
                "over a mesh, such as NamedSharding(mesh, PartitionSpec('data'))"
            )
        _check_no_explicit_axes()
        self.mesh = _automatic(sharding.mesh)
        self.sharding = NamedSharding(self.mesh, PartitionSpec(*sharding.spec[:1]))
        axes = (sharding.spec[0] if len(sharding.spec) else None) or ()
        names = (axes,) if isinstance(axes, str) else axes
        self.shards = math.prod(self.mesh.shape[name] for name in names)
        parts: dict[int, set[int]] = {process: set() for process in range(jax.process_count())}
        for device, index in self.sharding.devices_indices_map((self.shards,)).items():
            parts[device.process_index].add(index[0].start or 0)
        self._readers(parts)

    def _readers(self, parts: dict[int, set[int]]) -> None:
        """Processes with the same shards are one reader; readers stand in the order of shards."""
        self.readers = sorted({tuple(sorted(shards)) for shards in parts.values()})
        flat = [shard for reader in self.readers for shard in reader]
        if () in self.readers or len(set(flat)) < len(flat):
            raise PlacementError(
                f"the processes hold these parts of a batch: {parts}; expected a part for each, "
                "and equal or separate ones. Make the mesh of all devices, in jax.devices()'s order"
            )
        self.reader = [self.readers.index(tuple(sorted(parts[p]))) for p in sorted(parts)]

    @property
    def own(self) -> int:
        """The number of this process's reader."""
        return self.reader[jax.process_index()]

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def counts(self, own: int) -> list[int]:
        """What every reader says, given what this process says."""
        if jax.process_count() == 1:
            return [own]
        said = multihost_utils.process_allgather(np.asarray([own], np.int32)).reshape(-1)
        if np.any(said == _FAILED):
            if own == _FAILED:
                return []
            failed = int(np.flatnonzero(said == _FAILED)[0])
            raise PlacementError(f"process {failed} failed on its own data; see its message")
        for reader in range(len(self.readers)):
            same = {int(n) for n, r in zip(said, self.reader, strict=True) if r == reader}
            if len(same) > 1:
                raise PlacementError(
                    f"processes that hold the same rows of a batch read {sorted(same)} examples; "
                    "they must read the same ones"
                )
        return [int(said[self.reader.index(r)]) for r in range(len(self.readers))]

    def place(self, batch: Any, rows: int) -> Any:
        """Global arrays of `rows` rows per shard from this process's part, filled up."""
        own = self.readers[self.own]

        def leaf(x: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                start = own.index((index[0].start or 0) // rows) * rows
                return x[start : start + rows]

            return jax.make_array_from_callback(
                (rows * self.shards, *x.shape[1:]), self.sharding, part
            )

        return jax.tree.map(leaf, padded(batch, rows * len(own)))

    def valid(self, counts: Sequence[int], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that hold examples, and whose they are."""
        found = []
        for shards, count in zip(self.readers, counts, strict=True):
            positions = np.arange(max(count, 0))
            found.append(np.asarray(shards)[positions // rows] * rows + positions % rows)
        readers = np.repeat(np.arange(len(counts), dtype=np.int32), [len(f) for f in found])
        return np.concatenate(found), readers


def spread(
    batches: Iterable[Any], sharding: NamedSharding | None = None, *, rows: int = 0
) -> Iterator[Placed]:
    """Places batches on devices, all filled up to one size, so that one program serves them.

    Filling repeats an example; `Placed.taken` drops what comes of it. Rows per device are those
    of the first round, more where a later one needs them.

    Args:
      batches: this process's own part of the data; pytrees of arrays with one leading axis.
        Processes need not have equally many, but at least one example each.
      sharding: of the examples' axis; None for one device.
      rows: per device, of an earlier pass that this one continues.

    Yields:
      The batches; empty ones are left out.

    Raises:
      PlacementError: see `Layout`; a process has no examples, or failed while it read.
    """
    if sharding is None:
        for batch in batches:
            count = examples(batch)
            if count:
                rows = rows or count
                none = np.zeros(count, np.int32)
                yield Placed(padded(batch, rows), np.arange(count), none, rows)
        return
    layout = Layout(sharding)
    for batch, counts in _rounds(layout, batches):
        parts = zip(counts, layout.readers, strict=True)
        rows = max(rows, *(-(-count // len(shards)) for count, shards in parts))
        yield Placed(layout.place(batch, rows), *layout.valid(counts, rows), rows)


def spread_exactly(batches: Iterable[Any], sharding: NamedSharding | None = None) -> Iterator[Any]:
    """As `spread`, without filling, for what sums over examples.

    A round that the devices can't share equally is copied to each of them: a last, smaller batch.

    Yields:
      The batches as global arrays; `(values, number of examples)`.
    """
    if sharding is None:
        yield from ((batch, examples(batch)) for batch in batches)
        return
    layout = Layout(sharding)
    for batch, counts in _rounds(layout, batches):
        each = [count / len(shards) for count, shards in zip(counts, layout.readers, strict=True)]
        if len(set(each)) == 1 and each[0] == int(each[0]):
            yield layout.place(batch, int(each[0])), sum(counts)
        else:
            whole = _together(layout, batch, counts)
            yield jax.tree.map(lambda x: _copied(x, layout.replicated), whole), sum(counts)


def _rounds(layout: Layout, batches: Iterable[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Each round's own batch, and how many examples every reader has in it.

    A process that has no more examples takes part with the last one it had, of which none counts.
    """
    iterator, latest = iter(batches), None
    while True:
        try:
            batch = next(iterator, None)
            said = _ENDED if batch is None else examples(batch)
        except Exception:
            layout.counts(_FAILED)
            raise
        counts = layout.counts(said)
        if all(count == _ENDED for count in counts):
            return
        if batch is not None and said:
            latest = batch
        if not any(count > 0 for count in counts):
            continue
        without = [r for r, count in enumerate(counts) if count <= 0]
        if without and _anyone_without(latest):
            raise PlacementError(
                f"reader {without[0]} of {len(counts)} has no example in the first round; every "
                "process needs at least one example"
            )
        yield latest, [max(count, 0) for count in counts]


def _anyone_without(latest: Any) -> bool:
    """Whether a process has had no example yet; all processes must give up together."""
    return any_process(latest is None)


def _together(layout: Layout, batch: Any, counts: Sequence[int]) -> Any:
    """The examples of all readers in one batch, on every process."""
    if len(counts) == 1:
        return jax.tree.map(lambda x: np.asarray(x)[: counts[0]], batch)
    size = max(counts)
    own = jax.tree.map(lambda x: np.asarray(x)[:size], batch)
    parts = multihost_utils.process_allgather(padded(own, size))
    first = [layout.reader.index(reader) for reader in range(len(counts))]
    return jax.tree.map(
        lambda x: np.concatenate([x[p][:count] for p, count in zip(first, counts, strict=True)]),
        parts,
    )


def examples(batch: Any) -> int:
    """The length of the leading axis."""
    return jax.tree.leaves(batch)[0].shape[0]


def padded(batch: Any, size: int) -> Any:
    """The batch as NumPy arrays, filled up with its first example so that it has `size` at least.

    >>> padded(np.array([3, 4]), 4).tolist()
    [3, 4, 3, 3]
    """

    def fill(x: Any) -> Any:
        x = np.asarray(x)
        missing = size - x.shape[0]
        return x if missing <= 0 else np.concatenate([x, np.repeat(x[:1], missing, axis=0)])

    return jax.tree.map(fill, batch)


def in_reading_order(readers: np.ndarray, results: Any) -> Any:
    """Results as one process gives them that reads all of reader 0's examples, then reader 1's.

    Args:
      readers: [N], whose example each row is.
      results: pytree of arrays [N, ...] in rounds.
    """
    if not np.any(readers[1:] < readers[:-1]):
        return results
    order = np.argsort(readers, kind="stable")
    return jax.tree.map(lambda x: x[order], results)


def any_process(said: bool) -> bool:
    """Whether it is true on any process; all processes must call it together."""
    if jax.process_count() == 1:
        return said
    return bool(np.any(multihost_utils.process_allgather(np.asarray([said], np.int32))))


def to_host(tree: Any) -> Any:
    """The values as NumPy arrays on every process; all processes must call it together."""

    def leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def few_everywhere(batch: Any, sharding: NamedSharding, count: int = 4) -> Any:
    """The first examples of a batch that was placed, copied to every device."""
    everywhere = Layout(sharding).replicated
    first = jax.jit(lambda b: jax.tree.map(lambda x: x[:count], b), out_shardings=everywhere)
    return first(batch)


def with_params(params: Any, sharding: NamedSharding | None) -> Any:
    """Parameters that a program with batches spread so can read.

    Those that lie on the mesh's devices stay as they are, however they are sharded; others are
    copied to every device. Without a sharding NumPy arrays are put on the default device, so that
    not every call does it, and all others stay where they are. Explicit axes of their mesh become
    automatic ones, without moving data.

    Raises:
      PlacementError: parameters lie on a mesh, or are to, while one with explicit axes is set.
    """
    if sharding is None:
        return jax.tree.map(_with_automatic_axes, params)
    layout = Layout(sharding)
    devices = set(layout.mesh.devices.flat)

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.sharding.device_set != devices:
            return _copied(x, layout.replicated)
        return _with_automatic_axes(x)

    return jax.tree.map(leaf, params)


def _with_automatic_axes(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    placed = x.sharding if isinstance(x, jax.Array) else None
    if not isinstance(placed, NamedSharding):
        return x
    _check_no_explicit_axes()
    automatic = _automatic(placed.mesh)
    same = placed.mesh is automatic
    return x if same else jax.device_put(x, NamedSharding(automatic, placed.spec))


def _copied(x: Any, everywhere: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(x, everywhere)
    value = np.asarray(x)  # every process has all of it
    return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])


def _automatic(mesh: Any) -> Mesh:
    """The mesh with axes over which the compiler spreads work, as a traced program needs them.

    `jax.make_mesh` makes axes that are part of the types of values, which equations that were
    traced without them don't have.
    """
    if _all_automatic(mesh):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _check_no_explicit_axes() -> None:
    """Raises PlacementError under `jax.set_mesh` of explicit axes, where operations refuse others.

    The mesh is read with automatic ones, which a traced program needs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not _all_automatic(mesh):
        raise PlacementError(
            f"jax.set_mesh has set a mesh with explicit axes, {mesh.axis_names}, which a traced "
            "program does not have; call this outside of it, or set a mesh that is made with "
            "axis_types=(jax.sharding.AxisType.Auto,) * n"
        )


def _all_automatic(mesh: Any) -> bool:
    return all(kind == AxisType.Auto for kind in mesh.axis_types)

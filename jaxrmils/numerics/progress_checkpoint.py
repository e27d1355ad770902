"""Progress of a pass over data, kept with Orbax, so that a job that was killed goes on.

After some time, what was accumulated is saved with the number of batches it holds and a hash of
their contents. Orbax writes aside and renames, so a save that was cut short is no checkpoint. A
folder belongs to one job: its identity is saved beside, and another job is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxrmils.graph import Graph
from jaxrmils.numerics.placement import any_process, to_host
from jaxrmils.version import __version__

PathLike = str | os.PathLike[str]
Arrays = Mapping[str, np.ndarray]

_KEPT = 2  # the one before the last, too: the last may be damaged


class CheckpointError(ValueError):
    """A checkpoint that belongs to another job, or can't be used by this one."""


class Run:
    """A pass over data whose progress is kept; without a folder, nothing is.

    Args:
      folder: of the checkpoint; None for none.
      job: what the result depends on, besides the data, as in `job_of`; not called without a
        folder.
      sharding: of the batches.
      seconds: the least time between two saves; 0 saves after every batch.

    Attributes:
      restored: what was accumulated by the interrupted job; empty for a new one.
      rows: rows per device, by which the first round decided; 0 before it. See `spread`.

    Raises:
      CheckpointError: the folder belongs to another job, or is no folder.
    """

    def __init__(
        self,
        folder: PathLike | None,
        job: Callable[[], Mapping[str, str]],
        *,
        sharding: NamedSharding | None = None,
        seconds: float = 60.0,
    ):
        self._manager, self._seconds = None, seconds
        self._read, self._hash = 0, b""
        self._rounds, self._saved_at = 0, time.monotonic()
        self._expected: tuple[int, bytes] = (0, b"")
        self.restored: dict[str, np.ndarray] = {}
        self.rows = 0
        if folder is not None and sharding is None and jax.process_count() > 1:
            raise CheckpointError(
                f"{folder}: {jax.process_count()} processes can keep one checkpoint only together; "
                "pass sharding="
            )
        if folder is not None:
            self._job = dict(job())
            self._folder = Path(folder).resolve()
            self._manager = _manager(self._folder)
            self._restore()

    def remaining(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that are still to be done.

        Those that the checkpoint holds are read again and compared with it, and left out.

        Raises:
          CheckpointError: they are not the batches that the checkpoint holds.
        """
        if self._manager is None:
            yield from batches
            return
        done, expected = self._expected
        for batch in batches:
            self._hash = hashlib.sha256(self._hash + _batch_hash(batch)).digest()
            self._read += 1
            if self._read == done and self._hash != expected:
                break
            if self._read > done:
                yield batch
        if self._read <= done and self._hash != expected:
            raise CheckpointError(
                f"{self._folder} holds the results of {done} batches, and the first {self._read} "
                "that were read now are others, in shape, content or order. Read the same data "
                "in the same order, or give another folder"
            )

    def after_round(self, accumulated: Callable[[], Arrays], *, last: bool = False) -> None:
        """Saves what is accumulated, if the time has come.

        Args:
          accumulated: makes the arrays, all of which every process has.
          last: save in any case.
        """
        if self._manager is None:
            return
        self._rounds += not last
        due = last or time.monotonic() - self._saved_at >= self._seconds
        if jax.process_count() > 1:
            due = bool(multihost_utils.broadcast_one_to_all(np.int32(due)))
        if due:
            self._save(dict(sorted(accumulated().items())))
            self._saved_at = time.monotonic()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def _save(self, arrays: dict[str, np.ndarray]) -> None:
        import orbax.checkpoint as ocp

        assert self._manager is not None
        if self._rounds in self._manager.all_steps():
            return
        own = np.frombuffer(self._hash.ljust(32, b"\0"), np.uint8)
        read, hashes = np.asarray([self._read], np.int32), own[None]
        if jax.process_count() > 1:
            read, hashes = multihost_utils.process_allgather((read, hashes))
        document = {
            "job": self._job,
            "rounds": self._rounds,
            "rows": self.rows,
            "read": [int(n) for n in np.ravel(read)],
            "hashes": [bytes(h).hex() for h in np.reshape(hashes, (-1, 32))],
            "arrays": {n: [a.dtype.str, list(a.shape)] for n, a in arrays.items()},
            "bytes": sum(array.nbytes for array in arrays.values()),
            "sha256": _arrays_hash(arrays),
        }
        # One array of bytes: Orbax refuses arrays without elements.
        data = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()]
        self._manager.save(
            self._rounds,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave({"data": np.concatenate(data)}),
                document=ocp.args.JsonSave(document),
            ),
        )
        self._manager.wait_until_finished()

    def _restore(self) -> None:
        assert self._manager is not None
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, problem = _read_step(self._manager, step)
            if any_process(found is None):
                warnings.warn(
                    f"{self._folder}: the checkpoint after {step} batches can't be read and is "
                    f"removed ({problem}); an older one is used, or the start",
                    RuntimeWarning,
                    stacklevel=3,
                )
                self._remove(step)
                continue
            assert found is not None
            document, arrays = found
            self._check_job(document["job"])
            process = jax.process_index()
            hashed = bytes.fromhex(document["hashes"][process])
            self._expected = document["read"][process], hashed
            self._rounds, self.rows = document["rounds"], document["rows"]
            self.restored = arrays
            return

    def _check_job(self, found: Mapping[str, str]) -> None:
        names = sorted(found.keys() | self._job.keys())
        other = [name for name in names if found.get(name) != self._job.get(name)]
        if any_process(bool(other)):
            raise CheckpointError(
                f"{self._folder} is the checkpoint of another job: {', '.join(other)} differ(s) "
                f"(saved: {[found.get(n) for n in other]}, now: {[self._job.get(n) for n in other]}"
                "). Give another folder, or remove this one to start anew"
            )

    def _remove(self, step: int) -> None:
        assert self._manager is not None
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / str(step), ignore_errors=True)
        any_process(False)  # nobody looks before it is gone
        self._manager.reload()


def job_of(
    kind: str,
    graph: Graph,
    params: Any,
    sharding: NamedSharding | None,
    *,
    program: Callable[..., Any] | None = None,
    values: Any = (),
    **options: Any,
) -> dict[str, str]:
    """What a result depends on, besides the data.

    Args:
      kind: what the job does.
      graph: from `trace`.
      params: the parameters; their values count, not how they are sharded.
      sharding: of the batches.
      program: a function of (params, inputs) whose compiled text counts; by default `graph.apply`.
      values: other arrays whose values count.
      options: short values that count.
    """
    lowered = jax.jit(program or graph.apply).lower(graph.params, graph.example).as_text()
    places = None if sharding is None else (sharding.spec, tuple(sharding.mesh.shape.items()))
    return {
        "kind": kind,
        "graph": graph.fingerprint,
        "program": hashlib.sha256(lowered.encode()).hexdigest(),
        "params": digest(params),
        "values": digest(values),
        "devices": f"{jax.default_backend()} {places} {jax.process_count()} process(es)",
        "versions": f"jaxrmils {__version__}, jax {jax.__version__}",
        **{name: re.sub(r"\s+", " ", repr(value)) for name, value in options.items()},
    }


def digest(tree: Any) -> str:
    """Identifies the values of arrays, however they are sharded, without gathering them.

    Sums modulo 2^32 of mixed words, which do not depend on the order in which they are added. It
    tells trained parameters apart; it is no cryptographic hash.

    >>> digest({"w": np.float32([1, 2])}) == digest({"w": jnp.array([1.0, 2.0])})
    True
    >>> digest({"w": np.float32([1, 2])}) == digest({"w": np.float32([2, 1])})
    False
    """
    leaves = [x if hasattr(x, "dtype") else np.asarray(x) for x in jax.tree.leaves(tree)]
    sums = to_host([_word_sums(leaf) for leaf in leaves if leaf.size])
    shapes = [(str(leaf.dtype), leaf.shape) for leaf in leaves]
    text = repr((jax.tree.structure(tree), shapes, [s.tolist() for s in sums]))
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _word_sums(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_ or x.dtype.name in ("int4", "uint4"):
        x = x.astype(jnp.uint8)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, length in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(length) + index
    sums = []
    for seed in (0x9E3779B9, 0x85EBCA6B):
        mixed = (words ^ (place * jnp.uint32(seed))) * jnp.uint32(0xC2B2AE35) + jnp.uint32(seed)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x27D4EB2F)
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums)


def _batch_hash(batch: Any) -> bytes:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    return bytes.fromhex(_arrays_hash({str(i): leaf for i, leaf in enumerate(leaves)}))


def _arrays_hash(arrays: Arrays) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape};".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; the folder of a checkpoint was expected")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=_KEPT, create=True, enable_async_checkpointing=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(folder, options=options)


def _read_step(manager: Any, step: int) -> tuple[tuple[dict[str, Any], dict[str, Any]] | None, str]:
    """`((document, arrays), "")`, or None and what is wrong with them."""
    import orbax.checkpoint as ocp

    try:
        kept = manager.restore(step, args=ocp.args.Composite(document=ocp.args.JsonRestore()))
        document = kept.document
        arrays, start = {}, 0
        target = {"data": np.zeros(document["bytes"], np.uint8)}
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        data = np.asarray(manager.restore(step, args=args).arrays["data"])
        for name, (dtype, shape) in document["arrays"].items():
            stop = start + np.dtype(dtype).itemsize * int(np.prod(shape))
            arrays[name] = data[start:stop].view(dtype).reshape(shape)
            start = stop
    except Exception as error:  # whatever damage does to Orbax's readers
        return None, (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if _arrays_hash(arrays) != document["sha256"]:
        return None, "its arrays are not those that were saved"
    return (document, arrays), ""

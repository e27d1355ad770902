"""Memory that a process keeps between calls, for programs with large temporaries on CPU.

XLA:CPU asks the C library for a program's temporaries in every call. glibc maps pieces of more than
32 MB anew each time and gives them back, so that every page of them costs a fault in every call:
a third to a half of the time of an image network at batch 32 can be that.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

from jaxrmils.lowering.sites import LoweringError

# glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_memory() -> None:
    """Makes the process keep what it frees, and use it again in the next call.

    It is a setting of the whole process, which lasts: memory stays at its peak, and threads share
    one pool. Results do not change. Call it before the first computation, since threads stay with
    the pools they have. `docs/benchmarks.md` has what it gains.

    Raises:
      LoweringError: the C library is not glibc, or JAX has started its threads already; nothing
        was changed then.

    Example:
      >>> import jaxrmils as jr
      >>> jr.keep_memory()  # doctest: +SKIP
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        raise LoweringError(
            f"keep_memory sets glibc's allocator, and this process uses {library or 'another one'}"
        )
    if _has_threads():
        raise LoweringError(
            "keep_memory must come before the first computation: JAX has started its threads, "
            "which stay with the memory pools that they have"
        )
    process = ctypes.CDLL(None)
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)):
        if process.mallopt(parameter, value) != 1:
            raise LoweringError(f"glibc {version} refused mallopt({parameter}, {value})")


def _has_threads() -> bool:
    """Whether XLA's threads run, by their names."""
    for task in Path("/proc/self/task").glob("*/comm"):
        try:
            if task.read_text().startswith("tf_XLA"):
                return True
        except OSError:  # It has just ended.
            continue
    return False

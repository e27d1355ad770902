"""Compiles the C++ kernels of this folder once per machine, and tells XLA about them.

The library lies in a cache folder under a name that holds everything it depends on, so that
another compiler, jaxlib or processor makes another one. It is written aside and renamed: two
processes that compile at once end up with the same file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from jaxrmils.lowering.sites import LoweringError

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    # Products and sums are rounded on their own, as in XLA's programs and in NumPy.
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-pthread",
)
TARGETS = ("jaxrmils_batched_dot", "jaxrmils_conv", "jaxrmils_depthwise", "jaxrmils_dot")
_COMPILERS = ("c++", "g++", "clang++")
_SHOWN_LINES = 8


def cache_folder() -> Path:
    """Where compiled kernels are kept.

    `JAXRMILS_CACHE`, or `jaxrmils` in `XDG_CACHE_HOME` or in `~/.cache`.
    """
    if chosen := os.environ.get("JAXRMILS_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxrmils"


def find_compiler() -> list[str]:
    """The command of a C++ compiler: `CXX`, else the first of c++, g++ and clang++.

    Raises:
        LoweringError: if there is none.
    """
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise LoweringError(
                f"native kernels need a C++ compiler, and CXX={os.environ['CXX']!r} is not found; "
                "set CXX to one, or unset it to try " + ", ".join(_COMPILERS)
            )
        return chosen
    for name in _COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise LoweringError(
        "native kernels need a C++ compiler, and none of "
        + ", ".join(_COMPILERS)
        + " is on the PATH; install one (on Debian: apt-get install g++) or set CXX"
    )


def sources() -> list[Path]:
    """The C++ files of this folder."""
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cc"), *folder.glob("*.h")])


def compile_library() -> Path:
    """The compiled library, from the cache or made now.

    Flags in `CXXFLAGS` come after the package's own; `-DJAXRMILS_PORTABLE` compiles kernels
    without vector instructions of their own.

    Raises:
        LoweringError: if there is no compiler, or it fails, or the cache cannot be written.
    """
    compiler = find_compiler()
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    library = cache_folder() / f"kernels-{_key(compiler, flags)}.so"
    if library.exists():
        return library
    units = [str(path) for path in sources() if path.suffix == ".cc"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    except OSError as error:
        raise LoweringError(
            f"native kernels cannot be kept in {library.parent}: {error}; set JAXRMILS_CACHE to a "
            "folder that can be written"
        ) from error
    os.close(handle)
    aside = Path(name)
    try:
        _run([*compiler, *flags, "-I", jax.ffi.include_dir(), *units, "-o", name])
        aside.chmod(0o755)
        aside.replace(library)
    finally:
        aside.unlink(missing_ok=True)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles and loads the library, and registers its targets; once per process.

    Raises:
        LoweringError: as `compile_library`, or if the library cannot be loaded.
    """
    path = compile_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LoweringError(
            f"native kernels were compiled but cannot be loaded: {error}; delete {path} to have "
            "them compiled again"
        ) from error
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def _key(compiler: list[str], flags: list[str]) -> str:
    """A digest of all that the library depends on."""
    versions = [_run([*compiler, "--version"]), importlib.metadata.version("jaxlib")]
    parts = [*compiler, *versions, *flags, _processor()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What `-march=native` looks at: the processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.split(":")[0].strip(): line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), platform.processor(), *found.values()])


def _run(command: list[str]) -> str:
    """A command's output.

    Raises:
        LoweringError: with the first lines of its message, if it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise LoweringError(
            f"native kernels need a C++ compiler, and {command[0]} does not run: {error}; set CXX "
            "to one that does"
        ) from error
    if done.returncode != 0:
        message = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise LoweringError(
            f"the C++ compiler failed on the native kernels: {shlex.join(command)} ended with "
            f"{done.returncode}:\n"
            + "\n".join(message[:_SHOWN_LINES])
            + "\nSet CXX to a compiler with C++17 (g++ 9 or clang 10 and later have it)."
        )
    return done.stdout

"""Devices that a program can be compiled for without having one."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jaxlib.version
from jax.experimental import topologies

from jaxrmils.lowering.sites import LoweringError

Platform = Literal["tpu", "cuda"]

# Where these are missing, libtpu looks for the TPUs of this machine when it is loaded, and
# complains or waits; the CUDA plugin looks for a driver. None of them changes what is compiled.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_INSTALL = {
    "tpu": "pip install 'jaxrmils[tpu-aot]'",
    "cuda": f"pip install jax-cuda12-plugin=={jaxlib.version.__version__} nvidia-cuda-nvcc-cu12",
}


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      name: what people write, "tpu:v5e".
      platform: "tpu" or "cuda".
      device: what the compiler calls it; "" where programs are only lowered to StableHLO, which is
        the same for all devices of a platform.
      clock: cycles a second that are assumed of a TPU, 0 for unknown: the published bfloat16 peak
        by twice the multiplications that its matrix units do in a cycle.
    """

    name: str
    platform: Platform
    device: str = ""
    clock: float = 0.0

    @property
    def is_compiled(self) -> bool:
        """Whether programs are compiled to machine code, not only lowered."""
        return bool(self.device)

    @property
    def is_installed(self) -> bool:
        """Whether what it needs is here."""
        if not self.is_compiled:
            return True
        return _is_here("libtpu") if self.platform == "tpu" else _cuda_plugin() is not None

    @property
    def install(self) -> str:
        """The command that installs what it needs; "" for nothing."""
        return _INSTALL[self.platform] if self.is_compiled else ""


_DEVICES: dict[Platform, dict[str, str]] = {
    "tpu": {
        "v4": "v4:1x1x1",
        "v5e": "v5e:1x1",
        "v5p": "v5p:1x1x1",
        "v6e": "v6e:1x1",
        "7x": "tpu7x:1x1x1",
    },
    "cuda": {
        "a100": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "b200": "NVIDIA B200",
    },
}

# Published peaks of 275, 197, 459, 918 and 2,307 TFLOP/s by 2 x 128 x 128 x 8, 4, 8 and by
# 2 x 256 x 256 x 4, 8. The matrix units of v6e and 7x are inferred from the compiler's estimates.
_CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}


def targets() -> Mapping[str, Target]:
    """All devices that programs can be compiled or lowered for, by name.

    "tpu" and "cuda" alone mean that programs are lowered to StableHLO, which needs nothing.

    >>> list(targets())
    ['tpu:v4', 'tpu:v5e', 'tpu:v5p', 'tpu:v6e', 'tpu:7x', 'cuda:a100', 'cuda:h100', 'cuda:b200',
     'tpu', 'cuda']
    >>> targets()["tpu:v5e"].install
    "pip install 'jaxrmils[tpu-aot]'"
    """
    compiled = [
        Target(f"{platform}:{name}", platform, device, _CLOCKS.get(name, 0.0))
        for platform, devices in _DEVICES.items()
        for name, device in devices.items()
    ]
    lowered = [Target(platform, platform) for platform in _DEVICES]
    return {target.name: target for target in (*compiled, *lowered)}


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
      LoweringError: there is none; lists those there are.

    >>> find_target("cuda:h100").device
    'NVIDIA H100 80GB HBM3'
    """
    known = targets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise LoweringError(f"unknown target {name!r}{hint} Known targets: {', '.join(known)}")
    return known[name]


@contextlib.contextmanager
def without_devices() -> Iterator[None]:
    """Sets the variables that keep compilers from looking for devices, where unset, and back.

    `compile_for` does so itself. Around a whole program it also keeps jax's own start, which loads
    the compilers, quiet.
    """
    missing = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def compile_for(target: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """Compiles a function for one device that need not be here.

    Args:
      target: a name of `targets()` that is compiled.
      function: of as many arguments as there are shapes.
      shapes: pytrees of arrays or `jax.ShapeDtypeStruct`; values are not read.

    Returns:
      `jax.stages.Compiled`: its `as_text()`, `memory_analysis()` and `cost_analysis()` can be
      asked; it runs on such a device alone.

    Raises:
      LoweringError: unknown target, one that is only lowered, or the compiler refuses the program.
      ImportError: its compiler is not installed.
    """
    found = find_target(target)
    if not found.is_compiled:
        raise LoweringError(
            f"target {target!r} is lowered to StableHLO and not compiled; expected one of "
            f"{', '.join(t.name for t in targets().values() if t.is_compiled)}"
        )
    if not found.is_installed:
        raise ImportError(f"the compiler for {target} is not installed: {found.install}")
    with without_devices():
        sharding = jax.sharding.SingleDeviceSharding(_topology(found).devices[0])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(found.platform,))
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise LoweringError(
                f"the compiler for {target} refused the program: {reason}"
            ) from error


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _cuda_plugin() -> Path | None:
    """The folder of the installed CUDA plugin."""
    for name in _CUDA_PLUGINS:
        spec = importlib.util.find_spec(name) if _is_here(name) else None
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
    return None


def _topology(target: Target) -> Any:
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=target.device)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.name,
        topology="1x1x1",
        target_config=_target_config(target),
    )


def _target_config(target: Target) -> str:
    """What the CUDA compiler must know of a device, a text that its plugin carries for itself.

    Raises:
      LoweringError: this version of the plugin has none for the device.
    """
    folder = _cuda_plugin()
    library = folder / "xla_cuda_plugin.so" if folder else Path()
    name = f'device_description_str: "{target.device}"'.encode()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = text.find(name)
        if found < 0:
            raise LoweringError(f"{library.name} has no description of {target.device}")
        start, end = text.rfind(b"\0", 0, found) + 1, text.find(b"\0", found)
        return text[start:end].decode()

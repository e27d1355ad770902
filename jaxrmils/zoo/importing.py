"""Weights of PyTorch checkpoints as Linen variables: every tensor used once, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

StateDict = Mapping[str, Any]
Variables = dict[str, Any]

# Training bookkeeping of PyTorch's BatchNorm: how many batches its averages have seen.
BATCH_COUNTERS = r"(.*\.)?num_batches_tracked"

# Where training scripts put the state dict when they save more than it.
WRAPPERS = ("state_dict", "model_state_dict", "model")
# nn.DataParallel's and DistributedDataParallel's prefix.
PARALLEL_PREFIX = "module."

# Flax's names of leaves in PyTorch's; any other name is the same in both.
LEAF_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "embedding"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
LISTED = 20


class WeightError(ValueError):
    """A checkpoint does not fit the network; the message lists what is left over and missing."""


def load_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint file, by name.

    Args:
      path: a `.safetensors` file, or a file written by `torch.save` (`.th`, `.pt`, `.pth`, `.bin`),
        which needs PyTorch and is read with `weights_only=True`, so it cannot run code.

    Returns:
      NumPy arrays; floating tensors of a torch file become float32, others keep their dtype. A
      state dict inside another dict (under "state_dict", "model_state_dict" or "model") is taken
      out, and the prefix `module.`, where every name has it, is dropped.

    Raises:
      WeightError: the file's suffix is none of these, or what it holds is no state dict.
      ImportError: a torch file, and PyTorch is not installed.
      FileNotFoundError: there is no such file.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"module.fc.bias": np.zeros(2)}, f"{folder}/weights.safetensors")
    ...     load_state_dict(f"{folder}/weights.safetensors")
    {'fc.bias': array([0., 0.])}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return plain_state_dict(_read_safetensors(path))
    if path.suffix in (".th", ".pt", ".pth", ".bin"):
        return plain_state_dict(_import_torch(path).load(path, "cpu", weights_only=True))
    raise WeightError(
        f"{path.name} is neither .safetensors nor a torch file (.th, .pt, .pth, .bin); save the "
        "state dict as one of these"
    )


def plain_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's state dict as NumPy arrays, taken out of its wrappers and prefixes.

    Args:
      checkpoint: names to tensors (NumPy, JAX or PyTorch), or a dict that has them under
        "state_dict", "model_state_dict" or "model", next to anything else.

    Returns:
      Names to arrays; the prefix `module.` is dropped if every name has it.

    Raises:
      WeightError: it is no dict, or a value is no tensor.

    >>> plain_state_dict({"state_dict": {"module.fc.bias": np.zeros(2)}, "epoch": 3})
    {'fc.bias': array([0., 0.])}
    """
    if not isinstance(checkpoint, Mapping):
        raise WeightError(
            f"the checkpoint is a {type(checkpoint).__name__}; expected a state dict, which maps "
            "names to tensors"
        )
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return plain_state_dict(checkpoint[wrapper])
    tensors = {name: _as_numpy(name, value) for name, value in checkpoint.items()}
    if tensors and all(name.startswith(PARALLEL_PREFIX) for name in tensors):
        return {name.removeprefix(PARALLEL_PREFIX): value for name, value in tensors.items()}
    return tensors


def import_params(
    state_dict: StateDict,
    shapes: Any,
    *,
    rename: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (BATCH_COUNTERS,),
) -> Variables:
    """A PyTorch state dict as the variables of a Linen module of the same structure.

    The module's path is the tensor's name with dots for slashes: `layer1/0/conv1/kernel` takes
    `layer1.0.conv1.weight`. Kernels, scales and embeddings take `weight`, a BatchNorm's mean and
    var take `running_mean` and `running_var`, other leaves the tensor of their own name. Kernels
    move their output axis from first to last and their input axis to the one before, which is
    OIHW to HWIO for convolutions (depthwise ones too) and the transpose for linear layers.

    Args:
      state_dict: names to tensors, as `load_state_dict` returns or as PyTorch holds them.
      shapes: variables of the module, of arrays or of `jax.ShapeDtypeStruct`
        (`jax.eval_shape(module.init, key, inputs)`): `{"params": ..., "batch_stats": ...}`.
      rename: `(pattern, replacement)` pairs for `re.sub`, applied in order to every tensor's name
        before it is looked up.
      ignore: patterns of whole tensor names, as the checkpoint has them, that are not weights.

    Returns:
      The variables, float32 NumPy arrays in the structure of `shapes`.

    Raises:
      WeightError: a tensor has no place, two have the same, a place stays empty, a shape differs,
        or values are not floating point or not finite. The message lists them all.

    >>> shapes = {"params": {"fc": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}}
    >>> state = {"fc.weight": np.arange(6.0).reshape(2, 3), "fc.bias": np.zeros(2)}
    >>> import_params(state, shapes)["params"]["fc"]["kernel"]
    array([[0., 3.], [1., 4.], [2., 5.]], dtype=float32)
    >>> import_params({"fc.weights": np.zeros((2, 3)), "fc.bias": np.zeros(2)}, shapes)
    Traceback (most recent call last):
    ...
    jaxrmils.zoo.importing.WeightError: the checkpoint does not fit the network
      no place for tensors of the checkpoint (1):
        fc.weights [2, 3] (near: fc.weight [2, 3])
      missing from the checkpoint (1):
        fc.weight [2, 3] (near: fc.weights [2, 3])
    """
    places = _places(shapes)
    tensors: dict[str, np.ndarray] = {}
    twice: list[str] = []
    for name, tensor in plain_state_dict(state_dict).items():
        if any(re.fullmatch(pattern, name) for pattern in ignore):
            continue
        new = _renamed(name, rename)
        if new in tensors:
            twice.append(f"{name}, as {new}")
        tensors[new] = tensor
    _check(tensors, twice, places)
    arrays = {places[name].path: _in_flax_layout(t, places[name]) for name, t in tensors.items()}
    return unflatten_dict(arrays)


@dataclass(frozen=True)
class _Place:
    """A leaf of the variables; `shape` is in the checkpoint's layout."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


def _places(shapes: Any) -> dict[str, _Place]:
    """Every leaf of the variables, by the name that its tensor has in a checkpoint."""
    places: dict[str, _Place] = {}
    leaves: Any = flatten_dict(shapes)
    for path, leaf in leaves.items():
        last: str = path[-1]
        name = ".".join((*path[1:-1], LEAF_NAMES.get((path[0], last), last)))
        if name in places:
            raise WeightError(
                f"{'/'.join(places[name].path)} and {'/'.join(path)} would both take the tensor "
                f"{name}; import such a module by hand"
            )
        shape = tuple(leaf.shape)
        places[name] = _Place(
            path, (shape[-1:] + shape[-2:-1] + shape[:-2]) if last == "kernel" else shape
        )
    return places


def _in_flax_layout(tensor: np.ndarray, place: _Place) -> np.ndarray:
    """Float32, kernels with the input and output axes last."""
    if place.path[-1] == "kernel":
        tensor = tensor.transpose((*range(2, tensor.ndim), 1, 0))
    return np.ascontiguousarray(tensor, dtype=np.float32)


def _renamed(name: str, rename: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


def _check(
    tensors: Mapping[str, np.ndarray], twice: list[str], places: Mapping[str, _Place]
) -> None:
    """Raises one error about everything that does not fit."""
    known = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: place.shape for name, place in places.items()}
    left_over = [name for name in known if name not in expected]
    missing = [name for name in expected if name not in known]
    both = [name for name in known if name in expected]
    floats = {name: tensors[name] for name in both if _is_float(tensors[name])}
    lines = [
        *_listed(
            "no place for tensors of the checkpoint",
            left_over,
            lambda n: _with_near(n, known[n], {m: expected[m] for m in missing or expected}),
        ),
        *_listed(
            "missing from the checkpoint",
            missing,
            lambda n: _with_near(n, expected[n], {m: known[m] for m in left_over or known}),
        ),
        *_listed(
            "of another shape",
            [name for name in both if known[name] != expected[name]],
            lambda n: f"{n} {list(known[n])}, expected {list(expected[n])}",
        ),
        *_listed("of the same name after renaming", twice),
        *_listed(
            "not floating point",
            [name for name in both if name not in floats],
            lambda n: f"{n} {tensors[n].dtype}",
        ),
        *_listed("with NaN or infinity", [n for n, array in floats.items() if not _finite(array)]),
    ]
    if lines:
        raise WeightError("\n".join(["the checkpoint does not fit the network", *lines]))


def _listed(
    heading: str, names: Sequence[str], describe: Callable[[str], str] = str
) -> Iterable[str]:
    if names:
        yield f"  {heading} ({len(names)}):"
        yield from (f"    {describe(name)}" for name in names[:LISTED])
    if len(names) > LISTED:
        yield f"    and {len(names) - LISTED} more"


def _with_near(name: str, shape: tuple[int, ...], others: Mapping[str, tuple[int, ...]]) -> str:
    """`name [shape] (near: ...)`, the nearest names first among those of the same shape."""
    near = get_close_matches(name, others, n=2, cutoff=0.7)
    near.sort(key=lambda other: others[other] != shape)
    text = ", ".join(f"{other} {list(others[other])}" for other in near)
    return f"{name} {list(shape)}" + (f" (near: {text})" if near else "")


def _is_float(array: np.ndarray) -> bool:
    # bfloat16 is an extension of NumPy's types and of no kind of its own.
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())


def _as_numpy(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16, so PyTorch refuses to convert it.
        value = value.float() if value.dtype.is_floating_point else value
    if not hasattr(value, "shape"):
        raise WeightError(
            f"{name!r} is a {type(value).__name__}, not a tensor; pass the state dict (names to "
            f"tensors) or a dict that has it under one of {', '.join(WRAPPERS)}"
        )
    return np.asarray(value)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # safetensors' NumPy reader knows no bfloat16; its JAX reader would cut int64 to int32.
    with safe_open(path, "np") as file, safe_open(path, "flax") as jax_file:
        return {
            name: np.asarray(
                (jax_file if file.get_slice(name).get_dtype() == "BF16" else file).get_tensor(name)
            )
            for name in file.keys()  # noqa: SIM118
        }


def _import_torch(path: Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{path.name} is a torch file and reading it needs PyTorch, which is not installed; "
            "run: pip install 'jaxrmils[torch]', or save the checkpoint as .safetensors "
            "(safetensors.torch.save_file), which needs nothing more"
        ) from error
    return torch

"""Arrays to and from the bytes of a safetensors file, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike

# safetensors' own reader into numpy knows no bfloat16 and no float8.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


def pack_arrays(arrays: Mapping[str, Any], path: PathLike) -> tuple[bytes, dict[str, str]]:
    """The content of a safetensors file.

    Args:
      arrays: numpy or jax arrays, PRNG keys among them, by name.
      path: for messages.

    Returns:
      The bytes, and the generator's name for every array that holds PRNG keys.

    Raises:
      ArtifactError: a dtype that safetensors can't hold.

    >>> data, _ = pack_arrays({"a": jnp.ones(2, jnp.bfloat16)}, "example")
    >>> unpack_arrays(data, {}, "example")["a"].dtype
    dtype(bfloat16)
    """
    plain, keys = {}, {}
    for name, array in arrays.items():
        if is_key(array):
            keys[name] = str(jax.random.key_impl(array))
            array = jax.random.key_data(array)
        # Its bytes are copied as they lie, so they must lie in order, axes or none.
        value = np.asarray(array, order="C")
        if value.dtype not in _DTYPES.values():
            known = ", ".join(str(d) for d in _DTYPES.values())
            raise ArtifactError(
                f"{path}: {name} has the dtype {value.dtype}, which can't be saved; expected one "
                f"of {known}, or a PRNG key. Cast it before tracing"
            )
        plain[name] = value
    return safetensors.numpy.save(plain), keys


def unpack_arrays(data: bytes, keys: Mapping[str, str], path: PathLike) -> dict[str, Any]:
    """The arrays of a safetensors file, as numpy arrays; PRNG keys as jax keys.

    Args:
      data: the file's content.
      keys: as `pack_arrays` returned it.
      path: for messages.

    Raises:
      ArtifactError: damaged content or an unknown dtype.
    """
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ArtifactError(
            f"{path} is no complete safetensors file ({error}); copy it again from its source, or "
            "save the artifact again"
        ) from error
    result: dict[str, Any] = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ArtifactError(
                f"{path}: {name} has the dtype {entry['dtype']}; expected one of {list(_DTYPES)}"
            )
        result[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    for name, generator in keys.items():
        result[name] = jax.random.wrap_key_data(jnp.asarray(result[name]), impl=generator)
    return result


def to_jax(array: Any, name: str, path: PathLike) -> Any:
    """A jax array of the same bits.

    Raises:
      ArtifactError: 64 bits, and jax is not set to hold them.
    """
    result = jnp.asarray(array)
    if result.dtype != array.dtype:
        raise ArtifactError(
            f"{path}: {name} was saved as {array.dtype}, which jax would read as {result.dtype}; "
            "call jax.config.update('jax_enable_x64', True) first"
        )
    return result


def is_key(array: Any) -> bool:
    """Whether an array, its shape or its dtype is of PRNG keys."""
    return jnp.issubdtype(getattr(array, "dtype", array), jax.dtypes.prng_key)

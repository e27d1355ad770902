"""Codes of 8 and 4 bits as models hold them, for property tests of integer operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxrmils.numerics import QTensor, QuantParams

# What comes first is met in every run: hypothesis begins with it.
WIDTHS = st.sampled_from([4, 8])
WEIGHTS = st.sampled_from([(4, "packed"), (4, "int8"), (4, "int4"), (8, "int8"), (8, "int8")])
"""Widths of weights and the arrays that hold them: 4 bits in pairs, as int8, or as native int4."""


def code_range(bits):
    """The lowest and the highest code: -128 and 127, or -8 and 7."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def random_codes(rng, shape, bits, extreme=False):
    """int8 codes; the two ends of their range alone, if `extreme`."""
    low, high = code_range(bits)
    if extreme:
        return jnp.asarray(rng.choice([low, high], shape, p=[0.9, 0.1]), jnp.int8)
    return jnp.asarray(rng.integers(low, high + 1, shape), jnp.int8)


@functools.partial(jax.jit, static_argnames=("bits", "storage"))
def hold(codes, bits, storage="int8"):
    """A tensor of these codes; its scale is 1."""
    grid = QuantParams(jnp.float32(1), jnp.int32(0), bits, symmetric=True)
    tensor = QTensor.from_codes(codes, grid, pack=storage == "packed")
    return tensor.native_int4() if storage == "int4" else tensor


def operand(tensor):
    """What an operation is given of a tensor, unpacked inside the program."""
    return tensor.values if tensor.values.dtype == jnp.int4 else tensor.codes()


def clipped(zero_point, bits):
    """A zero point in the range of codes."""
    return int(np.clip(zero_point, *code_range(bits)))

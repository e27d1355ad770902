import jax.numpy as jnp
import pytest

from jaxrmils.numerics import format_size, size_bits_float


def test_float_sizes():
    assert size_bits_float((), jnp.float32) == 32
    assert size_bits_float((10, 3), jnp.float16) == 480
    assert size_bits_float((0, 3), jnp.float32) == 0


@pytest.mark.parametrize(
    "size, text", [(0, "0 B"), (999, "999 B"), (1e3, "1.00 kB"), (44.7e6, "44.70 MB")]
)
def test_human_form(size, text):
    assert format_size(8 * size) == text

"""Division that XLA keeps as a division."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def divide_exactly(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x / y` with one rounding, where `y` may be a constant or a broadcast scale.

    XLA rewrites a division by a constant or by a broadcast value as a product with the
    reciprocal, which rounds twice and may differ by one unit in the last place: enough to break
    ties, and to cross an integer under floor or ceil, differently from one compilation to the
    next. Selecting the divisor element by element hides the broadcast; NaN is the one input for
    which the selected value differs, and the quotient is NaN either way.

    On CPU the quotient is IEEE's, so codes are the same in eager mode, under `jit`, and in NumPy.
    Accelerators may divide approximately in hardware.

    Args:
        x: the numerator, float32.
        y: the denominator, float32, broadcast against `x`.

    Returns:
        The float32 quotient.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> x = jnp.arange(1.0, 1000.0)
        >>> quotient = jax.jit(lambda x: divide_exactly(x, jnp.float32(255)))(x)
        >>> bool((np.asarray(quotient) == np.asarray(x) / np.float32(255)).all())
        True
    """
    # In `lax`, as in `quantize`: jax.numpy takes longer to trace.
    x, y = jnp.broadcast_arrays(x, y)
    return lax.div(x, lax.select(lax.ne(x, x), x, y))

"""From Flax modules to `(apply, params)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxrmils.graph import compat
from jaxrmils.graph.builder import TraceError
from jaxrmils.graph.checks import check_same_shapes


def from_linen(
    module: nn.Module, variables: Any, **apply_kwargs: Any
) -> tuple[Callable[[Any, Any], Any], Any]:
    """A Linen module and its variables as a pure function and its parameters.

    Args:
      module: the module.
      variables: what `module.init` returned, or the trained variables; batch statistics and other
        collections travel along and are used as they are.
      **apply_kwargs: passed to `module.apply` (`train=False`, `deterministic=True`, `method=...`).

    Returns:
      `(apply, params)` with `apply(params, inputs)`. Inputs that are a tuple are passed as
      positional arguments and a dict as keyword arguments; anything else is the only argument.

    Raises:
      TraceError: for `mutable` or `rngs`, which mean training mode, or variables without "params".

    >>> import jax, jax.numpy as jnp
    >>> module = nn.Dense(2)
    >>> apply, params = from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
    >>> apply(params, jnp.ones((4, 3))).shape
    (4, 2)
    """
    for name in ("mutable", "rngs"):
        if apply_kwargs.get(name):
            raise TraceError(
                f"from_linen got {name}={apply_kwargs[name]!r}, which is for training: "
                "quantization needs the model in evaluation mode, without it"
            )
    if "params" not in variables:
        raise TraceError(
            f"variables hold the collections {sorted(variables)}, and none is 'params'; pass all "
            "that module.init returned, such as {'params': ..., 'batch_stats': ...}"
        )

    def apply(params: Any, inputs: Any) -> Any:
        if isinstance(inputs, tuple):
            return module.apply(params, *inputs, **apply_kwargs)
        if isinstance(inputs, dict):
            return module.apply(params, **inputs, **apply_kwargs)
        return module.apply(params, inputs, **apply_kwargs)

    return apply, variables


def from_nnx(
    module: nnx.Module, *, method: str = "__call__", **call_kwargs: Any
) -> tuple[Callable[[Any, Any], Any], Any]:
    """An NNX module as a pure function and its parameters.

    Args:
      module: the module, in evaluation mode (`module.eval()`).
      method: the method to call.
      **call_kwargs: passed to it.

    Returns:
      `(apply, params)`; params is a plain nested dict of arrays with the module's parameters and
      statistics (random streams are left out). Tuples and dicts of inputs as in `from_linen`.
      `apply` raises TraceError for params of another model.

    >>> import jax.numpy as jnp
    >>> apply, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> apply(params, jnp.ones((4, 3))).shape
    (4, 2)
    """
    definition, randomness, state = nnx.split(module, nnx.RngState, ...)
    params = nnx.to_pure_dict(state)
    structs = jax.tree.map(compat.abstract, params)

    def apply(params: Any, inputs: Any) -> Any:
        check_same_shapes(structs, params)
        restored = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
        # A copy: a call must not change the state of the streams, nor of the module.
        full = nnx.merge(definition, randomness, restored, copy=True)
        function = getattr(full, method)
        if isinstance(inputs, tuple):
            return function(*inputs, **call_kwargs)
        if isinstance(inputs, dict):
            return function(**inputs, **call_kwargs)
        return function(inputs, **call_kwargs)

    return apply, params

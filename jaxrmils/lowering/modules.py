"""A quantized model as a Flax module, Linen or NNX, whose variables are the integer parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxrmils.graph import TraceError, compat
from jaxrmils.lowering.named_params import from_named, named_arrays
from jaxrmils.lowering.quantized_model import QuantizedModel

COLLECTION = "quantized"
"""The Linen collection that holds codes, scales, zero points, sums and float leaves."""


class QuantizedVariable(nnx.Variable):
    """An array of a quantized model: codes, a scale, a zero point, a sum or a float leaf.

    A type of its own, so that filters find it and optimizers, which look for `nnx.Param`, do not.
    """


class QuantizedLinen(nn.Module):
    """A quantized model as a Linen module; see `as_linen`.

    Attributes:
      model: the model; its parameters are the initial variables.
    """

    model: QuantizedModel = dataclasses.field(repr=False)

    def model_variables(self) -> dict[str, Any]:
        """What `init` returns, without a run of the model: the model's own arrays by name."""
        return {COLLECTION: named_arrays(self.model.params)}

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The quantized model's outputs for a batch."""
        params = self.model.params
        arrays = {
            name: self.variable(COLLECTION, name, lambda value=value: value).value
            for name, value in named_arrays(params).items()
        }
        return self.model.apply(from_named(params, arrays), _inputs(args, kwargs))


class QuantizedNNX(nnx.Module):
    """A quantized model as an NNX module; see `as_nnx`.

    Attributes:
      arrays: the parameters by name, each a `QuantizedVariable`.
    """

    def __init__(self, model: QuantizedModel) -> None:
        arrays = named_arrays(model.params)
        self.arrays = nnx.Dict({name: QuantizedVariable(value) for name, value in arrays.items()})
        self.run = _run(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The quantized model's outputs for a batch."""
        arrays = {name: variable.get_value() for name, variable in self.arrays.items()}
        return self.run(arrays, _inputs(args, kwargs))


def as_linen(model: QuantizedModel) -> QuantizedLinen:
    """A quantized model as a Linen module.

    Its variables are one collection, "quantized", of arrays by name: those of a saved model, such
    as `weights/Dense_0/kernel/values`. `module.model_variables()` gives them as they are, under
    whatever sharding they have; so does `module.init`, which also runs the model.

    Args:
      model: from `quantize` or `load_model`.

    Returns:
      A module with `module.apply(variables, inputs)` equal to `model(inputs)`. Several arguments
      are the tuple, keyword arguments the dict of inputs that the model was traced with.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import calibrate, quantize, tabulate, trace, uniform
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [x]))
    >>> module = as_linen(model)
    >>> variables = module.model_variables()
    >>> bool((module.apply(variables, x) == model(x)).all())
    True
    >>> variables["quantized"]["weights/w/values"].dtype
    dtype('int8')
    """
    return QuantizedLinen(model)


def as_nnx(model: QuantizedModel) -> QuantizedNNX:
    """A quantized model as an NNX module.

    Args:
      model: from `quantize` or `load_model`.

    Returns:
      A module with `module(inputs)` equal to `model(inputs)`; arguments as in `as_linen`. Its
      parameters are `QuantizedVariable`s by name, under whatever sharding they have; `nnx.jit`,
      `nnx.split`, `nnx.merge`, `nnx.state` and `nnx.update` work as on any module.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import calibrate, quantize, tabulate, trace, uniform
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [x]))
    >>> module = as_nnx(model)
    >>> bool((module(x) == model(x)).all())
    True
    >>> module.arrays["weights/w/values"].get_value().dtype
    dtype('int8')
    """
    return QuantizedNNX(model)


def _run(model: QuantizedModel) -> Callable[[dict[str, Any], Any], Any]:
    """The model as a function of named arrays, which holds on to shapes alone."""
    shapes = jax.tree.map(compat.abstract, model.params)
    hollow = dataclasses.replace(model, params=shapes)

    def run(arrays: dict[str, Any], inputs: Any) -> Any:
        return hollow.apply(from_named(shapes, arrays), inputs)

    return run


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One argument is the inputs themselves, several are their tuple, keywords their dict."""
    if bool(args) == bool(kwargs):
        raise TraceError(
            f"the quantized model got {len(args)} positional and {len(kwargs)} keyword arguments; "
            "give the inputs it was traced with: one argument, all of a tuple's positionally, or "
            "all of a dict's by name"
        )
    return kwargs or (args[0] if len(args) == 1 else args)

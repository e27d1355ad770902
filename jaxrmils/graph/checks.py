"""Checks of the function and its arguments, before anything expensive runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrmils.graph import compat
from jaxrmils.graph.builder import TraceError
from jaxrmils.graph.naming import leaf_names


def check_finite(tree: Any, what: str, names: Sequence[str]) -> None:
    """Raises TraceError naming the first concrete float leaf that holds NaN or inf."""
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        if isinstance(leaf, (jax.ShapeDtypeStruct, compat.Tracer)):
            continue
        array = jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        bad = int(jnp.sum(~jnp.isfinite(array)))
        if bad:
            raise TraceError(
                f"{what}: {name} holds {bad} NaN or infinite values of {array.size}; "
                "finite values were expected"
            )


def check_same_shapes(expected: Any, params: Any) -> None:
    """Raises TraceError naming the first leaf of params that is not what was expected.

    Args:
      expected: the same tree of `jax.ShapeDtypeStruct`.
      params: what was given; dtypes must agree too.
    """
    names = leaf_names(expected)
    if jax.tree.structure(expected) != jax.tree.structure(params):
        found = set(leaf_names(params))
        missing, extra = sorted(set(names) - found)[:5], sorted(found - set(names))[:5]
        difference = [
            f"{len(missing)} missing such as {missing}" if missing else "",
            f"{len(extra)} unknown such as {extra}" if extra else "",
        ]
        text = ", ".join(filter(None, difference)) or "the containers of the tree differ"
        raise TraceError(f"params do not fit the model: {text}")
    leaves = zip(jax.tree.leaves(expected), jax.tree.leaves(params), strict=True)
    for name, (want, leaf) in zip(names, leaves, strict=True):
        found = compat.abstract(leaf)
        if want.shape != found.shape or want.dtype != found.dtype:
            raise TraceError(
                f"params do not fit the model: {name} is {found.dtype}{list(found.shape)}, "
                f"{want.dtype}{list(want.shape)} was expected"
            )


def check_apply(apply: Any, params: Any, example: Any) -> None:
    """Raises TraceError if apply does not run on params or has no per-example output."""
    structs = jax.tree.map(compat.abstract, params)
    outputs = {}
    for batch in (1, 2):
        inputs = jax.tree.map(
            lambda x, n=batch: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), example
        )
        try:
            outputs[batch] = jax.tree.leaves(jax.eval_shape(apply, structs, inputs))
        except TraceError:
            raise
        except Exception as error:
            shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(inputs))
            raise TraceError(
                f"apply(params, inputs) failed for inputs of shape {shapes}: "
                f"{type(error).__name__}: {_first_line(error)}. Do the params belong to this model?"
            ) from error
    if not outputs[1]:
        raise TraceError("apply returned no arrays; an output for every example was expected")
    for one, two in zip(outputs[1], outputs[2], strict=True):
        if one.shape[:1] == (1,) and two.shape[:1] == (2,):
            return
    one, two = ([tuple(x.shape) for x in outputs[n]] for n in (1, 2))
    raise TraceError(
        f"apply returned no per-example output: its outputs have shapes {one} for a batch of 1 and "
        f"{two} for a batch of 2, and none has a leading batch axis. Return the logits of every "
        "example, not their mean (the loss is a separate function), and squeeze no batch axis."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def check_examples_independent(
    apply: Any, params: Any, inputs: Any, *, tolerance: float = 1e-2
) -> None:
    """Raises TraceError if an example's output depends on the other examples of its batch.

    Every example of a small batch is run alone and within the batch. Batch normalisation in
    training mode or dropout differ by far more than float rounding does.

    Args:
      apply: the model's function.
      params: concrete parameters.
      inputs: concrete inputs; the first four examples are used, and one alone shows nothing.
      tolerance: largest accepted difference, relative to the output's largest magnitude; more
        is accepted of an output in a 16-bit format, by its rounding.
    """
    count = min(4, jax.tree.leaves(inputs)[0].shape[0])
    if count < 2:
        return
    few = jax.tree.map(lambda x: jnp.asarray(x)[:count], inputs)
    together = jax.tree.leaves(jax.jit(apply)(params, few))
    one = jax.jit(lambda p, x: apply(p, jax.tree.map(lambda leaf: leaf[None], x)))
    alone = [
        jax.tree.leaves(one(params, jax.tree.map(lambda x, i=i: x[i], few))) for i in range(count)
    ]
    for number, whole in enumerate(together):
        if not jnp.issubdtype(whole.dtype, jnp.floating) or whole.shape[:1] != (count,):
            continue
        single = np.stack([np.asarray(a[number][0], np.float64) for a in alone])
        batch = np.asarray(whole, np.float64)
        # NaN and masked logits say nothing here, unless it is the batch that makes them.
        finite = np.isfinite(single)
        scale = max(float(np.max(np.abs(single), initial=0, where=finite)), 1e-6)
        difference = float(np.max(np.abs(single - batch), initial=0, where=finite)) / scale
        if not difference <= max(tolerance, 16 * float(jnp.finfo(whole.dtype).eps)):
            raise TraceError(
                f"the outputs of an example change by {difference:.2g} (relative) with the other "
                "examples of its batch: batch statistics in training mode, or dropout, mix "
                "examples. Call the model in evaluation mode (Linen: use_running_average=True, "
                "deterministic=True; NNX: model.eval())."
            )

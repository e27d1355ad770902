"""Temperature scaling: what a change of confidence alone does to the loss.

Logits are divided by one number T, fitted by minimising the mean loss. It changes no prediction, so
a loss that falls as far by T alone says that the model was badly calibrated, not that anything else
improved it.

References:
    Guo, C., Pleiss, G., Sun, Y. and Weinberger, K. Q. (2017). On calibration of modern neural
    networks. ICML, arXiv 1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from jaxrmils.evaluation.simulate import EvaluationError, cooled
from jaxrmils.sensitivity import Loss

LOWEST, HIGHEST = 0.05, 20.0
MOST_OUTPUTS = 100_000  # of an example; those of all the fitting data are held at once
_FLAT = 1e-6  # nats; a range's end that is as good as the best means that none was found
_GRID = 25  # coarse steps of log T, so that a loss with several minima is searched as a whole


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
      value: T, what logits are divided by; above 1 for an overconfident model.
      loss_before, loss_after: mean loss at T = 1 and at T, on the fitting data.
      at_bound: an end of the search range is as good: the loss has no minimum within it.
    """

    value: float
    loss_before: float
    loss_after: float
    at_bound: bool


def fit_temperature(logits: Any, targets: Any, loss: Loss) -> Temperature:
    """The T between 0.05 and 20 with the smallest mean loss of `logits / T`.

    A grid over log T, then `scipy.optimize.minimize_scalar` between the neighbours of the best
    point. Never worse than T = 1 on the fitting data.

    Args:
      logits: float [N, classes], or a pytree of outputs that are all divided.
      targets: int [N], or what the loss takes.
      loss: `loss(logits, targets) -> [N]`.

    Returns:
      The temperature.

    Raises:
      EvaluationError: a loss is not finite at T = 1.

    >>> from jaxrmils.zoo import cross_entropy
    >>> logits = 4 * np.eye(2, dtype=np.float32)[[0, 0, 0, 0]]
    >>> fitted = fit_temperature(logits, np.array([0, 0, 0, 1]), cross_entropy)
    >>> round(fitted.value, 2)  # 3 of 4 are right: log 3 = 4 / T
    3.64
    """
    step = jax.jit(lambda z, y, t: loss(cooled(z, t), y).astype(jnp.float32))
    z, y = jax.tree.map(jnp.asarray, (logits, targets))

    def mean_loss(log_t: float) -> float:
        values = np.asarray(step(z, y, jnp.float32(np.exp(log_t))), np.float64)
        return float(values.mean()) if np.all(np.isfinite(values)) else float("inf")

    before = mean_loss(0.0)
    if not np.isfinite(before):
        raise EvaluationError("a temperature can't be fitted: a loss is NaN or infinite at T = 1")
    grid = np.linspace(np.log(LOWEST), np.log(HIGHEST), _GRID)
    losses = [mean_loss(point) for point in grid]
    best = int(np.argmin(losses))
    bracket = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    found: Any = optimize.minimize_scalar(
        mean_loss, bounds=bracket, method="bounded", options={"xatol": 1e-4}
    )
    log_t, after = float(found.x), float(found.fun)
    if before <= after:
        log_t, after = 0.0, before
    at_bound = min(losses[0], losses[-1]) - after < _FLAT
    return Temperature(float(np.exp(log_t)), before, after, at_bound)


def unfit_outputs(outputs: Any) -> str:
    """Why outputs of this form are not divided by a temperature; "" where they can be.

    Args:
      outputs: pytree of arrays or `jax.ShapeDtypeStruct`, [N, ...].

    >>> unfit_outputs((np.zeros((2, 384), np.float32), np.zeros((2, 384), np.float32)))
    ''
    >>> unfit_outputs(np.zeros((2, 5), np.int32))
    'the model returns int32 values; a temperature divides floats'
    """
    leaves = jax.tree.leaves(outputs)
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return f"the model returns {leaf.dtype} values; a temperature divides floats"
    size = sum(math.prod(leaf.shape[1:]) for leaf in leaves)
    if size > MOST_OUTPUTS:
        return (
            f"the model returns {size:,} numbers for an example, more than the {MOST_OUTPUTS:,} "
            "that are kept to fit one"
        )
    return ""


def unfit_for_temperature(logits: Any, targets: Any, loss: Loss) -> str:
    """Why a temperature does not apply to this loss; "" where it does.

    Dividing by T is a change of confidence only if the loss normalises its input, as softmax cross
    entropy does: then adding a constant to all logits of an example changes nothing. A loss of log
    probabilities or of margins would just be scaled. Each of several outputs gets a constant of its
    own: a loss of the distance between two of them is no loss of their softmax either.

    Args:
      logits: float [N, classes], or a pytree of floats [N, ...].
      targets: int [N], or what the loss takes.
      loss: `loss(logits, targets) -> [N]`.

    >>> from jaxrmils.zoo import cross_entropy
    >>> z, y = np.float32([[1, 2], [0, 3]]), np.array([1, 0])
    >>> unfit_for_temperature(z, y, cross_entropy)
    ''
    >>> unfit_for_temperature(z, y, lambda z, y: -jnp.take_along_axis(z, y[:, None], 1)[:, 0])
    'the loss changes when a constant is added to all logits: no loss of their softmax'
    """
    step = jax.jit(lambda z, y: loss(z, y).astype(jnp.float32))
    z, y = jax.tree.map(jnp.asarray, (logits, targets))
    leaves, form = jax.tree.flatten(z)
    shifted = [z + jnp.asarray(1 + i / len(leaves), z.dtype) for i, z in enumerate(leaves)]
    here = np.asarray(step(z, y), np.float64)
    there = np.asarray(step(jax.tree.unflatten(form, shifted), y), np.float64)
    if np.all(np.abs(there - here) <= 1e-3 * (1 + np.abs(here))):
        return ""
    return "the loss changes when a constant is added to all logits: no loss of their softmax"

"""Train a reference classifier: only to have a float model at hand, never to repair a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrmils.data.dataset import DataError, Dataset, check_labels

Variables = Any
# progress(step, steps, mean loss of that step's batch)
Progress = Callable[[int, int, float], None]


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Loss in nats of each example: `-log softmax(logits)[label]`.

    Args:
        logits: `[batch, classes]`.
        labels: integers `[batch]` in `[0, classes)`.

    Returns:
        `[batch]`, in the logits' dtype.

    >>> cross_entropy(jnp.zeros((1, 2)), jnp.array([1])).round(4)
    Array([0.6931], dtype=float32)
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]


def train_classifier(
    module: nn.Module,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Variables:
    """Train with AdamW on a cosine schedule and return the module's variables.

    The same arguments give the same variables on the same machine and versions.

    Args:
        module: a Linen module, `module.apply(variables, inputs) -> logits [batch, classes]`, with
            no state besides its parameters (no batch statistics).
        dataset: one array of inputs `[examples, ...]` and integer labels `[examples]`.
        epochs: passes over the data, each in a new order. What does not fill the last batch of an
            epoch is left out of that epoch.
        batch_size: examples in a step.
        learning_rate: peak of the cosine schedule, which ends at 0.
        weight_decay: AdamW's decoupled weight decay.
        seed: seeds the initial parameters and the order of the examples.
        progress: called after every step with `(step, steps, loss)`, the step counted from 1.

    Returns:
        The variables, `{"params": ...}`, to pass to `module.apply`.

    Raises:
        ImportError: optax is not installed; names the extra that brings it.
        DataError: no epoch, labels out of range, a batch larger than the data set, a module with
            state, or a loss that is not finite at the end.
    """
    optax = _import_optax()
    if epochs < 1:
        raise DataError(f"epochs is {epochs}; expected at least 1")
    first_batch = next(iter(dataset.batches(batch_size)))[0]
    variables = module.init(jax.random.key(seed), first_batch[:1])
    if set(variables) != {"params"}:
        raise DataError(
            f"{type(module).__name__} keeps state {sorted(set(variables) - {'params'})}; "
            "train_classifier only trains modules whose variables are all parameters"
        )
    check_labels(dataset.targets, _num_classes(module, variables, first_batch))

    steps_per_epoch = len(dataset) // batch_size
    steps = epochs * steps_per_epoch
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay
    )

    @jax.jit
    def update(variables, state, inputs, labels):
        def mean_loss(variables):
            return cross_entropy(_logits(module, variables, inputs), labels).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(variables)
        # optax raises a Python float to an int32 step count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, loss

    state = optimizer.init(variables)
    orders = np.random.default_rng(seed)
    step = 0
    for _ in range(epochs):
        order = orders.permutation(len(dataset))[: steps_per_epoch * batch_size]
        for chosen in order.reshape(steps_per_epoch, batch_size):
            inputs, labels = dataset.inputs[chosen], dataset.targets[chosen]
            variables, state, loss = update(variables, state, inputs, labels)
            step += 1
            if progress is not None:
                progress(step, steps, float(loss))
    if not np.isfinite(loss):
        raise DataError(f"the loss is {float(loss)} after {steps} steps; lower learning_rate")
    return variables


def evaluate_classifier(
    module: nn.Module, variables: Variables, dataset: Dataset, *, batch_size: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and correctness of every example, in the data set's order.

    Args:
        module: the Linen module.
        variables: what `train_classifier` returned.
        dataset: one array of inputs `[examples, ...]` and integer labels `[examples]`.
        batch_size: examples in a forward pass; the last may be smaller.

    Returns:
        `(losses, correct)`: float32 `[examples]` in nats, and bool `[examples]`.

    Raises:
        DataError: `batch_size` is below 1 or above the number of examples.
    """

    @jax.jit
    def judge(variables, inputs, labels):
        logits = _logits(module, variables, inputs)
        return cross_entropy(logits, labels), jnp.argmax(logits, axis=-1) == labels

    judged = [judge(variables, *batch) for batch in dataset.batches(batch_size)]
    losses, correct = zip(*judged, strict=True)
    return np.concatenate(losses), np.concatenate(correct)


def _logits(module: nn.Module, variables: Variables, inputs: Any) -> Any:
    # Typed here: apply's own type also allows for mutated state, and there is none.
    return module.apply(variables, inputs)


def _num_classes(module: nn.Module, variables: Variables, inputs: Any) -> int:
    return jax.eval_shape(lambda: _logits(module, variables, inputs)).shape[-1]


def _import_optax() -> Any:
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            "train_classifier needs optax, which is not installed; "
            "run: pip install 'jaxrmils[demo]'"
        ) from error
    return optax

"""A task: a trained model, its loss, and data in splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrmils.data.dataset import Dataset
from jaxrmils.data.splits import Splits


@dataclass(frozen=True, eq=False)
class Task:
    """All that a command line run needs to know of a model.

    Args:
        name: what reports call it.
        apply: `apply(params, inputs) -> outputs`, in evaluation mode.
        params: the trained parameters, or a function without arguments that loads or trains them,
            called only where they are needed.
        shapes: parameters as `jax.ShapeDtypeStruct`, so that a model can be inspected without
            them; needed where `params` is a function.
        loss: `loss(outputs, targets) -> [batch]`.
        dataset: the examples.
        splits: which of them do what.
        training: indices of the examples the model was trained on, where they are known.
        unit: of the loss.
        metrics: `metrics(outputs, indices) -> {name: [examples]}`, numbers in [0, 1] that people
            judge the model by (top-1, F1), from its outputs on these examples of the data set;
            `None` where the loss says it all.
    """

    name: str
    apply: Callable[[Any, Any], Any]
    params: Any
    shapes: Any
    loss: Callable[[Any, Any], Any]
    dataset: Dataset
    splits: Splits
    training: np.ndarray | None = None
    unit: str = "nats"
    metrics: Callable[[Any, np.ndarray], Mapping[str, np.ndarray]] | None = None

    def load_params(self) -> Any:
        """The parameters; trains or loads them if need be."""
        return self.params() if callable(self.params) else self.params

    def split(self, name: str) -> Dataset:
        """The examples of one split."""
        return self.dataset.take(getattr(self.splits, name))

"""What every layer costs in every format: the table that a budget is solved on.

An objective (`objectives.py`, `measured_costs.py`) fills it, `budget/` minimises its sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxrmils.policies.plan import LayerPlan


@dataclass(frozen=True)
class Costs:
    """The additive risk of every option of every layer.

    Attributes:
      objective: its name, for the record ("signed", "squared_output", ...).
      unit: "nats" or whatever the loss is in for predictions of a loss change, else what the sum
        means ("squared nats", "noise-to-signal ratio").
      options: per layer, in the model's order, the risk of each way to run it. The float option is
        always there and costs 0.

    >>> costs = Costs("signed", "nats", {"a": {LayerPlan(): 0.0, LayerPlan(8): 0.1}})
    >>> costs.total({"a": LayerPlan(8)})
    0.1
    """

    objective: str
    unit: str
    options: Mapping[str, Mapping[LayerPlan, float]]

    def total(self, layers: Mapping[str, LayerPlan]) -> float:
        """The sum over a plan's layers.

        Raises:
          KeyError: a layer or an option that is not in the table.
        """
        return sum(self.options[name][layer] for name, layer in layers.items())

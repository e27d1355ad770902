"""What a plan costs beyond first-order slopes, as far as labels are believed.

With c_n the first-order contributions of a plan's noise to example n's loss, S_n the slope of its
loss at the float outputs times their change, and d_n the divergence (`sensitivity.divergence`), its
loss changes by

    d_n + S_n = d_n + c_n + (S_n - c_n)

The last part is what labels say of the network's curvature. Like c_n it is mostly luck of the
labels, and is believed as far: the rest is d_n + k (S_n - c_n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxrmils.policies.plan import Plan, predict
from jaxrmils.policies.simulation import Simulation
from jaxrmils.sensitivity import Scores

# Divergences that are smaller than this share of what the first order leaves are rounding errors.
_LINEAR = 1e-3


@dataclass(frozen=True)
class Rest:
    """What plans cost beyond first-order slopes, on every example.

    Attributes:
      simulation: of the model.
      scores: of its examples.
      kept: k, from 0 to 1: how far labels are believed.
    """

    simulation: Simulation
    scores: Scores
    kept: float

    def change(self, plan: Plan) -> np.ndarray:
        """float64 [N]: of the whole plan."""
        found = self.simulation.divergences(self.kept).change(plan)
        slopes = sum(predict(self.scores, plan).values(), np.zeros_like(found))
        return found - self.kept * slopes

    def shares(self, plan: Plan, scale: float = 1.0) -> Mapping[str, np.ndarray]:
        """float64 [N] for every quantized layer: their shares in it, by the secant.

        With a scale, of the network whose noise is multiplied by it, over its square: to second
        order the same, and near the float network where the plan itself would destroy it.
        """
        slopes = predict(self.scores, plan)
        found = self.simulation.divergences(self.kept).attribute(plan, scale=scale).layers
        return {
            name: (share - scale * self.kept * slopes[name]) / scale**2
            for name, share in found.items()
        }


def is_linear(simulation: Simulation, scores: Scores, plan: Plan) -> bool:
    """Does a plan show that the loss is linear in the outputs?

    There are no divergences then, and labels say all that is known: k must be 1. It is so for the
    likelihood of outputs that are log probabilities already.

    Args:
      simulation: of the model.
      scores: of its examples.
      plan: any plan; one that quantizes nothing shows nothing.
    """
    divergence = simulation.divergences().change(plan)
    change = simulation.change(plan)
    slopes = sum(predict(scores, plan).values(), np.zeros_like(change))
    return bool(np.abs(divergence).max() < _LINEAR * np.abs(change - slopes).max())

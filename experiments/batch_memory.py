"""XLA's temporary memory per example, against what `fitting_batch_size` predicts from shapes.

    python experiments/batch_memory.py mnist_cnn cifar_resnet20 mobilenet_v2 bert

Prints, for the passes that score, simulate and attribute, and for those of the objectives with a
pass of their own, the bytes that each further example adds to the compiled program's temporary
memory, as a multiple of `example_bytes`; and a gradient of all weights as the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxrmils as jr
from jaxrmils.policies.cost_programs import Lowering, lowerings
from jaxrmils.sensitivity import (
    Formats,
    all_off,
    contributions,
    perturbed_losses,
    secant,
    weight_noise,
)
from jaxrmils.sensitivity.batch_size import example_bytes
from jaxrmils.zoo import BertConfig, BertForClassification, MnistCNN, cross_entropy, reference

FEW, MANY = 4, 16
TOKENS = 128


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=["mnist_cnn", "cifar_resnet20"])
    for name in parser.parse_args().models:
        module, inputs = model(name)
        first = jax.tree.map(lambda x: x[:1], inputs)
        positional, named = ((), first) if isinstance(first, dict) else ((first,), {})
        variables = module.init(jax.random.key(0), *positional, **named)
        apply, params = jr.from_linen(module, variables)
        measured = ratios(apply, params, inputs)
        print(name, {key: round(value, 2) for key, value in measured.items()}, flush=True)


def model(name: str) -> tuple[Any, Any]:
    """A module and `MANY` random examples."""
    rng = np.random.default_rng(0)
    if name == "bert":
        sizes = BertConfig(hidden_size=128, layers=2, heads=2, intermediate_size=512)
        ids = rng.integers(0, 1000, (MANY, TOKENS)).astype(np.int32)
        return BertForClassification(sizes, 8, "mean"), {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
    if name == "mnist_cnn":
        return MnistCNN(), rng.normal(size=(MANY, 28, 28, 1)).astype(np.float32)
    network = reference(name)
    side = min(64, network.input_size)
    return network.module, rng.normal(size=(MANY, side, side, 3)).astype(np.float32)


def ratios(apply: Callable[[Any, Any], Any], params: Any, inputs: Any) -> dict[str, float]:
    """Bytes of each further example, over `example_bytes`, for every pass."""
    graph = jr.trace(apply, params, jax.tree.map(lambda x: x[:1], inputs))
    labels = np.zeros(MANY, np.int32)
    ranges = jr.calibrate(graph, params, [jax.tree.map(lambda x: x[:FEW], inputs)])
    noise, off = weight_noise(graph, params), all_off(graph, ranges)
    expected = example_bytes(graph, params, cross_entropy, inputs, labels)

    def scored(params: Any, noise: Any, off: Any, x: Any, y: Any) -> Any:
        return contributions(graph, params, x, y, cross_entropy, ranges, noise=noise)

    def simulated(params: Any, noise: Any, off: Any, x: Any, y: Any) -> Any:
        return perturbed_losses(graph, params, x, y, cross_entropy, ranges, *off, noise=noise)

    def attributed(params: Any, noise: Any, off: Any, x: Any, y: Any) -> Any:
        return secant(graph, params, x, y, cross_entropy, ranges, Formats(*off), noise=noise)

    def temporary(step: Callable[..., Any], count: int) -> int:
        batch = jax.tree.map(lambda x: x[:count], (inputs, labels))
        return _temporary(jax.jit(step).lower(params, noise, off, *batch).compile())

    def objective(lowering: Lowering, count: int) -> int:
        batch = jax.tree.map(lambda x: x[:count], (inputs, labels))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        return max(_temporary(lowered.compile()) for lowered in lowering(*shapes))

    weights = 4 * sum(math.prod(weight.shape) for weight in graph.weights.values())
    found = {"bytes of an example": float(expected), "all weights": weights / expected}
    for step in (scored, simulated, attributed):
        slope = (temporary(step, MANY) - temporary(step, FEW)) / (MANY - FEW)
        found[step.__name__] = slope / expected
    known = (graph, params, cross_entropy, ranges, ("w8a8", "w4a8", "w4a4"))
    for name, lowering in lowerings(*known).items():
        slope = (objective(lowering, MANY) - objective(lowering, FEW)) / (MANY - FEW)
        found[name] = slope / expected
    return found


def _temporary(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA reports no memory on this backend"
    return memory.temp_size_in_bytes


if __name__ == "__main__":
    main()

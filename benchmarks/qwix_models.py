"""The same Linen modules quantized by qwix (https://github.com/google/qwix), w8a8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from speed_models import Workload, apply_module


def qwix_model(
    work: Workload, example: Any, *, static: bool
) -> tuple[Callable[[Any, Any], Any], Any]:
    """A network in qwix's int8, by the steps of its README.

    Args:
        work: the network.
        example: inputs; with `static`, the ranges of activations are measured on them.
        static: fixed ranges for the inputs of layers with weights; otherwise, and for products of
            two activations, they are measured in every call, which is qwix's default.

    Returns:
        A function of variables and inputs, and its variables.

    Raises:
        ImportError: qwix is not installed.
    """
    import qwix

    int8 = {"weight_qtype": "int8", "act_qtype": "int8"}
    # Ranges of products of two activations do not come back from the statistics in qwix 0.1.8.
    rules = [{**int8, "op_names": ("einsum",)}, {**int8, "act_static_scale": static}]
    stats: Any = {}
    if static:
        observing = qwix.quantize_model(
            work.module, qwix.QtProvider([qwix.QtRule(**rule) for rule in rules])
        )
        _, changed = apply_module(observing, work.variables, example, mutable=["quant_stats"])
        stats = changed["quant_stats"]
    provider = qwix.PtqProvider([qwix.QuantizationRule(**rule) for rule in rules])
    module = qwix.quantize_model(work.module, provider)
    keyed = example if isinstance(example, dict) else {"images": example}
    abstract = jax.eval_shape(lambda key: module.init(key, **keyed), jax.random.key(0))
    params = qwix.quantize_params(work.variables["params"], abstract["params"], stats)
    variables = {**work.variables, "params": params}
    return lambda variables, inputs: apply_module(module, variables, inputs), variables

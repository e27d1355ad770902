"""Checks integer sites in StableHLO, which every jax can make for every platform.

StableHLO is what compilers are given: it shows that a site multiplies integer codes and that
nothing widened them, not what a compiler makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax

from jaxrmils.graph import Graph
from jaxrmils.lowering.ahead.abstract_models import abstract_model, has_symmetric_grids
from jaxrmils.lowering.ahead.targets import Platform
from jaxrmils.lowering.hlo import CODES, planned_sites
from jaxrmils.lowering.quantized_model import SCOPE_PATTERN, QuantizedModel, scope_site
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.policies import Plan

Operands = tuple[str, str]
"""The element types of a multiplication, as HLO names them: ("s8", "s4")."""

_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_REFERENCE = re.compile(r"#loc\d*")
_PRODUCT = re.compile(
    r"stablehlo\.(?:dot_general|convolution)\b.*"
    r" : \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<[^>]*> loc\((.*)\)$"
)


def stablehlo_sites(text: str) -> dict[str, list[Operands]]:
    """The operand types of every site's dots and convolutions in StableHLO.

    Args:
      text: `lowered.as_text(debug_info=True)`.

    Returns:
      By site name; operations that belong to no site are under "".

    >>> stablehlo_sites('''
    ...   %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] :
    ... (tensor<2x3xi8>, tensor<3x4xi8>) -> tensor<2x4xi32> loc(#loc1)
    ... #loc1 = loc("jit(f)/jaxrmils[w]/dot_general"(#loc))'''.replace(":\\n", ": "))
    {'w': [('s8', 's8')]}
    """
    lines = text.splitlines()
    matches = (_LOCATION.match(line) for line in lines)
    locations = {match[1]: match[2] for match in matches if match}
    found: dict[str, list[Operands]] = {}
    for line in lines:
        match = _PRODUCT.search(line)
        if match:
            site = _site_at(match[3], locations)
            found.setdefault(site, []).append((_element(match[1]), _element(match[2])))
    return found


def lowered_sites(
    function: Callable[[Any, Any], Any], params: Any, inputs: Any, platform: Platform
) -> dict[str, list[Operands]]:
    """`stablehlo_sites` of a function, lowered for a platform.

    Args:
      function: `apply(params, inputs)` with sites in their scopes, as of a `QuantizedModel`.
      params: arrays or shapes.
      inputs: arrays or shapes.
      platform: "tpu" or "cuda"; no such device is needed.
    """
    traced = jax.jit(function).trace(params, inputs)
    return stablehlo_sites(traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True))


def check_lowering(
    model: QuantizedModel, inputs: Any, platform: Platform
) -> dict[str, list[Operands]]:
    """Lowers an integer model for a platform and reads its planned sites' operand types.

    Nothing is compiled, and neither the device nor any package for it is needed. The model is taken
    as `quantize(..., backend=platform)` would make it.

    Args:
      model: from `quantize` or `load_model`, for any backend; values are not read.
      inputs: a batch, or its shapes.
      platform: "tpu" or "cuda".

    Returns:
      Per site with quantized activations, the operand types of its dots and convolutions.

    Raises:
      LoweringError: a planned site multiplies anything but integer codes; the message names the
        sites and what they multiply.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import calibrate, quantize, tabulate, trace, uniform
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> model = quantize(graph, params, uniform(tabulate(graph)), calibrate(graph, params, [x]))
    >>> check_lowering(model, x, "tpu")
    {'w': [('s8', 's8')]}
    """
    return check_plan_lowering(
        model.graph, model.plan, inputs, platform, symmetric=has_symmetric_grids(model)
    )


def check_plan_lowering(
    graph: Graph, plan: Plan, inputs: Any, platform: Platform, *, symmetric: bool = False
) -> dict[str, list[Operands]]:
    """`check_lowering` of what a plan would become, without parameters.

    Args:
      graph: from `trace`.
      plan: for this graph.
      inputs: a batch, or its shapes.
      platform: "tpu" or "cuda".
      symmetric: whether activations have no zero points, as in `calibrate`.

    Raises:
      LoweringError: as in `check_lowering`.
      PlanError: the plan is for another model.
    """
    if platform not in get_args(Platform):
        raise LoweringError(f"platform is {platform!r}; expected one of {get_args(Platform)}")
    model = abstract_model(graph, plan, platform, symmetric=symmetric)
    found = lowered_sites(model.apply, model.params, inputs, platform)
    return refuse_float(planned_sites(graph, plan), found, f"StableHLO for {platform}")


def refuse_float(
    planned: list[str], found: Mapping[str, list[Operands]], where: str
) -> dict[str, list[Operands]]:
    """The planned sites' operand types.

    Raises:
      LoweringError: a site is missing or an operand is no integer code.
    """
    wrong = {
        name: found.get(name, [])
        for name in planned
        if not found.get(name) or any(each not in CODES for pair in found[name] for each in pair)
    }
    if wrong:
        shown = ", ".join(f"{n} ({operand_words(pairs)})" for n, pairs in list(wrong.items())[:10])
        raise LoweringError(
            f"{len(wrong)} of {len(planned)} planned sites do not multiply integer codes in the "
            f"{where}: {shown}. Leave them in float in the plan"
        )
    return {name: found[name] for name in planned}


def operand_words(pairs: list[Operands]) -> str:
    """Operand types for people.

    >>> operand_words([("s8", "s4"), ("s8", "s4")])
    's8 x s4'
    """
    return ", ".join(dict.fromkeys(" x ".join(pair) for pair in pairs)) or "no multiplication"


def _site_at(location: str, locations: Mapping[str, str]) -> str:
    """The site of a location, which may refer to others; the outermost scope counts."""
    seen: set[str] = set()
    front = [location]
    while front:
        text = front.pop(0)
        match = SCOPE_PATTERN.search(text)
        if match:
            return scope_site(match[1])
        names = [n for n in _REFERENCE.findall(text) if n not in seen]
        seen.update(names)
        front += [locations[n] for n in names if n in locations]
    return ""


def _element(tensor: str) -> str:
    """HLO's name of a tensor type's elements: "4x8xi8" gives "s8"."""
    element = tensor.split("x")[-1]
    if element.startswith("ui"):
        return f"u{element[2:]}"
    return f"s{element[1:]}" if element[0] == "i" else element

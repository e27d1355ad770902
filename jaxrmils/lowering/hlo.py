"""Reads compiled HLO: which sites really multiply integers.

A compiler may do anything with a program, so what a model became is read from its compiled text.
Every site runs in a scope of its own (`site_scope`), which instructions carry in their
metadata. The text must be followed across computations to answer two questions:

* Are the operands integer codes? XLA:CPU widens the int8 operands of dots and convolutions that
  its int8 kernels don't take (small batched dots, few channels) to int32, in another fusion or
  hoisted out of a loop. Such an operand is followed back to where it was int8.
* Whose is an instruction without metadata? XLA drops it where it rewrites a dot (axes of size 1).
  Such an instruction belongs to the site of those that read its result, else of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxrmils.graph import Graph
from jaxrmils.lowering.hlo_text import Instruction, Text, parse
from jaxrmils.lowering.quantized_model import SCOPE_PATTERN, QuantizedModel, scope_site
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.policies import Plan
from jaxrmils.policies.formats import FLOAT_BITS

CODES = ("s8", "u8", "s4", "u4")
PRODUCTS = ("dot", "convolution")
EXACT_FLOAT = "float32 dot of codes"
"""An operation of codes less their zero points in float32, whose sums are exact."""
WIDENED = {kind: f"int32 {kind} of codes" for kind in PRODUCTS}
"""Operations of codes that were widened to int32, which no int8 kernel takes."""
# What keeps codes codes: moves, widening and the shifts that unpack int4.
_SHAPES = ("bitcast", "broadcast", "concatenate", "pad", "reshape", "reverse", "transpose")
_PICKS = ("dynamic-slice", "gather", "select", "slice")
_WIDENINGS = ("bitcast-convert", "convert", "shift-left", "shift-right-arithmetic")
_MOVES = frozenset((*_SHAPES, *_PICKS, *_WIDENINGS, "copy", "opt-barrier"))
_CALLS = ("parameter", "get-tuple-element", "fusion", "call")
_SHIFTS = frozenset((*_SHAPES, "slice", "convert", "copy", "opt-barrier"))


def integer_sites(compiled_text: str) -> dict[str, set[str]]:
    """The integer operations of every site in a compiled program.

    An operation counts if its result is int32 and both operands are integer codes, or int32 that
    was widened from them: "dot" or "convolution" of codes, those of `WIDENED` where an operand is
    int32, or "multiply" (a tap of a depthwise convolution, or what XLA makes of a dot that sums one
    product). A site's float32 dot of two operands that are codes, converted and less a zero point,
    is `EXACT_FLOAT`.

    Args:
      compiled_text: `jax.jit(...).lower(...).compile().as_text()`.

    Returns:
      Kinds of operation by site name; sites without an integer operation are missing. Operations
      that belong to no site are under "".

    >>> integer_sites('''
    ... ENTRY %main (a: s8[2,3], b: s8[3,4]) -> s32[2,4] {
    ...   %a = s8[2,3]{1,0} parameter(0)
    ...   %b = s8[3,4]{1,0} parameter(1)
    ...   ROOT %dot = s32[2,4]{1,0} dot(%a, %b), metadata={op_name="jit(f)/jaxrmils[w]/dot_general"}
    ... }''')
    {'w': {'dot'}}
    """
    text = parse(compiled_text)
    found: dict[str, set[str]] = {}
    for instruction in text.instructions.values():
        if instruction.dtype == "s32" and instruction.opcode in (*PRODUCTS, "multiply"):
            operands = list(text.operands(instruction))
            if len(operands) == 2 and all(_is_code(text, each, set()) for each in operands):
                is_wide = any(each.dtype not in CODES for each in operands)
                kind = WIDENED.get(instruction.opcode) if is_wide else None
                kinds = found.setdefault(site_of(text, instruction), set())
                kinds.add(kind or instruction.opcode)
        if instruction.dtype == "f32" and instruction.opcode == "dot":
            operands = list(text.operands(instruction))
            site = site_of(text, instruction)
            if site and all(_is_shifted(text, each, set()) for each in operands):
                found.setdefault(site, set()).add(EXACT_FLOAT)
    return found


def compiled_integer_sites(model: QuantizedModel, inputs: Any) -> dict[str, set[str]]:
    """`integer_sites` of a quantized model, compiled for the present device.

    Args:
      model: from `quantize`.
      inputs: a batch, or its shapes.
    """
    compiled = jax.jit(model.apply).lower(model.params, inputs).compile()
    return integer_sites(compiled.as_text() or "")


def check_integer_sites(model: QuantizedModel, inputs: Any) -> dict[str, set[str]]:
    """Compiles a quantized model for the present device and reads what its sites became.

    Args:
      model: from `quantize`.
      inputs: a batch, or its shapes.

    Returns:
      The kinds of integer operation of every site with quantized activations.

    Raises:
      LoweringError: a planned site holds neither an integer operation nor a `EXACT_FLOAT` one; the
        message names the sites.
    """
    found, planned = compiled_integer_sites(model, inputs), planned_sites(model.graph, model.plan)
    missing = [name for name in planned if name not in found]
    if missing:
        raise LoweringError(
            f"{len(missing)} of {len(planned)} planned sites hold no integer operation in the "
            f"program compiled for {jax.default_backend()}: {', '.join(missing[:10])}. "
            "They run in float there; skip them in the plan, or report the model."
        )
    return {name: found[name] for name in planned}


def assert_integer(model: QuantizedModel, inputs: Any) -> None:
    """Raises LoweringError unless every planned site is compiled to integer operations.

    Stricter than `check_integer_sites`: codes that are multiplied in float32, however exactly, are
    no integer operation. Those that are widened to int32 are one (`WIDENED`).
    """
    found = check_integer_sites(model, inputs)
    exact = [site for site, kinds in found.items() if kinds == {EXACT_FLOAT}]
    if exact:
        raise LoweringError(
            f"{len(exact)} of {len(found)} planned sites multiply their codes in float32 in the "
            f"program compiled for {jax.default_backend()}: {', '.join(exact[:10])}. The results "
            "are those of integers; skip them in the plan, or allow them with check_integer_sites."
        )


def planned_sites(graph: Graph, plan: Plan) -> list[str]:
    """The sites whose operands a plan makes integers, all of them, in the model's order."""
    return [
        site.name
        for site in graph.sites
        if site.activations and plan.layers[site.layer].activation_bits < FLOAT_BITS
    ]


def _is_code(text: Text, instruction: Instruction, seen: set[Instruction]) -> bool:
    """Whether a value is made of integer codes by moves and widening alone."""
    if instruction.dtype in CODES:
        return True
    if instruction in seen:
        return False
    seen.add(instruction)
    if instruction.opcode not in _CALLS and (
        instruction.opcode not in _MOVES or instruction.dtype not in ("s32", "s16")
    ):
        return False
    return any(_is_code(text, source, seen) for source in text.sources(instruction))


def _is_shifted(text: Text, instruction: Instruction, seen: set[Instruction]) -> bool:
    """Whether a float32 value is codes, converted and less integers, and nothing else."""
    if instruction.dtype in CODES:
        return True
    if instruction in seen or instruction.dtype not in ("f32", "s32"):
        return False
    seen.add(instruction)
    if instruction.opcode in ("subtract", "add"):
        codes, zero_points = text.operand(instruction, 0), text.operand(instruction, 1)
        if codes is None or zero_points is None:
            return False
        return _is_shifted(text, codes, seen) and _is_whole(text, zero_points, set())
    if instruction.opcode not in (*_CALLS, *_SHIFTS):
        return False
    return any(_is_shifted(text, source, seen) for source in text.sources(instruction))


def _is_whole(text: Text, instruction: Instruction, seen: set[Instruction]) -> bool:
    """Whether a value was an integer, or is a constant of the program."""
    if instruction.dtype.startswith(("s", "u")) or instruction.opcode == "constant":
        return True
    if instruction in seen or instruction.opcode not in (*_CALLS, *_SHIFTS, "negate"):
        return False
    seen.add(instruction)
    return any(_is_whole(text, source, seen) for source in text.sources(instruction))


def site_of(text: Text, instruction: Instruction) -> str:
    """The site of an instruction, or "": see the module."""
    if instruction.op_name:
        return scoped_site(instruction)
    return _nearest(instruction, text.destinations) or _nearest(instruction, text.sources)


def _nearest(start: Instruction, neighbours: Callable[[Instruction], Iterator[Instruction]]) -> str:
    """The site of the nearest instructions that carry metadata; "" if they are of several."""
    seen, front = {start}, [start]
    while front:
        step = [n for each in front for n in neighbours(each)]
        front = [n for n in dict.fromkeys(step) if n not in seen]
        seen.update(front)
        # A fusion carries the metadata of its root, which may be of a later operation.
        labelled = [n for n in front if n.op_name and n.opcode not in ("fusion", "call")]
        if labelled:
            sites = {scoped_site(n) for n in labelled} - {""}
            return sites.pop() if len(sites) == 1 else ""
    return ""


def scoped_site(instruction: Instruction) -> str:
    """The site in whose scope an instruction says it is, or ""; the innermost of several.

    A native product is computed where the next site asks for its codes.
    """
    found = SCOPE_PATTERN.findall(instruction.op_name)
    return scope_site(found[-1]) if found else ""

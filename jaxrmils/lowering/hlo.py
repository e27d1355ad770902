"""Reads compiled HLO: which sites really multiply integers.

A compiler may do anything with a program, so what a model became is read from its compiled text.
Every quantized site runs in a scope of its own (`site_scope`), which instructions carry in their
metadata. The text must be followed across computations to answer two questions:

* Are the operands integer codes? XLA:CPU widens the int8 operands of dots and convolutions that
  its int8 kernels don't take (small batched dots, few channels) to int32, in another fusion or
  hoisted out of a loop. Such an operand is followed back to where it was int8.
* Whose is an instruction without metadata? XLA drops it where it rewrites a dot (axes of size 1).
  Such an instruction belongs to the site of those that read its result, else of its operands.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxrmils.lowering.quantized_model import SCOPE_PATTERN, QuantizedModel, scope_site
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.policies.formats import FLOAT_BITS

_CODES = ("s8", "u8", "s4", "u4")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# What keeps codes codes: moves, widening and the shifts that unpack int4.
_SHAPES = ("bitcast", "broadcast", "concatenate", "pad", "reshape", "reverse", "transpose")
_PICKS = ("dynamic-slice", "gather", "select", "slice")
_WIDENINGS = ("bitcast-convert", "convert", "shift-left", "shift-right-arithmetic")
_MOVES = frozenset((*_SHAPES, *_PICKS, *_WIDENINGS, "copy", "opt-barrier"))


@dataclass(frozen=True, eq=False)
class _Instruction:
    name: str
    computation: str
    dtype: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    index: int
    op_name: str
    is_root: bool


@dataclass(eq=False)
class _Text:
    """The instructions of a module, and how values flow between its computations."""

    instructions: dict[tuple[str, str], _Instruction] = field(default_factory=dict)
    roots: dict[str, _Instruction] = field(default_factory=dict)
    parameters: dict[tuple[str, int], _Instruction] = field(default_factory=dict)
    callers: dict[str, list[_Instruction]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[_Instruction, list[_Instruction]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def operand(self, instruction: _Instruction, position: int) -> _Instruction | None:
        """An operand's definition."""
        if position >= len(instruction.operands):
            return None
        return self.instructions.get((instruction.computation, instruction.operands[position]))

    def operands(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """The definitions of all operands."""
        for position in range(len(instruction.operands)):
            definition = self.operand(instruction, position)
            if definition is not None:
                yield definition

    def arguments(self, parameter: _Instruction) -> Iterator[_Instruction]:
        """What the callers of a computation pass for a parameter."""
        for caller in self.callers[parameter.computation]:
            # A conditional's first operand is the predicate; each branch has one parameter.
            branch = caller.called.index(parameter.computation)
            position = branch + 1 if caller.opcode == "conditional" else parameter.index
            definition = self.operand(caller, position)
            if definition is not None:
                yield definition

    def sources(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """Where a value comes from, one step back, calls and tuples seen through."""
        if instruction.opcode == "parameter":
            yield from self.arguments(instruction)
        elif instruction.opcode == "get-tuple-element":
            for source in self.operands(instruction):
                yield from self.element(source, instruction.index, set())
        elif instruction.opcode in ("fusion", "call"):
            yield from (self.roots[c] for c in instruction.called if c in self.roots)
        else:
            yield from self.operands(instruction)

    def element(
        self, instruction: _Instruction, index: int, seen: set[_Instruction]
    ) -> Iterator[_Instruction]:
        """The definitions of one element of a tuple; of a loop's state, its initial value too."""
        if instruction in seen:
            return
        seen.add(instruction)
        if instruction.opcode == "tuple":
            definition = self.operand(instruction, index)
            if definition is not None:
                yield definition
            return
        if instruction.opcode == "parameter":
            sources: Iterable[_Instruction] = self.arguments(instruction)
        elif instruction.opcode in ("fusion", "call", "conditional"):
            sources = (self.roots[c] for c in instruction.called if c in self.roots)
        else:  # A loop, or a copy of a tuple.
            sources = self.operands(instruction)
        for source in sources:
            yield from self.element(source, index, seen)

    def destinations(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """Who reads a value, one step on, fusions seen through."""
        for reader in self.readers[instruction]:
            if reader.opcode not in ("fusion", "call"):
                yield reader
                continue
            for position, name in enumerate(reader.operands):
                inner = self.parameters.get((reader.called[0], position)) if reader.called else None
                if name == instruction.name and inner is not None:
                    yield inner
        if instruction.is_root:
            yield from (c for c in self.callers[instruction.computation] if c.opcode != "while")


def integer_sites(compiled_text: str) -> dict[str, set[str]]:
    """The integer operations of every site in a compiled program.

    An operation counts if its result is int32 and both operands are integer codes, or int32 that
    was widened from them: "dot", "convolution", or "multiply" (a tap of a depthwise convolution, or
    what XLA makes of a dot that sums one product).

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
    text = _parse(compiled_text)
    found: dict[str, set[str]] = {}
    for instruction in text.instructions.values():
        if instruction.dtype != "s32" or instruction.opcode not in (
            "dot",
            "convolution",
            "multiply",
        ):
            continue
        operands = list(text.operands(instruction))
        if len(operands) == 2 and all(_is_code(text, each, set()) for each in operands):
            found.setdefault(_owner(text, instruction), set()).add(instruction.opcode)
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
      LoweringError: a planned site holds no integer operation; the message names the sites.
    """
    found = compiled_integer_sites(model, inputs)
    planned = [
        site.name
        for site in model.graph.sites
        if site.activations and model.plan.layers[site.layer].activation_bits < FLOAT_BITS
    ]
    missing = [name for name in planned if name not in found]
    if missing:
        raise LoweringError(
            f"{len(missing)} of {len(planned)} planned sites hold no integer operation in the "
            f"program compiled for {jax.default_backend()}: {', '.join(missing[:10])}. "
            "They run in float there; skip them in the plan, or report the model."
        )
    return {name: found[name] for name in planned}


def assert_integer(model: QuantizedModel, inputs: Any) -> None:
    """Raises LoweringError unless every planned site is compiled to integer operations."""
    check_integer_sites(model, inputs)


def _parse(text: str) -> _Text:
    result, computation = _Text(), ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            computation = head[1]
            continue
        match = _INSTRUCTION.match(line)
        if match:
            instruction = _instruction(match, computation)
            result.instructions[computation, instruction.name] = instruction
    for instruction in result.instructions.values():
        if instruction.is_root:
            result.roots[instruction.computation] = instruction
        if instruction.opcode == "parameter":
            result.parameters[instruction.computation, instruction.index] = instruction
        for called in instruction.called:
            result.callers[called].append(instruction)
        for operand in result.operands(instruction):
            result.readers[operand].append(instruction)
    return result


def _instruction(match: re.Match[str], computation: str) -> _Instruction:
    root, name, shape, opcode, rest = match.groups()
    arguments, attributes = _split(rest)
    called = _CALLED.findall(attributes)
    for group in _BRANCHES.findall(attributes):
        called += _REFERENCE.findall(group)
    index = re.search(r"index=(\d+)", attributes)
    number = arguments if opcode == "parameter" else index[1] if index else "0"
    op_name = _OP_NAME.search(attributes)
    return _Instruction(
        name=name,
        computation=computation,
        dtype=shape.split("[")[0],
        opcode=opcode,
        operands=tuple(_REFERENCE.findall(arguments)),
        called=tuple(called),
        index=int(number) if number.isdigit() else 0,
        op_name=op_name[1] if op_name else "",
        is_root=root is not None,
    )


def _split(rest: str) -> tuple[str, str]:
    """Arguments and attributes of an instruction, at the parenthesis that closes the former."""
    depth = 1
    for i, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _is_code(text: _Text, instruction: _Instruction, seen: set[_Instruction]) -> bool:
    """Whether a value is made of integer codes by moves and widening alone."""
    if instruction.dtype in _CODES:
        return True
    if instruction in seen:
        return False
    seen.add(instruction)
    calls = ("parameter", "get-tuple-element", "fusion", "call")
    if instruction.opcode not in calls and (
        instruction.opcode not in _MOVES or instruction.dtype not in ("s32", "s16")
    ):
        return False
    return any(_is_code(text, source, seen) for source in text.sources(instruction))


def _owner(text: _Text, instruction: _Instruction) -> str:
    """The site of an instruction, or ""."""
    if instruction.op_name:
        return _site(instruction)
    return _nearest(instruction, text.destinations) or _nearest(instruction, text.sources)


def _nearest(
    start: _Instruction, neighbours: Callable[[_Instruction], Iterator[_Instruction]]
) -> str:
    """The site of the nearest instructions that carry metadata; "" if they are of several."""
    seen, front = {start}, [start]
    while front:
        step = [n for each in front for n in neighbours(each)]
        front = [n for n in dict.fromkeys(step) if n not in seen]
        seen.update(front)
        # A fusion carries the metadata of its root, which may be of a later operation.
        labelled = [n for n in front if n.op_name and n.opcode not in ("fusion", "call")]
        if labelled:
            sites = {_site(n) for n in labelled} - {""}
            return sites.pop() if len(sites) == 1 else ""
    return ""


def _site(instruction: _Instruction) -> str:
    match = SCOPE_PATTERN.search(instruction.op_name)
    return scope_site(match[1]) if match else ""

"""The text of a compiled program (HLO), and how values flow between its computations."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")  # a type's letters, its bits, sizes of dims


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a program.

    Attributes:
      name: unique within its computation.
      computation: where it stands.
      dtype: of its result, as HLO names it ("s8", "f32"); "(" and more for a tuple.
      size: bytes of its result, of a tuple's elements together; without what layouts pad.
      opcode: "dot", "fusion", "parameter", ...
      target: the library function that a custom call calls, else "".
      operands: names of instructions in the same computation.
      called: names of the computations that it runs; a loop's body, not its condition.
      condition: a loop's condition, else "".
      index: of a parameter or a tuple's element; a constant's value where it is an integer.
      op_name: where it comes from in the traced function.
      cycles: what the TPU compiler estimates it to take; 0 where it says nothing.
      is_root: whether it is its computation's result.
    """

    name: str
    computation: str
    dtype: str
    size: int
    opcode: str
    target: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    condition: str
    index: int
    op_name: str
    cycles: int
    is_root: bool


@dataclass(eq=False)
class Text:
    """The instructions of a module, and how values flow between its computations.

    Attributes:
      entry: the computation that runs first.
      instructions: by computation and name.
      roots: every computation's result.
      parameters: by computation and index.
      callers: the instructions that run a computation.
      readers: the instructions of the same computation that read a value.
    """

    entry: str = ""
    instructions: dict[tuple[str, str], Instruction] = field(default_factory=dict)
    roots: dict[str, Instruction] = field(default_factory=dict)
    parameters: dict[tuple[str, int], Instruction] = field(default_factory=dict)
    callers: dict[str, list[Instruction]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[Instruction, list[Instruction]] = field(default_factory=lambda: defaultdict(list))

    def operand(self, instruction: Instruction, position: int) -> Instruction | None:
        """An operand's definition."""
        if position >= len(instruction.operands):
            return None
        return self.instructions.get((instruction.computation, instruction.operands[position]))

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The definitions of all operands."""
        for position in range(len(instruction.operands)):
            definition = self.operand(instruction, position)
            if definition is not None:
                yield definition

    def arguments(self, parameter: Instruction) -> Iterator[Instruction]:
        """What the callers of a computation pass for a parameter."""
        for caller in self.callers[parameter.computation]:
            # A conditional's first operand is the predicate; each branch has one parameter.
            branch = caller.called.index(parameter.computation)
            position = branch + 1 if caller.opcode == "conditional" else parameter.index
            definition = self.operand(caller, position)
            if definition is not None:
                yield definition

    def sources(self, instruction: Instruction) -> Iterator[Instruction]:
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
        self, instruction: Instruction, index: int, seen: set[Instruction]
    ) -> Iterator[Instruction]:
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
            sources: Iterable[Instruction] = self.arguments(instruction)
        elif instruction.opcode in ("fusion", "call", "conditional"):
            sources = (self.roots[c] for c in instruction.called if c in self.roots)
        else:  # A loop, or a copy of a tuple.
            sources = self.operands(instruction)
        for source in sources:
            yield from self.element(source, index, seen)

    def destinations(self, instruction: Instruction) -> Iterator[Instruction]:
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

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs, where its condition is that a counter from 0 is below a number."""
        test = self.roots.get(loop.condition)
        if test is None or test.opcode != "compare":
            return None
        limits = [each.index for each in self.operands(test) if each.opcode == "constant"]
        return limits[0] if len(limits) == 1 else None


def parse(text: str) -> Text:
    """Reads a program's text, as `Compiled.as_text()` gives it.

    >>> text = parse('''
    ... ENTRY %main (x: f32[2]) -> f32[2] {
    ...   ROOT %x = f32[2]{0} parameter(0)
    ... }''')
    >>> text.entry, text.roots["main"].opcode
    ('main', 'parameter')
    """
    result, computation = Text(), ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            computation = head[1]
            if line.startswith("ENTRY"):
                result.entry = computation
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


def _instruction(match: re.Match[str], computation: str) -> Instruction:
    root, name, shape, opcode, rest = match.groups()
    arguments, attributes = _split(rest)
    called = _CALLED.findall(attributes)
    for group in _BRANCHES.findall(attributes):
        called += _REFERENCE.findall(group)
    index = re.search(r"index=(\d+)", attributes)
    is_number = opcode in ("parameter", "constant")
    number = arguments if is_number else index[1] if index else "0"
    condition, op_name = _CONDITION.search(attributes), _OP_NAME.search(attributes)
    cycles, target = _CYCLES.search(attributes), _TARGET.search(attributes)
    return Instruction(
        name=name,
        computation=computation,
        dtype=shape.split("[")[0],
        size=_size(shape),
        opcode=opcode,
        target=target[1] if target else "",
        operands=tuple(_REFERENCE.findall(arguments)),
        called=tuple(called),
        condition=condition[1] if condition else "",
        index=int(number) if number.isdigit() else 0,
        op_name=op_name[1] if op_name else "",
        cycles=int(cycles[1]) if cycles else 0,
        is_root=root is not None,
    )


def _size(shape: str) -> int:
    bits = 0
    for _, width, dims in _ARRAY.findall(shape):
        elements = math.prod(int(dim) for dim in dims.split(",") if dim)
        bits += elements * int(width or 8)  # pred has no number
    return -(-bits // 8)


def _split(rest: str) -> tuple[str, str]:
    """Arguments and attributes of an instruction, at the parenthesis that closes the former."""
    depth = 1
    for i, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""

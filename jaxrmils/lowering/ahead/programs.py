"""What a compiler says of a program: operand types, kernels, memory, and for TPUs cycles.

Cycles are the TPU compiler's own estimates (`estimated_cycles` in the optimized HLO), by which it
chooses tilings. They are no measurements: transfers between memories run beside the computation and
are not in them, and no device has run anything. The CUDA compiler gives none.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrmils.lowering.ahead.stablehlo import Operands
from jaxrmils.lowering.hlo import CODES, PRODUCTS, integer_sites, scoped_site, site_of
from jaxrmils.lowering.hlo_text import Instruction, Text, parse

_CALLS = ("call", "async-start")
# What moves no bytes of its own: others do, or nobody.
_STILL = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "conditional", "call"),
)
# Library functions that multiply matrices, in programs for CUDA.
_LIBRARIES = ("__cudnn$conv", "__cublas$")


@dataclass(frozen=True)
class SiteCost:
    """What became of one site.

    Attributes:
      operands: operand types of its dots and convolutions; empty where the compiler multiplies
        elementwise (a single row on a TPU) or the site is a lookup.
      kernels: what they are: "dot", "convolution" (on a TPU both are the matrix unit's), or the
        library function that is called, such as "__cudnn$convForward", which picks its own kernel
        on the device.
      is_integer: whether it multiplies integer codes and nothing else.
      cycles: estimated cycles of the instructions that hold those operations, loops included; None
        without estimates. A fusion holds neighbouring operations too, such as the next site's
        quantization.
      overhead: estimated cycles of all other instructions in the site's scope: quantization,
        corrections for zero points, scales; None without estimates.
      shares: other sites whose operation is in the same instruction, which counts for each.
      divided: `cycles` with each instruction's divided evenly among the sites whose operations it
        holds, so that sites can be summed.
      bytes: what the instructions behind `cycles` and `overhead` read and write, loops included, in
        whichever memory it lies; without what layouts pad.
    """

    operands: tuple[Operands, ...]
    kernels: tuple[str, ...]
    is_integer: bool
    cycles: int | None
    overhead: int | None
    shares: tuple[str, ...] = ()
    divided: float | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, from `memory_analysis`.

    Attributes:
      arguments: parameters and inputs.
      outputs: results.
      temporaries: what lives while it runs.
      code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int


@dataclass(frozen=True)
class ProgramCost:
    """What a compiler says of a whole program.

    Attributes:
      sites: by name.
      cycles: estimated cycles of the whole, loops included; of branches the dearest. None where
        the compiler estimates none.
      unknown_loops: loops whose length is not known; their bodies count once.
      memory: on the device; None for a program that is text alone.
      bytes_accessed: as the compiler counts them; None where it does not.
    """

    sites: Mapping[str, SiteCost]
    cycles: int | None
    unknown_loops: int = 0
    memory: Memory | None = None
    bytes_accessed: float | None = None


def program_cost(compiled: Any) -> ProgramCost:
    """Reads a program of `compile_for`.

    Args:
      compiled: `jax.stages.Compiled`.
    """
    analysis, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = analysis and Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )
    return text_cost(compiled.as_text() or "", memory, costs.get("bytes accessed"))


def text_cost(
    compiled_text: str, memory: Memory | None = None, bytes_accessed: float | None = None
) -> ProgramCost:
    """Reads operand types and estimated cycles from a compiled program's text.

    Args:
      compiled_text: optimized HLO for a TPU or CUDA.
      memory: passed on.
      bytes_accessed: passed on.

    >>> cost = text_cost('''
    ... ENTRY %main (a: s8[2,3], b: s8[3,4]) -> s32[2,4] {
    ...   %a = s8[2,3]{1,0} parameter(0)
    ...   %b = s8[3,4]{1,0} parameter(1)
    ...   ROOT %c = s32[2,4]{1,0} convolution(%a, %b), metadata={op_name="f/jaxrmils[w]/dot"}, \
backend_config={"window_config":{"estimated_cycles":"70"}}
    ... }''')
    >>> cost.sites["w"].operands, cost.sites["w"].cycles, cost.cycles, cost.sites["w"].bytes
    ((('s8', 's8'),), 70, 70, 50)
    """
    text = parse(compiled_text)
    schedule = _schedule(text)
    runs, integer = schedule.runs, integer_sites(compiled_text)
    products: dict[str, list[Operands]] = {}
    kernels: dict[str, list[str]] = {}
    holders: dict[str, dict[Instruction, None]] = {}
    for instruction in text.instructions.values():
        operands = list(text.operands(instruction))
        if _is_product(instruction) and len(operands) >= 2:
            site = site_of(text, instruction)
            kernels.setdefault(site, []).append(instruction.target or instruction.opcode)
            products.setdefault(site, []).append((operands[0].dtype, operands[1].dtype))
            held_by = dict.fromkeys(_holders(text, instruction, runs))
            holders.setdefault(site, {}).update(held_by)
    held = collections.Counter(h for site, own in holders.items() for h in own if site)
    # Held, but nobody's: operations of no site.
    held.update(dict.fromkeys(holders.get("", ()), 0))

    def spent(holder: Instruction) -> int:
        return holder.cycles * runs[holder.computation]

    def moved(instruction: Instruction) -> int:
        return _moved(text, instruction) * runs[instruction.computation]

    overhead: dict[str, int] = {}
    beside: dict[str, int] = {}  # bytes of the same
    for instruction in text.instructions.values():
        site = scoped_site(instruction)
        if site and instruction.computation in runs and instruction not in held:
            overhead[site] = overhead.get(site, 0) + spent(instruction)
            beside[site] = beside.get(site, 0) + moved(instruction)
    names = [name for name in dict.fromkeys([*products, *overhead, *integer]) if name]
    sites = {
        name: SiteCost(
            operands=tuple(products.get(name, ())),
            kernels=tuple(kernels.get(name, ())),
            is_integer=all(each in CODES for pair in products[name] for each in pair)
            if name in products
            else name in integer,
            cycles=sum(spent(h) for h in holders.get(name, ())) if schedule.cycles else None,
            overhead=overhead.get(name, 0) if schedule.cycles else None,
            shares=_sharing(name, holders),
            divided=sum(spent(h) / held[h] for h in holders.get(name, ()))
            if schedule.cycles
            else None,
            bytes=beside.get(name, 0) + sum(moved(h) for h in holders.get(name, ())),
        )
        for name in names
    }
    cycles = schedule.cycles or None
    return ProgramCost(sites, cycles, schedule.unknown_loops, memory, bytes_accessed)


def _moved(text: Text, instruction: Instruction) -> int:
    """Bytes that an instruction reads and writes in one run."""
    if instruction.opcode in _STILL or instruction.opcode.endswith("-done"):
        return 0
    read = sum(each.size for each in text.operands(instruction))
    # What starts a copy has its source among its results.
    return 2 * read if instruction.opcode.endswith("-start") else read + instruction.size


def _is_product(instruction: Instruction) -> bool:
    return instruction.opcode in PRODUCTS or instruction.target.startswith(_LIBRARIES)


def _sharing(name: str, holders: Mapping[str, Mapping[Instruction, None]]) -> tuple[str, ...]:
    own = holders.get(name, {}).keys()
    return tuple(n for n, of_site in holders.items() if n and n != name and own & of_site.keys())


@dataclass
class _Schedule:
    """What runs by itself (the inside of a fusion does not), how often, and how long in all."""

    runs: dict[str, int]
    unknown_loops: int = 0
    cycles: int = 0


def _schedule(text: Text) -> _Schedule:
    bodies: dict[str, list[Instruction]] = {}
    for (computation, _), instruction in text.instructions.items():
        bodies.setdefault(computation, []).append(instruction)
    schedule = _Schedule({})

    def visit(computation: str, times: int) -> int:
        schedule.runs[computation] = schedule.runs.get(computation, 0) + times
        cycles = 0
        for instruction in bodies.get(computation, ()):
            cycles += times * instruction.cycles
            if instruction.opcode == "while":
                trips = text.trips(instruction)
                schedule.unknown_loops += trips is None
                inner = times * (1 if trips is None else trips)
                cycles += sum([visit(body, inner) for body in instruction.called])
            elif instruction.opcode == "conditional":
                cycles += max([visit(branch, times) for branch in instruction.called], default=0)
            elif instruction.opcode in _CALLS:
                cycles += sum([visit(called, times) for called in instruction.called])
        return cycles

    schedule.cycles = visit(text.entry, 1)
    return schedule


def _holders(
    text: Text, instruction: Instruction, runs: Mapping[str, int]
) -> Iterator[Instruction]:
    """The scheduled instructions that an operation is part of: itself, or fusions around it."""
    if instruction.computation in runs:
        yield instruction
        return
    for caller in text.callers[instruction.computation]:
        yield from _holders(text, caller, runs)

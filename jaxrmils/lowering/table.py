"""Which formulation of an operation runs where, and why: the one place that decides.

An integer operation has many ways to be written that give the same int32. XLA runs some on the
integer units of a device and others in scalar code, dozens of times slower; which, changes with the
backend and its version. `TABLE` has a row for every backend and kind of operation, with what the
choice rests on. `dot_int32` and `conv_int32` ask it and nothing else.

Speed is against the same operation in float32 on that backend. CPU: measured with jax 0.12.0.1 on
two cores with AVX512-VNNI (`benchmarks/operations.py`); jaxlib before 0.12 has no int8 kernels on
CPU. CUDA and TPU: what their compilers made of it, without a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax

Operation = Literal[
    "dot",
    "one row",
    "one column",
    "batched dot",
    "short batched dot",
    "conv",
    "stem",
    "depthwise",
    "grouped",
    "weights only",
]
Formulation = Literal[
    "s8 dot",
    "s8 dot, two rows",
    "s8 dot, two columns",
    "s4 dot",
    "float32 dot of codes",
    "s8 conv",
    "s8 conv, pixels as channels",
    "s8 conv, block-diagonal",
    "s8 conv in float32",
    "shifted products",
    "float dot",
    "fused kernel",
]

STEM_CHANNELS = 4
"""Convolutions of fewer input channels are stems: the kernels multiply channels by fours."""
KERNEL_FEATURES = 16
"""XLA:CPU has no int8 kernel for a convolution with no more channels and features than this."""
BLOCK_GROUPS = 64
"""Up to so many groups, a dense kernel that is zero between them is faster than a grouped one."""


@dataclass(frozen=True)
class Row:
    """One decision.

    Attributes:
      backend: "cpu", "cuda" or "tpu"; "native" for kernels of our own on CPU.
      operation: what is to be computed.
      formats: the formats that it holds for.
      formulation: how it is written.
      speed: against float32, in words.
      reason: why so.
    """

    backend: str
    operation: Operation
    formats: tuple[str, ...]
    formulation: Formulation
    speed: str
    reason: str


INTEGER = ("w8a8", "w8a4", "w4a8", "w4a4")
DOTS = (*INTEGER, "a8", "a4")
WEIGHTS = ("w8", "w4")
GROUPED = ("w4g32", "w4g64", "w4g128")
DYNAMIC = ("w8a8d", "w4a8d", "a8d")
"""A grid for every row of the activations; "a8d" for every row of both."""
_DOTS: tuple[Operation, ...] = (
    "dot",
    "one row",
    "one column",
    "batched dot",
    "short batched dot",
)
_DOT_FORMULATIONS: tuple[tuple[Operation, Formulation], ...] = (
    ("dot", "s8 dot"),
    ("one row", "s8 dot, two rows"),
    ("one column", "s8 dot, two columns"),
    ("batched dot", "s8 dot"),
    ("short batched dot", "float32 dot of codes"),
)
_CONVS: tuple[Operation, ...] = ("conv", "stem", "depthwise", "grouped")

TABLE: tuple[Row, ...] = (
    Row(
        "cpu",
        "dot",
        DOTS,
        "s8 dot",
        "3 to 8 times",
        "int8 kernels with int32 sums; int4 is unpacked inside the program, for 5 to 15 % of "
        "time at 32 rows or more. The order [K, N] or [N, K] of the weight changes it by 15 % at "
        "most",
    ),
    Row(
        "cpu",
        "one row",
        DOTS,
        "s8 dot, two rows",
        "1 to 2 times",
        "there is no int8 kernel for one row: with a second one of zeros 1 x 4096 x 4096 takes "
        "a fifth of the time. int4 weights are 1.1 to 1.6 times slower than float32: they are "
        "unpacked in every call",
    ),
    Row(
        "cpu",
        "one column",
        DOTS,
        "s8 dot, two columns",
        "1.2 times",
        "the same for one column: 1024 x 768 x 1 takes two fifths of the time",
    ),
    Row(
        "cpu",
        "batched dot",
        DOTS,
        "s8 dot",
        "1.6 to 2.3 times; from float32 operands 0.3 to 0.5 times",
        "batched int8 kernels, but both operands are quantized in every call, and summed for "
        "zero points",
    ),
    Row(
        "cpu",
        "short batched dot",
        DOTS,
        "float32 dot of codes",
        "from float32 operands 0.4 to 0.5 times",
        "zero points need sums of both operands in every call, which cost more than int8 products "
        "gain (a tenth of BERT-base's time). No sum of so few codes passes 2^24, so that float32 "
        "is exact",
    ),
    *(
        Row(
            "cpu",
            operation,
            DYNAMIC,
            formulation,
            "as w8a8, w4a8",
            "each row's smallest and largest value are found first: of 32 to 1,024 rows that "
            "costs a lone dot no time that could be seen, of a single row a fifth, and a BERT base "
            "layer a fifth",
        )
        for operation, formulation in _DOT_FORMULATIONS
        if operation not in ("batched dot", "short batched dot")
    ),
    Row(
        "cpu",
        "batched dot",
        DYNAMIC,
        "s8 dot",
        "from float32 operands 0.3 times",
        "passes for the ranges of both operands' rows come first",
    ),
    Row(
        "cpu",
        "short batched dot",
        DYNAMIC,
        "float32 dot of codes",
        "from float32 operands 0.25 times",
        "the same passes, then as w8a8",
    ),
    Row(
        "cpu",
        "conv",
        INTEGER,
        "s8 conv",
        "1 to 6 times",
        "int8 kernels where channels or features exceed 16; large outputs of few channels are "
        "bound by memory",
    ),
    Row(
        "cpu",
        "stem",
        INTEGER,
        "s8 conv, pixels as channels",
        "1.1 to 1.7 times",
        "strides become channels (7 x 7 by 2 on 3 channels takes a quarter of the time), "
        "otherwise channels are filled up to 4",
    ),
    Row(
        "cpu",
        "depthwise",
        INTEGER,
        "shifted products",
        "14 times",
        "XLA's own are scalar loops, in float32 too: against shifted products in float32 it is "
        "about as fast",
    ),
    Row(
        "cpu",
        "grouped",
        INTEGER,
        "s8 conv, block-diagonal",
        "3.7 times",
        "a dense kernel with zeros between the groups reaches the int8 kernels (32 groups of 8: "
        "2.7 times faster than grouped int8)",
    ),
    Row(
        "cpu",
        "weights only",
        WEIGHTS,
        "float dot",
        "none",
        "weights are smaller and dequantized in every call: int8 as fast as float32, int4 up to 3 "
        "times slower at few rows",
    ),
    Row(
        "cpu",
        "weights only",
        GROUPED,
        "float dot",
        "none",
        "as w4: scales of groups take no time that could be seen",
    ),
    Row("cuda", "dot", DOTS, "s8 dot", "tensor cores", "int4 x int4 would be scalar code"),
    Row(
        "cuda",
        "one row",
        DOTS,
        "s8 dot, two rows",
        "tensor cores",
        "one row with unpacked int4 weights does not compile (Triton)",
    ),
    Row("cuda", "one column", DOTS, "s8 dot", "tensor cores", "as any dot"),
    Row("cuda", "batched dot", DOTS, "s8 dot", "tensor cores", "as any dot, batched"),
    Row("cuda", "short batched dot", DOTS, "s8 dot", "tensor cores", "as any dot, batched"),
    *(
        Row(
            "cuda",
            operation,
            DYNAMIC,
            "s8 dot, two rows" if operation == "one row" else "s8 dot",
            "tensor cores",
            "as with calibrated grids",
        )
        for operation in _DOTS
    ),
    *(
        Row(
            "cuda",
            operation,
            INTEGER,
            "s8 conv in float32",
            speed,
            "XLA compiles an int8 convolution for cuDNN only if it is converted to float32 at "
            "once; exact below 2^24, beyond that rounded, by at most 2^-24 of the sum",
        )
        for operation in _CONVS
        for speed in ("tensor cores" if operation in ("conv", "stem") else "not measured",)
    ),
    Row(
        "cuda",
        "weights only",
        (*WEIGHTS, *GROUPED),
        "float dot",
        "not measured",
        "smaller to read",
    ),
    *(
        Row(
            "tpu",
            operation,
            ("w8a8", "w8a4", "w4a8", "a8"),
            "s8 dot",
            "native",
            "the MXU multiplies int8, and int4 after XLA's own conversion",
        )
        for operation in _DOTS
    ),
    *(
        Row(
            "tpu",
            operation,
            DYNAMIC,
            "s8 dot",
            "native",
            "the MXU multiplies as with calibrated grids; ranges of rows are passes of their own, "
            "and libtpu estimates 1 % more cycles for a small dense network and twice as many for "
            "a small attention block",
        )
        for operation in _DOTS
    ),
    *(
        Row(
            "tpu",
            operation,
            ("w4a4", "a4"),
            "s4 dot",
            "native",
            "the MXU multiplies int4 as it is",
        )
        for operation in _DOTS
    ),
    *(
        Row(
            "tpu",
            operation,
            INTEGER,
            "s8 conv",
            "native",
            "JAX's convolutions refuse mixed widths: int4 is converted, and XLA folds it back",
        )
        for operation in _CONVS
    ),
    Row(
        "tpu",
        "weights only",
        (*WEIGHTS, *GROUPED),
        "float dot",
        "none",
        "codes become floats inside the product's program, without a copy in memory, and the MXU "
        "multiplies those: as many cycles as bfloat16 at 512 rows (libtpu's estimate), and half or "
        "a quarter of its weights' bytes to read",
    ),
)


_FUSED: tuple[tuple[Operation, str, str], ...] = (
    (
        "dot",
        "1.2 to 1.3 times XLA's int8",
        "sums are finished in registers and written once, as codes; 94 % of the peak at 128 rows, "
        "81 % at 4",
    ),
    ("one row", "4.7 to 9.5 times XLA's int8", "bound by reading the weights, which are packed"),
    ("one column", "not measured", "as any dot"),
    (
        "conv",
        "1.3 to 5.5 times XLA's int8",
        "pixels are laid out as rows of a dot, as many as stay in cache; 3 x 3 reach 88 to 95 % of "
        "the peak, 1 x 1 of few channels 36 to 54 %",
    ),
    (
        "stem",
        "1.7 to 2.7 times XLA's int8",
        "a row of the kernel with its channels is one run of products",
    ),
    (
        "depthwise",
        "3.2 to 8.3 times XLA's int8",
        "four taps to an instruction, shared between neighbouring rows",
    ),
    (
        "batched dot",
        "2.1 times XLA's int8",
        "the right operand of every product is packed on the way, and nothing is transposed; "
        "72 % of the peak",
    ),
    (
        "short batched dot",
        "3.8 to 4.2 times XLA's float32 of codes",
        "as any batched dot; 59 to 66 % of the peak",
    ),
)


def _formats(operation: Operation) -> tuple[str, ...]:
    return ("a8", "a4") if operation in ("batched dot", "short batched dot") else INTEGER


NATIVE: tuple[Row, ...] = tuple(
    Row("native", operation, _formats(operation), "fused kernel", speed, reason)
    for operation, speed, reason in _FUSED
)
"""What `native` has kernels for; everything else runs as on "cpu". Grids of rows are not among
it. Speed: one core with AVX512-VNNI, `benchmarks/native_kernels.py`.
"""


def has_kernel(operation: str, format_: str) -> bool:
    """Whether `native` has a kernel of its own.

    >>> has_kernel("depthwise", "w8a8"), has_kernel("grouped", "w8a8"), has_kernel("dot", "w8")
    (True, False, False)
    """
    return any(row.operation == operation and format_ in row.formats for row in NATIVE)


def row_of(backend: str, operation: str, format_: str) -> Row:
    """The row that decides.

    Raises:
      KeyError: no such combination.

    >>> row_of("cpu", "one row", "w8a8").formulation
    's8 dot, two rows'
    """
    for row in TABLE:
        if (row.backend, row.operation) == (backend, operation) and format_ in row.formats:
            return row
    raise KeyError(f"no formulation of {operation!r} in {format_!r} on {backend!r}")


INT8_KERNELS_ON_CPU = (0, 12)
"""The first version of jax whose CPU backend has int8 kernels."""


def remarks(
    backend: str, formats: Iterable[str], jax_version: str = jax.__version__
) -> tuple[str, ...]:
    """What formats do not do well on a backend, for people who choose among them.

    >>> remarks("cpu", ["w8a8"], "0.10.2")
    ('jax 0.10.2 has no int8 kernels on CPU: ...)

    >>> remarks("tpu", ("w8a8", "w4a8"))
    ()
    >>> len(remarks("cpu", ("w4g16",))), len(remarks("cuda", ("w8a8",)))
    (2, 1)
    """
    used, found = {name.partition("g")[0] for name in formats}, []  # w4g32 is a w4
    version = tuple(int(part) for part in jax_version.split(".")[:2])
    if backend == "cpu" and version < INT8_KERNELS_ON_CPU and used & {*DOTS, *DYNAMIC}:
        found.append(
            f"jax {jax_version} has no int8 kernels on CPU: integer layers are about as fast as "
            "float32, some slower; they are faster from jax 0.12 on, or on native kernels"
        )
    if backend == "cpu" and used & {"w4a4", "w4a8", "w4a8d", "w4"}:
        found.append(
            "int4 weights are smaller but not faster on CPU: every call unpacks them to int8"
        )
    if backend == "cuda" and used & {*INTEGER, *DYNAMIC}:
        found.append(
            "convolutions sum into float32 on CUDA: sums of codes past 2^24 are rounded there, by "
            "at most 2^-24 of the sum and of its zero point's share, so that a code may differ "
            "from the simulation's by a step"
        )
    if backend == "cpu" and used & set(WEIGHTS):
        found.append("weight-only formats save memory, not time: the operation stays float")
    if backend == "cpu" and used & {"a8", "a4", "a8d"}:
        found.append(
            "products of two activations are often slower in integers than in float among XLA's "
            "operations on CPU, since both are quantized in every call, and make nothing smaller; "
            "consider skipping them, or native kernels, on which they are faster"
        )
    return tuple(found)


def remarks_on_layers(kinds: Iterable[str]) -> tuple[str, ...]:
    """What a model's layers can't have, for people who choose among formats.

    Args:
      kinds: of its sites: "dot", "conv", "gather".

    >>> remarks_on_layers(["dot"])
    ()
    """
    if "conv" not in kinds:
        return ()
    return (
        "convolutions have no rows with grids of their own: in w8a8d and w4a8d they become w8a8 "
        "and w4a8, with calibrated grids; nor groups: in w4g32, w4g64 and w4g128 they become w4",
    )


def dot_operation(rows: Any, columns: Any, batch_dims: int, *, is_short: bool = False) -> Operation:
    """The kind of a dot.

    Args:
      rows: product of the left operand's free dims; may be symbolic.
      columns: of the right operand's.
      batch_dims: how many dims are batched.
      is_short: whether zero points need sums at run time, and no sum of codes less zero points
        can pass 2^24 (of 8 bits on both sides: 2 to 258 products).

    >>> dot_operation(1, 10, 0), dot_operation(128, 128, 1)
    ('one row', 'batched dot')
    """
    if batch_dims:
        is_vector = rows == 1 and columns == 1  # XLA:CPU makes no dot of it
        return "short batched dot" if is_short and not is_vector else "batched dot"
    return "one row" if rows == 1 else "one column" if columns == 1 else "dot"


def conv_operation(
    channels: int, features: int, groups: int, *, batch_groups: int = 1, dilated: bool = False
) -> Operation:
    """The kind of a convolution.

    Args:
      channels: of the input.
      features: of the output.
      groups: feature groups.
      batch_groups: batch groups.
      dilated: whether the kernel has holes.

    >>> conv_operation(3, 64, 1), conv_operation(8, 8, 8), conv_operation(64, 64, 32)
    ('stem', 'depthwise', 'grouped')
    """
    if batch_groups > 1:
        return "conv"
    if groups == channels:
        return "depthwise"
    if groups > 1:
        return "grouped" if groups <= BLOCK_GROUPS else "conv"
    is_stem = channels < STEM_CHANNELS and features > KERNEL_FEATURES and not dilated
    return "stem" if is_stem else "conv"

"""Where a model's time goes on this machine: every layer in every format, by the profiler.

A uniform model of each format is compiled and run under `jax.profiler`, whose events name the
instructions of the compiled program; their metadata names the sites. What follows a site, up to the
next one, counts for it: a loop that rescales its result, normalizes it and quantizes it for the
next site is the first one's, whether XLA fuses it or not. So formats can be compared layer by
layer. Where XLA puts several products into one instruction they share its time by their products.
The whole program's time is the median of runs without the profiler, all programs in turns, and is
dealt out in proportion to the events.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxrmils.graph import Format, Graph, ModelTable, tabulate
from jaxrmils.lowering.hlo import scoped_site
from jaxrmils.lowering.hlo_text import Instruction, Text, parse
from jaxrmils.lowering.integer_dot import dot_int32
from jaxrmils.lowering.native_model import native
from jaxrmils.lowering.quantized_model import default_backend, quantize
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.numerics import Ranges
from jaxrmils.policies import (
    FORMATS,
    LatencyTable,
    Plan,
    PlanError,
    check_plan,
    parse_format,
    uniform,
)
from jaxrmils.policies.formats import fit
from jaxrmils.progress import Progress, silent

Kernels = Literal["xla", "native"]
"""XLA's operations (`QuantizedModel`), or kernels of our own (`native`)."""
THIS_PLAN = "this plan"
_PRODUCTS = ("dot", "convolution", "custom-call")
_CONTAINERS = ("while", "conditional", "call")
_PEAK_SIZE = 1536


@dataclass(frozen=True)
class ProgramTimes:
    """A program on this machine.

    Attributes:
      seconds: median of a whole call.
      layers: seconds of each layer, of all its sites and iterations.
      rest: seconds that belong to no layer.
    """

    seconds: float
    layers: Mapping[str, float]
    rest: float


@dataclass(frozen=True)
class Prediction:
    """A plan's time as the latency table has it, beside the measured one.

    Attributes:
      name: of the plan.
      measured: seconds of a call.
      predicted: seconds by its layers' times; None where a format of it was not measured.
      is_uniform: whether the table was made from this program, among others.
      missing: what the table lacks, in words.
    """

    name: str
    measured: float
    predicted: float | None
    is_uniform: bool
    missing: str = ""

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return None if self.predicted is None else self.predicted / self.measured


@dataclass(frozen=True)
class Profile:
    """Programs side by side.

    Attributes:
      programs: by "float", a format, `THIS_PLAN`, or the name of another plan.
      plans: what ran in each.
      batch_size: examples in a call.
      environment: backend, device, versions, cores.
      peak: int8 operations a second of a large dot; a multiplication and an addition are two.
      compared: the programs that the latency table is compared with and not made of.
    """

    programs: Mapping[str, ProgramTimes]
    plans: Mapping[str, Plan]
    batch_size: int
    environment: Mapping[str, str]
    peak: float
    compared: tuple[str, ...] = (THIS_PLAN,)

    def latency_table(self) -> LatencyTable:
        """The uniform programs as `budget` reads them; `overhead` is the median of their rests."""
        seconds: dict[str, dict[Any, float]] = {}
        rests = []
        for name, times in self.programs.items():
            if name in self.compared:
                continue
            rests.append(times.rest)
            for layer, value in times.layers.items():
                entry = seconds.setdefault(layer, {})
                entry.setdefault(self.plans[name].layers[layer].format, value)
        return LatencyTable(
            seconds,
            self.environment["backend"],
            f"measured with batches of {self.batch_size} on {self.environment['device']}"
            + ", native kernels" * (self.environment.get("kernels") == "native"),
            overhead=statistics.median(rests),
        )

    def predicted(self, plan: Plan) -> float:
        """Seconds of a call by the latency table.

        Raises:
          PlanError: the plan has a format that was not measured.
        """
        table = self.latency_table()
        return table.overhead + sum(table.of(n, layer) for n, layer in plan.layers.items())

    def predictions(self) -> tuple[Prediction, ...]:
        """Every program's time as the latency table predicts it, and as it was measured."""
        found = []
        for name, times in self.programs.items():
            predicted, missing = None, ""
            try:
                predicted = self.predicted(self.plans[name])
            except PlanError as error:
                missing = str(error)
            is_uniform = name not in self.compared
            found.append(Prediction(name, times.seconds, predicted, is_uniform, missing))
        return tuple(found)


def formats_to_measure(
    table: ModelTable, formats: Iterable[str], plans: Iterable[Plan] = ()
) -> tuple[str, ...]:
    """The formats whose uniform models have every layer as formats and plans may have it.

    Args:
      table: the model's layers.
      formats: names of formats; float is left out, as it is measured anyway.
      plans: for this model.

    Raises:
      PlanError: an unknown format.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import tabulate, trace
    >>> table = tabulate(trace(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, jnp.ones((1, 8))))
    >>> formats_to_measure(table, ["w8a8", "float"], [uniform(table, "w8"), uniform(table, "int8")])
    ('w8a8', 'w8')
    """
    found: dict[Format, str] = {}
    for name in formats:
        found.setdefault(parse_format(name), name)
    found.pop(parse_format("float"), None)
    for plan in plans:
        for name, layer in plan.layers.items():
            row = table.layer[name]
            if layer.is_float or any(fit(row, each) == layer.bits for each in found):
                continue
            of = [n for n, each in FORMATS.items() if fit(row, each) == layer.bits]
            if of:  # Else no uniform model has such a layer.
                found[parse_format(of[0])] = of[0]
    return tuple(found.values())


def profile(
    graph: Graph,
    params: Any,
    ranges: Ranges,
    inputs: Any,
    *,
    formats: Sequence[str] = ("w8a8", "w4a8"),
    plan: Plan | None = None,
    plans: Mapping[str, Plan] | None = None,
    kernels: Kernels = "xla",
    rounds: int = 15,
    progress: Progress = silent,
) -> Profile:
    """Times every layer in float and in uniform formats, and plans beside them.

    Args:
      graph: from `trace`.
      params: the float parameters.
      ranges: from `calibrate`.
      inputs: a batch, of the size that is to be served.
      formats: what to measure besides float.
      plan: a plan to measure too, as `THIS_PLAN`.
      plans: further plans, by names of your own.
      kernels: "native" for the kernels of `native`, on CPU.
      rounds: timed calls of every program.
      progress: see `jaxrmils.progress`.

    Returns:
      The times.

    Raises:
      LoweringError: the profiler saw no instruction of a program, rounds is below 1, or native
        kernels can't be used here.
      PlanError: an unknown format, a plan for another model, or one with the name of a format.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, trace
    >>> x, params = jnp.ones((4, 64)), {"w": jnp.ones((64, 64))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    >>> found = profile(graph, params, calibrate(graph, params, [x]), x, formats=("w8a8",))
    >>> sorted(found.latency_table().seconds["w"])
    ['float', 'w8a8']
    """
    if rounds < 1:
        raise LoweringError(f"rounds is {rounds}; expected at least 1")
    if kernels not in get_args(Kernels):
        raise LoweringError(f"kernels {kernels!r}; expected one of {', '.join(get_args(Kernels))}")
    for name in formats:
        parse_format(name)
    table = tabulate(graph)
    uniforms = {name: uniform(table, name) for name in ("float", *formats)}
    own = {} if plan is None else {THIS_PLAN: plan}
    for name in plans or {}:
        if name in uniforms or name in own:
            raise PlanError(f"a plan is named {name!r}, as another program; give it another name")
    compared = own | dict(plans or {})
    for each in compared.values():
        check_plan(each, table)
    every = uniforms | compared
    calls: dict[str, Callable[[], Any]] = {}
    texts: dict[str, str] = {}
    inputs = jax.tree.map(jnp.asarray, inputs)
    for name in progress(list(every), "compiling", len(every)):
        model: Any = quantize(graph, params, every[name], ranges)
        if kernels == "native":
            model = native(model)
        compiled = jax.jit(model.apply).lower(model.params, inputs).compile()
        texts[name] = compiled.as_text() or ""
        calls[name] = _call(compiled, model.params, inputs)
    seconds = _alternating(calls, rounds, progress)
    programs = {}
    for name, run in calls.items():
        shares, rest = _shares(_events(run), texts[name], graph)
        layers = {layer: seconds[name] * shares.get(layer, 0.0) for layer in graph.layers}
        programs[name] = ProgramTimes(seconds[name], layers, seconds[name] * rest)
    batch = jax.tree.leaves(inputs)[0].shape[0]
    where = environment() | {"kernels": kernels}
    return Profile(programs, every, batch, where, _peak(), tuple(compared))


def environment() -> dict[str, str]:
    """What times depend on."""
    device = jax.devices()[0]
    kind = device.device_kind
    if kind == "cpu":
        kind = _cpu_name()
    return {
        "backend": default_backend(),
        "device": f"{kind}, {os.cpu_count()} cores" if device.platform == "cpu" else kind,
        "jax": jax.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _call(compiled: Any, params: Any, inputs: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(compiled(params, inputs))


def _alternating(
    calls: Mapping[str, Callable[[], Any]], rounds: int, progress: Progress
) -> dict[str, float]:
    """Median seconds of each, all run in turns, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in calls.values():
        run()
    for turn in progress(range(rounds), "timing", rounds):
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _events(run: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Nanoseconds by instruction, from the profiler."""
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                run()
        found: dict[str, float] = {}
        for path in Path(folder).rglob("*.xplane.pb"):
            data = jax.profiler.ProfileData.from_file(str(path))
            with warnings.catch_warnings():
                # The types of its events are made without a module's name.
                warnings.simplefilter("ignore", DeprecationWarning)
                for plane in data.planes:
                    for line in plane.lines:
                        for event in line.events:
                            if any(key == "hlo_op" for key, _ in event.stats):
                                name = event.name
                                found[name] = found.get(name, 0.0) + event.duration_ns
    return found


def _shares(
    events: Mapping[str, float], compiled_text: str, graph: Graph
) -> tuple[dict[str, float], float]:
    """Each layer's share of a program's time, and that of no layer."""
    text = parse(compiled_text)
    layer_of = {site.name: site.layer for site in graph.sites}
    macs = {row.name: row.macs for row in tabulate(graph).layers}
    instructions = {each.name: each for each in text.instructions.values()}
    layers: dict[str, float] = {}
    total = rest = 0.0
    for name, duration in events.items():
        instruction = instructions.get(name)
        if instruction is None or instruction.opcode in _CONTAINERS:
            continue
        total += duration
        owners = [layer_of[site] for site in _owners(text, instruction) if site in layer_of]
        if not owners:
            rest += duration
        work = [max(macs[layer], 1) for layer in owners]
        for layer, part in zip(owners, work, strict=True):
            layers[layer] = layers.get(layer, 0.0) + duration * part / sum(work)
    if total == 0.0:
        raise LoweringError(
            f"the profiler saw none of the program's instructions on {default_backend()}: "
            "nothing can be said of its layers. Is another profile running in this process?"
        )
    return {name: value / total for name, value in layers.items()}, rest / total


def _owners(text: Text, instruction: Instruction) -> list[str]:
    """The sites that an instruction counts for.

    Those whose products are inside it; else the first that has anything in it; else the nearest
    that it reads, else the nearest that reads it.
    """
    inner = _inside(text, instruction)
    products = [scoped_site(each) for each in inner if each.opcode in _PRODUCTS]
    if found := [site for site in dict.fromkeys(products) if site]:
        return found
    for neighbours in (text.operands, lambda each: text.readers[each]):
        seen, front = {instruction}, [instruction]
        while front:
            for each in front:
                if found := [site for i in _inside(text, each) if (site := scoped_site(i))]:
                    return found[:1]
            step = [n for each in front for n in neighbours(each)]
            front = [n for n in dict.fromkeys(step) if n not in seen]
            seen.update(front)
    return []


def _inside(text: Text, instruction: Instruction) -> list[Instruction]:
    """The instructions that a fusion is made of, and itself at the end."""
    called = instruction.called if instruction.opcode == "fusion" else ()
    return [each for (where, _), each in text.instructions.items() if where in called] + [
        instruction
    ]


def _peak() -> float:
    """int8 operations a second, of a large square dot; the best of a few calls."""
    codes = jnp.ones((_PEAK_SIZE, _PEAK_SIZE), jnp.int8)
    backend = default_backend()

    @jax.jit
    def dot(lhs: Any, rhs: Any) -> Any:
        return dot_int32(lhs, rhs, (((1,), (0,)), ((), ())), backend=backend).astype(jnp.int8)

    times = []
    for _ in range(6):
        start = time.perf_counter()
        dot(codes, codes).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * _PEAK_SIZE**3 / min(times)

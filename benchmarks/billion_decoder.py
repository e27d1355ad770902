"""Scoring and the integer model of a 1.3-billion-parameter decoder, compiled for a TPU slice.

Everything is shapes: no parameter, no example and no TPU exists. The decoder (24 layers of width
2048, scanned and rematerialized, bfloat16) is traced from `jax.ShapeDtypeStruct`, and libtpu
compiles two programs with sharded parameters: one step of `contributions`, and the forward pass of
the integer model. Reported are bytes per device as the compiler counts them, of the 16 GB that a
v5e has.

    python benchmarks/billion_decoder.py
    python benchmarks/billion_decoder.py --topology v5e:4x4 --data 4 --model 4
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrmils as jr
from jaxrmils.graph import Graph
from jaxrmils.lowering.ahead import abstract_model, without_devices
from jaxrmils.numerics import QuantParams, Ranges, RangeStats
from jaxrmils.numerics.formats import BITS
from jaxrmils.sensitivity import weight_noise

HEADS = 16
SPECS = {
    "embedding": P("model", None),
    "layers/query": P(None, None, "model"),
    "layers/key": P(None, None, "model"),
    "layers/value": P(None, None, "model"),
    "layers/out": P(None, "model", None),
    "layers/up": P(None, None, "model"),
    "layers/down": P(None, "model", None),
}
"""Tensor-parallel: columns, then rows; what is not here is on every device."""


def decoder_shapes(layers: int, width: int, vocabulary: int) -> Any:
    """The parameters, bfloat16."""

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    square, norm = (layers, width, width), (layers, width)
    stack = {name: struct(*square) for name in ("query", "key", "value", "out")}
    stack |= {"up": struct(layers, width, 4 * width), "down": struct(layers, 4 * width, width)}
    stack |= {"norm_attention": struct(*norm), "norm_mlp": struct(*norm)}
    return {"embedding": struct(vocabulary, width), "layers": stack, "norm": struct(width)}


def rms_norm(x: Any, scale: Any) -> Any:
    """x / sqrt(mean x^2), scaled; in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * scale


def layer(x: Any, params: Any) -> Any:
    """Attention that looks back, and an MLP."""
    count, length, width = x.shape
    h = rms_norm(x, params["norm_attention"])
    parts = (h @ params[name] for name in ("query", "key", "value"))
    query, key, value = (p.reshape(count, length, HEADS, -1) for p in parts)
    scores = jnp.einsum("bthd,bshd->bhts", query, key).astype(jnp.float32)
    scores = scores / math.sqrt(width // HEADS)
    causal = jnp.tril(jnp.ones((length, length), jnp.bool_))
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.float32(-1e9)))
    mixed = jnp.einsum("bhts,bshd->bthd", weights.astype(x.dtype), value)
    x = x + mixed.reshape(count, length, width) @ params["out"]
    h = rms_norm(x, params["norm_mlp"])
    return x + jax.nn.gelu(h @ params["up"]) @ params["down"]


def apply(params: Any, tokens: Any) -> Any:
    """Logits [batch, length, vocabulary], float32."""
    step = jax.checkpoint(lambda x, p: (layer(x, p), None))
    x, _ = jax.lax.scan(step, params["embedding"][tokens], params["layers"])
    x = rms_norm(x, params["norm"])
    return (x @ params["embedding"].T).astype(jnp.float32)


def next_token_loss(logits: Any, tokens: Any) -> Any:
    """Cross-entropy of the next token, the mean over a sequence: [batch]."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0], axis=-1)


def any_ranges(graph: Graph) -> Ranges:
    """Ranges as shapes."""

    def make() -> Ranges:
        stats, grids = {}, {}
        for site in graph.sites:
            if site.activations:
                ones = jnp.ones(site.stacked_lengths, jnp.float32)
                zeros = jnp.zeros(site.stacked_lengths, jnp.int32)
                one = {bits: QuantParams(ones, zeros, bits, False) for bits in BITS}
                stats[site.name] = (RangeStats(-ones, ones, None),) * len(site.activations)
                grids[site.name] = (one,) * len(site.activations)
        return Ranges(stats, grids, "minmax", False, 100.0, 1, graph.fingerprint)

    return jax.eval_shape(make)


def sharded(tree: Any, graph: Graph, mesh: Mesh) -> Any:
    """Shapes with shardings: those of the parameters' shapes are split as they are."""
    leaves = zip(graph.leaf_names, jax.tree.leaves(graph.params), strict=True)
    specs = {leaf.shape: SPECS[name] for name, leaf in leaves if name in SPECS}
    # Of one shape are query, key, value and out; the latter is split by rows.
    out = graph.params["layers"]["out"].shape

    def place(path: Any, x: Any) -> Any:
        spec = specs.get(x.shape, P())
        if x.shape == out:
            spec = SPECS["layers/out" if "out" in jax.tree_util.keystr(path) else "layers/query"]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def compiled(name: str, function: Callable[..., Any], *shapes: Any) -> dict[str, Any]:
    """Seconds, and bytes per device; printed, too."""
    start = time.perf_counter()
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    done = time.perf_counter()
    assert memory is not None
    argument, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = argument + temporary + memory.output_size_in_bytes + memory.generated_code_size_in_bytes
    print(
        f"{name:16} {total / 1e9:6.2f} GB per device ({argument / 1e9:.2f} arguments, "
        f"{temporary / 1e9:.2f} temporaries); traced in {traced - start:.0f} s, compiled in "
        f"{done - traced:.0f} s",
        flush=True,
    )
    return {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "argument_bytes": argument,
        "temporary_bytes": temporary,
        "output_bytes": memory.output_size_in_bytes,
        "total_bytes": total,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles both programs."""
    params = decoder_shapes(options.layers, options.width, options.vocabulary)
    tokens = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
    graph = jr.trace(apply, params, tokens)
    ranges = any_ranges(graph)
    noise = jax.eval_shape(lambda p: weight_noise(graph, p), params)
    with without_devices():
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=options.topology
        ).devices
        shape = options.data, options.model
        grid = np.array(devices).reshape(shape)
        mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        rows = jax.ShapeDtypeStruct(
            tokens.shape, tokens.dtype, sharding=NamedSharding(mesh, P("data"))
        )

        def scoring(params: Any, noise: Any, ranges: Any, tokens: Any) -> Any:
            return jr.contributions(
                graph, params, tokens, tokens, next_token_loss, ranges, noise=noise
            )

        def place(tree: Any) -> Any:
            return sharded(tree, graph, mesh)

        model = abstract_model(graph, jr.uniform(jr.tabulate(graph), options.format), "tpu")
        programs = {
            "float forward": (apply, place(params), rows),
            f"{options.format} forward": (model.apply, place(model.params), rows),
            "scoring": (scoring, place(params), place(noise), place(ranges), rows),
        }
        result = {name: compiled(name, *each) for name, each in programs.items()}
    return {
        "command": shlex.join(["python", "benchmarks/billion_decoder.py", *sys.argv[1:]]),
        "jax": jax.__version__,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "topology": options.topology,
        "mesh": dict(zip(mesh.axis_names, shape, strict=True)),
        "sequences": options.batch,
        "tokens": options.length,
        "sites": len(graph.sites),
        "programs": result,
    }


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="as libtpu names it (v5e:2x2)")
    parser.add_argument("--data", type=int, default=1, help="devices that share the examples (1)")
    parser.add_argument("--model", type=int, default=4, help="devices that share a matrix (4)")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--format", default="w4a8", help="of the integer model (w4a8)")
    parser.add_argument("--quick", action="store_true", help="2 layers of width 128")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.vocabulary = 2, 128, 256
        options.batch, options.length = 2, 16
    if options.output is None:
        name = f"billion_decoder_{options.topology.replace(':', '_')}.json"
        options.output = Path(__file__).parent / "results" / name
    return options


def main() -> None:
    """Compiles and prints."""
    options = parse()
    result = run(options)
    print(f"{result['parameters']:,} parameters, {result['sites']} sites, mesh {result['mesh']}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Run by `test_distributed.py` in several processes: the job of `sharded_job`, on its own part."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_job import TENSOR_PARALLEL, brief, data, everything, model


def placed(params, mesh):
    """Every process makes the part that is its own."""
    return {
        name: jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, TENSOR_PARALLEL[name]), np.asarray(value).__getitem__
        )
        for name, value in params.items()
    }


def main(port, processes, number, case, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(number))
    process, count = jax.process_index(), jax.process_count()
    params, graph = model()
    devices = np.array(jax.devices())
    if case == "examples":
        # Each process holds a part of the examples, unequal ones; params are split within it.
        mesh = Mesh(devices.reshape(count, -1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        own = {0: data()[:2], 1: data()[2:]}[process]
        found = everything(graph, placed(params, mesh), own, NamedSharding(mesh, P("data")))
    elif case == "params":
        # Pairs of processes hold half of the params each, and the same examples.
        mesh = Mesh(devices.reshape(-1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        own = {0: data()[:2], 1: data()[2:]}[process // 2]
        sharding = NamedSharding(mesh, P("data"))
        found, _ = brief(graph, placed(params, mesh), own, sharding, folder / "kept")
        # Once more, from what was kept: nothing is computed again.
        again, _ = brief(graph, placed(params, mesh), own, sharding, folder / "kept")
        jax.tree.map(np.testing.assert_array_equal, found, again)
    else:
        mesh = Mesh(devices, ("data",))
        bad = [(np.full((8, 16), np.nan, np.float32), y) for _, y in data()[:1]]
        try:
            brief(graph, params, bad if process else data()[:1], NamedSharding(mesh, P("data")))
        except ValueError as error:
            (folder / f"{process}.txt").write_text(str(error))
        return
    if process == 0:
        leaves, _ = jax.tree.flatten(found)
        np.savez(folder / "found.npz", *[np.asarray(leaf) for leaf in leaves])


if __name__ == "__main__":
    main(*sys.argv[1:5], Path(sys.argv[5]))

"""Run by `test_sharded.py` in a process with eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrmils as jr
from jaxrmils.evaluation.constant_shift import mean_noise
from jaxrmils.numerics.progress_checkpoint import digest
from jaxrmils.policies import Simulator
from jaxrmils.sensitivity import Candidate, weight_noise
from jaxrmils.sensitivity.moments import score_moments

FEW = {"activation_candidates": (Candidate(4),), "weight_candidates": ()}
TENSOR_PARALLEL = {"a": P(None, "model"), "stack": P(None, None, "model"), "b": P("model", None)}
FULLY_SHARDED = {"a": P("data"), "stack": P(None, "data"), "b": P("data")}


def apply(params, x):
    """A dense layer, two scanned ones, a product of activations, and another dense layer."""
    h = jax.nn.relu(x @ params["a"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    h = jnp.einsum("nij,njk->nik", *[h.reshape(-1, 4, 4)] * 2).reshape(-1, 16)
    return h @ params["b"]


def loss(outputs, targets):
    return jnp.mean((outputs - targets[:, None]) ** 2, axis=-1)


def model():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (16, 16), "stack": (2, 16, 16), "b": (16, 8)}
    params = {n: jax.random.normal(k, shapes[n]) / 2 for n, k in zip(shapes, keys, strict=True)}
    return params, jr.trace(apply, params, jax.ShapeDtypeStruct((2, 16), jnp.float32))


def of_sequences(params, x):
    """Enough rows for weights to be scored by their gradients."""
    return jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"], axis=1)


def data(seed=0, sizes=(8, 8, 5)):
    """The last batch divides by no number of devices; targets have numpy's own integers."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 16)).astype(np.float32), rng.integers(0, 3, n)) for n in sizes]


def float_loss(outputs, targets):
    return loss(outputs, targets.astype(jnp.float32))


def everything(graph, params, batches, sharding):
    """What a user of several devices computes."""
    plan = jr.uniform(jr.tabulate(graph), "w4a8")
    found, ranges = brief(graph, params, batches, sharding)
    moments = score_moments(graph, params, batches, float_loss, ranges, sharding=sharding)
    parts = jr.attribute(graph, params, plan, batches, float_loss, ranges, sharding=sharding)
    on = Simulator(graph, float_loss, sharding=sharding).on(params, ranges, batches)
    return {
        **found,
        "mean": moments.moments.mean,
        "products": moments.moments.products,
        "layers": parts.layers,
        "simulated": on.attribute(plan).layers,
        "change": on.change(plan),
        "divergence": on.divergences(0.25).change(plan),
        "beyond": on.divergences(0.25).attribute(plan).layers,
    }


def brief(graph, params, batches, sharding, checkpoint=None, ranges=None):
    """Ranges, calibrated unless they are given, and scores."""
    keep = {"sharding": sharding, "checkpoint_seconds": 0.0}
    folders = [None, None] if checkpoint is None else [checkpoint / "ranges", checkpoint / "scores"]
    inputs = [x for x, _ in batches]
    ranges = ranges or jr.calibrate(graph, params, inputs, checkpoint=folders[0], **keep)
    scores = jr.score(graph, params, batches, float_loss, ranges, checkpoint=folders[1], **keep)
    found = {
        "grids": jax.tree.leaves(ranges.grids),
        "histograms": [s.histogram for each in ranges.stats.values() for s in each],
        "examples": np.float32(ranges.examples),
        "loss": scores.loss,
        "activations": scores.activations,
        "weights": scores.weights,
        "gradient_square": scores.gradient_square,
    }
    return found, ranges


def check(expected, found):
    """Equal but for the order of sums: an activation may fall on the other side of a step."""
    for name in found:
        for one, many in zip(
            jax.tree.leaves(expected[name]), jax.tree.leaves(found[name]), strict=True
        ):
            one, many = np.asarray(one, np.float64), np.asarray(many, np.float64)
            assert one.shape == many.shape, (name, one.shape, many.shape)
            if name == "histograms":
                assert one.sum() == many.sum() and np.abs(one - many).sum() <= 4, name
                continue
            scale = float(np.abs(one).max())
            np.testing.assert_allclose(many, one, rtol=0, atol=1e-4 * scale, err_msg=name)


def judged(graph, params, ranges, sharding):
    """Curvature, and what a report measures; controls are simulated as layers are."""
    batches = [(x, y.astype(np.float32)) for x, y in data()]
    bent = jr.curvature(graph, params, batches, loss, ranges, sharding=sharding, **FEW)
    plan = jr.uniform(jr.tabulate(graph), "w4a8")
    model = jr.quantize(graph, params, plan, ranges)
    options = {"ranges": ranges, "attributed": False, "sharding": sharding}
    report = jr.verify(graph, params, model, batches, loss, **options)
    changes = [report.test.mean, report.test.upper_bound]
    changes += [layer.measured.mean for layer in report.layers]
    shifts = mean_noise(graph, params, plan, batches, ranges, sharding)
    # Changes beside the loss that they are differences of.
    judged = np.array([report.float_loss, *changes])
    return {"curvature": bent.activations, "report": judged, "shifts": shifts}


def costs(graph, params, ranges):
    """What objectives with a pass of their own find."""
    batches = [(x, y.astype(np.float32)) for x, y in data()]
    found = {
        name: jr.MEASURED_COSTS[name](
            graph, params, batches, loss, ranges, formats=("w4a4",)
        ).options
        for name in ("squared_output", "fisher", "hessian_trace", "sqnr")
    }
    return {
        name: [np.array(list(layer.values())) for layer in options.values()]
        for name, options in found.items()
    }


def quantized(graph, params, sharded, mesh):
    """The integer model with sharded parameters gives the same numbers."""
    x = data()[0][0]
    ranges = jr.calibrate(graph, params, [x])
    plan = jr.uniform(jr.tabulate(graph), "w4a8")
    single = jr.quantize(graph, params, plan, ranges)
    model = jr.quantize(graph, sharded, plan, ranges)
    outputs = jax.jit(model.apply)(model.params, jax.device_put(x, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(outputs, jax.jit(single.apply)(single.params, x), atol=1e-5)
    assert outputs.sharding.spec == P("data")


def main():
    assert len(jax.devices()) == 8
    params, graph = model()
    one = everything(graph, params, data(), None)
    axes = ("data", "model")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    place = lambda mesh, specs: {  # noqa: E731
        k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()
    }
    sharded = place(mesh, TENSOR_PARALLEL)
    check(one, everything(graph, sharded, data(), NamedSharding(mesh, P("data"))))
    ranges = jr.calibrate(graph, params, [x for x, _ in data()], estimator="minmax")
    spread = NamedSharding(mesh, P("data"))
    check(judged(graph, params, ranges, None), judged(graph, sharded, ranges, spread))
    quantized(graph, params, sharded, mesh)
    assert digest(sharded) == digest(params)
    noise = jax.jit(lambda p: weight_noise(graph, p))(sharded)
    assert noise["a"][0].sharding.is_equivalent_to(sharded["a"].sharding, 2), noise["a"][0].sharding
    # The axes that make_mesh makes by itself are part of the types of values.
    explicit = jax.make_mesh((4, 2), axes)
    sharded = place(explicit, FULLY_SHARDED)
    check(one, everything(graph, sharded, data(), NamedSharding(explicit, P("data"))))
    # And without a sharding of the batches. A zero point on the edge of two may come out as either.
    jr.calibrate(graph, sharded, [x for x, _ in data()])
    check(
        brief(graph, params, data(), None, ranges=ranges)[0],
        brief(graph, sharded, data(), None, ranges=ranges)[0],
    )
    check(costs(graph, params, ranges), costs(graph, sharded, ranges))
    long = [(np.stack([x, x[::-1]] * 20, axis=1), y) for x, y in data()]
    few, placed = ({n: p[n] for n in ("a", "b")} for p in (params, place(mesh, TENSOR_PARALLEL)))
    deep = jr.trace(of_sequences, few, long[0][0])
    check(brief(deep, few, long, None)[0], brief(deep, placed, long, spread)[0])
    # Parameters of one device, examples over all eight.
    check(one, brief(graph, params, data(), NamedSharding(mesh, P(axes)))[0])


if __name__ == "__main__":
    main()

"""The batch that is said to fit does, and a batch that is much larger does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrmils as jr
from jaxrmils.policies import batch_size, batch_size_for
from jaxrmils.sensitivity import ScoreError, contributions
from jaxrmils.sensitivity.batch_size import SIZES, example_bytes, fitting_batch_size
from jaxrmils.sensitivity.fisher_diagonal import fisher_diagonal
from jaxrmils.zoo import cross_entropy

SIDE, WIDTH, DEPTH = 16, 8, 4


def apply(params, x):
    x = x.astype(jnp.float32)
    for kernel in params["kernels"]:
        x = jnp.tanh(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
        )
    return x.mean(axis=(1, 2)) @ params["head"] + params["counts"].astype(jnp.float32)


NHWC = ("NHWC", "HWIO", "NHWC")
PARAMS = {
    "kernels": [np.full((3, 3, WIDTH, WIDTH), 0.01, np.float32)] * DEPTH,
    "head": np.ones((WIDTH, 5), np.float32),
    "counts": np.zeros(5, np.int32),
}
IMAGES = np.random.default_rng(0).integers(0, 9, (40, SIDE, SIDE, WIDTH)).astype(np.uint8)
LABELS = np.zeros(40, np.int32)


@pytest.fixture(scope="module")
def graph():
    return jr.trace(apply, PARAMS, IMAGES[:1])


def test_what_a_step_keeps_is_counted_once_per_example(graph):
    # Every layer keeps its input and tanh's output, which is the next one's input.
    layer = SIDE * SIDE * WIDTH * 4
    found = example_bytes(graph, PARAMS, cross_entropy, IMAGES, LABELS)
    assert DEPTH * layer <= found <= (2 * DEPTH + 1) * layer


def test_the_scoring_step_fits(graph):
    ranges = jr.calibrate(graph, PARAMS, [IMAGES[:4]])
    limit = 4 * 10**6

    def temporary(count):
        step = jax.jit(lambda p, x, y: contributions(graph, p, x, y, cross_entropy, ranges))
        compiled = step.lower(PARAMS, IMAGES[:count], LABELS[:count]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = fitting_batch_size(graph, PARAMS, cross_entropy, IMAGES, LABELS, memory_bytes=limit)
    assert 2 <= size < 40
    assert limit / 10 < temporary(size) < limit


def test_the_compiled_size_fits_and_the_next_does_not(monkeypatch):
    params, x = {"w": np.ones((64, 64), np.float32)}, np.ones((4, 64), np.float32)
    small = jr.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], params, x)
    squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)  # noqa: E731
    ranges = jr.calibrate(small, params, [x], estimator="minmax")
    compiled = {}
    program_bytes = batch_size._bytes

    def bytes_of(lowered):
        arrays = [leaf for leaf in jax.tree.leaves(lowered.in_avals) if leaf.shape]
        count = arrays[-1].shape[0]
        compiled.setdefault(count, []).append(program_bytes(lowered))
        return compiled[count][-1]

    monkeypatch.setattr(batch_size, "_bytes", bytes_of)
    known = (small, params, squares, ranges, x, x)
    limit = 2.5e5
    found = batch_size_for(limit, *known, steps=("score", "attribute", "refine"))
    following = SIZES[SIZES.index(found) - 1]
    assert max(compiled[found]) <= limit < max(compiled[following])
    assert len(compiled) <= 5 and all(len(each) == 3 for each in compiled.values())
    # What the compiler says is what the step takes.
    rows = np.ones((found, 64), np.float32)
    step = jax.jit(lambda p, x, y: contributions(small, p, x, y, squares, ranges))
    analysis = step.lower(params, rows, rows).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < compiled[found][0] < 4 * analysis.temp_size_in_bytes
    wide = jr.candidates_for(["w8a8d", "w4g32"])
    one = {"sizes": (4,), "steps": ("simulate",)}
    batch_size_for(limit, *known, **one)
    batch_size_for(limit, *known, **one, candidates=wide)
    assert compiled[4][-1] - compiled[4][-2] >= 4 * 64 * 64  # The noise of a third candidate.
    with pytest.raises(ScoreError, match=r"a batch of 4 takes [\d,]+ bytes, parameters and"):
        batch_size_for(1000, *known, sizes=(4,))
    with pytest.raises(ScoreError, match="steps of"):
        batch_size_for(limit, *known, steps=("scores",))


def test_the_passes_of_objectives_are_counted():
    """A wide layer and short sequences of examples: the weights' gradients are what is large."""
    params, x = {"w": np.ones((64, 512), np.float32)}, np.ones((4, 64), np.float32)
    wide = jr.trace(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)  # noqa: E731
    ranges = jr.calibrate(wide, params, [x], estimator="minmax")
    known = (wide, params, squares, ranges, x, np.ones((4, 512), np.float32))
    limit, weights = 12e6, 4 * 64 * 512
    found = {
        step: batch_size_for(limit, *known, steps=(step,), sizes=(4, 16, 64, 250))
        for step in ("score", "fisher", "squared_output")
    }
    assert found["score"] == found["squared_output"] == 250
    assert found["fisher"] * weights <= limit and found["fisher"] < 250
    both = batch_size_for(limit, *known, steps=("score", "fisher"), sizes=(4, 16, 64, 250))
    assert both == found["fisher"]
    # What the compiler says is what the pass takes.
    rows = np.ones((found["fisher"], 64), np.float32), np.ones((found["fisher"], 512), np.float32)
    step = jax.jit(lambda p, x, y: fisher_diagonal(wide, p, x, y, squares, ranges))
    temporary = step.lower(params, *rows).compile().memory_analysis().temp_size_in_bytes
    assert found["fisher"] * weights / 2 < temporary < limit
    # The estimate goes by the same.
    one = (wide, params, squares, rows[0], rows[1])
    without = fitting_batch_size(*one, memory_bytes=int(limit))
    estimate = fitting_batch_size(*one, memory_bytes=int(limit), weight_gradients=True)
    assert estimate * weights < limit < without * weights


@pytest.mark.parametrize("step", ["hessian_trace", "sqnr"])
def test_an_objective_takes_what_its_programs_take(step):
    params, x = {"w": np.ones((64, 64), np.float32)}, np.ones((4, 64), np.float32)
    small = jr.trace(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    squares = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)  # noqa: E731
    known = (small, params, squares, jr.calibrate(small, params, [x]), x, x)
    options = {"steps": (step,), "sizes": (4, 250), "formats": ("w8a8", "w4a4")}
    assert batch_size_for(1e9, *known, **options) == 250
    assert batch_size_for(1e5, *known, **options) == 4


def test_the_size_follows_the_memory(graph):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, IMAGES[:1], LABELS[:1])
    )

    def size(memory_bytes):
        params, inputs, targets = shapes
        return fitting_batch_size(
            graph, params, cross_entropy, inputs, targets, memory_bytes=memory_bytes
        )

    sizes = [size(10**n) for n in (1, 6, 7, 12)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1 and sizes[1] < sizes[2] and sizes[-1] == 250
    with pytest.raises(ScoreError, match="memory_bytes is 0"):
        size(0)

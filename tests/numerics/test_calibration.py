import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import cnn, matrices, model, random

from jaxrmils import calibrate
from jaxrmils.graph import TraceError, trace
from jaxrmils.numerics import ESTIMATORS, HISTOGRAM_BINS, CalibrationError


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mlp_graph():
    params = matrices("a", "b")
    return trace(mlp, params, random(4, 6)), params


def assert_range(ranges, site, values, position=0):
    stats = ranges.stats[site][position]
    np.testing.assert_allclose(stats.minimum, np.min(values), rtol=1e-6)
    np.testing.assert_allclose(stats.maximum, np.max(values), rtol=1e-6)


def test_range_is_numpys_on_intermediate_activations():
    graph, params = mlp_graph()
    batches = [random(4, 6, seed=s) for s in (3, 4)]
    ranges = calibrate(graph, params, batches, estimator="minmax")
    x = np.concatenate(batches)
    assert_range(ranges, "a", x)
    assert_range(ranges, "b", np.tanh(x @ np.asarray(params["a"])))
    assert ranges.examples == 8 and ranges.fingerprint == graph.fingerprint


def test_both_operands_of_an_attention_dot():
    apply, params, inputs = model("experts")
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs], estimator="minmax")
    assert len(ranges.stats["dot_0"]) == 2
    assert_range(ranges, "dot_1", inputs, position=1)


def test_stacked_layers_have_ranges_of_their_own():
    apply, params, inputs = model("scanned_stack")
    ranges = calibrate(trace(apply, params, inputs), params, [inputs], estimator="minmax")
    (stats,) = ranges.stats["layers/Dense_0/kernel"]
    layer = params["params"]["layers"]["Dense_0"]
    x, expected = inputs, []
    for kernel, bias in zip(layer["kernel"], layer["bias"], strict=True):
        expected.append((np.min(x), np.max(x)))
        x = jnp.tanh(x @ kernel + bias)
    np.testing.assert_allclose(np.stack([stats.minimum, stats.maximum], 1), expected, rtol=1e-5)


def test_a_recurrence_has_one_range():
    apply, params, inputs = model("lstm")
    ranges = calibrate(trace(apply, params, inputs), params, [inputs])
    (stats,) = ranges.stats["OptimizedLSTMCell_0/{if,ig,ii,io}/kernel"]
    assert stats.minimum.shape == ()
    assert (stats.minimum, stats.maximum) == (inputs.min(), inputs.max())
    assert float(stats.histogram.sum()) == inputs.size


@pytest.mark.parametrize("name", ["transformer", "scanned_stack", "tied_embedding"])
def test_histograms_hold_every_element(name):
    apply, params, inputs = model(name)
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs, inputs[:1]])
    for site in graph.sites:
        if not site.activations:
            assert site.name not in ranges.stats
        for index, stats in zip(site.activations, ranges.stats.get(site.name, ()), strict=True):
            assert stats.histogram.shape == (*site.stacked_lengths, HISTOGRAM_BINS)
            np.testing.assert_array_equal(
                np.sum(stats.histogram, -1), (len(inputs) + 1) * site.operands[index].size
            )


def test_deterministic():
    graph, params = mlp_graph()
    one, two = (calibrate(graph, params, [random(4, 6)]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, dict(one.stats), dict(two.stats))


def test_two_batches_equal_one():
    graph, params = mlp_graph()
    x = random(8, 6)
    for estimator in ("minmax", "percentile"):
        whole = calibrate(graph, params, [x], estimator=estimator)
        parts = calibrate(graph, params, [x[:5], x[5:]], estimator=estimator)
        for site in ("a", "b"):
            one, two = whole.grids[site][0][8], parts.grids[site][0][8]
            np.testing.assert_allclose(one.scale, two.scale, rtol=1e-6)
            np.testing.assert_array_equal(one.zero_point, two.zero_point)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_grids_of_every_estimator(estimator):
    graph, params = mlp_graph()
    ranges = calibrate(graph, params, [random(4, 6)], estimator=estimator)
    for bits in (8, 4):
        scale = float(ranges.grids["a"][0][bits].scale)
        assert np.isfinite(scale) and scale > 0
    assert float(ranges.grids["a"][0][4].scale) > float(ranges.grids["a"][0][8].scale)


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_branches_no_example_reaches(estimator):
    apply, params, inputs = model("cond_parameter")
    graph = trace(apply, params, inputs)
    ranges = calibrate(graph, params, [inputs], estimator=estimator)
    assert set(ranges.stats) == {"first", "yes"}
    assert_range(ranges, "yes", inputs @ params["first"])


def test_branches_that_examples_choose():
    apply, params, inputs = model("cond_data")
    ranges = calibrate(trace(apply, params, inputs), params, [inputs])
    assert_range(ranges, "yes", inputs[inputs[:, 0] > 0])
    assert_range(ranges, "no", inputs[inputs[:, 0] <= 0])
    (stats,) = ranges.stats["yes"]
    assert float(stats.histogram.sum()) == inputs[inputs[:, 0] > 0].size


def test_layers_of_a_stack_that_are_not_reached():
    def apply(params, x):
        def layer(x, inputs):
            w, is_used = inputs
            return jax.lax.cond(is_used, lambda: jnp.tanh(x @ w), lambda: x), None

        return jax.lax.scan(layer, x, (params["w"], jnp.array([True, False, True])))[0]

    params, x = {"w": random(3, 6, 6)}, random(4, 6)
    ranges = calibrate(trace(apply, params, x), params, [x])
    (stats,) = ranges.stats["w"]
    assert np.all(np.isfinite(stats.minimum)) and stats.minimum.shape == (3,)
    np.testing.assert_array_equal(np.sum(stats.histogram, -1), [24, 0, 24])
    assert float(stats.maximum[1]) == float(jnp.max(stats.maximum))
    assert np.all(np.isfinite(ranges.grids["w"][0][8].scale))


def test_one_shot_iterators_and_empty_data():
    graph, params = mlp_graph()
    with pytest.raises(CalibrationError, match="one-shot iterator"):
        calibrate(graph, params, (x for x in [random(4, 6)]))
    with pytest.raises(CalibrationError, match="no examples"):
        calibrate(graph, params, [])
    with pytest.raises(TraceError, match="no examples"):
        calibrate(graph, params, [jnp.ones((0, 6))])
    with pytest.raises(CalibrationError, match=r"median.*expected one of"):
        calibrate(graph, params, [random(4, 6)], estimator="median")


def test_inputs_that_are_not_finite():
    graph, params = mlp_graph()
    with pytest.raises(TraceError, match=r"calibration batch 1.*NaN"):
        calibrate(graph, params, [random(4, 6), random(4, 6).at[0, 0].set(np.nan)])


@pytest.mark.parametrize("bad", [lambda x: jnp.log(x), lambda x: 1 / (x - x)])
def test_activations_that_are_not_finite_name_their_site(bad):
    params = matrices("a", "b")
    graph = trace(lambda p, x: bad(x @ p["a"]) @ p["b"], params, random(4, 6))
    with pytest.raises(CalibrationError, match="site b: activation 0 is NaN or infinite"):
        calibrate(graph, params, [random(4, 6)])


def test_unequal_batch_sizes_in_one_batch():
    def apply(params, inputs):
        return inputs["x"] @ params["a"] + inputs["y"]

    params = matrices("a")
    graph = trace(apply, params, {"x": random(4, 6), "y": random(4, 6)})
    with pytest.raises(TraceError, match="disagree"):
        calibrate(graph, params, [{"x": random(4, 6), "y": random(1, 6)}])


def test_batch_norm_in_evaluation_mode_passes():
    apply, params, inputs = cnn()
    assert calibrate(trace(apply, params, inputs), params, [inputs], estimator="minmax").examples

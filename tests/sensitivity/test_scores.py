import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss, model, random
from stages import calibrated, scored, traced

from jaxrmils import contributions, score
from jaxrmils.graph import TraceError
from jaxrmils.sensitivity import Candidate, ScoreError

COUNT = 7
INPUTS = random(COUNT, 6, seed=20)
TARGETS = np.linspace(-1, 1, COUNT).astype(np.float32)


def batches(size, inputs=INPUTS, targets=TARGETS):
    return [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(inputs), size)]


def plain_scores(data, **kwargs):
    graph, params, _ = traced("plain")
    return score(graph, params, data, loss, calibrated("plain"), **kwargs)


def test_scores_do_not_depend_on_the_batch_size():
    whole = plain_scores(batches(COUNT), shift_probe=True)
    assert len(whole) == COUNT
    for size in (3, 5):
        parts = plain_scores(batches(size), shift_probe=True)
        for field in ("loss", "activations", "weights", "gradient_sum", "gradient_square"):
            wanted = getattr(whole, field)
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(getattr(parts, field), wanted, atol=2e-6 * scale)
        # Differences of losses, divided by steps.
        np.testing.assert_allclose(parts.shift, whole.shift, atol=2e-3 * np.abs(whole.shift).max())


def test_scores_hold_the_contributions():
    graph, params, _ = traced("plain")
    ranges, scores = calibrated("plain"), plain_scores(batches(4))
    direct = contributions(graph, params, INPUTS, jnp.asarray(TARGETS), loss, ranges)
    again = scores.contributions()
    assert jax.tree.structure(direct) == jax.tree.structure(again)
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-6 * np.abs(wanted).max())
    column = scores.activation("left", 0, Candidate(4, "ceil"))
    np.testing.assert_array_equal(column, again.activations["left"][:, 0, 5])
    assert scores.shift is None and scores.shifts() is None


def test_a_tied_weights_uses_are_summed():
    scores = scored("tied_embedding")
    rows = [i for i, site in enumerate(scores.weight_rows) if site.startswith("Embed_0")]
    assert len(rows) == 2
    found = scores.weight("Embed_0/embedding", Candidate(4))
    np.testing.assert_array_equal(found, scores.weights[:, rows, 1].sum(axis=1))


def test_steps_and_shifts_by_site():
    scores = scored("experts")
    ranges = calibrated("experts")
    for row, (site, position) in enumerate(scores.activation_rows):
        assert scores.step(site, position, 4) == float(ranges.grids[site][position][4].scale)
        np.testing.assert_array_equal(scores.shifts()[site][:, position], scores.shift[:, row])


def test_empty_batches_are_passed_over_but_no_data_is_an_error():
    empty = (INPUTS[:0], TARGETS[:0])
    assert len(plain_scores([empty, *batches(4), empty])) == COUNT
    for data in ([], [empty]):
        with pytest.raises(ScoreError, match="holds no examples"):
            plain_scores(data)


def test_a_loss_that_is_not_finite_is_named():
    targets = TARGETS.copy()
    targets[5] = np.nan
    with pytest.raises(ScoreError, match="loss of example 5 is nan"):
        plain_scores(batches(3, targets=targets))


def test_inputs_that_are_not_finite_are_named():
    inputs = INPUTS.at[4, 2].set(jnp.inf)
    with pytest.raises(TraceError, match="selection batch 1"):
        plain_scores(batches(3, inputs=inputs))


@pytest.mark.parametrize("label", [-1, 6])
def test_a_label_outside_the_classes_is_named(label):
    targets = np.array([0, 1, 2, 3, label, 5, 0])
    with pytest.raises(ScoreError, match=rf"batch 0: label {label} of example 4 .*0\.\.5"):
        plain_scores(batches(COUNT, targets=targets))


def test_targets_of_another_length_are_refused():
    with pytest.raises(ScoreError, match=r"targets .*\(3,\) for 7 inputs"):
        plain_scores([(INPUTS, TARGETS[:3])])


def test_a_mean_loss_is_refused():
    graph, params, _ = traced("plain")
    with pytest.raises(ScoreError, match="one value per example"):
        score(
            graph,
            params,
            batches(4),
            lambda outputs, targets: jnp.mean(loss(outputs, targets)),
            calibrated("plain"),
        )


def test_another_models_ranges_and_params_are_refused():
    graph, params, _ = traced("plain")
    with pytest.raises(ScoreError, match="calibrated on another model"):
        score(graph, params, batches(4), loss, calibrated("custom_rules"))
    with pytest.raises(TraceError, match="params do not fit"):
        score(graph, model("custom_rules")[1], batches(4), loss, calibrated("plain"))
    wide = {**params, "left": jnp.zeros((6, 7))}
    with pytest.raises(TraceError, match=r"left is float32\[6, 7\]"):
        score(graph, wide, batches(4), loss, calibrated("plain"))

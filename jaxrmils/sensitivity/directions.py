"""Directed rounding where the first order beats the second, and nearest elsewhere.

Floor and ceil move all elements of an operand the same way, by s/2 on average. To first order the
direction against the sign of E[p . 1] lowers the loss by (s/2) |E[p . 1]|. To second order moving
everything together costs: with independent rounding residuals of variance s^2/12

    change(directed) = -(s/2) |p . 1| + (s^2/8) 1'H1 + (s^2/24) tr H
    change(nearest)  =                                 (s^2/24) tr H

so a direction beats nearest only where |p . 1| > s 1'H1 / 4, and leaves the loss lower than the
float model's only where |p . 1| > s (tr H / 12 + 1'H1 / 4). Contributions and curvature are taken
with the true noise, for which neither independence nor an unclipped range is assumed.
"""

from __future__ import annotations

import numpy as np

from jaxrmils.numerics import Rounding
from jaxrmils.sensitivity.candidates import Candidate
from jaxrmils.sensitivity.curvature import Curvature, mean_and_error
from jaxrmils.sensitivity.scores import Scores
from jaxrmils.sensitivity.tangent import ScoreError


def fisher(scores: Scores) -> Curvature:
    """1/2 c^2 of every contribution c: the empirical Fisher term, at no further cost.

    For cross-entropy with labels drawn from the model, E[c^2] = E[eps' F eps] with F the Fisher
    information, which is the Gauss-Newton part of the Hessian. Here the labels are the data's, so
    this is the empirical Fisher: it differs as far as the model's probabilities are not those of
    the labels, it is never negative, and for other losses it means little. `curvature` has none
    of these restrictions.

    Args:
      scores: from `score`.

    Returns:
      The terms per example, in the place of `curvature`'s; weights with all uses together.

    References:
      Kunstner, F., Balles, L., Hennig, P. (2019). Limitations of the empirical Fisher
      approximation for natural gradient descent. arXiv 1905.12558.
    """
    names = tuple(layer.name for layer in scores.table.layers if layer.has_weight)
    weights = [
        [scores.weight(name, candidate) for candidate in scores.weight_candidates] for name in names
    ]
    shape = (len(names), len(scores.weight_candidates), len(scores))
    by_weight = np.reshape(np.asarray(weights, np.float32), shape).transpose(2, 0, 1)
    return Curvature(
        fingerprint=scores.table.fingerprint,
        activations=scores.activations**2 / 2,
        weights=by_weight**2 / 2,
        activation_rows=scores.activation_rows,
        weight_rows=names,
        activation_candidates=scores.activation_candidates,
        weight_candidates=scores.weight_candidates,
    )


def directions(
    scores: Scores, curvature: Curvature, *, errors: float = 1.0
) -> dict[int, dict[str, tuple[Rounding, ...]]]:
    """Which operands to round down or up, width by width: nearest unless a direction pays.

    Of floor and ceil, the one with the lower mean first-order change is compared with nearest,

        D = mean(c_directed - c_nearest) + mean(q_directed - q_nearest)

    with c the first-order contributions and q the second-order terms, both with the true noise. It
    is proposed where D < -errors (se_c + se_q), the standard errors of the two means. Their sum
    bounds the error of D whatever the two have in common, so the curvature may come from fewer or
    other examples. Weights are always rounded to nearest.

    Args:
      scores: from `score`.
      curvature: from `curvature` or `fisher`, of the same model and ranges.
      errors: how many standard errors the advantage must exceed.

    Returns:
      By width, by site: a rounding for every activation operand. Widths are those for which
      nearest, floor and ceil are in both arguments.

    Raises:
      ScoreError: the curvature is another model's, or no width has all three roundings.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrmils import calibrate, score, trace
    >>> x, params = jax.random.normal(jax.random.key(0), (64, 3)), {"w": jnp.ones((3, 2))}
    >>> graph = trace(lambda p, x: x @ p["w"], params, x)
    >>> ranges = calibrate(graph, params, [x])
    >>> scores = score(graph, params, [(x, x)], lambda o, t: 0.01 * o[:, 0], ranges)
    >>> directions(scores, fisher(scores))
    {8: {'w': ('floor',)}, 4: {'w': ('floor',)}}
    """
    if curvature.fingerprint != scores.table.fingerprint:
        raise ScoreError("the curvature is another model's; compute it for this one")
    if curvature.activation_rows != scores.activation_rows:
        raise ScoreError("the curvature was computed with other ranges; use those of the scores")
    known = set(scores.activation_candidates) & set(curvature.activation_candidates)
    widths = [
        bits
        for bits in dict.fromkeys(c.bits for c in scores.activation_candidates)
        if {Candidate(bits, r) for r in ("nearest", "floor", "ceil")} <= known
    ]
    if not widths:
        raise ScoreError(
            "no width was scored for nearest, floor and ceil in both the scores and the curvature; "
            "give both the same `activation_candidates`"
        )
    found: dict[int, dict[str, tuple[Rounding, ...]]] = {bits: {} for bits in widths}
    for bits in widths:
        for site, position in scores.activation_rows:
            rounding = _rounding(scores, curvature, site, position, bits, errors)
            found[bits][site] = (*found[bits].get(site, ()), rounding)
    return found


def _rounding(
    scores: Scores, curvature: Curvature, site: str, position: int, bits: int, errors: float
) -> Rounding:
    """The rounding of one operand."""
    nearest = Candidate(bits)
    directed = min(
        (Candidate(bits, "floor"), Candidate(bits, "ceil")),
        key=lambda c: scores.activation(site, position, c).mean(dtype=np.float64),
    )
    difference = [
        mean_and_error(values.activation(site, position, directed) - reference)
        for values, reference in (
            (scores, scores.activation(site, position, nearest)),
            (curvature, curvature.activation(site, position, nearest)),
        )
    ]
    (first, first_error), (second, second_error) = difference
    is_better = first + second < -errors * (first_error + second_error)
    return directed.rounding if is_better else "nearest"

"""What options are believed to cost, corrected by shares of a joint change that were measured.

A share m_i of a plan's joint loss change, here what it has beyond the first order, has sampling
noise of variance v_i. Before it was seen, option i was believed to cost b_i, in a unit that need
not be the loss's. The model is that of a meta-analysis with random effects,

    share_i ~ N(rho b_i, (tau b_i)^2)        what the option costs in this network
    m_i     ~ N(share_i, v_i)                what was measured of it

rho is what the whole network makes of beliefs (their unit, and how much worse everything is in
company), tau how far single layers depart from that. Both have the largest likelihood under
Student's t with 4 degrees of freedom, which a few layers that are much worse in company move little
(Lange, Little & Taylor 1989, Robust statistical modeling using the t distribution). The corrected
belief is the mean of share_i given m_i,

    rho b_i + w_i (m_i - rho b_i),    w_i = d_i^2 / (d_i^2 + v_i),    d_i = tau b_i

Noise is thus shrunk towards what was believed before, not towards zero (Efron & Morris 1975, Data
analysis using Stein's estimator and its generalizations): picking the least of many beliefs is not
picking the luckiest measurement. Gains are shrunk harder than losses, since beliefs are positive.
A share that lies z > 3 standard deviations off is a departure of its own: for it, d_i^2 + v_i is
multiplied by (z / 3)^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# How far layers may depart from what was believed, relative to all shares.
_DEPARTURES = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 41)])
# Degrees of freedom, and how often a location is reweighted.
_FREEDOM, _REWEIGHTINGS = 4.0, 20
# Standard deviations from which on a share is a departure of its own.
_ODD = 3.0
# Variance that no share goes below, relative to what is believed: plans are compared, not digits.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Corrected:
    """Beliefs after shares were seen.

    Attributes:
      costs: float64 [options], in the shares' unit.
      scale: rho, above 0: the factor by which beliefs in options that were not seen change.
      departure: tau, in the shares' unit for a unit of belief.
    """

    costs: np.ndarray
    scale: float
    departure: float


def corrected(beliefs: np.ndarray, shares: np.ndarray, variances: np.ndarray) -> Corrected:
    """Beliefs in the options of a plan, given their shares in its joint change.

    rho is at least its own standard error from sampling, so that beliefs keep their sign and order
    even where the shares add up to a gain.

    Args:
      beliefs: float64 [options], not all 0.
      shares: float64 [options], means over examples, in the loss's unit.
      variances: float64 [options], of these means.

    >>> beliefs, noisy = np.array([1.0, 2.0, 3.0, 4.0]), np.full(4, 0.04)
    >>> corrected(beliefs, np.array([0.1, 0.3, 0.2, 0.5]), noisy).costs.round(2).tolist()
    [0.11, 0.22, 0.33, 0.44]
    >>> corrected(beliefs, np.array([0.1, 0.3, 9.0, 0.5]), noisy).costs.round(2).tolist()
    [0.12, 0.31, 8.95, 0.5]
    """
    size = np.abs(beliefs)
    unit = float((np.abs(shares) + np.sqrt(variances)).sum() / size.sum()) or 1.0
    noise = variances + (_FLOOR * unit * np.maximum(size, size.mean())) ** 2
    least = float(1 / np.linalg.norm(beliefs / np.sqrt(noise)))
    best = (-np.inf, 1.0, 0.0)
    for tau in unit * _DEPARTURES:
        total = noise + (tau * size) ** 2
        rho = max(_scale(beliefs, shares, total), least)
        squares = (shares - rho * beliefs) ** 2 / total
        tails = (_FREEDOM + 1) * np.log1p(squares / _FREEDOM)
        best = max(best, (-float(np.sum(tails + np.log(total))), rho, float(tau)))
    _, rho, tau = best
    total = noise + (tau * size) ** 2
    odd = (shares - rho * beliefs) ** 2 / total / _ODD**2
    weight = 1 - noise / (total * np.maximum(odd, 1.0))
    return Corrected(rho * beliefs + weight * (shares - rho * beliefs), rho, tau)


def _scale(beliefs: np.ndarray, shares: np.ndarray, variances: np.ndarray) -> float:
    """The rho of the largest likelihood, by reweighting from the weighted median of the ratios."""
    rho = _median(beliefs, shares, variances)
    for _ in range(_REWEIGHTINGS):
        weights = 1 / (_FREEDOM * variances + (shares - rho * beliefs) ** 2)
        rho = float(np.sum(weights * shares * beliefs) / np.sum(weights * beliefs**2))
    return rho


def _median(beliefs: np.ndarray, shares: np.ndarray, variances: np.ndarray) -> float:
    """The weighted median of shares / beliefs."""
    known = beliefs != 0
    ratios, weights = shares[known] / beliefs[known], np.abs(beliefs / np.sqrt(variances))[known]
    order = np.argsort(ratios, kind="stable")
    below = np.cumsum(weights[order])
    return float(ratios[order][np.searchsorted(below, below[-1] / 2)])

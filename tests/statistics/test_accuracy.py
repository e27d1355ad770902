import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from jaxrmils.statistics import accuracy_change
from jaxrmils.statistics.accuracy import drop_bound

Z = 1.6448536269514722


def answers(gained, lost, n):
    before = np.arange(n) < lost
    after = (np.arange(n) >= lost) & (np.arange(n) < lost + gained)
    return before, after


def test_mcnemars_exact_test():
    before = np.array([True] * 12 + [False] * 8)
    after = before.copy()
    after[:9] = False  # 9 lost
    after[12:14] = True  # 2 gained
    change = accuracy_change(before, after)
    assert (change.gained, change.lost, change.n) == (2, 9, 20)
    assert change.difference == pytest.approx(after.mean() - before.mean())
    by_hand = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert change.p_value == pytest.approx(by_hand)
    assert (change.test, change.groups, change.alpha) == ("McNemar, exact", None, 0.05)


def test_without_any_difference():
    change = accuracy_change([True, False], [True, False])
    assert (change.difference, change.p_value) == (0.0, 1.0)
    assert change.drop_upper == pytest.approx(Z**2 / (2 + Z**2))


def score_statistic(lost, gained, n, drop):
    """Tango's, with the restricted likelihood maximised numerically."""

    def unlikely(q):
        cells = ((gained, q), (lost, q + drop), (n - lost - gained, 1 - 2 * q - drop))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -drop), (1 - drop) / 2
    q = optimize.minimize_scalar(unlikely, bounds=(low, high), options={"xatol": 1e-10}).x
    return (lost - gained - n * drop) / math.sqrt(n * (2 * q + drop * (1 - drop)))


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(9, 2, 20), (1, 7, 21), (5, 0, 60), (0, 5, 60), (3, 3, 1000)]
)
def test_tangos_bound_against_a_grid(lost, gained, n):
    bound = accuracy_change(*answers(gained, lost, n)).drop_upper
    grid = np.linspace((lost - gained) / n + 1e-4, 0.999, 501)
    accepted = [drop for drop in grid if score_statistic(lost, gained, n, drop) >= -Z]
    assert bound == pytest.approx(max(accepted), abs=grid[1] - grid[0] + 1e-6)


def test_tangos_bound_against_a_published_interval():
    # 21 pairs, 1 and 7 discordant: 95 % interval from -0.517 to -0.026 (Fagerland et al. 2014).
    quantile = stats.norm.ppf(0.975)
    assert drop_bound(1, 7, 21, quantile) == pytest.approx(-0.026, abs=5e-4)
    assert -drop_bound(7, 1, 21, quantile) == pytest.approx(-0.517, abs=5e-4)


def test_extremes():
    nothing_left = accuracy_change(*answers(0, 10, 10)).drop_upper
    all_won = accuracy_change(*answers(10, 0, 10)).drop_upper
    assert nothing_left == pytest.approx(1.0)
    assert -1.0 < all_won < -0.5  # The score bound of 10 of 10: 1 - 2 q, q = z^2 / (n + z^2).
    bounds = [drop_bound(lost, 4, 200, Z) for lost in range(20)]
    assert bounds == sorted(bounds)


def test_coverage_of_the_drop():
    # 3 % lost, 2 % gained, n = 400; the simulation's standard error is 0.005.
    counts = np.random.default_rng(0).multinomial(400, [0.03, 0.02, 0.95], size=2000)
    covered = [drop_bound(lost, gained, 400, Z) >= 0.01 for lost, gained, _ in counts]
    assert 0.93 < np.mean(covered) < 0.97


def test_sign_flips_against_enumeration():
    groups = [0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4]
    net = np.array([-1, -1, -1, -1, 0, 1, -1, -1, 1, 0, 0])
    change = accuracy_change(net < 0, net > 0, groups=groups)
    totals = [3, 1, 1, 2, 1]
    sums = [
        sum(s * t for s, t in zip(signs, totals, strict=True))
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    assert change.p_value == pytest.approx(np.mean([abs(s) >= 4 for s in sums]))
    assert (change.test, change.groups) == ("sign flips of groups, exact", 5)


def test_groups_of_one_give_mcnemars_test():
    pair = answers(4, 13, 300)
    alone, grouped = accuracy_change(*pair), accuracy_change(*pair, groups=np.arange(300))
    assert grouped.p_value == pytest.approx(alone.p_value)
    # Student's t with 299 degrees of freedom in place of the normal.
    assert grouped.drop_upper == pytest.approx(alone.drop_upper, rel=0.01)


@pytest.mark.parametrize(("gained", "lost"), [(4, 13), (0, 0), (0, 200)])
def test_copies_are_no_evidence(gained, lost):
    before, after = answers(gained, lost, 200)
    names = [f"page {i}" for i in range(200)]
    once = accuracy_change(before, after, groups=names)
    five = accuracy_change(np.repeat(before, 5), np.repeat(after, 5), groups=np.repeat(names, 5))
    assert five.difference == once.difference
    assert five.p_value == pytest.approx(once.p_value)
    # The variances' divisors, 200 - 1 and 1,000 - 1, differ.
    assert five.drop_upper == pytest.approx(once.drop_upper, abs=5e-4)


def test_coverage_and_size_with_dependent_examples():
    # 100 groups of 6; a group is touched as a whole, half of the touched ones for the worse.
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(100), 6)
    covered, rejected, naive = [], [], []
    for _ in range(300):
        touched = rng.choice([-1, 0, 1], size=100, p=[0.1, 0.8, 0.1])[groups]
        net = touched * (rng.random(600) < 0.9)
        change = accuracy_change(net < 0, net > 0, groups=groups)
        covered.append(change.drop_upper >= 0.0)
        rejected.append(change.p_value < 0.05)
        naive.append(accuracy_change(net < 0, net > 0).p_value < 0.05)
    # Standard error 0.013.
    assert 0.91 < np.mean(covered) < 0.99
    assert np.mean(rejected) < 0.09
    assert np.mean(naive) > 0.3


def test_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="shapes"):
        accuracy_change([True, False], [True])
    with pytest.raises(ValueError, match="boolean"):
        accuracy_change([1, 0], [True, False])
    with pytest.raises(ValueError, match="alpha is 2"):
        accuracy_change([True, False], [True, False], alpha=2)
    with pytest.raises(ValueError, match="expected \\(2,\\)"):
        accuracy_change([True, False], [True, False], groups=[1, 2, 3])

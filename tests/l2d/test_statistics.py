"""The project's statistics against scipy, and against values computed by hand.

Run: `python -m pytest tests/l2d/test_statistics.py`
"""

import math

import numpy as np
import pytest
from scipy import stats

from l2d.statistics import (
    Estimate,
    average,
    holm,
    independent_average,
    mean,
    over_trainings,
    paired,
    ratio,
    shown,
    sign_test,
    verdict,
    wilson,
)

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.random(40)
OTHERS = SCORES * 0.5 + GENERATOR.random(40) * 0.6
CLUSTERS = [f"c{i % 7}" for i in range(40)]


def close(value, expected):
    return value == pytest.approx(expected, rel=1e-9, abs=1e-12)


# ---- one sample --------------------------------------------------------------------------------------------------


def test_mean_is_scipys():
    estimate = mean(SCORES)
    low, high = stats.ttest_1samp(SCORES, 0).confidence_interval(0.95)
    assert close(estimate.value, SCORES.mean()) and close(estimate.stderr, stats.sem(SCORES))
    assert close(estimate.interval(), (low, high)) and estimate.units == 40
    assert close(estimate.p_value, stats.ttest_1samp(SCORES, 0).pvalue)
    assert close(estimate.interval(0.5), stats.ttest_1samp(SCORES, 0).confidence_interval(0.5))


def test_mean_by_hand():
    """Values 0, 0, 1: variance 1/3, over 3, and the t quantile 4.30265 of two degrees of freedom."""
    estimate = mean([0, 0, 1])
    assert close(estimate.stderr, 1 / 3)
    assert estimate.interval() == pytest.approx((1 / 3 - 4.30265 / 3, 1 / 3 + 4.30265 / 3), abs=1e-5)
    assert close(estimate.p_value, 0.42264973081037427)


def test_clusters_of_one_size_are_their_means():
    values = GENERATOR.random(30)
    estimate = mean(values, [i // 3 for i in range(30)])
    means = values.reshape(10, 3).mean(1)
    assert close(estimate.stderr, stats.sem(means)) and estimate.units == 10
    assert close(estimate.interval(), stats.ttest_1samp(means, 0).confidence_interval(0.95))


def test_clusters_by_hand():
    """Residuals of (1, 0, 0 | 1): 3/4 - ... per cluster they sum to -1/2 and 1/2; 2/(2-1) * (1/4 + 1/4) over 4."""
    estimate = mean([1, 0, 0, 1], ["a", "a", "a", "b"])
    assert close(estimate.stderr, 1 / 4) and estimate.units == 2
    assert close(estimate.interval()[1], 0.5 + 12.706204736432095 / 4)
    assert close(mean(SCORES, range(40)).stderr, stats.sem(SCORES))


def test_ratio_is_per_token():
    """The delta method: residuals sums - value * counts."""
    sums, counts = np.array([3.0, 1.0, 4.0]), np.array([4.0, 1.0, 5.0])
    estimate = ratio(sums, counts)
    residuals = sums - 0.8 * counts
    assert close(estimate.value, 0.8)
    assert close(estimate.stderr, math.sqrt(1.5 * (residuals**2).sum()) / 10)
    assert estimate.interval() is not None and ratio([3.0, 6.0], [1.0, 2.0]).stderr is None


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 0.1])
def test_one_value_or_one_cluster_says_nothing(value):
    for estimate in (mean([value]), mean([value, 1 - value], ["a", "a"])):
        assert estimate.units == 1
        assert estimate.stderr is estimate.interval() is estimate.p_value is None
        assert not estimate.equal_within(10)


@pytest.mark.parametrize("n", [2, 20, 468])
def test_all_right_or_all_wrong_has_wilsons_interval(n):
    for value in (0, 1):
        estimate = mean([value] * n)
        interval = stats.binomtest(n * value, n).proportion_ci(0.95, "wilson")
        assert estimate.stderr is None and close(estimate.interval(), tuple(interval))
    assert mean([7.0] * n).interval() is None and mean([1] * n, bounds=None).interval() is None


def test_equal_values_have_no_spread_whatever_their_rounding():
    assert mean([0.1] * 10).stderr is None and mean([1e6 / 3] * 7, bounds=None).stderr is None
    assert mean([0.1] * 9 + [0.1 + 1e-6]).stderr == pytest.approx(1e-7)
    assert mean([0.3, 0.1, 0.2, 0.2], ["a", "a", "b", "b"]).stderr is None  # both clusters have the same mean


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 9), (3, 9), (9, 9), (50, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(k, n, level):
    assert close(wilson(k, n, level), tuple(stats.binomtest(k, n).proportion_ci(level, "wilson")))


# ---- two settings ------------------------------------------------------------------------------------------------


def test_paired_is_scipys():
    result, test = paired(SCORES, OTHERS), stats.ttest_rel(SCORES, OTHERS)
    assert close(result.p_value, test.pvalue) and close(result.interval(), test.confidence_interval(0.95))
    assert close(result.stderr, stats.sem(SCORES - OTHERS)) and close(result.value, (SCORES - OTHERS).mean())
    wins = int((SCORES > OTHERS).sum())
    assert (result.wins, result.losses, result.ties) == (wins, 40 - wins, 0) and result.documents == 40
    assert close(result.sign_p_value, stats.binomtest(wins, 40).pvalue)


def test_paired_is_not_the_error_of_independent_samples():
    """10 of 100 problems change, 8 of them gain: the paired error, not that of two shares of 100 problems."""
    first, second = [1] * 58 + [0] * 42, [1] * 50 + [0] * 8 + [1] * 2 + [0] * 40
    first[58:60] = [0, 0]
    result = paired(first, second)
    assert (result.wins, result.losses, result.ties) == (8, 2, 90) and close(result.value, 0.06)
    assert close(result.stderr, math.sqrt((8 * 0.94**2 + 2 * 1.06**2 + 90 * 0.06**2) / 99 / 100))
    assert result.stderr < 0.032 < math.hypot(mean(first).stderr, mean(second).stderr) / 2


def test_paired_with_clusters():
    result = paired(SCORES, OTHERS, CLUSTERS)
    assert close(result.stderr, mean(SCORES - OTHERS, CLUSTERS, None).stderr) and result.units == 7
    assert close(result.p_value, 2 * stats.t.sf(abs(result.value) / result.stderr, 6))
    assert result.sign_p_value is None and result.clustered


@pytest.mark.parametrize("n", [2, 3, 5, 6, 30])
def test_equal_gains_are_a_sign_test_and_never_certain(n):
    result = paired([1] * n, [0] * n)
    assert result.stderr is None and close(result.p_value, stats.binomtest(n, n).pvalue) and result.p_value > 0
    assert verdict(result) == ("better" if n >= 6 else "not told apart")
    share = stats.binomtest(n, n).proportion_ci(0.95, "wilson").low
    assert close(result.interval(), (2 * share - 1, 1))


def test_equal_gains_in_clusters_count_clusters():
    result = paired([1] * 12, [0] * 12, [i // 4 for i in range(12)])
    assert result.p_value == 0.25 and result.units == 3 and result.stderr is None


def test_no_change_at_all():
    result = paired([1, 0] * 50, [1, 0] * 50)
    share = stats.binomtest(100, 100).proportion_ci(0.95, "wilson").low
    assert (result.value, result.stderr, result.p_value, result.sign_p_value) == (0, None, 1, 1)
    assert close(result.interval(), (share - 1, 1 - share)) and verdict(result) == "not told apart"
    assert verdict(result, 0.05) == "equal within 0.05" and verdict(result, 0.02) == "not told apart"


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (5, 0), (6, 0), (9, 2), (2, 9), (30, 30), (31, 30)])
def test_sign_test_is_scipys(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
    assert close(sign_test(wins, losses), expected)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.05])
@pytest.mark.parametrize("margin", [0.01, 0.05, 0.1, 0.2])
def test_equality_is_two_one_sided_tests(shift, margin):
    differences = (SCORES - SCORES.mean()) * 0.4 + shift
    lower = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert mean(differences).equal_within(margin) == (max(lower, upper) < 0.05)


def test_equality_at_the_edge():
    """The 90 % interval of 31 units is +- 1.6973 errors."""
    estimate = Estimate(0.01, 0.01, 31)
    assert estimate.equal_within(0.01 + 0.016973) and not estimate.equal_within(0.01 + 0.016972)
    assert Estimate(-0.01, 0.01, 31).equal_within(0.026973) and not Estimate(-0.01, 0.01, 31).equal_within(0.026972)


# ---- several trainings and tasks ---------------------------------------------------------------------------------


def test_two_trainings_hardly_tell_anything():
    """The study's +.222: two trainings at .2388 and .2052 have the t interval +- 12.706 errors of .0168."""
    problems, trainings = over_trainings([[0.2388] * 3 + [0.2389], [0.2052] * 3 + [0.2053]])
    assert close(trainings.value, 0.222025) and close(trainings.stderr, 0.0168) and trainings.units == 2
    assert close(trainings.interval()[1] - trainings.value, 12.706204736432095 * 0.0168)
    assert problems.units == 4 and close(problems.stderr, 0.000025)


def test_trainings_are_scipys():
    runs = GENERATOR.random((5, 60))
    problems, trainings = over_trainings(runs)
    assert close(problems.stderr, stats.sem(runs.mean(0))) and close(trainings.stderr, stats.sem(runs.mean(1)))
    assert close(trainings.interval(), stats.ttest_1samp(runs.mean(1), 0).confidence_interval(0.95))
    assert over_trainings([[1.0, 0.0]]).trainings.stderr is None
    assert over_trainings([[1, 0], [0, 1]]).trainings.interval() is None  # equal trainings show no spread


def test_average_of_tasks_that_share_nothing():
    one, other = mean(SCORES), mean(OTHERS[:30])
    expected = math.sqrt(one.stderr**2 + other.stderr**2) / 2
    result = average([(SCORES, None), (OTHERS[:30], None)])
    for estimate in (result, independent_average([one, other])):
        assert close(estimate.value, (one.value + other.value) / 2) and close(estimate.stderr, expected)
        assert estimate.units == 30
    named = average([(SCORES, CLUSTERS), (OTHERS, [f"other {name}" for name in CLUSTERS])])
    expected = math.hypot(mean(SCORES, CLUSTERS).stderr, mean(OTHERS, CLUSTERS).stderr) / 2
    assert close(named.stderr, expected) and named.units == 7


def test_average_of_tasks_that_share_their_documents():
    documents = [f"d{i}" for i in range(40)]
    order = GENERATOR.permutation(40)
    shuffled = (OTHERS[order], [documents[i] for i in order])
    result = average([(SCORES, documents), shuffled])
    assert close(result.stderr, stats.sem((SCORES + OTHERS) / 2)) and result.units == 40
    assert result.stderr > average([(SCORES, None), (OTHERS, None)]).stderr
    assert average([(SCORES, documents), (1 - SCORES, documents)]).stderr is None  # what one gains, the other loses


def test_average_without_a_known_error():
    assert average([([1.0], None), (SCORES, None)]).stderr is None
    assert average([([1.0, 1.0], None), ([0.0, 0.0], None)]).stderr is None
    assert independent_average([mean(SCORES), mean([1.0])]).stderr is None
    half = average([([1.0] * 40, None), (SCORES, None)])
    assert close(half.stderr, stats.sem(SCORES) / 2)


# ---- words -------------------------------------------------------------------------------------------------------


def test_verdicts_turn_at_five_percent():
    """Ten units: two errors are not enough, 2.2622 of them are."""
    assert verdict(Estimate(2.0, 1.0, 10)) == verdict(Estimate(-2.262, 1.0, 10)) == "not told apart"
    assert verdict(Estimate(2.263, 1.0, 10)) == "better" and verdict(Estimate(-2.263, 1.0, 10)) == "worse"
    assert verdict(Estimate(1.5, 1.0, 10_000)) == "not told apart" and verdict(Estimate(1.97, 1.0, 10_000)) == "better"
    assert verdict(Estimate(2.263, 1.0, 10), higher_is_better=False) == "worse"
    assert verdict(Estimate(0.001, 0.0001, 10), margin=0.01) == "better"
    assert verdict(Estimate(0.0001, 0.001, 10), margin=0.01) == "equal within 0.01"
    assert verdict(Estimate(5.0, None, 1), margin=9) == "not told apart"


def test_shown_with_interval():
    assert shown(mean([1] * 100)) == "1.000 [0.963, 1.000]" and shown(mean([1])) == "1.000"
    assert shown(Estimate(0.0314, 0.01, 10_000), 2, signed=True) == "+0.03 [+0.01, +0.05]"


def test_records_are_plain():
    assert mean([1]).record() == dict(value=1, stderr=None, low=None, high=None, p_value=None, units=1)
    record = paired([1, 0, 1], [0, 0, 0]).record()
    assert (record["wins"], record["losses"], record["ties"], record["documents"]) == (2, 0, 1, 3)
    assert record["sign_p_value"] == 0.5 and close(record["low"], 2 / 3 - 4.302652729696142 / 3)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: mean([]), "sums"),
        (lambda: mean([float("nan"), 1]), "finite"),
        (lambda: mean([1, 2], ["a"]), "clusters"),
        (lambda: ratio([1, 2], [1]), "counts"),
        (lambda: ratio([1, 2], [0, 0]), "counts"),
        (lambda: paired([1], [1, 2]), "first"),
        (lambda: paired([1, math.inf], [1, 2]), "first"),
        (lambda: over_trainings([]), "runs"),
        (lambda: over_trainings([[1, 0], [1]]), "runs"),
        (lambda: average([]), "tasks"),
        (lambda: wilson(3, 2), "successes"),
        (lambda: wilson(0, 0), "successes"),
        (lambda: mean([1, 0]).equal_within(0), "margin"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_holms_correction_by_hand():
    """Times 4, 3, 2, 1 in rising order, never falling, at most 1; an unknown p-value is not counted."""
    assert holm([0.04, 0.01, None, 0.03, 0.5]) == pytest.approx([0.09, 0.04, None, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


def test_shown_intervals_stay_within_limits():
    estimate = Estimate(0.998, 0.002, 1000)
    assert shown(estimate) == "0.998 [0.994, 1.002]" and shown(estimate, limits=(0, 1)) == "0.998 [0.994, 1.000]"
    assert shown(Estimate(-0.5, 0.4, 3), signed=True, limits=(-1, 1)) == "-0.500 [-1.000, +1.000]"

"""Intervals and p values of a few seeds, beside SciPy's."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))

from estimates import Estimate, estimate, holm, ratio_of_spreads, versus

A = np.array([0.0, 0.0, 3.0])
B = np.array([10.0, 11.0, 12.0, 17.0])
C = np.array([-90.0, -70.0, 60.0, 80.0, 100.0])


def test_one_array_gives_the_interval_of_students_t():
    own = estimate([B])
    expected = stats.ttest_1samp(B, 0)
    assert own.value == B.mean()
    assert (own.low, own.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert own.p == pytest.approx(expected.pvalue)


def test_two_give_welchs():
    own = estimate([A], [B])
    expected = stats.ttest_ind(A, B, equal_var=False)
    assert own.value == A.mean() - B.mean()
    assert (own.low, own.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert own.p == pytest.approx(expected.pvalue)


def test_four_give_the_difference_of_two_differences():
    own = estimate([A, B], [B, A])
    assert own.value == 0
    assert own.p == pytest.approx(1)
    one = estimate([A], [B])
    two = estimate([A, A + 5], [B, A])
    assert two.value == pytest.approx(one.value + 5)
    assert two.high - two.low > one.high - one.low


def test_the_interval_holds_the_truth_in_95_of_100():
    """Differences of differences of three to five seeds with unequal spread."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1_000):
        plus = [rng.normal(1, 3, 5), rng.normal(0, 1, 3)]
        minus = [rng.normal(0, 2, 4), rng.normal(0, 1, 5)]
        own = estimate(plus, minus)
        held += own.low < 1 < own.high
    assert 0.93 < held / 1_000 < 0.98


@pytest.mark.parametrize("samples", [[np.array([1.0])], [np.array([2.0, 2.0])]])
def test_no_interval_of_a_single_seed_or_of_equal_ones(samples):
    own = estimate(samples)
    assert own.value == samples[0][0]
    assert all(math.isnan(x) for x in (own.low, own.high, own.p))


def test_format():
    assert f"{Estimate(1234.4):,.0f}" == "1,234"
    assert f"{Estimate(0.5, -0.25, 1.25, 0.2):.2f}" == "0.50 [-0.25, 1.25]"
    assert f"{estimate([A], [np.array([])]):,.0f}" == "–"


def test_the_interval_of_a_ratio_of_spreads_holds_the_truth_in_95_of_100():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(1_000):
        own = ratio_of_spreads(rng.normal(5, 3, 5), rng.normal(0, 1, 4))
        held.append(own.low < 3 < own.high)
    assert 0.93 < np.mean(held) < 0.97


def test_a_ratio_of_spreads():
    own = ratio_of_spreads(B, A)
    assert own.value == pytest.approx(B.std(ddof=1) / A.std(ddof=1))
    other = ratio_of_spreads(A, B)
    assert (other.low, other.high) == pytest.approx((1 / own.high, 1 / own.low))
    assert math.isnan(own.p)  # of three seeds
    own = ratio_of_spreads(B, C)
    assert own.p == stats.levene(B, C, center="median").pvalue
    assert math.isnan(ratio_of_spreads(A, A[:1]).value)
    assert math.isnan(ratio_of_spreads(A, np.zeros(3)).value)


def test_versus_a_reference():
    values = {"a": A, "b": B, "far": A + 100, "none": np.array([]), "one": A[:1]}
    cells = versus(values, "a", ".1f")
    own = estimate([B], [A])
    assert cells["a"] == cells["none"] == ["–", "–"]
    assert cells["b"] == [f"{own:.1f}", f"{own.p:.2g}"]
    assert cells["far"][0].startswith("100.0 [") and cells["far"][1] == "< 0.001"
    assert cells["one"] == ["-1.0", "–"]
    ratio = ratio_of_spreads(B, C)
    spreads = versus({"a": C, "b": B}, "a", ".1f", ratio_of_spreads)
    assert spreads["b"] == [f"{ratio:.1f}", f"{ratio.p:.2g}"]
    assert versus({"b": B}, "a", ".1f") == {"b": ["–", "–"]}


def test_holm():
    corrected = holm([0.01, math.nan, 0.04, 0.03, 0.005])
    assert corrected[:1] + corrected[2:] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(corrected[1])
    assert holm([0.9, 0.8]) == [1, 1]

"""Means, intervals and p values of a few seeds, beside SciPy's."""

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))

from estimates import aggregate, estimate, holm, interval, iqm, ratio_of_spreads, versus

A = np.array([0.0, 0.0, 3.0])
B = np.array([10.0, 11.0, 12.0, 17.0])
C = np.array([-90.0, -70.0, 60.0, 80.0, 100.0])


def test_the_interquartile_mean_drops_a_quarter_on_either_side():
    assert iqm(np.array([0, 1, 2, 3, 4, 5, 6, 100.0])) == 3.5
    assert iqm(np.array([1, 2, 90.0])) == 31
    assert iqm(np.array([-99, 1.0]), np.array([2.0, 99])) == 1.5  # all tasks together
    np.testing.assert_array_equal(iqm(np.array([[1, 10], [3, 30.0]])), [2, 20])


def test_the_interval_draws_seeds_within_each_task():
    low, high = interval(np.array([1.0, 2, 3]))
    assert (low, high) == (1, 3)  # three equal draws come once in 27: the range
    low, high = interval(np.full(3, 5.0), np.full(3, 7.0))
    assert low == high == 6  # were they drawn from all six, it would vary
    scores = np.random.default_rng(1).normal(10, 2, 200)
    own = aggregate([scores])
    assert own.low < iqm(scores) == own.value < own.high
    assert 0.4 < own.high - own.low < 1.0  # about 2 * 1.96 * 1.1 * 2 / sqrt(200)
    assert np.isnan(interval(np.array([1.0]))).all()
    assert math.isnan(aggregate([scores, scores[:0]]).value) and math.isnan(aggregate([]).value)
    with warnings.catch_warnings(action="error"):  # no word about a column without values
        low, high = interval(np.array([[np.nan, 1.0], [np.nan, 2.0]]))
    assert np.isnan([low[0], high[0]]).all() and (low[1], high[1]) == (1, 2)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (estimate([B]), stats.ttest_1samp(B, 0)),
        (estimate([A], [B]), stats.ttest_ind(A, B, equal_var=False)),
    ],
    ids=["Student", "Welch"],
)
def test_an_interval_is_that_of_scipy(own, expected):
    assert (own.low, own.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert own.value == pytest.approx((own.low + own.high) / 2)
    assert own.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("sample", [[1.0], [2.0, 2.0]])
def test_no_interval_of_a_single_seed_or_of_equal_ones(sample):
    assert f"{estimate([np.array(sample)]):.1f}" == f"{sample[0]}"


def test_a_ratio_of_spreads():
    own = ratio_of_spreads(B, A)
    assert own.value == pytest.approx(B.std(ddof=1) / A.std(ddof=1))
    assert math.isnan(own.p)  # of three seeds
    assert ratio_of_spreads(B, C).p == stats.levene(B, C, center="median").pvalue
    assert math.isnan(ratio_of_spreads(A, A[:1]).value)
    assert math.isnan(ratio_of_spreads(A, np.zeros(3)).value)


def test_versus_a_reference():
    values = {"a": A, "b": B, "far": A + 100, "none": A[:0], "one": A[:1]}
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
    corrected = holm(np.array([0.01, math.nan, 0.04, 0.03, 0.005]))
    assert corrected == pytest.approx([0.03, math.nan, 0.06, 0.06, 0.02], nan_ok=True)
    assert holm(np.array([0.9, 0.8])).tolist() == [1, 1]

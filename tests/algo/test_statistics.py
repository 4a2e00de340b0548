"""algo/statistics.py against published tables, definitions solved by bisection, and coverage."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import proportions
from tests.oracles.batches import oracle_settings
from threefold.algo.statistics import (
    Z_95,
    Estimate,
    distinct_n,
    mean_interval,
    pairwise_wins,
    standard_error,
    wilson_interval,
)

# Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3; four decimals.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("successes", "count", "low", "high"), NEWCOMBE)
def test_wilson_published(successes: int, count: int, low: float, high: float) -> None:
    found = wilson_interval(successes, count)
    assert [found.low, found.high] == pytest.approx([low, high], abs=5e-5)
    assert found.mean == successes / count
    assert found.count == count


@oracle_settings
@given(count=st.integers(1, 400), halves=st.integers(0, 800), z=st.sampled_from([1.0, Z_95, 2.575829]))
def test_wilson_is_the_inverted_score_test(count: int, halves: int, z: float) -> None:
    successes = (halves % (2 * count + 1)) / 2  # ties count one half
    found = wilson_interval(successes, count, z)
    low, high = proportions.wilson_by_bisection(successes, count, z)
    assert [found.low, found.high] == pytest.approx([low, high], abs=1e-9)
    assert 0 <= found.low <= found.mean + 1e-15
    assert found.mean - 1e-15 <= found.high <= 1
    mirrored = wilson_interval(count - successes, count, z)
    assert [1 - mirrored.high, 1 - mirrored.low] == pytest.approx([found.low, found.high], abs=1e-12)


def test_z_is_the_quantile_of_the_normal_distribution() -> None:
    assert pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-14) == Z_95


@pytest.mark.parametrize("count", [20, 100, 300])
def test_wilson_covers_95_percent(count: int) -> None:
    """Exact, by summing the binomial: near 0.95 on average over p, nowhere far below away from the ends."""
    intervals = [wilson_interval(x, count) for x in range(count + 1)]
    grid = [0.05 + 0.9 * i / 60 for i in range(61)]
    coverages = [proportions.exact_coverage(p, count, lambda x: (intervals[x].low, intervals[x].high)) for p in grid]
    assert statistics.mean(coverages) == pytest.approx(0.95, abs=0.01)
    assert min(coverages) > 0.91


def test_simulated_coverage_of_both_intervals() -> None:
    """2,000 experiments of 60 each: the standard error of a coverage near 0.95 is 0.005; 4 of them are allowed."""
    source = random.Random(0)
    covered_share = covered_mean = 0
    for _ in range(2000):
        share = wilson_interval(sum(source.random() < 0.8 for _ in range(60)), 60)
        covered_share += share.low <= 0.8 <= share.high
        mean = mean_interval([source.gauss(3, 2) for _ in range(60)])
        covered_mean += mean.low <= 3 <= mean.high
    assert covered_share / 2000 == pytest.approx(0.95, abs=0.02)
    assert covered_mean / 2000 == pytest.approx(0.95, abs=0.02)


@oracle_settings
@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_mean_and_standard_error_equal_the_standard_librarys(values: list[float]) -> None:
    found = mean_interval(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(error, abs=1e-9)
    assert found.mean == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found.high - found.mean == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-9)
    assert found.mean - found.low == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-9)
    assert found.count == len(values)


def test_one_value_has_no_error_and_no_values_no_interval() -> None:
    assert mean_interval([4.0]) == Estimate(4.0, 4.0, 4.0, 1)
    assert standard_error([4.0]) == standard_error([]) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_estimate_reads_well() -> None:
    assert str(wilson_interval(81, 263)) == "0.308 [0.255, 0.366]"


def test_ties_are_half_a_win_for_both() -> None:
    assert pairwise_wins([2.0, 1.0, 3.0], [1.0, 1.0, 4.0]) == [1.0, 0.5, 0.0]
    assert pairwise_wins([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        pairwise_wins([1.0, 2.0], [1.0])


@oracle_settings
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_wins_of_the_two_sides_add_up(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    forward, backward = pairwise_wins(first, second), pairwise_wins(second, first)
    assert [a + b for a, b in zip(forward, backward, strict=True)] == [1.0] * len(pairs)


def test_a_constant_scorer_wins_half_not_all() -> None:
    """A reward model that gives everything one score is at chance; counting ties as right once showed it at 99 %."""
    assert sum(pairwise_wins([0.0] * 10, [0.0] * 10)) / 10 == 0.5


def test_distinct_n_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["b", "a"], ["c"]]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # ab ba ab | ba: no bigram goes from one text to the next
    assert distinct_n(texts, 3) == 2 / 2
    assert distinct_n(texts, 5) == 0.0
    assert distinct_n([], 2) == 0.0


@oracle_settings
@given(texts=st.lists(st.lists(st.sampled_from("abc"), max_size=8), max_size=6), n=st.integers(1, 4))
def test_distinct_n_equals_the_loop(texts: list[list[str]], n: int) -> None:
    assert distinct_n(texts, n) == pytest.approx(proportions.distinct_share(texts, n), abs=1e-12)

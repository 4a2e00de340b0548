"""What a run reports about itself: intervals, win rates, diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; `count` independent observations."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_interval(successes: float, count: int, z: float = Z_95) -> Estimate:
    """Score interval of a proportion (Wilson 1927); right for shares near 0 and 1 too. Ties may count one half.

    Args:
        successes: 0 <= successes <= count.
        count: > 0.
    """
    if count <= 0:
        raise ValueError("an interval needs at least one observation")
    share = successes / count
    denominator = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def mean_interval(values: Sequence[float], z: float = Z_95) -> Estimate:
    """Mean with its normal 95 % interval, from the sample standard deviation (n - 1)."""
    count = len(values)
    if count == 0:
        raise ValueError("an interval needs at least one observation")
    mean = math.fsum(values) / count
    half = z * standard_error(values)
    return Estimate(mean, mean - half, mean + half, count)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, from the sample standard deviation (n - 1); 0 for a single value."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def pairwise_wins(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """1 where first > second, 0 where less, one half for a tie."""
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(first, second, strict=True)]


def distinct_n(texts: Sequence[Sequence[object]], n: int) -> float:
    """Distinct n-grams over all n-grams of the token sequences (Li et al. 2016); 0 if there is none."""
    grams = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

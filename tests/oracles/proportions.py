"""Intervals of a proportion from their definition, and exact coverage."""

from __future__ import annotations

import math
from collections.abc import Callable


def wilson_by_bisection(successes: float, count: int, z: float) -> tuple[float, float]:
    """Ends of the set of p that the score test does not reject: |share - p| <= z sqrt(p (1 - p) / n)."""
    share = successes / count

    def rejected(p: float) -> bool:
        return abs(share - p) > z * math.sqrt(p * (1 - p) / count)

    def edge(inside: float, outside: float) -> float:
        if not rejected(outside):
            return outside
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return edge(share, 0.0), edge(share, 1.0)


def exact_coverage(p: float, count: int, interval: Callable[[int], tuple[float, float]]) -> float:
    """Probability, over x ~ binomial(count, p), that interval(x) contains p."""
    covered = 0.0
    for x in range(count + 1):
        low, high = interval(x)
        if low <= p <= high:
            covered += math.comb(count, x) * p**x * (1 - p) ** (count - x)
    return covered


def distinct_share(texts: list[list[str]], n: int) -> float:
    """Distinct n-grams over all n-grams, by keeping a list and looking each one up."""
    seen: list[list[str]] = []
    total = 0
    for text in texts:
        for start in range(len(text)):
            gram = text[start : start + n]
            if len(gram) == n:
                total += 1
                if gram not in seen:
                    seen.append(gram)
    return len(seen) / total if total else 0.0

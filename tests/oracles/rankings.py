"""Losses of ranked answers, one prompt at a time, with Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

Ranking = Sequence[Sequence[int]]
"""Tiers of places, the best first."""


def tier_of(ranking: Ranking) -> dict[int, int]:
    return {place: number for number, tier in enumerate(ranking) for place in tier}


def ordered_pairs(rankings: Sequence[Ranking]) -> list[tuple[int, int]]:
    """(better, worse) of every two answers of which a ranking says which is better."""
    found = []
    for ranking in rankings:
        tiers = tier_of(ranking)
        found += [(one, other) for one in tiers for other in tiers if tiers[one] < tiers[other]]
    return found


def pairwise_loss(scores: Sequence[float], rankings: Sequence[Ranking]) -> float:
    """Mean over all pairs of one prompt of ln(1 + exp(worse - better))."""
    losses = [math.log(1 + math.exp(scores[worse] - scores[better])) for better, worse in ordered_pairs(rankings)]
    return math.fsum(losses) / len(losses)


def accuracy(scores: Sequence[float], rankings: Sequence[Ranking]) -> float:
    """Share of the pairs of one prompt whose scores are in order; a tie is one half."""
    points = [
        1.0 if scores[better] > scores[worse] else 0.5 if scores[better] == scores[worse] else 0.0
        for better, worse in ordered_pairs(rankings)
    ]
    return math.fsum(points) / len(points)


def margin(scores: Sequence[float], rankings: Sequence[Ranking]) -> float:
    pairs = ordered_pairs(rankings)
    return math.fsum(scores[better] - scores[worse] for better, worse in pairs) / len(pairs)


def plackett_luce_loss(scores: Sequence[float], rankings: Sequence[Ranking]) -> float:
    """Mean over the rankings of one prompt of the mean of -ln(probability) of a ranking's choices."""
    means = []
    for ranking in rankings:
        tiers = tier_of(ranking)
        last = max(tiers.values(), default=0)
        losses = []
        for place, tier in tiers.items():
            if tier < last:
                rivals = [other for other in tiers if tiers[other] >= tier]
                total = math.fsum(math.exp(scores[other]) for other in rivals)
                losses.append(-math.log(math.exp(scores[place]) / total))
        if losses:
            means.append(math.fsum(losses) / len(losses))
    return math.fsum(means) / len(means)

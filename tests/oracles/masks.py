"""Naive means, variances and whitening: plain loops over the real entries of nested lists."""

from __future__ import annotations

import math

Rows = list[list[float]]
Mask = list[list[bool]]


def real_entries(values: Rows, mask: Mask) -> list[float]:
    """The entries whose mask is True, row by row."""
    found = []
    for row, flags in zip(values, mask, strict=True):
        for value, flag in zip(row, flags, strict=True):
            if flag:
                found.append(value)
    return found


def mean(entries: list[float]) -> float:
    return math.fsum(entries) / len(entries)


def population_variance(entries: list[float]) -> float:
    """Mean squared distance over all ordered pairs, halved: a formula that needs no mean."""
    total = math.fsum((a - b) ** 2 for a in entries for b in entries)
    return total / (2 * len(entries) ** 2)


def whitened(values: Rows, mask: Mask, keep_mean: bool, epsilon: float) -> Rows:
    """(x - mean) / sqrt(variance + epsilon) at the real entries, the mean added back if it is to be kept; else 0."""
    entries = real_entries(values, mask)
    centre = mean(entries)
    spread = math.sqrt(population_variance(entries) + epsilon)
    offset = centre if keep_mean else 0.0
    return [
        [(value - centre) / spread + offset if flag else 0.0 for value, flag in zip(row, flags, strict=True)]
        for row, flags in zip(values, mask, strict=True)
    ]


def whitened_by_trl(entries: list[float]) -> list[float]:
    """TRL's `masked_whiten`: the variance is the sample's (n - 1), 1e-8 under the root."""
    centre = mean(entries)
    variance = math.fsum((entry - centre) ** 2 for entry in entries) / (len(entries) - 1)
    return [(entry - centre) / math.sqrt(variance + 1e-8) for entry in entries]

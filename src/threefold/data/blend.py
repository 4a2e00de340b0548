"""The order in which the rows of several sources are drawn.

A fixed pattern says from which source each draw is, as evenly spread as whole draws can be; within a source the draws
go through one permutation of its rows after another, from pass to pass without losing their place. Everything is a
function of sizes, weights, seed and pass: the same on every process, and the same again after a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from threefold.data.collate import epoch_order

GOLDEN_PART = 0.6180339887498949
WEIGHT_STEPS = 100_000
"""Weights are kept to this part of the whole."""


@dataclass(frozen=True)
class Blend:
    """How sources are drawn from.

    Attributes:
        sizes: rows of each source.
        draws: of each source in one pass; where weights were given, to the nearest whole.
        seed: of the permutations.
        names: of the sources, for messages and the manifest; may be empty.
        pattern_draws: of each source in one turn of the pattern, which repeats; empty where that is a pass.
    """

    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int
    names: tuple[str, ...] = ()
    pattern_draws: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Draws of one pass."""
        return sum(self.draws)

    def order(self, epoch: int) -> list[int]:
        """One pass: places in the concatenation of the sources.

        Args:
            epoch: passes before this one.
        """
        pattern = self._pattern()
        if len(pattern) == 0:
            return []
        start, stop = epoch * len(self), (epoch + 1) * len(self)
        source_of_draw = pattern[np.arange(start, stop) % len(pattern)]
        order = np.empty(len(self), dtype=np.int64)
        offsets = np.cumsum([0, *self.sizes])
        with_rows = [source for source, size in enumerate(self.sizes) if size]
        for number, source in enumerate(with_rows):
            mine = source_of_draw == source
            first = start // len(pattern) * int(np.count_nonzero(pattern == source))
            first += int(np.count_nonzero(pattern[: start % len(pattern)] == source))
            drawn = self._rows(source, number, first, int(np.count_nonzero(mine)))
            order[mine] = offsets[source] + drawn
        listed: list[int] = order.tolist()
        return listed

    def _pattern(self) -> NDArray[np.int16]:
        """The source of each draw of one turn.

        The j-th of d draws of the i-th source stands at (j + u_i) / d of the turn, so that each stretch of it has a
        source's share to within a draw or so. The offsets u_i are multiples of the golden ratio, modulo 1: many sources
        of one size then come one after the other, and not all at the same moments.
        """
        draws = np.array(self.pattern_draws or self.draws, dtype=np.int64)
        sources = np.repeat(np.arange(len(draws), dtype=np.int16), draws)
        if len(draws) == 1:
            return sources
        offsets = (0.5 + GOLDEN_PART * np.arange(len(draws))) % 1
        counts_and_offsets = zip(draws.tolist(), offsets.tolist(), strict=True)
        when = np.concatenate([(np.arange(count) + offset) / max(count, 1) for count, offset in counts_and_offsets])
        return sources[np.argsort(when, kind="stable")]

    def _rows(self, source: int, number: int, first: int, count: int) -> NDArray[np.int64]:
        """Rows of a source from its `first` draw on, counted from the start of the run."""
        size = self.sizes[source]
        rounds = range(first // size, (first + count - 1) // size + 1)
        seed = _seed_of_source(self.seed, number)
        rows = [np.array(epoch_order(size, seed, each), dtype=np.int64) for each in rounds]
        start = first % size
        return np.concatenate(rows)[start : start + count] if rows else np.empty(0, dtype=np.int64)


def make_blend(
    sizes: Sequence[int],
    weights: Sequence[float],
    temperature: float,
    epochs: Sequence[float],
    seed: int,
    names: Sequence[str] = (),
) -> Blend:
    """How the recipe's sources are drawn from in one step. A source without rows is left out of it.

    With weights or a temperature one pass has as many draws as there are rows, so that some rows of a source may come
    several times and some of another wait for the next pass; without, it takes each row of a source `epochs` times. One
    source alone is drawn as `collate.epoch_order` orders it.

    Args:
        sizes: rows of each source.
        weights: share of each source, in any unit; empty where sizes, or the temperature, decide.
        temperature: shares are proportional to size ** (1 / temperature).
        epochs: passes over each source in one pass over the blend, where neither weights nor a temperature decide.
        seed: of the permutations.
        names: of the sources.
    """
    if not weights and temperature == 1:
        draws = [
            max(math.floor(size * times + 0.5), 1) if size else 0 for size, times in zip(sizes, epochs, strict=True)
        ]
        return Blend(tuple(sizes), tuple(draws), seed, tuple(names))
    wanted = list(weights) or [size ** (1 / temperature) for size in sizes]
    shares = [share if size else 0.0 for size, share in zip(sizes, wanted, strict=True)]
    if not any(shares):
        return Blend(tuple(sizes), (0,) * len(sizes), seed, tuple(names))
    parts = [max(round(share / sum(shares) * WEIGHT_STEPS), 1) if share else 0 for share in shares]
    divisor = math.gcd(*parts)
    bounds = [math.floor(sum(sizes) * bound / sum(parts) + 0.5) for bound in (0, *accumulate(parts))]
    draws = [after - before for before, after in pairwise(bounds)]
    pattern_draws = tuple(part // divisor for part in parts)
    return Blend(tuple(sizes), tuple(draws), seed, tuple(names), pattern_draws)


def _seed_of_source(seed: int, number: int) -> int:
    """The first source that has rows keeps the seed; others get one of their own."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"source {seed} {number}".encode()).digest()[:8], "big")

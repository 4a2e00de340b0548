"""Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing, each candidate checked exactly.

The kept library `datasketch` finds the candidates; a pair counts where the Jaccard similarity of the two sets of
shingles really reaches the threshold, so a collision is no finding. Shingles are runs of three words, or of five
characters where a text does not separate its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from threefold.data.doctor.findings import MAX_ORIGINS, Finding, of_rows
from threefold.data.doctor.rows import Row

NUM_PERMUTATIONS = 64
SEED = 1
SIMILARITY = 0.8
CANDIDATE_SIMILARITY = 0.6
"""At which half of all pairs become candidates: low enough that nearly all of those of SIMILARITY do."""
MIN_SHINGLES = 8
MIN_PROMPT_SHINGLES = 20
"""Of a shorter text, and of a shorter prompt by itself, one other word may be all that matters: "Which is bigger, 5 or
7?" """
MAX_CHARACTERS = 4000
MAX_NEAR_ROWS = 0.03
MAX_NEAR_LEAKED = 0.05
MIN_NEAR = 5

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff]")


def shingles(text: str) -> NDArray[np.uint32]:
    """Different shingles of a text's beginning, as 32-bit hashes, in order."""
    text = text[:MAX_CHARACTERS].casefold()
    if len(_UNSPACED.findall(text)) * 4 > len(text):
        letters = "".join(_WORD.findall(text))
        pieces = {letters[i : i + 5] for i in range(len(letters) - 4)}
    else:
        words = _WORD.findall(text)
        pieces = {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}
    return np.unique(np.fromiter((crc32(piece.encode("utf-8", "replace")) for piece in pieces), np.uint32, len(pieces)))


def similarity(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """Jaccard: shared shingles over all shingles."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(len(one) + len(other) - shared, 1)


@dataclass(frozen=True)
class NearPair:
    """Two texts that are nearly the same: positions in the order in which they were added, earlier first."""

    earlier: int
    later: int
    similarity: float


class NearIndex:
    """Texts among which near duplicates are found as they are added."""

    def __init__(self, min_shingles: int = MIN_SHINGLES) -> None:
        self._min_shingles = min_shingles
        self._lsh = MinHashLSH(threshold=CANDIDATE_SIMILARITY, num_perm=NUM_PERMUTATIONS)
        self._shingles: list[NDArray[np.uint32]] = []
        self._template = MinHash(num_perm=NUM_PERMUTATIONS, seed=SEED, hashfunc=_as_is)

    def add(self, text: str) -> list[NearPair]:
        """The earlier texts that are nearly this one; none for one too short to judge."""
        position = len(self._shingles)
        own = shingles(text)
        self._shingles.append(own)
        if len(own) < self._min_shingles:
            return []
        sketch = self._template.copy()
        sketch.update_batch(own.tolist())
        pairs = [
            NearPair(int(other), position, found)
            for other in self._lsh.query(sketch)
            if (found := similarity(self._shingles[int(other)], own)) >= SIMILARITY
        ]
        self._lsh.insert(position, sketch, check_duplication=False)
        return sorted(pairs, key=lambda pair: pair.earlier)


def _as_is(value: int) -> int:
    """Shingles come hashed."""
    return value


class NearChecks:
    """Near-duplicate rows, and near-duplicate prompts in two places; over the rows of all sources that are given."""

    def __init__(self, source_names: Sequence[str]) -> None:
        self.source_names = source_names
        self._rows, self._prompts = NearIndex(), NearIndex(MIN_PROMPT_SHINGLES)
        self._sources: list[int] = []
        self._origins: list[str] = []
        self._places: list[int] = []
        self._row_keys: list[int] = []
        self._prompt_keys: list[int] = []
        self.near_rows: list[NearPair] = []
        self.near_leaks: list[NearPair] = []

    def see(self, row: Row) -> None:
        """Compare a row with those before it."""
        whole = "\n".join((row.prompt, *row.answers)) if not row.is_text else row.example.demonstration
        self._origins.append(row.origin)
        self._sources.append(row.source)
        self._places.append(row.place)
        self._row_keys.append(row.row_key)
        self._prompt_keys.append(row.loose_prompt_key)
        pairs = self._rows.add(whole)
        other = [pair for pair in pairs if self._row_keys[pair.earlier] != row.row_key]
        if other and len(other) == len(pairs):  # the same row once more is counted elsewhere
            self.near_rows.append(other[0])
        prompt_pairs = self._prompts.add(row.prompt or whole)
        leaks = [
            pair
            for pair in prompt_pairs
            if self._places[pair.earlier] != row.place
            and min(self._places[pair.earlier], row.place) >= 0
            and (self._places[pair.earlier] % 2 or row.place % 2)
            and self._prompt_keys[pair.earlier] != row.loose_prompt_key
        ]
        if leaks:
            self.near_leaks.append(leaks[0])

    def findings(self) -> Iterator[Finding]:
        """Shares above the bounds, of each source."""
        for number, name in enumerate(self.source_names):
            total = self._sources.count(number)
            near = [pair for pair in self.near_rows if self._sources[pair.later] == number]
            if len(near) >= max(MIN_NEAR, MAX_NEAR_ROWS * total):
                yield self._finding(
                    "near_duplicates", near, total, f"{of_rows(len(near), total)} of {name} are nearly the same as an "
                    "earlier one", "leave them out: they are trained on several times",
                )  # fmt: skip
            leaks = [pair for pair in self.near_leaks if self._sources[pair.later] == number]
            held_out = sum(p >= 0 and p % 2 for s, p in zip(self._sources, self._places, strict=True) if s == number)
            if len(leaks) >= max(MIN_NEAR, MAX_NEAR_LEAKED * held_out):
                yield self._finding(
                    "near_leakage", leaks, total, f"{len(leaks):,} prompts of {name} are nearly the same as one on the "
                    f"other side of a held-out part ({held_out:,} of {total:,} rows are held out)",
                    "the evaluation shows less than it seems to; leave near duplicates out",
                )  # fmt: skip

    def _finding(self, check: str, pairs: Sequence[NearPair], total: int, what: str, fix: str) -> Finding:
        first = pairs[0]
        origins = tuple(self._origins[pair.later] for pair in pairs[:MAX_ORIGINS])
        where = f"{origins[0]} and {self._origins[first.earlier]}, similarity {first.similarity:.2f}"
        return Finding("warning", check, f"{what} ({where}): {fix}", origins[0], len(pairs), total, origins)

    def statistics(self) -> dict[str, Any]:
        """Counts."""
        return {
            "num_rows": len(self._origins),
            "similarity": SIMILARITY,
            "num_near_duplicate_rows": len(self.near_rows),
            "num_near_duplicate_prompts_across_held_out": len(self.near_leaks),
        }

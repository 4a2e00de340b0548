"""Checks of rankings and labels: what a reward model could learn instead of which answer is better."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threefold.data.doctor import patterns
from threefold.data.doctor.findings import MAX_ORIGINS, Finding, of_rows
from threefold.data.doctor.rows import Row, SourceRows, digest

MAX_PAIRS_OF_ROW = 28
"""Pairs of a row's ranked answers that are looked at: all of eight answers."""

MIN_DECIDED = 40
"""Pairs that a predictor must tell apart before it is judged."""

MAX_LENGTH_ACCURACY = 0.7
"""Accuracy of "the longer is better" (or of "the shorter is") above which length is called a bias."""

MAX_FEATURE_ACCURACY = 0.85
MIN_FEATURE_COVERAGE = 0.3
"""The same for features of form, and the share of pairs that such a feature must tell apart."""

RANKED_FORMATS = frozenset({"scored", "ranked"})
"""Formats whose rows without a comparison are ties (or have one answer); all ties are read as a demonstration."""

MIN_LABEL_SHARE = 0.1
MIN_LABELS = 20


def wilson(right: float, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not total:
        return 0.0, 1.0
    z = 1.959963984540054
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class Feature:
    """A property of an answer's form that a pair may differ in."""

    name: str
    value: Callable[[str], float]


FEATURES: tuple[Feature, ...] = (
    Feature("declines or apologises", lambda text: float(bool(patterns.refusal(text)))),
    Feature("ends with a full stop or the like", lambda text: float(text.rstrip()[-1:] in ".!?。！？")),
    Feature("begins with a capital letter", lambda text: float(text.lstrip()[:1].isupper())),
    Feature("has several lines", lambda text: float("\n" in text.strip())),
    Feature("has a list", lambda text: float("\n- " in text or "\n* " in text or "\n1." in text)),
    Feature("has bold text or a heading", lambda text: float("**" in text or "\n#" in text)),
    Feature("has an exclamation mark", lambda text: float("!" in text or "！" in text)),
)


class RankingChecks:
    """Looks at the ranked answers and the labels of one source: counts, and 17 bytes for each pair."""

    def __init__(self, source: SourceRows) -> None:
        self.source = source
        self.source_name = source.name
        self.num_rankings = self.num_pairs = 0
        self.num_tied = 0
        self.longer_better = self.shorter_better = 0
        self.agree = [0] * len(FEATURES)
        self.decided = [0] * len(FEATURES)
        self.good_labels = self.bad_labels = 0
        self._pair, self._way, self._index = array("Q"), array("b"), array("Q")

    def see(self, row: Row, index: int) -> None:
        """Count one row; `index` is its place in its source."""
        example = row.example
        if len(example.answers) == 1 and (not example.demonstration or example.demonstration == example.answers[0]):
            self.good_labels += bool(example.demonstration)
            self.bad_labels += not example.demonstration
        if len(example.answers) < 2:
            self.num_tied += self.source.format_name in RANKED_FORMATS
            self.num_rankings += self.source.format_name in RANKED_FORMATS
            return
        self.num_rankings += 1
        ranks = example.ranks or tuple(range(len(example.answers)))
        pairs = [
            (example.answers[i], example.answers[j])
            if ranks[i] < ranks[j]
            else (example.answers[j], example.answers[i])
            for i, j in combinations(range(len(ranks)), 2)
            if ranks[i] != ranks[j]
        ][:MAX_PAIRS_OF_ROW]
        self.num_tied += not pairs
        for better, worse in pairs:
            self._see_pair(better, worse)
            self._note_pair(row.prompt_key, better, worse, index)

    def _see_pair(self, better: str, worse: str) -> None:
        self.num_pairs += 1
        self.longer_better += len(better) > len(worse)
        self.shorter_better += len(better) < len(worse)
        for number, feature in enumerate(FEATURES):
            difference = feature.value(better) - feature.value(worse)
            self.decided[number] += difference != 0
            self.agree[number] += difference > 0

    def _note_pair(self, prompt_key: int, better: str, worse: str, index: int) -> None:
        first, second = sorted((digest(better), digest(worse)))
        self._pair.append(digest(f"{prompt_key} {first} {second}"))
        self._way.append(1 if digest(better) == first else -1)
        self._index.append(index)

    def _contradicting_rows(self) -> NDArray[np.uint64]:
        """Places in the source of the rows that rank two answers the other way round than an earlier row does."""
        if not self._pair:
            return np.empty(0, np.uint64)
        pair, way = np.frombuffer(self._pair, np.uint64), np.frombuffer(self._way, np.int8)
        _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
        return np.unique(np.frombuffer(self._index, np.uint64)[way != way[first][inverse]])

    def findings(self) -> Iterator[Finding]:
        """What is out of bounds."""
        against = self._contradicting_rows()
        if len(against) >= max(3, 0.005 * self.num_rankings):
            origins = tuple(self.source.examples[int(index)].origin for index in against[:MAX_ORIGINS])
            yield Finding(
                "warning", "contradictions",
                f"{of_rows(len(against), self.num_rankings, 'rankings')} of {self.source_name} rank two answers the "
                f"other way round than an earlier row (first: {origins[0]}): people disagree; where they should not, "
                "look whether chosen and rejected were swapped",
                origins[0], len(against), self.num_rankings, origins,
            )  # fmt: skip
        if self.num_tied >= max(10, 0.5 * self.num_rankings):
            yield self._about_all(
                "ties", self.num_tied,
                f"{of_rows(self.num_tied, self.num_rankings, 'rankings')} of {self.source_name} are ties, or have one "
                "answer: they compare nothing",
            )  # fmt: skip
        yield from self._length_bias()
        yield from self._feature_bias()
        yield from self._label_balance()

    def _length_bias(self) -> Iterator[Finding]:
        decided = self.longer_better + self.shorter_better
        right = max(self.longer_better, self.shorter_better)
        if decided < MIN_DECIDED or wilson(right, decided)[0] < MAX_LENGTH_ACCURACY:
            return
        which = "longer" if self.longer_better >= self.shorter_better else "shorter"
        low, high = wilson(right, decided)
        yield self._about_all(
            "length_bias", right,
            f"{self.source_name}: the {which} answer is the better one in {right / decided:.1%} of {decided:,} pairs "
            f"(95 % interval {low:.1%} to {high:.1%}): a reward model learns to count; balance the lengths",
        )  # fmt: skip

    def _feature_bias(self) -> Iterator[Finding]:
        for feature, agree, decided in zip(FEATURES, self.agree, self.decided, strict=True):
            right = max(agree, decided - agree)
            if decided < max(MIN_DECIDED, MIN_FEATURE_COVERAGE * self.num_pairs):
                continue
            if wilson(right, decided)[0] >= MAX_FEATURE_ACCURACY:
                which = "better" if agree >= decided - agree else "worse"
                yield self._about_all(
                    "form_bias", right,
                    f"{self.source_name}: where one answer of a pair {feature.name} and the other not, it is the "
                    f"{which} one in {right / decided:.1%} of {decided:,} pairs: a reward model learns that instead",
                )  # fmt: skip

    def _label_balance(self) -> Iterator[Finding]:
        labels = self.good_labels + self.bad_labels
        rarer = min(self.good_labels, self.bad_labels)
        if self.bad_labels and labels >= MIN_LABELS and rarer < MIN_LABEL_SHARE * labels:
            yield self._about_all(
                "label_imbalance", rarer,
                f"{self.source_name}: {self.good_labels:,} answers are labelled good and {self.bad_labels:,} bad: take "
                "more of the rarer ones",
            )  # fmt: skip

    def _about_all(self, check: str, count: int, message: str) -> Finding:
        return Finding("warning", check, message, "", count, self.num_rankings or self.good_labels + self.bad_labels)

    def statistics(self) -> dict[str, Any]:
        """How well length and form predict which answer is better, and the labels."""
        found: dict[str, Any] = {}
        if self.num_rankings:
            decided = self.longer_better + self.shorter_better
            low, high = wilson(self.longer_better, decided)
            found = {
                "num_rankings": self.num_rankings,
                "num_pairs": self.num_pairs,
                "num_tied_rankings": self.num_tied,
                "num_contradictions": len(self._contradicting_rows()),
                "longer_is_better": {
                    "accuracy": round(self.longer_better / max(decided, 1), 4),
                    "interval_95": [round(low, 4), round(high, 4)],
                    "num_pairs": decided,
                },
                "form": {
                    feature.name: {"better": agree, "pairs_that_differ": decided}
                    for feature, agree, decided in zip(FEATURES, self.agree, self.decided, strict=True)
                },
            }
        if self.bad_labels:
            found |= {"num_labelled_good": self.good_labels, "num_labelled_bad": self.bad_labels}
        return found


def percentiles(values: list[int]) -> dict[str, float]:
    """Median, 95th and 99th percentile and maximum, for the statistics."""
    if not values:
        return {}
    array = np.asarray(values)
    return {
        "median": round(float(np.median(array)), 1),
        "p95": round(float(np.percentile(array, 95)), 1),
        "p99": round(float(np.percentile(array, 99)), 1),
        "max": float(array.max()),
    }

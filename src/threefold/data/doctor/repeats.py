"""Checks of rows against each other by 64-bit keys: exact over any number of rows, 60 bytes for each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threefold.data.doctor.findings import MAX_ORIGINS, Finding, Severity, clip, of_rows
from threefold.data.doctor.rows import Row, SourceRows, digest
from threefold.data.split import opening as opening_of

MAX_EQUAL_ROWS = 0.02
MIN_EQUAL_ROWS = 20
MAX_ONE_PROMPT = 0.05
MAX_ONE_ANSWER = 0.05
MAX_ONE_OPENING = 0.5
MIN_OF_ONE = 20
MAX_LEAKED = 0.02
MIN_LEAKED = 10
MIN_LENGTH_CUT = 100
MAX_AT_ONE_LENGTH = 0.05

STEP_NAMES = ("step 1", "step 2", "step 3")

Keys = NDArray[np.uint64]


class RepeatChecks:
    """Collects keys of the rows of all sources, then compares them."""

    def __init__(self, sources: Sequence[SourceRows]) -> None:
        self.sources = sources
        self._source = array("H")
        self._place = array("b")
        self._index = array("Q")
        self._row, self._prompt, self._opening, self._loose, self._answer = (array("Q") for _ in range(5))
        self._length = array("L")

    def see(self, row: Row, index: int) -> None:
        """Note a row; `index` is its place in its source."""
        self._source.append(row.source)
        self._place.append(row.place)
        self._index.append(index)
        self._row.append(row.row_key)
        self._prompt.append(row.prompt_key)
        self._opening.append(row.opening_key)
        self._loose.append(row.loose_prompt_key)
        first = row.answers[0] if row.answers and not row.is_text else ""
        self._answer.append(digest(first) if first else 0)
        self._length.append(len(first))

    def findings(self) -> Iterator[Finding]:
        """Equal rows, one prompt or answer for many rows, answers cut at one length, prompts in two places."""
        row, prompt, answer = (np.frombuffer(keys, np.uint64) for keys in (self._row, self._prompt, self._answer))
        source = np.frombuffer(self._source, np.uint16)
        again = repeated(row)
        exact, alike = self._leaked_rows()
        for number in range(len(self.sources)):
            inside = np.flatnonzero(source == number)
            yield from self._equal_rows(number, inside, row, again)
            yield from self._one_for_many(
                inside, prompt, "one_prompt", MAX_ONE_PROMPT, "have one and the same prompt",
                "cap them: what is learnt of it outweighs all else",
            )  # fmt: skip
            yield from self._one_for_many(
                inside[answer[inside] != 0], answer, "one_answer", MAX_ONE_ANSWER, "have one and the same answer",
                "look whether the column holds answers, and leave most of them out",
            )  # fmt: skip
            yield from self._one_opening(number, inside)
            yield from self._cut_at_one_length(number, inside)
            yield from self._leaked(number, inside, exact, alike)

    def statistics(self) -> dict[str, Any]:
        """Numbers of different rows, prompts and answers."""
        row, prompt = np.frombuffer(self._row, np.uint64), np.frombuffer(self._prompt, np.uint64)
        exact, alike = self._leaked_rows()
        return {
            "num_rows": len(row),
            "num_different_rows": len(np.unique(row)),
            "num_different_prompts": len(np.unique(prompt)),
            "num_openings_in_two_places": len(exact),
            "num_prompts_in_two_places_but_for_punctuation": len(alike),
        }

    def _origins(self, positions: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(
            self.sources[self._source[position]].examples[self._index[position]].origin
            for position in positions[:MAX_ORIGINS].tolist()
        )

    def _equal_rows(
        self, number: int, inside: NDArray[np.int64], row: Keys, again: NDArray[np.int64]
    ) -> Iterator[Finding]:
        """Rows of one source that are equal to an earlier one of any source; `again` are those of all sources."""
        again = np.intersect1d(again, inside, assume_unique=True)
        if len(again) >= max(MIN_EQUAL_ROWS, MAX_EQUAL_ROWS * len(inside)):
            first = np.flatnonzero(row == row[again[0]])[:1]
            origins = self._origins(again)
            yield Finding(
                "warning", "equal_rows",
                f"{of_rows(len(again), len(inside))} of {self.sources[number].name} are the same as an earlier one "
                f"({origins[0]} as {self._origins(first)[0]}): leave them out, or say so with a source's epochs",
                origins[0], len(again), len(inside), origins,
            )  # fmt: skip

    def _one_for_many(
        self, inside: NDArray[np.int64], keys: Keys, check: str, bound: float, what: str, fix: str
    ) -> Iterator[Finding]:
        if not len(inside):
            return
        values, counts = np.unique(keys[inside], return_counts=True)
        most = int(counts.argmax())
        if counts[most] < max(MIN_OF_ONE, bound * len(inside)):
            return
        where = inside[keys[inside] == values[most]]
        position = int(where[0])
        example = self.sources[self._source[position]].examples[self._index[position]]
        shown = example.demonstration or example.answers[0]
        if check == "one_prompt":
            shown = example.prompt.messages[-1].content if example.prompt.messages else example.demonstration
        name = self.sources[self._source[position]].name
        yield Finding(
            "warning", check,
            f"{of_rows(int(counts[most]), len(inside))} of {name} {what} ({clip(shown)} in {example.origin}): {fix}",
            example.origin, int(counts[most]), len(inside), self._origins(where),
        )  # fmt: skip

    def _one_opening(self, number: int, inside: NDArray[np.int64]) -> Iterator[Finding]:
        """One first question before more than half of the conversations, which go on in several ways: all of them go
        to one place."""
        opening, prompt = np.frombuffer(self._opening, np.uint64), np.frombuffer(self._prompt, np.uint64)
        values, counts = np.unique(opening[inside], return_counts=True)
        if not len(inside) or counts.max() < MIN_OF_ONE or counts.max() <= MAX_ONE_OPENING * len(inside):
            return
        where = inside[opening[inside] == values[counts.argmax()]]
        if len(np.unique(prompt[where])) == 1:
            return  # one prompt for many rows, which is a finding of its own
        origins = self._origins(where)
        first = self.sources[number].examples[self._index[int(where[0])]]
        shown = opening_of(first.prompt).messages[-1].content
        yield Finding(
            "warning", "one_opening",
            f"{of_rows(len(where), len(inside))} of {self.sources[number].name} begin with one and the same question "
            f"({clip(shown)} in {origins[0]}), so all of them go to one part of one step: where it is the same by "
            "design, write it as a system message",
            origins[0], len(where), len(inside), origins,
        )  # fmt: skip

    def _cut_at_one_length(self, number: int, inside: NDArray[np.int64]) -> Iterator[Finding]:
        """Many answers of exactly the longest length there is: somebody cut them there."""
        lengths = np.frombuffer(self._length, np.dtype("L"))[inside]
        answered = lengths[lengths > 0]
        if not len(answered):
            return
        longest = int(answered.max())
        at_it = inside[lengths == longest]
        if longest < MIN_LENGTH_CUT or len(at_it) < max(5, MAX_AT_ONE_LENGTH * len(answered)):
            return
        answers = np.frombuffer(self._answer, np.uint64)[at_it]
        if len(np.unique(answers)) < len(at_it) / 2:
            return  # one answer for many rows, which is a finding of its own
        origins = self._origins(at_it)
        yield Finding(
            "warning", "cut_answers",
            f"{of_rows(len(at_it), len(answered))} of {self.sources[number].name} have an answer of exactly "
            f"{longest} characters, and none is longer (first: {origins[0]}): they were cut there; take the whole ones",
            origins[0], len(at_it), len(answered), origins,
        )  # fmt: skip

    def _leaked_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows whose opening an earlier row has in another place; and those whose prompt differs from one in another
        place only in case, spaces and punctuation."""
        opening, loose = np.frombuffer(self._opening, np.uint64), np.frombuffer(self._loose, np.uint64)
        place = np.frombuffer(self._place, np.int8)
        exact = np.flatnonzero(in_another_place(opening, place))
        return exact, np.setdiff1d(np.flatnonzero(in_another_place(loose, place)), exact)

    def _leaked(
        self, number: int, inside: NDArray[np.int64], exact: NDArray[np.int64], alike: NDArray[np.int64]
    ) -> Iterator[Finding]:
        name = self.sources[number].name
        used = int((np.frombuffer(self._place, np.int8)[inside] >= 0).sum())
        here = np.intersect1d(exact, inside, assume_unique=True)
        if len(here):
            yield self._leak("error", "leakage", here, used, f"of {name} begin with the same question as one in "
                             "another step, or on the other side of a held-out part: the split is at fault, please "
                             "report it")  # fmt: skip
        here = np.intersect1d(alike, inside, assume_unique=True)
        if len(here) >= max(MIN_LEAKED, MAX_LEAKED * used):
            yield self._leak("warning", "leakage_but_for_punctuation", here, used, f"of {name} differ only in case, "
                             "spaces or punctuation from one in another step, or on the other side of a held-out part: "
                             "write them alike, then the split keeps them together")  # fmt: skip

    def _leak(self, severity: Severity, check: str, rows: NDArray[np.int64], used: int, what: str) -> Finding:
        origins = self._origins(rows)
        message = f"{of_rows(len(rows), used, 'prompts')} {what} (first: {origins[0]})"
        return Finding(severity, check, message, origins[0], len(rows), used, origins)


def repeated(keys: Keys) -> NDArray[np.int64]:
    """Positions of keys that stand earlier too, in order."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.sort(order[1:][same])


def in_another_place(keys: Keys, places: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Of each position whether the first one with its key, among those that a step sees, has another place."""
    result = np.zeros(len(keys), np.bool_)
    used = np.flatnonzero(places >= 0)
    if not len(used):
        return result
    _, first, inverse = np.unique(keys[used], return_index=True, return_inverse=True)
    result[used] = places[used] != places[used][first][inverse]
    return result

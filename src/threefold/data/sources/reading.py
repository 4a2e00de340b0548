"""One source of the recipe, read row by row into examples: its format found out, bad rows refused or counted."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal

from threefold.config.data import DEMO, DemoDataSection, SourceSection
from threefold.data.demo import generate_examples
from threefold.data.reasoning import WorkedExample, read_worked_examples, with_reasoning
from threefold.data.sources.fields import BadRowError, UnansweredRowError, wrong_type
from threefold.data.sources.formats import FORMATS, RowFormat, detect, nearest_format, other_format, unknown_label
from threefold.data.sources.published import PUBLISHED, located, published_of
from threefold.data.sources.tables import LocatedRow, Row, read_rows
from threefold.errors import ConfigError, DataError
from threefold.types import Example

BadRows = Literal["error", "drop"]
ROWS_TO_LOOK_AT = 100
"""From which the format of a source is detected."""
MAX_COLUMNS = 20
"""Columns that a message names."""
MAX_FAULTS = 5
"""Bad rows of one kind that a reading describes."""


class SourceReading:
    """The examples of one source, read while they are iterated over, once.

    Attributes:
        name: of the source, in messages.
        format_name: the format that its rows are read in.
        columns: names that occur in its first rows.
        num_rows: rows read so far.
        dropped: rows left out so far, by reason.
        faults: what is wrong with the first few of them, by reason, each with its origin; not of those that are left
            out whatever data.bad_rows says.
    """

    def __init__(self, name: str, format_name: str, columns: tuple[str, ...]) -> None:
        self.name = name
        self.format_name = format_name
        self.columns = columns
        self.num_rows = 0
        self.dropped: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self._examples: Iterator[Example] = iter(())

    def __iter__(self) -> Iterator[Example]:
        return self._examples

    def read_with(self, read: Callable[[SourceReading], Iterator[Example]]) -> SourceReading:
        """This reading, with the generator of its examples, which counts in it."""
        self._examples = read(self)
        return self


def open_source(section: SourceSection, demo: DemoDataSection, seed: int, bad_rows: BadRows = "error") -> SourceReading:
    """Begin to read one of `data.sources`: its first rows say of what format it is.

    Args:
        section: the source.
        demo: settings of the embedded conversations.
        seed: of the embedded conversations.
        bad_rows: whether a row that cannot be used is an error, or is dropped and counted.

    Raises:
        DataError: the rows cannot be read, or fit no format; while iterating, also: a row is bad (under "error") or of
            another format than the others, or none could be used.
        ConfigError: section.format or section.mapping names what does not exist.
    """
    if section.path == [DEMO]:
        return SourceReading(section.label, DEMO, ()).read_with(lambda reading: _demo(reading, demo, seed))
    given = _given_format(section)
    section = located(section)
    rows = read_rows(section)
    if section.streaming and section.max_rows:
        rows = islice(rows, section.max_rows)
    first = list(islice(rows, ROWS_TO_LOOK_AT))
    columns = tuple(dict.fromkeys(name for row in first for name in row.values))
    rename = _renaming(section, given, columns)
    first = [rename(row) for row in first]
    row_format = given or _detected(section, first)
    if given is not None:
        _check_columns(section, given, first)
    reader = _Reader(section, row_format, bad_rows, first, is_detected=given is None)
    rest = chain(first, map(rename, rows) if section.mapping else rows)
    return SourceReading(section.label, row_format.name, columns).read_with(
        lambda reading: reader.examples(reading, rest)
    )


def _demo(reading: SourceReading, demo: DemoDataSection, seed: int) -> Iterator[Example]:
    for example in generate_examples(demo.num_prompts, demo.flawed_fraction, demo.flip_rate, seed):
        reading.num_rows += 1
        yield example


class _Reader:
    """What turns the rows of one source into examples."""

    def __init__(
        self,
        section: SourceSection,
        row_format: RowFormat,
        bad_rows: BadRows,
        first: list[LocatedRow],
        is_detected: bool,
    ) -> None:
        self._section = section
        self._format = row_format
        self._bad_rows = bad_rows
        self._is_detected = is_detected
        self._worked = _worked_examples(section)
        self._seen: set[tuple[str, ...]] = set()
        if is_detected:
            for row in first:
                self._refuse_other_format(row)
            self._seen = {tuple(row.values) for row in first}

    def examples(self, reading: SourceReading, rows: Iterator[LocatedRow]) -> Iterator[Example]:
        """All examples of the rows."""
        read, reasons = self._format.read, self._section.reasoning != "none"
        num_examples = 0
        rows = self._counted(reading, rows)
        for row in self._format.gather(rows) if self._format.gather else rows:
            try:
                examples = read(row.values, row.origin)
                if row.values.get("reference") is not None:
                    examples = [_with_reference(example, row.values["reference"]) for example in examples]
                if reasons:
                    examples = [self._with_reasoning(example) for example in examples]
            except BadRowError as bad:
                self._refuse_or_count(bad, row, reading)
                continue
            num_examples += len(examples)
            yield from examples
        if not num_examples:
            first = next((f": {faults[0]}" for faults in reading.faults.values() if faults), "")
            raise DataError(
                f"{reading.name}: none of its {reading.num_rows} rows can be used ({counts_note(reading.dropped)})"
                f"{first}; mend them, or say what they are with format or mapping in [[data.sources]]"
            )

    def _with_reasoning(self, example: Example) -> Example:
        try:
            return with_reasoning(example, self._section, self._worked)
        except DataError as error:
            raise BadRowError("without a question or a final answer", str(error)) from error

    def _counted(self, reading: SourceReading, rows: Iterator[LocatedRow]) -> Iterator[LocatedRow]:
        """The rows, counted; one with columns that none had before is looked at."""
        seen, is_detected = self._seen, self._is_detected
        for row in rows:
            reading.num_rows += 1
            if is_detected and (columns := tuple(row.values)) not in seen:
                self._refuse_other_format(row)
                seen.add(columns)
            yield row

    def _refuse_or_count(self, bad: BadRowError, row: LocatedRow, reading: SourceReading) -> None:
        if self._is_detected and self._format.gather is None:
            self._refuse_other_format(row)
        if self._bad_rows == "error" and not isinstance(bad, UnansweredRowError):
            raise DataError(
                f'{row.origin}: {bad.message}; mend the row, or set data.bad_rows = "drop" to leave out such rows'
            ) from bad
        reading.dropped[bad.reason] += 1
        faults = reading.faults.setdefault(bad.reason, [])
        if len(faults) < MAX_FAULTS and not isinstance(bad, UnansweredRowError):
            faults.append(f"{row.origin}: {bad.message}")

    def _refuse_other_format(self, row: LocatedRow) -> None:
        """A row of another format is no bad row: the file is not what it was taken for."""
        other = other_format(row.values, self._format)
        if other is not None:
            raise DataError(
                f"{row.origin}: is of format {other.signature()}, and {self._section.label} is of format "
                f"{self._format.signature()}: put rows of different formats into different files, each a source of "
                f'its own, or set format = "{self._format.name}" in [[data.sources]]'
            )


def _worked_examples(section: SourceSection) -> tuple[WorkedExample, ...]:
    """Those of section.few_shot_file; none where the built-in ones are to be shown."""
    if not section.few_shot_file:
        return ()
    rows = read_rows(SourceSection(path=[section.few_shot_file]))
    return read_worked_examples(section, (row.values for row in rows))


def counts_note(dropped: Mapping[str, int]) -> str:
    """Counts of dropped rows by reason, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))


def _with_reference(example: Example, reference: Any) -> Example:
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        raise wrong_type(reference, "reference", "a text or a number")
    return replace(example, reference=str(reference).strip())


# ------------------------------------------------------------------------------------------ finding out the format


def _given_format(section: SourceSection) -> RowFormat | None:
    """The format that the recipe names, or that the path stands for; None where it is to be detected."""
    known = published_of(section)
    if known is not None:
        return known.row_format
    if section.format == "auto":
        return None
    if section.format not in FORMATS:
        names = ["auto", *FORMATS, *PUBLISHED]
        raise ConfigError(
            f'{section.label}: there is no format "{section.format}"{_did_you_mean(section.format, names)}: use auto, '
            f"{', '.join(FORMATS)}, or the name of a published dataset"
        )
    return FORMATS[section.format]


def _detected(section: SourceSection, first: Sequence[LocatedRow]) -> RowFormat:
    rows = [row.values for row in first]
    row_format = detect(rows)
    if row_format is None:
        found = [*dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)]
        nearest, guesses = nearest_format(found)
        hint = ", ".join(f'{name} = "{guess or "..."}"' for name, guess in guesses.items())
        mend = f"say what yours are called with mapping = {{{hint}}} in [[data.sources]]"
        others = "; ".join(row_format.signature() for row_format in FORMATS.values() if row_format is not nearest)
        why = _why_not(rows, found, guesses, section)
        raise DataError(
            f"{section.label}: its columns ({_listed(found)}) fit no format{why}; the nearest is "
            f"{nearest.signature()}: {mend if guesses else 'its values are of other types'}; the others are {others}"
        )
    label = unknown_label(rows, row_format)
    if label is not None:
        raise DataError(
            f"{section.label}: label is {str(label)[:40]!r}, must be true or false; or set format = "
            f'"{row_format.name}" in [[data.sources]]'
        )
    return row_format


def _listed(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    more = len(names) - MAX_COLUMNS
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:MAX_COLUMNS])} and {more} more"


def _why_not(rows: Sequence[Row], found: Sequence[str], guesses: Mapping[str, str], section: SourceSection) -> str:
    """What most likely went wrong before the columns did."""
    if len(found) == 1 and all(_is_table(row.get(found[0])) for row in rows):
        return f" (the rows seem to be in the list {found[0]!r}: save that list alone)"
    if empty := [*dict.fromkeys(name for row in rows for name in row if name not in found)]:
        return f" (no value in the first {len(rows)} rows: {_listed(empty)})"
    if not any(guesses.values()) and any(re.search(r"\.[ct]sv(\.gz|\.zst)?$", path.lower()) for path in section.path):
        return " (the first line of a file must name its columns)"
    return ""


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _check_columns(section: SourceSection, row_format: RowFormat, first: Sequence[LocatedRow]) -> None:
    """Refuse a dataset without the columns of the format that it is to have."""
    found = [*dict.fromkeys(name for row in first for name in row.values)]
    missing = row_format.missing(found)
    if missing:
        guesses = [next(iter(difflib.get_close_matches(name, found, n=1)), "...") for name in missing]
        hint = ", ".join(f'{name} = "{guess}"' for name, guess in zip(missing, guesses, strict=True))
        raise DataError(
            f"{section.label}: format {row_format.signature()} needs {', '.join(map(repr, missing))}, and the columns "
            f"are {', '.join(found)}: say what yours are called with mapping = {{{hint}}} in [[data.sources]]"
        )


def _renaming(
    section: SourceSection, given: RowFormat | None, columns: Sequence[str]
) -> Callable[[LocatedRow], LocatedRow]:
    """What gives the columns of a row the names that `section.mapping` says."""
    mapping = section.mapping
    if not mapping:
        return lambda row: row
    known = given.known_columns() if given else [*dict.fromkeys(n for f in FORMATS.values() for n in f.known_columns())]
    for name, theirs in mapping.items():
        if name not in known:
            of_format = f"format {given.name}" if given else "any format"
            raise ConfigError(
                f"{section.label}: mapping: {name!r} is no column of {of_format}{_did_you_mean(name, known)}: use "
                f"{', '.join(known)}"
            )
        if theirs not in columns:
            raise DataError(
                f'{section.label}: mapping {name} = "{theirs}": there is no such column'
                f"{_did_you_mean(theirs, columns)}: it has {', '.join(columns)}"
            )
    used = {*mapping, *mapping.values()}
    pairs = tuple(mapping.items())

    def rename(row: LocatedRow) -> LocatedRow:
        values: Row = {name: value for name, value in row.values.items() if name not in used}
        for name, theirs in pairs:
            if theirs in row.values:
                values[name] = row.values[theirs]
        return LocatedRow(row.origin, values)

    return rename


def _did_you_mean(name: str, candidates: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, candidates, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""

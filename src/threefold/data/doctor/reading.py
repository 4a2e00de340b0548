"""From a recipe, or a library that is open already, to the rows that are examined; what cannot be read is a finding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from threefold.config.data import DataSection, SourceSection
from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat
from threefold.data.doctor.examination import FAST, examine
from threefold.data.doctor.findings import Finding, Report
from threefold.data.doctor.rows import BadRows, SourceRows
from threefold.data.examples import SourceTable
from threefold.data.library import Library, open_library
from threefold.data.sources import open_source
from threefold.data.split import STEPS, Step
from threefold.errors import ConfigError, DataError
from threefold.types import Example

BadRowsOfSource = Mapping[str, tuple[BadRows, ...]]


class TableExamples(Sequence[Example]):
    """The examples of one source in file order; going through all of them reads a batch at a time."""

    def __init__(self, table: SourceTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._table.example(range(len(self))[index])

    def __iter__(self) -> Iterator[Example]:
        for _, examples in self._table.batches(np.ones(len(self), np.bool_)):
            yield from examples


@dataclass(frozen=True)
class Opened:
    """A recipe's sources, as far as they can be read.

    Attributes:
        library: of those that can be; None where none can.
        findings: what is wrong with the others, and with the split.
        bad_rows: of each source, by its name.
    """

    library: Library | None
    findings: tuple[Finding, ...]
    bad_rows: BadRowsOfSource


def source_rows(library: Library, bad_rows: BadRowsOfSource, allow_bad: bool) -> list[SourceRows]:
    """The sources of a library, to be examined."""
    return [
        SourceRows(
            name=table.info.name,
            examples=TableExamples(table),
            places=places,
            num_rows=table.info.num_rows,
            bad_rows=bad_rows.get(table.info.name, ()),
            allow_bad=allow_bad,
            format_name=table.info.format_name,
        )
        for table, places in zip(library.tables, library.places, strict=True)
    ]


def fast_report(
    library: Library, chats: Mapping[Step, ChatFormat], recipe: Recipe, steps: Collection[Step] = STEPS
) -> Report:
    """What can be found in seconds, for the beginning of a run: some rows of each source.

    Args:
        library: of the run; where it could be opened, data.bad_rows has been obeyed.
        chats: of the steps whose tokenizer is known.
        steps: those that are to be run.
    """
    bad_rows = {
        table.info.name: tuple(BadRows(reason, count, reason, ()) for reason, count in table.info.dropped.items())
        for table in library.tables
    }
    return examine(source_rows(library, bad_rows, allow_bad=True), chats, recipe, FAST, steps).report


def open_for_doctor(recipe: Recipe, tell: Callable[[str], None]) -> Opened:
    """Open what can be opened, and describe the rest: one finding for each source, or kind of bad rows, at fault.

    Raises:
        ConfigError: the cache cannot be written.
    """
    try:
        library = open_library(recipe, tell)
    except (DataError, ConfigError):
        return _open_what_can_be(recipe, tell)
    bad_rows = {
        table.info.name: _bad_rows_of(table.info.section, recipe) for table in library.tables if table.info.dropped
    }
    return Opened(library, tuple(_split_findings(library)), bad_rows)


def _open_what_can_be(recipe: Recipe, tell: Callable[[str], None]) -> Opened:
    findings: list[Finding] = []
    bad_rows: dict[str, tuple[BadRows, ...]] = {}
    usable: list[SourceSection] = []
    for section in recipe.data.sources:
        try:
            bad_rows[section.label] = _bad_rows_of(section, recipe)
        except (DataError, ConfigError) as error:
            findings.append(Finding("error", "source", str(error), section.label, 1, 1))
        else:
            usable.append(section)
    if not usable:
        return Opened(None, tuple(findings), bad_rows)
    library = open_library(_with_sources(recipe, usable), tell)
    return Opened(library, (*findings, *_split_findings(library)), bad_rows)


def _bad_rows_of(section: SourceSection, recipe: Recipe) -> tuple[BadRows, ...]:
    """The bad rows of a source, which is read to its end for it.

    Raises:
        DataError, ConfigError: it cannot be read at all.
    """
    reading = open_source(section, recipe.data.demo, recipe.run.seed, "drop")
    for _ in reading:
        pass
    return tuple(
        BadRows(reason, reading.dropped[reason], faults[0], tuple(fault.partition(": ")[0] for fault in faults))
        for reason, faults in reading.faults.items()
        if faults
    )


def _with_sources(recipe: Recipe, sources: list[SourceSection]) -> Recipe:
    """The recipe with these sources alone, and bad rows dropped."""
    changed = {"sources": sources, "bad_rows": "drop", "weights": [], "temperature": 1.0}
    return recipe.model_copy(update={"data": DataSection(**(dict(recipe.data) | changed))})


def _split_findings(library: Library) -> Iterator[Finding]:
    try:
        library.check_enough()
    except DataError as error:
        yield Finding("error", "empty_share", str(error))

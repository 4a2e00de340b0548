"""Rows of any source, one after the other and never all at once, with the very values that the source holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.config.data import SourceSection
from threefold.data.sources.arrow_rows import dataset_files, read_dataset_directory, read_parquet
from threefold.data.sources.entry_point import entry_point_fingerprint, read_entry_point
from threefold.data.sources.hub import hub_fingerprint, read_hub
from threefold.data.sources.json_rows import read_json
from threefold.data.sources.locations import DATASET, resolve
from threefold.data.sources.text_rows import read_csv, read_tsv, read_txt
from threefold.errors import DataError

Row = dict[str, Any]

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_txt,
    DATASET: read_dataset_directory,
}


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """A row and where it stands.

    Attributes:
        origin: file and row for messages ("pairs.jsonl row 3"); rows count from 1 in each file, and blank lines and the
            column names of a csv file are no rows.
        values: what the row holds, by column.
    """

    origin: str
    values: Row


def read_rows(section: SourceSection) -> Iterator[LocatedRow]:
    """All rows of a source, in order: its files as they are listed, what a pattern names sorted by name.

    Raises:
        DataError: at once where something is missing or of unknown kind; on the way where it is damaged, with the file
            and the line or row.
    """
    location = resolve(section)
    if location.entry_point:
        return _located(location.entry_point, read_entry_point(location.entry_point))
    if location.hub_id:
        return _located(location.hub_id, read_hub(location.hub_id, section))
    return (row for file in location.files for row in _located(str(file.path), READERS[file.kind](file.path)))


def _located(name: str, rows: Iterator[Row]) -> Iterator[LocatedRow]:
    for number, row in enumerate(rows, start=1):
        yield LocatedRow(f"{name} row {number}", row)


def fingerprint(section: SourceSection) -> str:
    """Hexadecimal sha256 that changes when the rows may have changed; reads bytes, but no rows.

    Of files it is over their content and endings in order, of a Hub dataset over its commit and what is read of it, of
    a Python function over the source of its module (see `entry_point_fingerprint`).

    Raises:
        DataError: as `read_rows` at once.
    """
    location = resolve(section)
    if location.entry_point:
        return entry_point_fingerprint(location.entry_point)
    if location.hub_id:
        return hub_fingerprint(location.hub_id, section)
    digest = hashlib.sha256()
    for file in location.files:
        for part in dataset_files(file.path) if file.kind == DATASET else [file.path]:
            try:
                with part.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(f"{part}: cannot be read: {error.strerror}") from error
        digest.update(file.kind.encode())
    return digest.hexdigest()

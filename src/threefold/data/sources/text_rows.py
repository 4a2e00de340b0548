"""Rows of csv, tsv and txt files: the very texts that the file holds, no types guessed."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from threefold.data.sources.streams import text_chunks, text_lines
from threefold.errors import DataError

DOCUMENT_SEPARATOR = "<|endoftext|>"
LONGEST_FIELD = 1 << 27
"""Characters; Python's own bound of 131,072 is shorter than some conversations."""
OTHER_SEPARATORS = re.compile(r"[^;\t|,]+([;\t|,])[^;\t|,]+(\1[^;\t|,]+)*")
REASONS = {
    "unexpected end of data": "its quote is never closed",
    "new-line character": "a carriage return without a line feed stands in it, as old Macs end lines",
}
"""What Python's reader says, and what it means."""


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a csv file: texts by the names in its first line."""
    return _read_separated(path, ",", "commas")


def read_tsv(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a tsv file, quoted as in csv."""
    return _read_separated(path, "\t", "tabs")


def _read_separated(path: Path, separator: str, separators: str) -> Iterator[dict[str, str]]:
    """Rows as RFC 4180 describes them: a field with separators, quotes or line ends stands in quotes, and a quote in it
    is doubled. Blank lines are no rows, and neither are lines of separators alone, as spreadsheets write them; columns
    without a name, as spreadsheets and data frames write them, are left out.

    Raises:
        DataError: a line breaks these rules, has more or fewer fields than the first, or the first names one twice.
    """
    records = _records(path, separator, separators)
    _, columns = next(records, (1, []))
    if not any(columns):
        raise DataError(f"{path}: is empty; it must hold a line of column names, and at least one row")
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path} line 1: names column {twice[0]!r} twice; rename or remove one")
    other = OTHER_SEPARATORS.fullmatch(columns[0]) if len(columns) == 1 else None
    if other is not None and other[1] != separator:
        raise DataError(
            f"{path} line 1: has the one column {columns[0]!r}, which looks like several, separated by "
            f"{other[1]!r}; a {path.name.lower().split('.', 1)[1]} file is separated by {separators}: save it so"
        )
    num_rows = 0
    for line, fields in records:
        if len(fields) != len(columns):
            raise DataError(
                f"{path} line {line}: has {len(fields)} fields, and the first line names {len(columns)} columns; "
                f"put a text that holds {separators} into double quotes"
            )
        if any(fields):
            num_rows += 1
            yield {name: text for name, text in zip(columns, fields, strict=True) if name}
    if not num_rows:
        raise DataError(f"{path}: holds no rows, only column names; it must hold at least one")


def _records(path: Path, separator: str, separators: str) -> Iterator[tuple[int, list[str]]]:
    """Fields of each record that is not blank, and the line where it begins."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(text_lines(path), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = next((said for cause, said in REASONS.items() if cause in str(error)), str(error))
            raise DataError(
                f"{path} line {line}: is not a row of fields separated by {separators}: {reason} (a text that holds "
                "quotes stands in double quotes, and each quote in it is doubled)"
            ) from error
        if fields is None:
            return
        if fields:
            yield line, fields


def read_txt(path: Path) -> Iterator[dict[str, str]]:
    """Documents of a txt file as rows {"text": …}, without whitespace around them; blank ones are none.

    <|endoftext|> separates documents, so a file without it is one document: blank lines are paragraphs.

    Raises:
        DataError: the file cannot be read, or holds no text.
    """
    num_rows = 0
    for document in _documents(path):
        if text := document.replace("\r\n", "\n").strip():
            num_rows += 1
            yield {"text": text}
    if not num_rows:
        raise DataError(f"{path}: holds no text")


def _documents(path: Path) -> Iterator[str]:
    parts: list[str] = []
    tail = ""
    for chunk in text_chunks(path):
        *ended, rest = (tail + chunk).split(DOCUMENT_SEPARATOR)
        for document in ended:
            yield "".join([*parts, document])
            parts = []
        # A separator may lie across the end of a chunk.
        tail = rest[1 - len(DOCUMENT_SEPARATOR) :]
        parts.append(rest[: len(rest) - len(tail)])
    yield "".join([*parts, tail])

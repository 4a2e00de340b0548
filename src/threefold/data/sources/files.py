"""Rows of a local json, jsonl or gzipped file, with the very values that the file holds.

Python's own parser reads them: it names the line that is wrong, and it guesses no types. (The json reader of `datasets`
turns a column of date-like texts into timestamps, the text "12" into a number where its column has several types, and
quotes texts again where a column changes its type after the first 10 MB.)
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.errors import DataError

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """All rows of a file.

    Attributes:
        columns: names that occur in any of the rows.
        rows: in the order of the file; row 1 is the first, blank lines do not count.
    """

    columns: tuple[str, ...]
    rows: list[Row]


def read_rows(spec: str) -> Table:
    """All rows of a file: a list of objects, or one object per line.

    Raises:
        DataError: the file is missing or damaged, is not JSON (the line is named), or holds no rows.
    """
    return parse_rows(spec, read_text(spec, ENDINGS))


def parse_rows(spec: str, text: str) -> Table:
    """`read_rows` of a text that was already read; `spec` is for messages."""
    if not text.strip():
        raise DataError(f"{spec}: is empty; it must hold at least one row")
    values = _parse_list(spec, text) if text.lstrip().startswith("[") else _parse_lines(spec, text)
    if not values:
        raise DataError(f"{spec}: holds no rows; it must hold at least one")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(
                f"{spec} row {number}: is {json.dumps(value)[:40]}, and must be an object with named fields"
            )
    if re.search(r"\\u[dD][89a-fA-F]", text):
        _refuse_half_characters(spec, values)
    return Table(columns=tuple(dict.fromkeys(name for row in values for name in row)), rows=values)


def read_text(spec: str, endings: Sequence[str]) -> str:
    """The whole text of a UTF-8 file, gzipped where its name ends in .gz.

    Raises:
        DataError: there is no such file, it is a directory, has another ending, or cannot be read as text.
    """
    path = Path(spec)
    if path.is_dir():
        raise DataError(f"{spec}: is a directory; name a file in it ({', '.join(endings)})")
    if not path.is_file():
        raise DataError(f"{spec}: no such file (paths are relative to the directory where the command is run)")
    if not spec.endswith(tuple(endings)):
        raise DataError(f"{spec}: cannot tell its format from its name; it must end in one of {', '.join(endings)}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{spec}: is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{spec}: cannot be read: {error}; is the file whole?") from error


def _refuse_half_characters(spec: str, rows: list[dict[str, Any]]) -> None:
    """An escape such as \\ud83d is half a character (a cut emoji): no text that can be encoded, so no tokenizer takes
    it."""
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{spec} row {number}: field {name!r} holds half of a character ({error.object[error.start]!a}); "
                    "mend or remove it"
                ) from error


def _parse_list(spec: str, text: str) -> list[Any]:
    try:
        values: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{spec} line {error.lineno}: is not JSON: {error.msg} at column {error.colno}") from error
    return values


def _parse_lines(spec: str, text: str) -> list[Any]:
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{spec} line {number}: is not JSON: {error.msg} at column {error.colno} "
                    "(a file is one list of objects, or one object per line)"
                ) from error
    return values

"""Rows of json and jsonl files, with the very values that the file holds (docs/decisions/0003-json-rows.md).

A file is one list of objects, or one object per line, whatever its ending; both are read as a stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threefold.data.sources.streams import CHUNK_BYTES, text_chunks, text_lines
from threefold.errors import DataError

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
WHITESPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
LONGEST_TOKEN = 16
"""A number or word of JSON that a chunk cuts is shorter than this; the parser then complains this near the end."""


def read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a json or jsonl file, in order; blank lines are none.

    Raises:
        DataError: the file cannot be read, is not JSON (the line is named), or holds no rows, or one that is no object.
    """
    values = _list_values(path) if _begins_with_list(path) else _line_values(path)
    number = 0
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(
                f"{path} row {number}: is {json.dumps(value)[:40]}, and must be an object with named fields"
            )
        yield value
    if not number:
        raise DataError(f"{path}: holds no rows; it must hold at least one")


def _begins_with_list(path: Path) -> bool:
    for chunk in text_chunks(path):
        if text := chunk.lstrip():
            return text.startswith("[")
    raise DataError(f"{path}: is empty; it must hold at least one row")


# ------------------------------------------------------------------------------------------------- one object per line


def _line_values(path: Path) -> Iterator[Any]:
    lines = enumerate(text_lines(path), start=1)
    num_values = 0
    for number, line in lines:
        try:
            value = DECODER.decode(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            if not line.strip():
                continue
            raise DataError(
                f"{path} line {number}: is not JSON: {_reason(error)} "
                f"(a file is one list of objects, or one object per line); {_count_bad_lines(number, lines)}"
            ) from error
        num_values += 1
        if HALF_CHARACTER.search(line):
            _refuse_half_characters(f"{path} row {num_values}", value)
        yield value


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error).split(";")[0]


def _count_bad_lines(number: int, rest: Iterator[tuple[int, str]]) -> str:
    """How many of the lines are no JSON, where line `number` is the first of them."""
    bad = 1
    end = ""
    try:
        for _, line in rest:
            number += 1
            try:
                DECODER.decode(line)
            except (ValueError, RecursionError):
                bad += bool(line.strip())
    except DataError:
        end = ", and what follows cannot be read"
    return f"{bad} of its {number} lines {'is' if bad == 1 else 'are'} not{end}"


def _refuse_half_characters(place: str, row: Any) -> None:
    """An escape such as \\ud83d is half a character (a cut emoji): no text that can be encoded, so no tokenizer takes
    it."""
    for name, value in row.items() if isinstance(row, dict) else ():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: field {name!a} holds half of a character ({error.object[error.start]!a}); mend or remove it"
            ) from error


# ----------------------------------------------------------------------------------------------------- list of objects


class _Text:
    """A text that is read on as far as it is needed, and forgotten up to where it was understood.

    Attributes:
        text: what is held of it.
        at: place in `text` up to which it was understood.
        has_ended: whether nothing follows `text`.
    """

    def __init__(self, path: Path) -> None:
        self._chunks = text_chunks(path)
        self._lines_before, self._columns_before = 0, 0
        self.text, self.at = "", 0
        self.has_ended = False

    def read_on(self) -> bool:
        """Adds at least as much as is held and not understood, so that a long value costs no square of its length;
        False at the end of the file."""
        last_line_end = self.text.rfind("\n", 0, self.at)
        if last_line_end >= 0:
            self._lines_before += self.text.count("\n", 0, self.at)
            self._columns_before = -last_line_end - 1
        self._columns_before += self.at
        parts = [self.text[self.at :]]
        wanted = max(CHUNK_BYTES, len(parts[0]))
        for chunk in self._chunks:
            parts.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        else:
            self.has_ended = True
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1

    def next_character(self) -> str:
        """The character after any whitespace, where `at` then stands; "" at the end of the file."""
        while True:
            match = WHITESPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or not self.read_on():
                return self.text[self.at : self.at + 1]

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, both from 1, of a place in `text`."""
        line_end = self.text.rfind("\n", 0, at)
        column = at - line_end if line_end >= 0 else self._columns_before + at + 1
        return self._lines_before + self.text.count("\n", 0, at) + 1, column


def _list_values(path: Path) -> Iterator[Any]:
    text = _Text(path)
    assert text.next_character() == "["
    text.at += 1
    number = 0
    more = text.next_character() != "]"
    while more:
        number += 1
        text.next_character()
        value, end = _next_value(path, text, number)
        if HALF_CHARACTER.search(text.text, text.at, end):
            _refuse_half_characters(f"{path} row {number}", value)
        text.at = end
        yield value
        more = text.next_character() == ","
        if more:
            text.at += 1
    if not text.next_character():
        raise _cut_list(path, text, number)
    if text.next_character() != "]":
        raise _bad_list(path, text, "Expecting ',' delimiter", text.at)
    text.at += 1
    if text.next_character():
        raise _bad_list(path, text, "Extra data after the list", text.at)


def _next_value(path: Path, text: _Text, number: int) -> tuple[Any, int]:
    """Value that begins where `text` stands, and where it ends."""
    while True:
        try:
            value, end = DECODER.raw_decode(text.text, text.at)
        except json.JSONDecodeError as error:
            open_string = error.msg.startswith("Unterminated string")
            if not text.has_ended and (open_string or error.pos >= len(text.text) - LONGEST_TOKEN):
                text.read_on()
                continue
            if open_string or not text.text[error.pos :].strip():
                raise _cut_list(path, text, number - 1) from error
            raise _bad_list(path, text, error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise _bad_list(path, text, _reason(error), text.at) from error
        else:
            if end < len(text.text) or not text.read_on():
                return value, end


def _bad_list(path: Path, text: _Text, message: str, at: int) -> DataError:
    line, column = text.place(at)
    return DataError(f"{path} line {line}: is not JSON: {message.removesuffix(' at')} at column {column}")


def _cut_list(path: Path, text: _Text, whole_rows: int) -> DataError:
    line, _ = text.place(len(text.text))
    return DataError(
        f"{path} line {line}: is not JSON: the list ends in the middle, after {whole_rows} whole rows; is the file "
        "whole?"
    )

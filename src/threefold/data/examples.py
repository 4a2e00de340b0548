"""The examples of one source as an Arrow table: read once, whatever the split, the seed and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from threefold.config.data import DEMO, SourceSection
from threefold.config.recipe import Recipe
from threefold.data.cache import TableReader, TableWriter, cached, code_version, key_hash, read_info
from threefold.data.sources import file_names, fingerprint, open_source
from threefold.data.split import opening, prompt_digest
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt, Role

EXAMPLES_FILE = "examples.arrow"
SCHEMA = pa.schema(
    [
        ("roles", pa.string()),
        ("contents", pa.list_(pa.string())),
        ("demonstration", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("ranks", pa.list_(pa.int16())),
        ("reference", pa.string()),
        ("origin", pa.string()),
        ("opening", pa.uint64()),
        ("digest", pa.uint64()),
        ("content", pa.uint64()),
    ]
)
ROLE_OF: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
PROGRESS_EVERY_ROWS = 100_000


@dataclass(frozen=True)
class SourceInfo:
    """What one source gave.

    Attributes:
        section: as the recipe has it.
        name: in messages.
        format_name: the format that its rows were read in.
        columns: names that occur in its first rows.
        num_rows: rows read.
        num_examples: examples that they gave.
        dropped: rows that cannot be used, counted by reason; empty unless data.bad_rows is "drop".
        fingerprint: hash of the source's content.
        key: hash of all that its examples depend on.
    """

    section: SourceSection
    name: str
    format_name: str
    columns: tuple[str, ...]
    num_rows: int
    num_examples: int
    dropped: Mapping[str, int]
    fingerprint: str
    key: str

    def note(self) -> str:
        """One line for the console."""
        counts = f"{self.num_rows} rows"
        if self.num_examples != self.num_rows - sum(self.dropped.values()):
            counts += f", {self.num_examples} examples"
        if self.dropped:
            reasons = sorted(self.dropped.items(), key=lambda item: -item[1])
            counts += (
                f"; {sum(self.dropped.values())} of {self.num_rows} rows dropped ("
                + ", ".join(f"{count} {reason}" for reason, count in reasons)
                + ")"
            )
        return f"{self.name}: {self.format_name} ({', '.join(self.columns) or 'embedded'}), {counts}"


class SourceTable:
    """The examples of a source, in the order of its rows.

    Attributes:
        info: what the source gave.
        openings: [N] uint64, of each example's conversation up to the first question, which decides its place.
        digests: [N] uint64, of each example's whole prompt: equal for prompts that count as the same.
        contents: [N] uint64, of each example's whole content.
    """

    def __init__(self, info: SourceInfo, path: Path) -> None:
        self.info = info
        self._table = TableReader(path)
        self.openings: NDArray[np.uint64] = self._table.numbers("opening")
        self.digests: NDArray[np.uint64] = self._table.numbers("digest")
        self.contents: NDArray[np.uint64] = self._table.numbers("content")

    def __len__(self) -> int:
        return len(self._table)

    def example(self, index: int) -> Example:
        """One example."""
        columns, row = self._table.row(index)
        return _example([column[row].as_py() for column in columns[:7]])

    def origins(self) -> Iterator[tuple[int, pa.Array]]:
        """Where the examples come from, a record batch at a time, each with the number of its first example."""
        for first, batch in self._table.batches():
            yield first, batch.column("origin")

    def batches(self, keep: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[Example]]]:
        """The examples that `keep` [N] marks, in their order, a record batch at a time: their numbers, and they."""
        for first, batch in self._table.batches():
            rows = np.flatnonzero(keep[first : first + batch.num_rows])
            if len(rows):
                chosen = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
                columns = [column.to_pylist() for column in chosen.columns[:7]]
                yield first + rows, [_example(values) for values in zip(*columns, strict=True)]


class ExampleList(Sequence[Example]):
    """Some examples of several sources, read when they are asked for.

    Args:
        tables: the sources.
        rows: for each, the numbers of its examples, in the order wanted.
    """

    def __init__(self, tables: Sequence[SourceTable], rows: Sequence[NDArray[np.int64]]) -> None:
        self._tables, self._rows = tables, rows
        self._ends = np.cumsum([len(numbers) for numbers in rows])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        source = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[source - 1]) if source else 0
        return self._tables[source].example(int(self._rows[source][index - start]))


def open_table(section: SourceSection, recipe: Recipe, root: Path, tell: Callable[[str], None]) -> SourceTable:
    """The table of one source, made if it is not in the cache.

    Raises:
        DataError: the source cannot be read; see `open_source`.
    """
    print_of_content = source_fingerprint(section, recipe)
    settings = section.model_dump(exclude={"name", "split", "sft_only", "epochs"})
    if not section.streaming:
        settings.pop("max_rows")
    key = {
        "fingerprint": print_of_content,
        "files": file_names(section),
        "settings": settings,
        "bad_rows": recipe.data.bad_rows,
        "code": [code_version(), pa.__version__, datasets.__version__, platform.python_version()],
    }

    def build(partial: Path) -> dict[str, Any]:
        info = _write(partial, section, recipe, tell)
        if source_fingerprint(section, recipe) != print_of_content:
            raise DataError(f"{section.label}: changed while it was read; run again when nothing writes to it")
        return info

    directory = cached(root, "examples", key, build, tell)
    info = read_info(directory)
    source = SourceInfo(
        section=section,
        name=section.label,
        format_name=info["format"],
        columns=tuple(info["columns"]),
        num_rows=info["num_rows"],
        num_examples=info["num_examples"],
        dropped=info["dropped"],
        fingerprint=print_of_content,
        key=key_hash(key),
    )
    return SourceTable(source, directory / EXAMPLES_FILE)


def source_fingerprint(section: SourceSection, recipe: Recipe) -> str:
    """What stands for a source's content, a file of few-shot examples included."""
    if section.path == [DEMO]:
        return key_hash({"demo": recipe.data.demo.model_dump(), "seed": recipe.run.seed})
    if not section.few_shot_file:
        return fingerprint(section)
    return key_hash({"rows": fingerprint(section), "shots": fingerprint(SourceSection(path=[section.few_shot_file]))})


def _write(partial: Path, section: SourceSection, recipe: Recipe, tell: Callable[[str], None]) -> dict[str, Any]:
    """Read a source into `partial`."""
    reading = open_source(section, recipe.data.demo, recipe.run.seed, recipe.data.bad_rows)
    with TableWriter(partial / EXAMPLES_FILE, SCHEMA) as writer:
        for example in reading:
            values, num_bytes = _values(example)
            writer.append(*values, num_bytes=num_bytes)
            if writer.num_rows % PROGRESS_EVERY_ROWS == 0:
                tell(f"{section.label}: {writer.num_rows} examples read")
    return {
        "format": reading.format_name,
        "columns": list(reading.columns),
        "num_rows": reading.num_rows,
        "num_examples": writer.num_rows,
        "dropped": dict(reading.dropped),
    }


def _values(example: Example) -> tuple[tuple[Any, ...], int]:
    """A row of SCHEMA, and about how many bytes it has."""
    messages = example.prompt.messages
    roles = "".join(message.role[0] for message in messages)
    contents = [message.content for message in messages]
    content = [roles, contents, example.demonstration, example.answers, example.ranks, example.reference]
    try:
        whole = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # rows of files have been looked at, those of a Python function have not
        half = error.object[error.start]
        raise DataError(f"{example.origin}: holds half of a character ({half!a}); mend or remove it") from error
    text = "" if messages else example.demonstration
    asked = example.original if example.original.messages else example.prompt
    values = (
        roles,
        contents,
        example.demonstration,
        example.answers,
        example.ranks,
        example.reference,
        example.origin,
        int.from_bytes(prompt_digest(opening(asked), text)[:8], "little"),
        int.from_bytes(prompt_digest(asked, text)[:8], "little"),
        int.from_bytes(hashlib.sha256(whole).digest()[:8], "little"),
    )
    return values, len(whole)


def _example(values: Sequence[Any]) -> Example:
    roles, contents, demonstration, answers, ranks, reference, origin = values
    messages = tuple(Message(ROLE_OF[role], content) for role, content in zip(roles, contents, strict=True))
    return Example(Prompt(messages), demonstration, tuple(answers), origin, tuple(ranks), reference)

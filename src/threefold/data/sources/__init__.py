"""Datasets to examples: a source is named in the recipe, its rows are recognised by their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from threefold.config.recipe import DemoDataSection
from threefold.data.demo import generate_examples
from threefold.data.sources.files import read_rows
from threefold.data.sources.formats import BadRowError, recognise_format
from threefold.errors import DataError
from threefold.types import Example

BadRows = Literal["error", "drop"]


@dataclass(frozen=True)
class SourceResult:
    """What one source gave.

    Attributes:
        spec: the source as the recipe names it.
        examples: its usable rows, in their order.
        num_rows: rows read.
        dropped_by_reason: unusable rows, counted; empty unless bad rows are dropped.
    """

    spec: str
    examples: list[Example]
    num_rows: int
    dropped_by_reason: Mapping[str, int]

    @property
    def num_dropped(self) -> int:
        """Rows that were left out."""
        return sum(self.dropped_by_reason.values())


def read_source(spec: str, demo: DemoDataSection, seed: int, bad_rows: BadRows = "error") -> SourceResult:
    """Reads one entry of `data.sources`.

    Args:
        spec: "demo", or the path of a json, jsonl or jsonl.gz file.
        demo: settings of the embedded conversations.
        seed: of the embedded conversations.
        bad_rows: whether a row that cannot be used is an error or is dropped and counted.

    Raises:
        DataError: the file cannot be read, its columns are unknown, a row is bad (under "error"), or none is usable.
    """
    if spec == "demo":
        examples = generate_examples(demo.num_prompts, demo.flawed_fraction, demo.flip_rate, seed)
        return SourceResult(spec, examples, len(examples), {})
    table = read_rows(spec)
    row_format = recognise_format(spec, table.columns)
    examples = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(table.rows, start=1):
        origin = f"{spec} row {number}"
        try:
            examples.append(row_format.read(row, origin))
        except BadRowError as bad:
            if bad_rows == "error":
                raise DataError(
                    f'{origin}: {bad.message}; mend the row, or set data.bad_rows = "drop" to leave out such rows'
                ) from bad
            dropped[bad.reason] += 1
    if not examples:
        raise DataError(f"{spec}: none of its {len(table.rows)} rows can be used ({_counts(dropped)})")
    return SourceResult(spec, examples, len(table.rows), dict(dropped))


def dropped_note(result: SourceResult) -> str:
    """One line for the console about the rows that were left out; "" if there were none."""
    if not result.num_dropped:
        return ""
    return (
        f"{result.spec}: {result.num_dropped} of {result.num_rows} rows dropped ({_counts(result.dropped_by_reason)})"
    )


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))

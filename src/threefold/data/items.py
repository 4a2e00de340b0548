"""What a step trains on: items that are read from their Arrow tables when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from threefold.data.blend import Blend
from threefold.data.cache import TableReader
from threefold.data.examples import ROLE_OF
from threefold.types import Message, PreparedPrompt, Prompt, RankedAnswers, TokenSequence

Item = TypeVar("Item")
ItemT = TypeVar("ItemT", covariant=True)
ReadRows = Callable[[TableReader, NDArray[np.int64]], Item]


@dataclass(frozen=True)
class LengthCounts:
    """What became of the examples of one part of a step.

    Attributes:
        examples: of the part.
        without: have nothing for this step (no demonstration, no comparison).
        refused: the template cannot render, and were left out (data.bad_rows = "drop").
        truncated: were shortened by whole turns to fit.
        dropped: were too long, and left out.
        answers_dropped: answers that were too long, left out of rankings that stayed.
        repeated: have the prompt of another row of step 3, which takes each once.
        pieces: sequences that plain texts were cut into.
        tokens: of all rows that stayed.
    """

    examples: int = 0
    without: int = 0
    refused: int = 0
    truncated: int = 0
    dropped: int = 0
    answers_dropped: int = 0
    repeated: int = 0
    pieces: int = 0
    tokens: int = 0

    def note(self) -> str:
        """What a user must know of it, for the end of a line; "" if nothing was left out."""
        parts = {
            "refused by the chat template and dropped": self.refused,
            "too long and dropped": self.dropped,
            "too long and shortened": self.truncated,
            "answers too long and dropped": self.answers_dropped,
            "without anything for this step": self.without,
            "with the prompt of another": self.repeated,
        }
        return "".join(f", {count} {what}" for what, count in parts.items() if count)


@dataclass(frozen=True)
class StepItems(Generic[Item]):
    """All that a step trains on and is measured with.

    Attributes:
        train: by source, in each by prompt.
        eval: of all sources, by prompt.
        blend: the order of `train` in each pass.
        counts: what became of the examples to train on.
        eval_counts: and of those held out.
    """

    train: Sequence[Item]
    eval: Sequence[Item]
    blend: Blend
    counts: LengthCounts
    eval_counts: LengthCounts

    def description(self) -> dict[str, Any]:
        """Sizes, draws of a pass and counts, as JSON."""
        sources = {
            name: {"items": size, "draws_per_pass": draws}
            for name, size, draws in zip(self.blend.names, self.blend.sizes, self.blend.draws, strict=True)
        }
        return {
            "sources": sources,
            "train": {"items": len(self.train), **asdict(self.counts)},
            "eval": {"items": len(self.eval), **asdict(self.eval_counts)},
        }

    def note(self) -> str:
        """Both parts' counts; see `LengthCounts.note`."""
        both = {
            name: getattr(self.counts, name) + getattr(self.eval_counts, name)
            for name in self.counts.__dataclass_fields__
        }
        return LengthCounts(**both).note()


class LazyItems(Sequence[ItemT]):
    """Items made of one or more rows of a table.

    Args:
        table: the rows.
        order: numbers of rows, those of one item beside each other.
        starts: [number of items + 1], where each item begins in `order`.
        read: makes an item of its rows.
    """

    def __init__(
        self, table: TableReader, order: NDArray[np.int64], starts: NDArray[np.int64], read: ReadRows[ItemT]
    ) -> None:
        self._table, self._order, self._starts, self._read = table, order, starts, read

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> ItemT: ...
    @overload
    def __getitem__(self, index: slice) -> list[ItemT]: ...
    def __getitem__(self, index: int | slice) -> ItemT | list[ItemT]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._read(self._table, self._order[self._starts[index] : self._starts[index + 1]])


def read_sequence(table: TableReader, rows: NDArray[np.int64]) -> TokenSequence:
    """A row of step 1's table."""
    columns, row = table.row(int(rows[0]))
    ids, trained, prompt_length = columns[0][row], columns[1][row], columns[2][row]
    return TokenSequence(
        tuple(ids.values.to_numpy().tolist()),
        tuple(trained.values.to_numpy(zero_copy_only=False).tolist()),
        prompt_length.as_py(),
    )


def read_ranking(table: TableReader, rows: NDArray[np.int64]) -> RankedAnswers:
    """All rankings of one prompt, rows of step 2's table; an answer that several of them rank is there once."""
    places: dict[tuple[int, ...], int] = {}
    sequences: list[TokenSequence] = []
    rankings = []
    for number in rows:
        columns, row = table.row(int(number))
        prompt_length, ranks = columns[1][row].as_py(), columns[2][row].as_py()
        tiers: dict[int, list[int]] = {}
        for answer, rank in zip(columns[0][row].values, ranks, strict=True):
            ids = tuple(answer.values.to_numpy().tolist())
            if ids not in places:
                places[ids] = len(sequences)
                trained = (False,) * prompt_length + (True,) * (len(ids) - prompt_length)
                sequences.append(TokenSequence(ids, trained, prompt_length))
            tiers.setdefault(rank, []).append(places[ids])
        rankings.append(tuple(tuple(tiers[rank]) for rank in sorted(tiers)))
    return RankedAnswers(tuple(sequences), tuple(rankings))


def read_prompt(table: TableReader, rows: NDArray[np.int64]) -> PreparedPrompt:
    """A row of step 3's table."""
    columns, row = table.row(int(rows[0]))
    values: list[Any] = [column[row].as_py() for column in columns[1:5]]
    roles, contents, origin, reference = values
    messages = tuple(Message(ROLE_OF[role], content) for role, content in zip(roles, contents, strict=True))
    ids = tuple(columns[0][row].values.to_numpy().tolist())
    return PreparedPrompt(Prompt(messages), ids, origin, reference)

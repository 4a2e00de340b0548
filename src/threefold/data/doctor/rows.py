"""What the doctor looks at: the rows of a source with what each check needs of them, and which rows are looked at."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from threefold.data.split import opening
from threefold.types import Example, Prompt

_IGNORED = re.compile(r"""(?<!\d)[.,]|[.,](?!\d)|[\s;:!?'"“”‘’`、。，！？；：…()（）*_]""")


@dataclass(frozen=True)
class BadRows:
    """Rows of a source that its format cannot read, of one kind.

    Attributes:
        reason: what they have in common ("with an empty answer").
        count: how many.
        message: what is wrong with the first; names file, row and field.
        origins: the first few of them.
    """

    reason: str
    count: int
    message: str
    origins: tuple[str, ...]


@dataclass(frozen=True)
class SourceRows:
    """One source, as the doctor sees it.

    Attributes:
        name: what messages call it.
        examples: its usable rows in file order; read lazily, so it may be longer than memory.
        places: of each of them 2 * step + (1 if it is held out), as `data.split` counts; -1 where no step sees it.
        num_rows: rows read, the bad ones included.
        bad_rows: by reason.
        allow_bad: the recipe drops bad rows instead of refusing them.
        format_name: of the rows, for messages.
    """

    name: str
    examples: Sequence[Example]
    places: NDArray[np.int8]
    num_rows: int
    bad_rows: tuple[BadRows, ...] = ()
    allow_bad: bool = False
    format_name: str = ""


@dataclass(frozen=True)
class Row:
    """A row with what several checks ask of it; each is worked out once."""

    example: Example
    source: int
    place: int

    @property
    def origin(self) -> str:
        """File and row."""
        return self.example.origin

    @property
    def step(self) -> int:
        """0, 1 or 2; -1 where no step sees the row."""
        return self.place // 2 if self.place >= 0 else -1

    @property
    def held_out(self) -> bool:
        """Whether a step is evaluated on it."""
        return self.place >= 0 and self.place % 2 == 1

    @cached_property
    def prompt(self) -> str:
        """All contents of the prompt but those of system messages, one after the other."""
        return "\n".join(message.content for message in self.example.prompt.messages if message.role != "system")

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The different answers: the demonstration, then the others."""
        texts = (self.example.demonstration, *self.example.answers)
        return tuple(dict.fromkeys(text for text in texts if text))

    @cached_property
    def last_question(self) -> str:
        """The user's last message."""
        messages = self.example.prompt.messages
        return messages[-1].content if messages else ""

    @property
    def is_text(self) -> bool:
        """Plain text instead of a conversation."""
        return not self.example.prompt.messages

    @cached_property
    def prompt_key(self) -> int:
        """64 bits of the prompt with its roles; of plain text, of the text."""
        return self._key(self.example.prompt)

    @cached_property
    def opening_key(self) -> int:
        """The same of the conversation up to its first question, which decides where the row goes."""
        return self._key(opening(self.example.prompt))

    def _key(self, prompt: Prompt) -> int:
        if not prompt.messages:
            return digest(self.example.demonstration)
        turns = [message for message in prompt.messages if message.role != "system"]
        return digest("\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in turns or prompt.messages))

    @cached_property
    def loose_prompt_key(self) -> int:
        """The same without letter case, spaces and punctuation."""
        return digest(loose(self.prompt or self.example.demonstration))

    @cached_property
    def row_key(self) -> int:
        """64 bits of all that the row says."""
        return digest("\x1d".join((str(self.prompt_key), self.example.demonstration, *self.example.answers)))


def digest(text: str) -> int:
    """64 bits of blake2b; among a million texts two share one with probability 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def loose(text: str) -> str:
    """A text without letter case, spaces, quotes and punctuation, other than that within numbers."""
    return _IGNORED.sub("", unicodedata.normalize("NFKC", text).casefold())


def spread_out(total: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Places of `wanted` of `total` rows (all where 0 or too few): one drawn from each of as many equal stretches."""
    if wanted <= 0 or wanted >= total:
        return np.arange(total, dtype=np.int64)
    edges = np.arange(wanted + 1, dtype=np.int64) * total // wanted
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def rows_of(source: SourceRows, number: int, wanted: int, seed: int) -> Iterator[Row]:
    """The rows of the `number`th source that are looked at, in file order."""
    if wanted <= 0 or wanted >= len(source.examples):
        for index, example in enumerate(source.examples):
            yield Row(example, number, int(source.places[index]))
    else:
        for index in spread_out(len(source.examples), wanted, seed).tolist():
            yield Row(source.examples[index], number, int(source.places[index]))

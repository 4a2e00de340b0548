"""From a recipe and its shares to what each step trains on: rendered, measured against the length limits, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat
from threefold.data.sources import dropped_note, read_source
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt, TokenSequence

LongRows = Literal["error", "drop"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class LoadedData:
    """The rows of all sources.

    Attributes:
        examples: in the order of the recipe's sources.
        num_dropped: bad rows that were left out.
        notes: one line for the console per source, and per source that lost rows.
    """

    examples: list[Example]
    num_dropped: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt of step 3 with its ids; `origin` says where it came from."""

    prompt: Prompt
    ids: tuple[int, ...]
    origin: str


def load_examples(recipe: Recipe) -> LoadedData:
    """Reads and joins all of `data.sources`.

    Raises:
        DataError: a source cannot be used; see `read_source`.
    """
    examples: list[Example] = []
    notes = []
    num_dropped = 0
    for spec in recipe.data.sources:
        result = read_source(spec, recipe.data.demo, recipe.run.seed, recipe.data.bad_rows)
        examples += result.examples
        num_dropped += result.num_dropped
        notes.append(f"{spec}: {len(result.examples)} examples")
        if result.num_dropped:
            notes.append(dropped_note(result))
    return LoadedData(examples, num_dropped, tuple(notes))


def sft_sequences(
    examples: Sequence[Example],
    chat_format: ChatFormat,
    max_length: int,
    loss_on: Literal["assistant", "all"] = "assistant",
    long_rows: LongRows = "error",
) -> tuple[list[TokenSequence], int]:
    """The demonstrations of a share, in its order, and how many were dropped for their length.

    Raises:
        DataError: one is too long (under "error"), none has a demonstration, or all were dropped.
    """
    rows = []
    for example in examples:
        if example.demonstration:
            messages = (*example.prompt.messages, Message("assistant", example.demonstration))
            with _naming(example):
                sequence = chat_format.demonstration(messages, loss_on)
            rows.append((example.origin, sequence, len(sequence.ids)))
    if examples and not rows:
        raise DataError("no row of step 1's share has a demonstration (an answer to imitate)")
    return _within(rows, "data.max_length", max_length, long_rows)


def reward_pairs(
    examples: Sequence[Example],
    chat_format: ChatFormat,
    max_length: int,
    long_rows: LongRows = "error",
    tell: Callable[[str], None] | None = None,
) -> list[tuple[TokenSequence, TokenSequence]]:
    """Every pair (better, worse) of the ranked answers of a share, in its order.

    Args:
        tell: called with one line for the console if pairs were dropped for their length.

    Raises:
        DataError: an answer is too long (under "error"), no row has a comparison, or all were dropped.
    """
    rows = []
    for example in examples:
        if len(example.answers) > 1:
            with _naming(example):
                sequences = chat_format.comparison(example.prompt, example.answers)
            for better, worse in combinations(sequences, 2):
                rows.append((example.origin, (better, worse), max(len(better.ids), len(worse.ids))))
    if examples and not rows:
        raise DataError(
            "no row of step 2's share has a comparison: data.sources needs rows of a format that has pairs "
            "(prompt + chosen + rejected, or chosen + rejected), or data.split = [1, 0, 0] for step 1 alone"
        )
    pairs, num_dropped = _within(rows, "data.max_length", max_length, long_rows)
    if tell and num_dropped:
        tell(f"{num_dropped} of {len(rows)} pairs dropped: longer than data.max_length = {max_length} tokens")
    return pairs


def ppo_prompts(
    examples: Sequence[Example],
    chat_format: ChatFormat,
    max_prompt_length: int,
    long_rows: LongRows = "error",
    tell: Callable[[str], None] | None = None,
) -> list[PreparedPrompt]:
    """The different prompts of a share, in its order; a prompt that has several rows is taken once.

    Args:
        tell: called with one line for the console if prompts were dropped for their length.

    Raises:
        DataError: a prompt is too long (under "error"), or all were dropped.
    """
    first_rows: dict[Prompt, Example] = {}
    for example in examples:
        first_rows.setdefault(example.prompt, example)
    rows = []
    for prompt, example in first_rows.items():
        with _naming(example):
            ids = chat_format.prompt_ids(prompt.messages)
        rows.append((example.origin, PreparedPrompt(prompt, ids, example.origin), len(ids)))
    prompts, num_dropped = _within(rows, "data.max_prompt_length", max_prompt_length, long_rows)
    if tell and num_dropped:
        tell(
            f"{num_dropped} of {len(rows)} prompts dropped: longer than data.max_prompt_length = "
            f"{max_prompt_length} tokens"
        )
    return prompts


def _within(
    rows: Sequence[tuple[str, Item, int]], field: str, limit: int, long_rows: LongRows
) -> tuple[list[Item], int]:
    """The items whose length, the third of each row, is within the limit, and how many are not."""
    for origin, _, length in rows:
        if length > limit and long_rows == "error":
            raise DataError(
                f"{origin}: has {length} tokens, more than {field} = {limit}: raise {field}, or set "
                'data.long_rows = "drop" to leave out such rows'
            )
    kept = [item for _, item, length in rows if length <= limit]
    if rows and not kept:
        shortest = min(length for _, _, length in rows)
        raise DataError(
            f"all {len(rows)} rows of the share are longer than {field} = {limit} (the shortest has {shortest} "
            f"tokens): raise {field}"
        )
    return kept, len(rows) - len(kept)


@contextmanager
def _naming(example: Example) -> Iterator[None]:
    """Puts the row's origin before what is wrong with rendering it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{example.origin}: {error}") from error

"""What an example gives each step: rendered, within the recipe's limits, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat
from threefold.data.lengths import shortened
from threefold.data.split import STEPS, Part, Step
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt, TokenSequence

Item = TypeVar("Item")
Messages = tuple[Message, ...]
Ranked = list[tuple[TokenSequence, int]]
"""Rendered answers to one prompt, each with its rank."""
MIN_ANSWERS = 2
Row = tuple[Any, ...]


class Tally:
    """Counts and refusals of one part of a step.

    Attributes:
        counts: fields of `LengthCounts` by name.
        shortest: tokens of the shortest row that was too long.
    """

    def __init__(self, step: Step, recipe: Recipe) -> None:
        self._policy = recipe.data.long_rows
        self._drops_bad_rows = recipe.data.bad_rows == "drop"
        self._field = "data.max_prompt_length" if step == "ppo" else "data.max_length"
        self.limit = recipe.data.max_prompt_length if step == "ppo" else recipe.data.max_length
        self.counts: Counter[str] = Counter()
        self.shortest = 0

    def add(self, other: Tally) -> None:
        """Count what another tally of the same part counted."""
        self.counts.update(other.counts)
        self.shortest = min(filter(None, (self.shortest, other.shortest)), default=0)

    @property
    def truncates(self) -> bool:
        """Whether rows may be shortened."""
        return self._policy == "truncate"

    def accepted(self, origin: str, rendered: Item | DataError) -> Item | None:
        """What was rendered; None for a row that the template refuses, where bad rows are dropped.

        Raises:
            DataError: where they are not, with the row's origin.
        """
        if isinstance(rendered, DataError) and self._drops_bad_rows:
            self.counts["refused"] += 1
            return None
        return _named(origin, rendered)

    def too_long(self, origin: str, length: int) -> None:
        """Note a row that stays too long.

        Raises:
            DataError: where that is an error.
        """
        if self._policy == "error":
            raise DataError(
                f"{origin}: has {length} tokens, more than {self._field} = {self.limit}: raise {self._field}, or set "
                'data.long_rows = "drop" to leave out such rows, or "truncate" to leave out whole turns of them'
            )
        self.shortest = min(self.shortest or length, length)

    def refuse_nothing(self, step: Step, part: Part, num_rows: int) -> None:
        """Refuse a part that has examples and no row.

        Raises:
            DataError: says why it has none.
        """
        if num_rows or not self.counts["examples"]:
            return
        share = f"step {STEPS.index(step) + 1}'s share"
        which = share if part == "train" else f"the held-out part of {share} (see data.eval_fraction)"
        if self.counts["dropped"]:
            raise DataError(
                f"all {self.counts['dropped']} rows of {which} are longer than {self._field} = {self.limit} (the "
                f"shortest has {self.shortest} tokens): raise {self._field}"
            )
        raise DataError(_NOTHING[step].format(which=which))


_NOTHING: dict[Step, str] = {
    "sft": "no row of {which} has a demonstration (an answer to imitate)",
    "reward": (
        "no row of {which} has a comparison: data.sources needs rows of a format that has several answers to a prompt "
        "(docs/data.md lists them), or data.split = [1, 0, 0] for step 1 alone"
    ),
    "ppo": "no row of {which} has a prompt: plain text has none, give data.split = [1, 0, 0] or other sources",
}


def sft_rows(examples: Sequence[Example], recipe: Recipe, chat: ChatFormat, tally: Tally) -> Iterator[tuple[int, Row]]:
    """Of each example with a demonstration or plain text, after its place: ids, which are trained, prompt length."""
    usable = [place for place, example in enumerate(examples) if example.demonstration]
    tally.counts["without"] += len(examples) - len(usable)
    conversations = {
        place: (*examples[place].prompt.messages, Message("assistant", examples[place].demonstration))
        for place in usable
        if examples[place].prompt.messages
    }
    rendered = dict(
        zip(conversations, chat.demonstrations(list(conversations.values()), recipe.sft.loss_on), strict=True)
    )
    for place in usable:
        origin = examples[place].origin
        if place not in conversations:
            pieces = _named(origin, chat.text([examples[place].demonstration], tally.limit)[0])
            tally.counts["pieces"] += len(pieces)
        elif (sequence := tally.accepted(origin, rendered[place])) is None:
            continue
        else:
            again = partial(_demonstration_again, chat, recipe.sft.loss_on, origin)
            fitted = _fitted(sequence, conversations[place], recipe.data.truncate_side, again, origin, tally)
            pieces = [] if fitted is None else [fitted]
        for piece in pieces:
            tally.counts["tokens"] += len(piece)
            yield place, (piece.ids, piece.trained, piece.prompt_length)


def _demonstration_again(chat: ChatFormat, loss_on: Any, origin: str, messages: Messages) -> TokenSequence:
    return _named(origin, chat.demonstrations([messages], loss_on)[0])


def reward_rows(
    examples: Sequence[Example], recipe: Recipe, chat: ChatFormat, tally: Tally
) -> Iterator[tuple[int, Row]]:
    """Of each example with a ranking, after its place: ids of each answer with the prompt, prompt length, ranks."""
    usable = [place for place, example in enumerate(examples) if _is_ranking(example)]
    tally.counts["without"] += len(examples) - len(usable)
    prompts, answers = ([getattr(examples[place], name) for place in usable] for name in ("prompt", "answers"))
    for place, rendered in zip(usable, chat.comparisons(prompts, answers), strict=True):
        sequences = tally.accepted(examples[place].origin, rendered)
        if sequences is None:
            continue
        ranked = list(zip(sequences, _ranks(examples[place]), strict=True))
        if tally.truncates and max(map(len, sequences)) > tally.limit:
            ranked = _with_shorter_prompt(examples[place], ranked, chat, tally)
        row = _fitting_answers(ranked, examples[place], tally)
        if row is not None:
            yield place, row


def _is_ranking(example: Example) -> bool:
    return len(example.answers) > 1 and (not example.ranks or len(set(example.ranks)) > 1)


def _ranks(example: Example) -> tuple[int, ...]:
    return example.ranks or tuple(range(len(example.answers)))


def _with_shorter_prompt(example: Example, ranked: Ranked, chat: ChatFormat, tally: Tally) -> Ranked:
    """The ranking with as many turns of its prompt left out as its answers need that can fit at all."""
    prompts = [example.prompt.messages]
    while (rest := shortened(prompts[-1], "left")) is not None:
        prompts.append(rest)
    versions = [
        _named(example.origin, rendered)
        for rendered in chat.comparisons([Prompt(messages) for messages in prompts], [example.answers] * len(prompts))
    ]
    can_fit = [len(sequence) <= tally.limit for sequence in versions[-1]]
    if sum(can_fit) < MIN_ANSWERS:
        return ranked
    number, sequences = next(
        (number, version)
        for number, version in enumerate(versions)
        if all(len(sequence) <= tally.limit for sequence, fits in zip(version, can_fit, strict=True) if fits)
    )
    tally.counts["truncated"] += number > 0
    return list(zip(sequences, _ranks(example), strict=True))


def _fitting_answers(ranked: Ranked, example: Example, tally: Tally) -> Row | None:
    """The answers that are within the limit, if they still are a ranking."""
    kept: Ranked = []
    for sequence, rank in ranked:
        if len(sequence) > tally.limit:
            tally.too_long(example.origin, len(sequence))
        elif all(sequence.ids != other.ids for other, _ in kept):  # a tokenizer may not tell two answers apart
            kept.append((sequence, rank))
    if len({rank for _, rank in kept}) < 2:
        tally.counts["dropped"] += 1
        return None
    tally.counts["answers_dropped"] += sum(len(sequence) > tally.limit for sequence, _ in ranked)
    tally.counts["tokens"] += sum(len(sequence) for sequence, _ in kept)
    return [sequence.ids for sequence, _ in kept], kept[0][0].prompt_length, [rank for _, rank in kept]


def ppo_rows(examples: Sequence[Example], _: Recipe, chat: ChatFormat, tally: Tally) -> Iterator[tuple[int, Row]]:
    """Of each example with a prompt, after its place: ids, roles, contents, origin, reference."""
    usable = [place for place, example in enumerate(examples) if example.prompt.messages]
    tally.counts["without"] += len(examples) - len(usable)
    for place, rendered in zip(usable, chat.prompts([examples[p].prompt.messages for p in usable]), strict=True):
        example = examples[place]
        ids = tally.accepted(example.origin, rendered)
        if ids is None:
            continue
        messages = [example.prompt.messages]

        def again(shorter: Messages, origin: str = example.origin, used: list[Messages] = messages) -> tuple[int, ...]:
            used[0] = shorter
            return _named(origin, chat.prompts([shorter])[0])

        fitted = _fitted(ids, messages[0], "left", again, example.origin, tally)
        if fitted is not None:
            roles = "".join(message.role[0] for message in messages[0])
            contents = [message.content for message in messages[0]]
            yield place, (fitted, roles, contents, example.origin, example.reference)


Rendered = TypeVar("Rendered", TokenSequence, tuple[int, ...])


def _fitted(
    rendered: Rendered,
    messages: Messages,
    side: Any,
    again: Callable[[Messages], Rendered],
    origin: str,
    tally: Tally,
) -> Rendered | None:
    """What was rendered, shortened by whole turns where it is too long and may be; None if it is to be dropped."""
    if len(rendered) <= tally.limit:
        return rendered
    rest = shortened(messages, side) if tally.truncates else None
    while rest is not None:
        shorter = again(rest)
        if len(shorter) <= tally.limit:
            tally.counts["truncated"] += 1
            return shorter
        rest = shortened(rest, side)
    tally.too_long(origin, len(rendered))
    tally.counts["dropped"] += 1
    return None


def _named(origin: str, rendered: Item | DataError) -> Item:
    """What was rendered; a refusal gets the row's origin."""
    if isinstance(rendered, DataError):
        raise DataError(f"{origin}: {rendered}") from rendered
    return rendered

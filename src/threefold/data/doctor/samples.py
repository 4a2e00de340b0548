"""A few rows as their tokens, each token with what becomes of it: for the page, and for the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat
from threefold.data.doctor.rows import Row
from threefold.data.split import Step
from threefold.errors import DataError
from threefold.types import Message, TokenSequence

TokenKind = Literal["context", "trained", "stop", "control", "cut"]

MAX_TOKENS_SHOWN = 600
WINDOW = 8
"""Tokens decoded together with the next one, as a token alone may be part of a character or lose a space."""


@dataclass(frozen=True)
class TokenPiece:
    """The text of one token (or of several that make one character together) and what becomes of it: "trained",
    "stop" (trained, and ends an answer), "context", "control" (a token that the template writes), "cut" (longer than
    the limit)."""

    text: str
    kind: TokenKind


@dataclass(frozen=True)
class TokenSample:
    """One row as a step is given it.

    Attributes:
        step: of the recipe.
        title: "demonstration", "better answer", "worse answer", "prompt".
        origin: file and row.
        pieces: its tokens.
        num_tokens, num_trained: of all of it.
        num_hidden: tokens in the middle that are not shown.
    """

    step: Step
    title: str
    origin: str
    pieces: tuple[TokenPiece, ...]
    num_tokens: int
    num_trained: int
    num_hidden: int = 0


def samples_of(row: Row, step: Step, chat: ChatFormat, recipe: Recipe) -> Iterator[TokenSample]:
    """What a step makes of a row: a demonstration, the best and the worst answer, or a prompt."""
    example, data = row.example, recipe.data
    if step == "sft" and example.demonstration:
        if row.is_text:
            pieces = chat.text([example.demonstration], max(data.max_length, 2))[0]
            rendered = pieces if isinstance(pieces, DataError) else pieces[0]
        else:
            messages = (*example.prompt.messages, Message("assistant", example.demonstration))
            rendered = chat.demonstrations([messages], recipe.sft.loss_on)[0]
        if isinstance(rendered, TokenSequence):
            yield token_sample(chat, step, "demonstration", row.origin, rendered, data.max_length)
    elif step == "reward" and len(example.answers) > 1:
        ends = (example.answers[0], example.answers[-1])
        answers = chat.comparisons([example.prompt], [ends])[0]
        if not isinstance(answers, DataError):
            for title, answer in zip(("better answer", "worse answer"), answers, strict=True):
                yield token_sample(chat, step, title, row.origin, answer, data.max_length)
    elif step == "ppo" and example.prompt.messages:
        ids = chat.prompts([example.prompt.messages])[0]
        if not isinstance(ids, DataError):
            sequence = TokenSequence(ids, (False,) * len(ids), len(ids))
            yield token_sample(chat, step, "prompt", row.origin, sequence, data.max_prompt_length)


def token_sample(
    chat: ChatFormat, step: Step, title: str, origin: str, sequence: TokenSequence, limit: int
) -> TokenSample:
    """One sequence with its tokens' texts; a long one without its middle."""
    total = len(sequence)
    half = MAX_TOKENS_SHOWN // 2
    spans = [(0, total)] if total <= MAX_TOKENS_SHOWN else [(0, half), (total - half, total)]
    pieces: list[TokenPiece] = []
    for start, end in spans:
        if start:
            pieces.append(TokenPiece(f" … {start - spans[0][1]} tokens … ", "context"))
        kinds = [_kind(chat, sequence, position, limit) for position in range(start, end)]
        pieces += _pieces(chat, sequence.ids[start:end], kinds)
    hidden = total - sum(end - start for start, end in spans)
    return TokenSample(step, title, origin, tuple(pieces), total, sum(sequence.trained), hidden)


def _kind(chat: ChatFormat, sequence: TokenSequence, position: int, limit: int) -> TokenKind:
    token_id, trained = sequence.ids[position], sequence.trained[position]
    if position >= limit:
        return "cut"
    if trained:
        return "stop" if token_id in chat.stop_ids else "trained"
    return "control" if token_id in chat.tokenizer.all_special_ids else "context"


def _pieces(chat: ChatFormat, ids: Sequence[int], kinds: Sequence[TokenKind]) -> Iterator[TokenPiece]:
    waiting = ""
    for text, kind in zip(token_texts(chat, ids), kinds, strict=True):
        waiting += text
        if waiting:
            yield TokenPiece(waiting, kind)
        waiting = ""


def token_texts(chat: ChatFormat, ids: Sequence[int]) -> list[str]:
    """The text of each token: what decoding grows by. A token that only begins a character has "", the one that
    completes it has the character."""
    texts = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        whole = _decoded(chat, ids[start:end])
        if whole.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else _decoded(chat, ids[end - 1 : end]))
        before = whole
        if end - start >= 2 * WINDOW:
            start = end - WINDOW
            before = _decoded(chat, ids[start:end])
    return texts


def _decoded(chat: ChatFormat, ids: Sequence[int]) -> str:
    return str(chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def runs(pieces: Sequence[TokenPiece]) -> list[TokenPiece]:
    """Pieces of one kind beside each other joined."""
    return [
        TokenPiece("".join(piece.text for piece in group), kind)
        for kind, group in groupby(pieces, key=lambda piece: piece.kind)
    ]

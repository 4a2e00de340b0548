"""Conversations that are too long: shortened by whole turns, never inside one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from threefold.data.chat import ChatFormat
from threefold.errors import DataError
from threefold.types import Message


def shortened(messages: Sequence[Message], side: Literal["left", "right"]) -> tuple[Message, ...] | None:
    """The conversation without one whole turn (what the user says, and what answers it); None where only one is left.

    Args:
        messages: a conversation; a system message that opens it is kept.
        side: "left" leaves out the oldest turn, so that the end stays what it is; "right" the last one, so that the
            conversation ends with the answer before it.
    """
    opening = tuple(messages[:1]) if messages and messages[0].role == "system" else ()
    turns = tuple(messages[len(opening) :])
    if side == "left":
        start = next((i for i, message in enumerate(turns) if i > 0 and message.role == "user"), None)
        kept = () if start is None else turns[start:]
    else:
        kept = turns[: _start_of_last_turn(turns)]
    return (*opening, *kept) if any(message.role == "user" for message in kept) else None


def _start_of_last_turn(turns: Sequence[Message]) -> int:
    """Where the last turn begins: after the last answer that has a user's message after it."""
    users = [i for i, message in enumerate(turns) if message.role == "user"]
    last_answer = next((i for i in reversed(range(users[-1])) if turns[i].role == "assistant"), None) if users else None
    return 0 if last_answer is None else last_answer + 1


def truncate_history(
    chat_format: ChatFormat, messages: Sequence[Message], max_prompt_tokens: int
) -> tuple[Message, ...]:
    """Drops the oldest turns until the prompt fits; keeps a system message.

    Args:
        chat_format: renders the prompt to count its tokens.
        messages: a conversation that ends with the user's message.
        max_prompt_tokens: the most tokens that the prompt may have.

    Raises:
        DataError: the last message alone does not fit.
    """
    kept = tuple(messages)
    while True:
        length = len(chat_format.prompt_ids(kept))
        if length <= max_prompt_tokens:
            return kept
        shorter = shortened(kept, "left")
        if shorter is None:
            raise DataError(
                f"the last message makes a prompt of {length} tokens, and the model has room for {max_prompt_tokens}: "
                "write a shorter one"
            )
        kept = shorter

"""Whole turns that are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.formats_under_test import byte_level_tokenizer
from threefold.data.chat import build_chat_format
from threefold.data.lengths import shortened, truncate_history
from threefold.errors import DataError
from threefold.types import Message, Role

ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}


def of(roles: str) -> tuple[Message, ...]:
    """Messages of these roles, numbered: "ua" is a question and its answer."""
    return tuple(Message(ROLES[role], f"{role}{number}") for number, role in enumerate(roles))


def names(messages: tuple[Message, ...] | None) -> list[str] | None:
    return None if messages is None else [message.content for message in messages]


@pytest.mark.parametrize(
    ("roles", "left", "right"),
    [
        ("ua", None, None),
        ("sua", None, None),
        ("uaua", "u2 a3", "u0 a1"),
        ("suaua", "s0 u3 a4", "s0 u1 a2"),
        ("uauaua", "u2 a3 u4 a5", "u0 a1 u2 a3"),
        ("aua", "u1 a2", None),  # an answer that nothing asked for is no conversation
        ("auaua", "u1 a2 u3 a4", "a0 u1 a2"),
        ("uuaua", "u1 a2 u3 a4", "u0 u1 a2"),
        ("uauua", "u2 u3 a4", "u0 a1"),
        ("uaua" + "a", "u2 a3 a4", "u0 a1"),
        ("uau", "u2", "u0 a1"),
        ("su", None, None),
        ("s", None, None),
        ("", None, None),
    ],
)
def test_one_turn_less(roles: str, left: str | None, right: str | None) -> None:
    messages = of(roles)
    assert names(shortened(messages, "left")) == (left and left.split())
    assert names(shortened(messages, "right")) == (right and right.split())


@given(st.text("ua", max_size=9), st.booleans(), st.sampled_from(["left", "right"]))
def test_what_is_left_is_part_of_the_conversation_and_grows_shorter(roles: str, system: bool, side) -> None:
    messages = of(("s" if system else "") + roles)
    opening, rest = messages[: int(system)], messages[int(system) :]
    kept = shortened(messages, side)
    while kept is not None:
        part = kept[len(opening) :]
        assert kept[: len(opening)] == opening
        assert 0 < len(part) < len(rest)
        assert part == (rest[-len(part) :] if side == "left" else rest[: len(part)])
        assert part[0].role == "user" if side == "left" else part[-1].role == "assistant"
        rest, kept = part, shortened(kept, side)


def test_history_is_cut_by_whole_turns() -> None:
    chat_format = build_chat_format(byte_level_tokenizer(), "tags")
    system, turns = of("s"), of("uauau")
    whole = (*system, *turns)
    lengths = [len(chat_format.prompt_ids(kept)) for kept in (whole, (*system, *turns[2:]), (*system, *turns[4:]))]
    assert truncate_history(chat_format, whole, lengths[0]) == whole
    assert truncate_history(chat_format, whole, lengths[0] - 1) == (*system, *turns[2:])
    assert truncate_history(chat_format, whole, lengths[1] - 1) == (*system, *turns[4:])
    assert truncate_history(chat_format, turns, lengths[0]) == turns
    with pytest.raises(
        DataError, match=f"a prompt of {lengths[2]} tokens, and the model has room for {lengths[2] - 1}"
    ):
        truncate_history(chat_format, whole, lengths[2] - 1)

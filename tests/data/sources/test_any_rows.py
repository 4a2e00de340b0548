"""Whatever a row holds, a reader makes examples of it or says what is wrong: no other error reaches the user."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.data.sources import FORMATS, PUBLISHED
from threefold.data.sources.fields import BadRowError
from threefold.data.sources.formats import RowFormat, detect, nearest_format, other_format
from threefold.types import Example

READERS = [*FORMATS.values(), *(known.row_format for known in PUBLISHED.values())]
WORDS = [
    "",
    " ",
    "Hi",
    "Human: a Assistant:",
    "\n\nHuman: a\n\nAssistant: b",
    "USER: a ASSISTANT:",
    "#### 4",
    "true",
    "1",
]
KEYS = ["role", "content", "from", "value", "text", "score", "rank", "replies", "full_text", "zh_cn", "ja", "answer"]
ROLES = ["user", "assistant", "system", "human", "gpt", "prompter", "tool"]

scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from(WORDS + ROLES)
messages = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.sampled_from(WORDS)})
nodes = st.recursive(
    st.fixed_dictionaries({"role": st.sampled_from(["prompter", "assistant"]), "text": st.sampled_from(WORDS)}),
    lambda inner: st.fixed_dictionaries(
        {
            "role": st.sampled_from(["prompter", "assistant"]),
            "text": st.just("x"),
            "replies": st.lists(inner, max_size=3) | scalars,
            "rank": scalars,
        }
    ),
    max_leaves=4,
)
values = st.recursive(
    scalars | st.lists(messages, max_size=3) | nodes,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def rows(draw: st.DrawFn) -> tuple[RowFormat, dict[str, Any]]:
    row_format = draw(st.sampled_from(READERS))
    return row_format, {name: draw(values) for name in row_format.known_columns() if draw(st.integers(0, 9))}


def check(row_format: RowFormat, row: dict[str, Any]) -> None:
    try:
        examples = row_format.read(row, "origin")
    except BadRowError:
        return
    for example in examples:
        assert isinstance(example, Example)
        assert example.demonstration or example.answers or example.prompt.messages
        assert len(example.ranks) in (0, len(example.answers))
        assert all(answer.strip() == answer != "" for answer in example.answers)
        assert not example.prompt.messages or example.prompt.messages[-1].role == "user"
        assert len(set(example.answers)) == len(example.answers)


@settings(max_examples=600, deadline=None)
@given(rows())
def test_every_reader_takes_or_refuses_any_row(drawn: tuple[RowFormat, dict[str, Any]]) -> None:
    check(*drawn)


@settings(max_examples=300, deadline=None)
@given(rows())
def test_any_row_is_recognised_or_not(drawn: tuple[RowFormat, dict[str, Any]]) -> None:
    row_format, row = drawn
    found = detect([row])
    assert found is None or not found.missing(row)
    other = other_format(row, row_format)
    assert other is not row_format
    nearest, guesses = nearest_format(list(row))
    assert set(guesses) == set(nearest.missing(row))


@pytest.mark.parametrize(
    ("columns", "name", "guesses"),
    [
        ("prompt response", "prompt_completion", {"completion": "response"}),
        ("input output", "alpaca", {"instruction": "input"}),
        ("instruction response", "alpaca", {"output": "response"}),
        ("query pos neg", "preference", {"prompt": "query", "chosen": "pos", "rejected": "neg"}),
        ("Prompt Chosen rejected", "preference", {"prompt": "Prompt", "chosen": "Chosen"}),
        ("prompt answers_list scores", "scored", {"answers": "answers_list"}),
        ("prompt rejected", "preference", {"chosen": ""}),
        ("chat id", "messages", {"messages": "chat"}),
        ("a b c", "preference", {"prompt": "", "chosen": "", "rejected": ""}),
        ("x y", "question_answer", {"question": "", "answer": ""}),
        ("line", "text", {"text": ""}),
    ],
)
def test_the_nearest_format_is_the_one_that_a_reader_would_name(
    columns: str, name: str, guesses: dict[str, str]
) -> None:
    nearest, guessed = nearest_format(columns.split())
    assert (nearest.name, guessed) == (name, guesses)

"""Row formats: what each becomes, and every fault of a row with its file, row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from threefold.config.recipe import DemoDataSection
from threefold.data.sources import SourceResult, dropped_note, read_source
from threefold.data.sources.formats import parse_dialogue
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt

DEMO = DemoDataSection(num_prompts=30)
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": " Hello \n"}
GOOD = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: Any) -> list[Example]:
    return read_source(write(tmp_path, *rows), DEMO, 0).examples


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " Hi ", "chosen": " Hello\n", "rejected": "Go"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"},
        {"prompt": [HI], "chosen": "Hello", "rejected": [{"role": "assistant", "content": "Go"}]},
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, {"role": "assistant", "content": "Go"}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
        {"chosen": [HI, HELLO], "rejected": [HI, {"role": "assistant", "content": "Go"}], "score": 0.5},
    ],
)
def test_preference_formats(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = read(tmp_path, row)
    assert example.prompt == Prompt((user("Hi"),))
    assert example.answers == ("Hello", "Go")
    assert example.demonstration == "Hello"
    assert example.origin.endswith("pairs.jsonl row 1")


def test_messages_are_demonstrations(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    (example,) = read(tmp_path, {"messages": [system, HI, HELLO, {"role": "user", "content": "Bye"}, HELLO]})
    assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"), assistant(" Hello \n"), user("Bye"))
    assert example.demonstration == "Hello"
    assert example.answers == ()


def test_several_turns_of_a_dialogue() -> None:
    text = "\n\nHuman: One?\nTwo?\n\nAssistant: Three: yes.\n\nAnd four.\n\nHuman: Human: why?"
    assert parse_dialogue(text) == (user("One?\nTwo?"), assistant("Three: yes.\n\nAnd four."), user("Human: why?"))
    with pytest.raises(ValueError, match="begins with 'Once upon'"):
        parse_dialogue("Once upon\n\nHuman: Hi")


def test_a_text_that_only_mentions_the_dialogue_form_is_one_message(tmp_path: Path) -> None:
    text = "Human: is that an Assistant: or not?"
    (example,) = read(tmp_path, {**GOOD, "prompt": text})
    assert example.prompt.messages == (user(text),)


BAD_ROWS = [
    ({"prompt": "Hi", "chosen": "Hello"}, "field 'rejected' is missing", "without 'rejected'"),
    ({**GOOD, "prompt": None}, "field 'prompt' is missing", "without 'prompt'"),
    ({**GOOD, "prompt": "  "}, "field 'prompt' is empty", "with an empty prompt"),
    ({**GOOD, "prompt": 5}, "field 'prompt' is a number, and must be a text", "with a wrong type of 'prompt'"),
    ({**GOOD, "chosen": {"a": 1}}, "field 'chosen' is an object", "with a wrong type of 'chosen'"),
    ({**GOOD, "chosen": " \n"}, "field 'chosen' has an empty answer", "with an empty answer"),
    ({**GOOD, "rejected": " Hello"}, "'chosen' and 'rejected' are the same answer", "with chosen equal to rejected"),
    ({**GOOD, "prompt": [HI, HELLO]}, "field 'prompt' has no message of the user right before", "without a question"),
    ({**GOOD, "prompt": []}, "field 'prompt' has no message of the user right before", "without a question"),
    ({**GOOD, "prompt": [HELLO, HI]}, "'prompt' begins with a message of the ass", "that begin with the assistant"),
    ({**GOOD, "prompt": ["Hi"]}, r"field 'prompt\[0\]' is a text, and must", "with a wrong type of 'prompt'"),
    ({**GOOD, "prompt": [{"role": "tool", "content": "x"}]}, r"'prompt\[0\]\.role' is 'tool'", "with an unknown role"),
    ({**GOOD, "prompt": [{"role": ["x"], "content": "x"}]}, r"'prompt\[0\]\.role' is \['x'\]", "with an unknown role"),
    ({**GOOD, "prompt": [{"role": "user"}]}, r"'prompt\[0\]\.content' is nothing", "with a wrong type of 'prompt'"),
    (
        {**GOOD, "prompt": [{"role": "user", "content": ""}, HELLO, HI]},
        r"'prompt\[0\]\.content' is empty",
        "with an empty message",
    ),
    ({**GOOD, "chosen": [HI]}, "field 'chosen' does not end with a message of the assistant", "without an answer"),
    (
        {**GOOD, "chosen": [{"role": "user", "content": "Ho"}, HELLO]},
        "field 'chosen' is a conversation that does not begin with 'prompt'",
        "with another prompt",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message", "reason"), BAD_ROWS)
def test_a_bad_row_is_an_error_or_counted(tmp_path: Path, row: dict[str, Any], message: str, reason: str) -> None:
    spec = write(tmp_path, GOOD, row)
    with pytest.raises(DataError, match=rf'pairs\.jsonl row 2: .*{message}.*set data\.bad_rows = "drop"') as caught:
        read_source(spec, DEMO, 0)
    assert "\n" not in str(caught.value)
    result = read_source(spec, DEMO, 0, "drop")
    assert result.dropped_by_reason == {reason: 1}
    assert [example.origin for example in result.examples] == [f"{spec} row 1"]
    assert dropped_note(result) == f"{spec}: 1 of 2 rows dropped (1 {reason})"
    spec = write(tmp_path, *[{**dict.fromkeys(GOOD), **row}] * 3)
    with pytest.raises(DataError, match=rf"none of its 3 rows can be used \(3 {reason}\)"):
        read_source(spec, DEMO, 0, "drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "Hello", "rejected": "Go"}, "'chosen' has no turn 'Assistant:', and there is no field 'prompt'"),
        (
            {"chosen": "Hi\n\nAssistant: a", "rejected": "Hi\n\nAssistant: b"},
            "field 'chosen' begins with 'Hi' instead of a turn",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
            "differ before their last answer",
        ),
        (
            {"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"},
            "field 'chosen' has no message of the user right before",
        ),
        ({"chosen": 5, "rejected": "x"}, "field 'chosen' is a number, and must be a dialogue text or a list"),
        ({"messages": [HI]}, "field 'messages' does not end with a message of the assistant"),
        ({"messages": [HI, {"role": "assistant", "content": ""}]}, "field 'messages' has an empty answer"),
        ({"messages": "Hi"}, "field 'messages' is a text, and must be a list of messages"),
        ({"messages": [HELLO]}, "field 'messages' has no message of the user right before the answer"),
    ],
)  # fmt: skip
def test_bad_rows_of_the_other_formats(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"pairs\.jsonl row 1: .*{message}"):
        read(tmp_path, row)


def test_unknown_columns_name_the_known_formats(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"its columns \(question, answer\) are of no known format; known are: prompt \+ chosen"
    ):
        read(tmp_path, {"question": "x", "answer": "y"})


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        read_source("absent.jsonl", DEMO, 0)


def test_demo_needs_no_file() -> None:
    result = read_source("demo", DEMO, seed=3)
    assert result == SourceResult("demo", result.examples, len(result.examples), {})
    assert result.examples == read_source("demo", DEMO, seed=3).examples
    assert dropped_note(result) == ""


@pytest.mark.real
def test_hh_rlhf(shared: Path) -> None:
    """Of 1,600 rows four have an empty answer, and one compares answers to different questions."""
    spec = str(shared / "data/hh_rlhf/harmless_1600.jsonl.gz")
    result = read_source(spec, DEMO, 0, "drop")
    assert result.num_rows == 1600
    assert result.dropped_by_reason == {
        "with an empty answer": 4,
        "with dialogues that differ before the last answer": 1,
    }
    assert len(result.examples) == 1595
    assert all(example.prompt.messages[-1].role == "user" for example in result.examples)
    example = result.examples[0]
    assert [message.role for message in example.prompt.messages] == ["user", "assistant"] * 2 + ["user"]
    assert example.prompt.messages[0].content == "what are some pranks with a pen i can do?"
    assert example.answers[0].startswith("No, sorry!  All of these involve a pen")
    assert example.answers[1].endswith("It’s really funny.")
    with pytest.raises(DataError, match=r"harmless_1600\.jsonl\.gz row 87: field 'chosen' has an empty answer"):
        read_source(spec, DEMO, 0)


@pytest.mark.real
def test_kto_messages_of_llama_factory(shared: Path) -> None:
    result = read_source(str(shared / "data/llama_factory/kto_en_demo.json"), DEMO, 0)
    assert len(result.examples) == 300
    assert all(example.demonstration for example in result.examples)

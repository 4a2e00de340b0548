"""Row formats: what each becomes, and every fault of a row with its file, row and field."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.rows import (
    ANSWERED,
    ASKED,
    DEMO,
    GO,
    GOOD,
    HELLO,
    HI,
    KIND,
    assistant,
    opened,
    read,
    user,
    write,
)
from threefold.config.data import SourceSection
from threefold.data.sources import FORMATS, open_source
from threefold.data.sources.fields import parse_dialogue
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt

DIALOGUE = "\n\nHuman: Hi\n\nAssistant:"
TALK = {"messages": [HI, HELLO]}
SHAREGPT = {"conversations": ANSWERED}
ALPACA = {"instruction": "a", "output": "b"}
LISTED = {"instruction": "a", "output": ["b", "c"]}
SCORED = {"prompt": "a", "answers": ["b", "c"], "scores": [1, 2]}
JUDGED = {"prompt": "a", "answers": [{"text": "b", "score": 1}, {"text": "c", "score": 2}]}
KTO = {"prompt": "a", "completion": "b", "label": True}


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("preference", {"prompt": " Hi ", "chosen": " Hello\n", "rejected": "Go"}),
    ("preference", {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"}),
    ("preference", {"prompt": " Human: Hi Assistant:", "chosen": " Hello", "rejected": " Go"}),
    ("preference", {"prompt": [HI], "chosen": "Hello", "rejected": [GO]}),
    ("preference", {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, GO]}),
    ("implicit_preference", {"chosen": f"{DIALOGUE} Hello", "rejected": f"{DIALOGUE} Go"}),
    ("implicit_preference", {"chosen": [HI, HELLO], "rejected": [HI, GO], "score": 0.5}),
    ("sharegpt_preference", {"conversations": ASKED, "chosen": ANSWERED[1], "rejected": GO}),
    ("sharegpt_preference", {"conversations": ASKED, "chosen": "Hello", "rejected": [{"from": "gpt", "value": "Go"}]}),
    ("alpaca_preference", {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go"}),
    ("ranked", {"instruction": "Hi", "input": "", "output": ["Hello", "Go"], "history": []}),
    ("scored", {"prompt": "Hi", "answers": ["Go", "Hello"], "scores": [-1, 4.5]}),
    ("scored", {"prompt": [HI], "answers": [{"answer": "Go", "score": 1}, {"answer": "Hello", "score": "2"}]}),
    ("scored", {"prompt": "Hi", "answers": [{"completion": [GO], "rank": 1}, {"completion": [HELLO], "rank": 0}]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_comparisons(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    reading = opened(tmp_path, row)
    assert (reading.format_name, reading.columns) == (name, tuple(row))
    (example,) = reading
    origin = f"{tmp_path / 'pairs.jsonl'} row 1"
    assert example == Example(Prompt((user("Hi"),)), "Hello", ("Hello", "Go"), origin)
    assert (reading.num_rows, reading.dropped) == (1, {})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [HI, HELLO]}),
        ("sharegpt", {"conversations": ANSWERED}),
        ("sharegpt", {"conversations": [HI, HELLO]}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is an instruction"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}),
        ("prompt_completion", {"prompt": "Hi", "completion": " Hello"}),
        ("prompt_completion", {"prompt": [HI], "completion": [HELLO]}),
        ("question_answer", {"question": "Hi", "answer": "Hello"}),
    ],
)
def test_demonstrations(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    reading = opened(tmp_path, row)
    assert reading.format_name == name
    assert list(reading) == [Example(Prompt((user("Hi"),)), "Hello", (), f"{tmp_path / 'pairs.jsonl'} row 1")]


def test_several_turns_and_a_system_message(tmp_path: Path) -> None:
    bye = {"role": "user", "content": "Bye"}
    (example,) = read(tmp_path, {"messages": [KIND, HI, HELLO, bye, HELLO]})
    assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"), assistant(" Hello \n"), user("Bye"))
    assert (example.demonstration, example.answers) == ("Hello", ())
    turns = [*ANSWERED, {"from": "user", "value": "Bye"}, {"from": "assistant", "value": "Hello"}]
    (example,) = read(tmp_path, {"system": "Be kind.", "conversations": turns})
    assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"), assistant("Hello"), user("Bye"))
    row = {"instruction": "Bye", "input": "now", "history": [["Hi", "Hello"]], "system": "Be kind.", "output": "Ciao"}
    (example,) = read(tmp_path, row)
    assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"), assistant("Hello"), user("Bye\nnow"))
    (example,) = read(tmp_path, {"prompt": "Hi", "chosen": [KIND, HI, HELLO], "rejected": [KIND, HI, GO]})
    assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"))


def test_a_system_message_in_the_data_wins_over_the_column(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"messages": [KIND, HI, HELLO], "system": "Be curt."})
    assert example.prompt.messages[0] == Message("system", "Be kind.")


SYSTEM_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}),
    ("preference", {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, GO]}),
    ("implicit_preference", {"chosen": f"{DIALOGUE} Hello", "rejected": f"{DIALOGUE} Go"}),
    ("scored", {"prompt": "Hi", "answers": ["Go", "Hello"], "scores": [1, 2]}),
    ("prompt_completion", {"prompt": [HI], "completion": [HI, HELLO]}),
    ("kto", {"prompt": "Hi", "completion": "Hello", "label": True}),
    ("question_answer", {"question": "Hi", "answer": "Hello"}),
    ("prompt_only", {"prompt": "Hi"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), SYSTEM_ROWS)
def test_a_column_system_stands_before_the_prompt(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    reading = opened(tmp_path, {**row, "system": " Be kind.\n"})
    assert reading.format_name == name
    (example,) = reading
    assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"))
    (example,) = read(tmp_path, {**row, "system": None})
    assert example.prompt.messages == (user("Hi"),)
    if "prompt" in row:
        asked = {"prompt": [KIND, HI], "chosen": "Hello", "rejected": "Go", "completion": "Hello"}
        own = {key: asked.get(key, value) for key, value in row.items()}
        (example,) = read(tmp_path, {**own, "system": "Be curt."})
        assert example.prompt.messages == (Message("system", "Be kind."), user("Hi"))


LABELS = [(True, "Hello"), (False, ""), (1, "Hello"), ("False", ""), ("1.0", "Hello"), (" 0.0", ""), ("Good", "Hello")]


@pytest.mark.parametrize(("label", "demonstration"), LABELS)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO]},
        {"conversations": ANSWERED},
        {"prompt": "Hi", "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
    ],
)
def test_kto(tmp_path: Path, row: dict[str, Any], label: Any, demonstration: str) -> None:
    reading = opened(tmp_path, {**row, "label": label})
    assert reading.format_name == "kto"
    (example,) = reading
    assert (example.prompt.messages, example.answers) == ((user("Hi"),), ("Hello",))
    assert example.demonstration == demonstration


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [HI, HELLO]}, "messages"),
        ({"instruction": "Hi", "output": "Hello"}, "alpaca"),
        ({"instruction": "Hi", "output": ["Hello"]}, "ranked"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion"),
    ],
)
@pytest.mark.parametrize("label", ["math", 3, "2.0", "nan", [1]])
def test_labels_that_say_neither_good_nor_bad_are_not_passed_over(
    tmp_path: Path, row: dict[str, Any], name: str, label: Any
) -> None:
    rows = [{**row, "label": None}, {**row, "label": " "}, {**row, "label": label}]
    shown = re.escape(repr(str(label)))
    with pytest.raises(DataError) as caught:
        opened(tmp_path, *rows)
    assert re.fullmatch(
        rf'.*pairs\.jsonl: label is {shown}, must be true or false; or set format = "{name}" in \[\[data\.sources\]\]',
        str(caught.value),
    )
    assert len(read(tmp_path, *rows, format=name)) == 3
    assert opened(tmp_path, *rows[:2]).format_name == name
    assert opened(tmp_path, {**row, "category": label}).format_name == name


def test_text_and_prompts_alone(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"text": " Once upon a time.\n", "url": "x"})
    assert (example.prompt, example.demonstration, example.answers) == (Prompt(()), "Once upon a time.", ())
    reading = opened(tmp_path, {"prompt": "Hi", "reference": 4})
    assert reading.format_name == "prompt_only"
    (example,) = reading
    assert (example.prompt.messages, example.demonstration, example.reference) == ((user("Hi"),), "", "4")


def test_reference_is_what_follows_four_hashes(tmp_path: Path) -> None:
    worked = "48/2 = 24.\nSo 48 + 24 = 72.\n#### 72"
    (example,) = read(tmp_path, {"question": "How many?", "answer": worked})
    assert (example.demonstration, example.reference, example.answers) == (worked, "72", ())
    (example,) = read(tmp_path, {"question": "How many?", "answer": "Two", "reference": " 2 "})
    assert example.reference == "2"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("So.\n####72\n", "72"),
        ("#### 3\nSo.\n####  4 + 1 ", "4 + 1"),
        ("#### Overview\nIt is.\n##### Why\nBecause.", ""),
        ("#### Overview\nIt is.\n##### Why", ""),
        ("#### 72\nas I said", ""),
        ("It is #### 72", ""),
        ("So.\n####", ""),
    ],
)
def test_only_a_last_line_is_the_reference(tmp_path: Path, answer: str, reference: str) -> None:
    (example,) = read(tmp_path, {"question": "How many?", "answer": answer})
    assert (example.demonstration, example.reference) == (answer.strip(), reference)


RANKINGS: list[tuple[list[str], list[float], tuple[str, ...], tuple[int, ...], str]] = [
    (["a", "b", "c"], [1, 3, 2], ("b", "c", "a"), (), "b"),
    (["a", "b", "c"], [2, 2, 5], ("c", "a", "b"), (0, 1, 1), "c"),
    (["a", "b", "c"], [2, 2, 2], (), (), "a"),
    (["a"], [2], (), (), "a"),
    (["a", "b", "a"], [1, 2, 3], ("a", "b"), (), "a"),
    (["a", "b", "a"], [2, 1, 1], ("a", "b"), (), "a"),
    (["a", "a"], [1, 2], (), (), "a"),
]


@pytest.mark.parametrize(("answers", "scores", "ordered", "ranks", "demonstration"), RANKINGS)
def test_ties_and_repeated_answers(
    tmp_path: Path,
    answers: list[str],
    scores: list[float],
    ordered: tuple[str, ...],
    ranks: tuple[int, ...],
    demonstration: str,
) -> None:
    """Worked by hand: highest score first; an answer given twice has its better score; no two, no comparison."""
    (example,) = read(tmp_path, {"prompt": "Hi", "answers": answers, "scores": scores})
    assert (example.answers, example.ranks, example.demonstration) == (ordered, ranks, demonstration)


def node(text: str, role: str = "assistant", *replies: Any, **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": list(replies), **more}


def test_a_tree_gives_an_example_for_each_answered_question(tmp_path: Path) -> None:
    again = node("And?", "prompter", node("So", rank=1), node("Thus", rank=0), node("Hm", rank=None))
    tree = node("Hi", "prompter", node("Hello", "assistant", again, rank=0), node("Ho", rank=1), node("Hey", rank=1))
    reading = opened(tmp_path, {"message_tree_id": "x", "tree_state": "y", "prompt": tree})
    assert reading.format_name == "oasst_tree"
    first, second = reading
    assert (first.prompt.messages, first.answers, first.ranks) == ((user("Hi"),), ("Hello", "Ho", "Hey"), (0, 1, 1))
    assert second.prompt.messages == (user("Hi"), assistant("Hello"), user("And?"))
    assert (second.answers, second.ranks, second.demonstration) == (("Thus", "So"), (), "Thus")
    assert first.origin == second.origin == f"{tmp_path / 'pairs.jsonl'} row 1"


def test_replies_without_ranks_deleted_or_rejected_by_review(tmp_path: Path) -> None:
    gone, spam = node("Bah", rank=0, deleted=True), node("Buy", rank=1, review_result=False)
    tree = node("Hi", "prompter", gone, spam, node("Hello", rank=2))
    (example,) = read(tmp_path, {"message_tree_id": "x", "prompt": tree})
    assert (example.demonstration, example.answers) == ("Hello", ())
    (example,) = read(tmp_path, {"message_tree_id": "x", "prompt": node("Hi", "prompter", node("A"), node("B"))})
    assert (example.demonstration, example.answers) == ("A", ())
    for others, answers in (((), ()), ((node("C", rank=1), node("D", rank=0)), ("D", "C"))):
        none = (node("A", rank=math.nan), node("B", rank=math.nan))
        tree = node("Hi", "prompter", *none, *others)
        (example,) = read(tmp_path, {"message_tree_id": "x", "prompt": tree})
        assert (example.demonstration, example.answers) == (answers[0] if answers else "A", answers)


@pytest.mark.parametrize("fault", [{"deleted": True}, {"review_result": False}])
def test_a_tree_whose_question_is_gone_is_left_out_and_counted(tmp_path: Path, fault: dict[str, bool]) -> None:
    replies = (node("Hello", rank=0), node("Ho", rank=1))
    trees = [node("Hi", "prompter", *replies, **fault), node("Hi", "prompter", *replies, review_result=True)]
    reading = opened(tmp_path, *({"message_tree_id": "x", "prompt": tree} for tree in trees))
    assert [example.origin[-5:] for example in reading] == ["row 2"]
    assert reading.dropped == {"with a question that was deleted or failed review": 1}
    asked = {"message_tree_id": "x", "message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter", **fault}
    told = {"message_tree_id": "x", "message_id": "2", "parent_id": "1", "text": "Ho", "role": "assistant"}
    other = [{**asked, **dict.fromkeys(fault), "message_tree_id": "y"}, {**told, "message_tree_id": "y"}]
    reading = opened(tmp_path, asked, told, *other)
    assert [example.origin[-5:] for example in reading] == ["row 3"]
    assert reading.dropped == {"with a question that was deleted or failed review": 1}


def test_a_tree_without_replies_is_left_out_and_counted(tmp_path: Path) -> None:
    trees = [{"message_tree_id": "x", "prompt": node("Hi", "prompter", *replies)} for replies in ([], [node("Ho")])]
    reading = opened(tmp_path, *trees)
    assert len(list(reading)) == 1
    assert (reading.num_rows, reading.dropped) == (2, {"without a reply": 1})


def test_messages_of_trees_are_gathered(tmp_path: Path) -> None:
    def message(name: str, parent: str | None, role: str, rank: int | None = None) -> dict[str, Any]:
        tree = name[0]
        more = {"text": name, "role": role, "rank": rank, "message_tree_id": tree}
        return {"message_id": name, "parent_id": parent, **more}

    rows = [message("a1", None, "prompter"), message("a2", "a1", "assistant", 1), message("a3", "a1", "assistant", 0)]
    rows += [message("a4", "a3", "prompter"), message("b1", None, "prompter"), message("b2", "b1", "assistant")]
    reading = opened(tmp_path, *rows)
    assert reading.format_name == "oasst_messages"
    first, second = reading
    assert (first.prompt.messages, first.answers) == ((user("a1"),), ("a3", "a2"))
    assert (second.prompt.messages, second.demonstration, second.answers) == ((user("b1"),), "b2", ())
    assert (first.origin[-5:], second.origin[-5:], reading.num_rows) == ("row 1", "row 5", 6)
    with pytest.raises(DataError, match=r"row 6: .*'b2' names no message before it in its tree .*one after the other"):
        read(tmp_path, *rows[:4], rows[4] | {"message_id": "b9"}, rows[5])


def test_several_turns_of_a_dialogue() -> None:
    text = "\n\nHuman: One?\nTwo?\n\nAssistant: Three: yes.\n\nAnd four.\n\nHuman: Human: why?"
    assert parse_dialogue(text) == (user("One?\nTwo?"), assistant("Three: yes.\n\nAnd four."), user("Human: why?"))
    with pytest.raises(ValueError, match="begins with 'Once upon'"):
        parse_dialogue("Once upon\n\nHuman: Hi")


def test_dialogues_on_one_line_and_texts_that_only_mention_the_form(tmp_path: Path) -> None:
    text = "Human: is that an Assistant: or not?"
    (example,) = read(tmp_path, {**GOOD, "prompt": text})
    assert example.prompt.messages == (user(text),)
    (example,) = read(tmp_path, {**GOOD, "prompt": "Human: a Assistant: b Human: c Assistant:"})
    assert example.prompt.messages == (user("a"), assistant("b"), user("c"))
    (example,) = read(tmp_path, {**GOOD, "prompt": "Human: say Assistant: twice\n\nAssistant:"})
    assert example.prompt.messages == (user("say Assistant: twice"),)


ONE_LINE = [
    (
        "Human: My Operating System: Windows Assistant: ok Human: c Assistant:",
        (user("My Operating System: Windows"), assistant("ok"), user("c")),
    ),
    (
        "Human: a Assistant: I am an Executive Assistant: b Human: c Assistant:",
        (user("a"), assistant("I am an Executive Assistant: b"), user("c")),
    ),
    ("Human: I am an Executive Assistant: help Assistant:", (user("I am an Executive Assistant: help"),)),
    ("Human: a Human: b\nAssistant: c\nHuman: d Assistant:", (user("a Human: b"), assistant("c"), user("d"))),
    ("Human: what?Assistant:", (user("what?"),)),
]


@pytest.mark.parametrize(("text", "messages"), ONE_LINE)
def test_marks_that_are_ordinary_words(tmp_path: Path, text: str, messages: tuple[Message, ...]) -> None:
    (example,) = read(tmp_path, {**GOOD, "prompt": text})
    assert example.prompt.messages == messages


BAD_ROWS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (GOOD, {"rejected": None}, "field 'rejected' is missing", "without 'rejected'"),
    (GOOD, {"prompt": None}, "field 'prompt' is missing", "without 'prompt'"),
    (GOOD, {"prompt": "  "}, "field 'prompt' is empty", "with an empty prompt"),
    (GOOD, {"prompt": 5}, "field 'prompt' is a number, and must be a text", "with a wrong type of 'prompt'"),
    (GOOD, {"chosen": {"a": 1}}, "field 'chosen' is an object", "with a wrong type of 'chosen'"),
    (GOOD, {"chosen": " \n"}, "field 'chosen' has an empty answer", "with an empty answer"),
    (GOOD, {"rejected": " Hello"}, "'chosen' and 'rejected' are the same answer", "with chosen equal to rejected"),
    (GOOD, {"prompt": [HI, HELLO]}, "'prompt' has no message of the user right before", "without a question"),
    (GOOD, {"prompt": []}, "field 'prompt' has no message of the user right before", "without a question"),
    (GOOD, {"prompt": [HELLO, HI]}, "'prompt' begins with a message of the ass", "that begin with the assistant"),
    (GOOD, {"prompt": ["Hi"]}, r"field 'prompt\[0\]' is a text, and must", "with a wrong type of 'prompt'"),
    (GOOD, {"prompt": [{"role": "tool", "content": "x"}]}, r"'prompt\[0\]\.role' is 'tool'", "with an unknown role"),
    (GOOD, {"prompt": [{"role": ["x"], "content": "x"}]}, r"'prompt\[0\]\.role' is \['x'\]", "with an unknown role"),
    (GOOD, {"prompt": [{"role": "user"}]}, r"'prompt\[0\]\.content' is nothing", "with a wrong type of 'prompt'"),
    (GOOD, {"prompt": [HI | {"content": ""}, HELLO, HI]}, r"'prompt\[0\]\.content' is empty", "with an empty message"),
    (GOOD, {"chosen": [HI]}, "'chosen' does not end with a message of the assistant", "without an answer"),
    (
        GOOD,
        {"chosen": [{"role": "user", "content": "Ho"}, HELLO]},
        "field 'chosen' is a conversation that does not begin with 'prompt'",
        "with another prompt",
    ),
    (TALK, {"messages": [HI]}, "does not end with a message of the ass", "without an answer"),
    (TALK, {"messages": [HI, GO | {"content": ""}]}, "an empty answer", "with an empty answer"),
    (TALK, {"messages": "Hi"}, "is a text, and must be a list", "with a wrong type of 'messages'"),
    (TALK, {"messages": [HELLO]}, "has no message of the user right", "without a question"),
    (TALK, {"messages": [HI, GO | {"weight": 0}]}, r"'messages\[1\]\.weight' is '0', and weights are not supported",
     "with weights of messages"),
    (SHAREGPT, {"conversations": [{"from": "tool"}]}, r"\[0\]\.from' is 'tool'", "with an unknown role"),
    (SHAREGPT, {"conversations": [{"from": "gpt"}]}, "nothing, not a text", "with a wrong type of 'conversations'"),
    (ALPACA, {"output": " "}, "field 'output' is empty", "with an empty 'output'"),
    (ALPACA, {"history": [["x"]]}, "must be a pair", "with a wrong type of 'history'"),
    (LISTED, {"output": []}, "is an empty list", "with an empty answer"),
    (LISTED, {"output": ["b", ""]}, r"'output\[1\]' has an empty", "with an empty answer"),
    (SCORED, {"scores": [1]}, "a list of 2 numbers", "with a wrong 'scores'"),
    (SCORED, {"scores": [1, "x"]}, r"'scores\[1\]' is 'x'", "with a wrong 'scores[1]'"),
    (SCORED, {"scores": [1, "inf"]}, r"'scores\[1\]' is 'inf'", "with a wrong 'scores[1]'"),
    (SCORED, {"scores": [1, math.inf]}, r"'scores\[1\]' is 'inf'", "with a wrong 'scores[1]'"),
    (JUDGED, {"answers": [{"text": "b", "rank": 0}, {"text": "c", "score": 3}]}, "a 'score' in each of its objects, or",
     "without a score of every answer"),
    (JUDGED, {"answers": [{"text": "b", "rank": 0}, {"text": "c"}]}, "a 'score' in each of its objects, or a 'rank'",
     "without a score of every answer"),
    (SCORED, {"scores": None}, "a text without a score", "without 'scores'"),
    (KTO, {"label": "maybe"}, "'label' is 'maybe'", "with a wrong 'label'"),
    (KTO, {"label": None}, "'label' is missing", "without 'label'"),
    ({"question": "a", "answer": "b"}, {"answer": None}, "'answer' is missing", "without 'answer'"),
    ({"question": "a", "answer": "b"}, {"reference": [1]}, "'reference' is a list", "with a wrong type of 'reference'"),
    ({"text": "a"}, {"text": "\n"}, "field 'text' is empty", "with an empty 'text'"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "change", "message", "reason"), BAD_ROWS)
def test_a_bad_row_is_an_error_or_counted(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], message: str, reason: str
) -> None:
    spec = write(tmp_path, good, good | change)
    section = SourceSection(path=[spec])
    with pytest.raises(DataError, match=rf'pairs\.jsonl row 2: .*{message}.*set data\.bad_rows = "drop"') as caught:
        list(open_source(section, DEMO, 0, "error"))
    assert "\n" not in str(caught.value)
    reading = open_source(section, DEMO, 0, "drop")
    assert [example.origin for example in reading] == [f"{spec} row 1"]
    assert (reading.num_rows, reading.dropped) == (2, {reason: 1})


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
        ({"message_tree_id": "x", "prompt": node("Hi", "bot")}, "field 'role' is 'bot', and must be 'prompter' here"),
        (
            {"message_tree_id": "x", "prompt": node("Hi", "prompter", node("Ho", "prompter"))},
            "field 'role' is 'prompter', and must be 'assistant' here",
        ),
        ({"message_tree_id": "x", "prompt": node("Hi", "prompter", "Ho")}, "'prompt' or a reply is a text"),
        (
            {"message_tree_id": "x", "prompt": node("Hi", "prompter", node("Ho", rank="x"))},
            "field 'rank' of a reply is a text, and must be a number",
        ),
    ],
)  # fmt: skip
def test_bad_rows_without_a_good_one(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"pairs\.jsonl row 1: .*{message}"):
        read(tmp_path, row)
    with pytest.raises(DataError, match=r"pairs\.jsonl: none of its 1 rows can be used \(1 "):
        list(open_source(SourceSection(path=[write(tmp_path, row)]), DEMO, 0, "drop"))


def test_weights_of_one_and_answers_with_score_and_rank(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"messages": [HI | {"weight": None}, HELLO | {"weight": 1}]})
    assert example.demonstration == "Hello"
    answers = [{"text": "b", "rank": 1, "score": 9}, {"text": "c", "rank": 0}]
    (example,) = read(tmp_path, {"prompt": "a", "answers": answers})
    assert example.answers == ("c", "b")


def test_every_format_is_tested_with_rows_of_its_own() -> None:
    tested = {name for name, _ in ROWS} | {"messages", "sharegpt", "alpaca", "prompt_completion", "question_answer"}
    tested |= {"kto", "text", "prompt_only", "oasst_tree", "oasst_messages"}
    assert tested == set(FORMATS)

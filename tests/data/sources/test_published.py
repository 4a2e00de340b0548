"""Published datasets, each on rows with the columns that it has on the Hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.sources.rows import DEMO, assistant, user
from threefold.config.data import SourceSection
from threefold.data.sources import FORMATS, PUBLISHED, SourceReading, open_source
from threefold.data.sources.fields import BadRowError
from threefold.data.sources.published import CITATION, located
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt

Row = dict[str, Any]


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    return Example(Prompt((user(prompt),)), chosen, (chosen, rejected), "")


def answered(prompt: str, answer: str) -> Example:
    return Example(Prompt((user(prompt),)), answer, (), "")


def passage(text: str) -> Row:
    return {"docid": "12#3", "title": "T", "text": text}


def chat(*contents: str) -> list[Row]:
    return [{"content": text, "role": ("user", "assistant")[place % 2]} for place, text in enumerate(contents)]


def webgpt(score: float) -> Row:
    quotes = {"title": ["T"], "extract": ["E"]}
    return {
        "question": {"dataset": "eli5", "id": "x", "full_text": "Why is the sky blue?"},
        "quotes_0": quotes, "answer_0": "Scattering [1]. (Rayleigh's.) [2, 3]", "score_0": score,
        "tokens_0": {"prefix": [1], "completion": [2]},
        "quotes_1": quotes, "answer_1": "It is not [1].", "score_1": -score,
        "tokens_1": {"prefix": [1], "completion": [2]},
    }  # fmt: skip


def shp(label: int) -> Row:
    return {
        "post_id": "p", "domain": "askculinary_train", "upvote_ratio": 0.9, "history": "How long do eggs keep?",
        "c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2,
        "score_A": 5, "score_B": 2,
        "human_ref_A": "Three weeks.", "human_ref_B": "Ask them.", "labels": label, "seconds_difference": 3.0,
        "score_ratio": 2.5,
    }  # fmt: skip


def mkqa(**answers: list[Row]) -> Row:
    return {
        "example_id": "1",
        "queries": {"en": "who sang it", "ja": "誰が歌った?", "zh_cn": "谁唱的?"},
        "query": "who sang it",
        "answers": answers,
    }


def said(text: str | None) -> Row:
    return {"type": 0 if text else 2, "entity": "Q1", "text": text, "aliases": []}


def oasst(name: str, parent: str | None, text: str, rank: int | None = None) -> Row:
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05", "text": text,
        "role": "assistant" if parent else "prompter", "lang": "en", "review_count": 3, "review_result": True,
        "deleted": False, "rank": rank, "synthetic": False, "model_name": None, "detoxify": None,
        "message_tree_id": "t", "tree_state": "ready_for_export", "emojis": None, "labels": None,
    }  # fmt: skip


HH = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = Prompt((user("a"), assistant("b"), user("c")))

FIXTURES: dict[str, tuple[list[Row], list[Example]]] = {
    "Dahoas/rm-static": (
        [{"prompt": HH, "response": " Yes", "chosen": " Yes", "rejected": " No"}],
        [pair("Hi", "Yes", "No")],
    ),
    "Dahoas/full-hh-rlhf": (
        [
            {
                "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "response": " Y",
                "chosen": " Y", "rejected": " N",
            }
        ],
        [Example(TWO_TURNS, "Y", ("Y", "N"), "")],
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        [{"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}],
        [pair("Name a colour.", "Blue.", "Seven.")],
    ),
    "yitingxie/rlhf-reward-datasets": (
        [
            {"prompt": "\n\nHuman: Hi\n\n", "chosen": "Assistant: Say Assistant: twice", "rejected": "Assistant: No"},
            {"prompt": "Human: a Assistant: b Human: c ", "chosen": "Assistant: Y", "rejected": "Assistant: N"},
            {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."},
        ],
        [
            pair("Hi", "Say Assistant: twice", "No"),
            Example(TWO_TURNS, "Y", ("Y", "N"), ""),
            pair("Name a colour.", "Blue.", "Seven."),
        ],
    ),
    "openai/webgpt_comparisons": (
        [webgpt(0.5), webgpt(-0.5), webgpt(0.0)],
        [
            pair("Why is the sky blue?", "Scattering. (Rayleigh's.)", "It is not."),
            pair("Why is the sky blue?", "It is not.", "Scattering. (Rayleigh's.)"),
            answered("Why is the sky blue?", "Scattering. (Rayleigh's.)"),
        ],
    ),
    "stanfordnlp/SHP": (
        [shp(1), shp(0)],
        [
            pair("How long do eggs keep?", "Three weeks.", "Ask them."),
            pair("How long do eggs keep?", "Ask them.", "Three weeks."),
        ],
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        [
            {"prompt": "USER: Hi ASSISTANT:", "label": "Hello"},
            {"prompt": "USER: a\nASSISTANT: b</s>USER: c\nASSISTANT:", "label": " d"},
            {"prompt": "Be kind. USER: Hi ASSISTANT:", "label": "Hello"},
        ],
        [
            answered("Hi", "Hello"),
            Example(TWO_TURNS, "d", (), ""),
            Example(Prompt((Message("system", "Be kind."), user("Hi"))), "Hello", (), ""),
        ],
    ),
    "local/jsonfile": (
        [
            {"prompt": "Human: Hi Assistant:", "chosen": "Yes", "rejected": "No"},
            {"prompt": "Human: Hi Assistant:", "chosen": "Yes", "rejected": None},
        ],
        [pair("Hi", "Yes", "No"), answered("Hi", "Yes")],
    ),
    "wangrui6/Zhihu-KOL": (
        [{"INSTRUCTION": "怎么说服男朋友?", "RESPONSE": "给他看。\n", "SOURCE": "Zhihu", "METADATA": "{}"}],
        [answered("怎么说服男朋友?", "给他看。")],
    ),
    "Cohere/miracl-zh-queries-22-12": (
        [
            {
                "query_id": "1#0", "query": "谁?", "emb": [0.1],
                "positive_passages": [passage("张三"), passage("李")], "negative_passages": [passage("王五")],
            }
        ],
        [pair("谁?", "张三", "王五")],
    ),
    "Cohere/miracl-ja-queries-22-12": (
        [
            {
                "query_id": "1#0", "query": "誰?", "emb": [0.1],
                "positive_passages": [passage("鈴木")], "negative_passages": [],
            }
        ],
        [answered("誰?", "鈴木")],
    ),
    "Hello-SimpleAI/HC3-Chinese": (
        [
            {
                "id": "0", "question": "为什么?", "human_answers": ["因为。", "不"], "chatgpt_answers": ["AI"],
                "source": "baike",
            }
        ],
        [answered("为什么?", "因为。")],
    ),
    "mkqa-Chinese": ([mkqa(zh_cn=[said("李四")], ja=[said("鈴木")])], [answered("谁唱的?", "李四")]),
    "mkqa-Japanese": ([mkqa(zh_cn=[said("李四")], ja=[said("鈴木")])], [answered("誰が歌った?", "鈴木")]),
    "lmqg/qg_jaquad": (
        [
            {
                "answer": "鈴木", "paragraph_question": "x", "question": "誰?", "sentence": "鈴木です。",
                "paragraph": "長い",
                "sentence_answer": "x", "paragraph_answer": "x", "paragraph_sentence": "x", "paragraph_id": "1",
            }
        ],
        [answered("誰?", "鈴木です。")],
    ),
    "lmqg/qag_jaquad": (
        [
            {
                "answers": ["鈴木"], "questions": ["誰?", "何?"], "paragraph": "鈴木です。", "paragraph_id": "1",
                "questions_answers": "x",
            }
        ],
        [answered("誰?", "鈴木です。")],
    ),
    "Anthropic/hh-rlhf": ([{"chosen": HH + " Yes", "rejected": HH + " No"}], [pair("Hi", "Yes", "No")]),
    "HuggingFaceH4/ultrafeedback_binarized": (
        [
            {
                "prompt": "Hi", "prompt_id": "1", "chosen": chat("Hi", "Yes"), "rejected": chat("Hi", "No"),
                "messages": chat("Hi", "Yes"), "score_chosen": score, "score_rejected": 4.0,
            }
            for score in (8.5, 4.0)
        ],
        [pair("Hi", "Yes", "No"), answered("Hi", "Yes")],
    ),
    "openai/gsm8k": (
        [{"question": "How many?", "answer": "24 + 48 = <<24+48=72>>72\n#### 72"}],
        [Example(Prompt((user("How many?"),)), "24 + 48 = <<24+48=72>>72\n#### 72", (), "", reference="72")],
    ),
    "tatsu-lab/alpaca": (
        [{"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is an instruction"}],
        [answered("Add.\n1, 2", "3")],
    ),
    "OpenAssistant/oasst1": (
        [oasst("1", None, "Hi"), oasst("2", "1", "No", 1), oasst("3", "1", "Yes", 0)],
        [pair("Hi", "Yes", "No")],
    ),
    "HuggingFaceH4/ultrachat_200k": (
        [{"prompt": "a", "prompt_id": "1", "messages": chat("a", "b", "c", "d")}],
        [Example(TWO_TURNS, "d", (), "")],
    ),
}  # fmt: skip

UNANSWERED: list[tuple[str, Row, str]] = [
    (
        "pvduy/sharegpt_alpaca_oa_vicuna_format",
        {"prompt": "USER: Hi ASSISTANT:", "label": ""},
        "without prompt or label",
    ),
    ("Cohere/miracl-zh-queries-22-12", {"query": "谁?", "positive_passages": []}, "without a positive passage"),
    ("Hello-SimpleAI/HC3-Chinese", {"question": "为什么?", "human_answers": []}, "without an answer of a person"),
    ("mkqa-Chinese", mkqa(zh_cn=[said(None)]), "that MKQA calls unanswerable"),
    ("lmqg/qag_jaquad", {"questions": [], "paragraph": "x"}, "without a question"),
]


def opened(tmp_path: Path, rows: list[Row], name: str) -> SourceReading:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return open_source(SourceSection(path=[str(path)], format=name), DEMO, 0)


def test_all_of_them_have_a_fixture() -> None:
    assert set(FIXTURES) == set(PUBLISHED)
    assert len(PUBLISHED) == 16 + 6


@pytest.mark.parametrize("name", FIXTURES)
def test_published_rows(tmp_path: Path, name: str) -> None:
    rows, expected = FIXTURES[name]
    reading = opened(tmp_path, rows, name)
    examples = list(reading)
    assert (reading.format_name, reading.num_rows, reading.dropped) == (name, len(rows), {})
    assert [Example(**{**vars(example), "origin": ""}) for example in examples] == expected
    assert examples[0].origin == f"{tmp_path / 'rows.jsonl'} row 1"


@pytest.mark.parametrize(("name", "row", "reason"), UNANSWERED)
def test_rows_that_have_no_answer_are_counted(tmp_path: Path, name: str, row: Row, reason: str) -> None:
    """Nobody can mend a published row, so these stop no run."""
    good = FIXTURES[name][0][0]
    reading = opened(tmp_path, [good, row], name)
    assert len(list(reading)) == 1
    assert reading.dropped == {reason: 1}


def test_lists_of_objects_as_older_versions_of_the_library_keep_them(tmp_path: Path) -> None:
    """An object of lists in place of a list of objects."""
    row = mkqa(zh_cn={"type": [0], "entity": ["Q1"], "text": ["李四"], "aliases": [[]]})  # type: ignore[arg-type]
    (example,) = opened(tmp_path, [row], "mkqa-Chinese")
    assert example.demonstration == "李四"


@pytest.mark.parametrize("name", ["stanfordnlp/SHP", "mkqa-Japanese", "Anthropic/hh-rlhf", "tatsu-lab/alpaca"])
def test_a_saved_dataset_is_known_by_the_end_of_its_path(tmp_path: Path, name: str) -> None:
    """DeepSpeed-Chat's way to use a dataset without the Hub."""
    rows, expected = FIXTURES[name]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / name))
    reading = open_source(SourceSection(path=[str(tmp_path / name)]), DEMO, 0)
    assert reading.format_name == name
    assert [Example(**{**vars(example), "origin": ""}) for example in reading] == expected


def test_local_jsonfile_is_the_files_below_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows, expected = FIXTURES["local/jsonfile"]
    for name, row in zip(("train", "eval"), rows, strict=True):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([row]))
    reading = open_source(SourceSection(path=["local/jsonfile"]), DEMO, 0)
    examples = list(reading)
    assert (reading.name, reading.format_name) == ("local/jsonfile", "local/jsonfile")
    assert [Example(**{**vars(example), "origin": ""}) for example in examples] == expected
    assert [example.origin for example in examples] == ["data/train.json row 1", "data/eval.json row 1"]


@pytest.mark.parametrize(
    ("given", "path", "subset", "hub_split"),
    [
        ({"path": ["Dahoas/rm-static"]}, "Dahoas/rm-static", "", ""),
        ({"path": ["openai/gsm8k"]}, "openai/gsm8k", "main", ""),
        ({"path": ["openai/gsm8k"], "subset": "socratic", "hub_split": "test"}, "openai/gsm8k", "socratic", "test"),
        ({"path": ["mkqa-Chinese"]}, "apple/mkqa", "", ""),
        ({"path": ["apple/mkqa"], "format": "mkqa-Japanese"}, "apple/mkqa", "", ""),
        ({"path": ["HuggingFaceH4/ultrachat_200k"]}, "HuggingFaceH4/ultrachat_200k", "", "train_sft"),
        ({"path": ["somebody/copy-of-gsm8k"], "format": "openai/gsm8k"}, "somebody/copy-of-gsm8k", "", ""),
        ({"path": ["some/data.jsonl"]}, "some/data.jsonl", "", ""),
    ],
)
def test_what_a_name_stands_for_on_the_hub(given: dict[str, Any], path: str, subset: str, hub_split: str) -> None:
    section = SourceSection(**given)
    found = located(section)
    assert (found.path, found.subset, found.hub_split) == ([path], subset, hub_split)
    assert found.label == section.label


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Blue [1]. Red. [2, 13] Green[3]", "Blue. Red. Green[3]"),
        ("Blue [1–3] or [ 1 ][2 ], red [1, 2, 4–6].", "Blue or, red."),
        ("list[0] = 3", "list[0] = 3"),
        ("in the year [2019], from [0, 1]", "in the year [2019], from [0, 1]"),
        ("x = [1, 2, 3] and y=[1]", "x = [1, 2, 3] and y=[1]"),
        ("a [100] b [x] c []", "a [100] b [x] c []"),
    ],
)
def test_citations_and_what_only_stands_in_brackets(text: str, left: str) -> None:
    assert CITATION.sub("", text) == left


def test_long_whitespace_costs_no_square_of_its_length() -> None:
    """A hundred times as long takes a hundred times as long, and not ten thousand: far below a second."""
    spaces = " " * 20_000
    row = {"prompt": f"USER: a{spaces}b ASSISTANT: c{spaces}USER: d ASSISTANT:", "label": "e"}
    start = time.process_time()
    (example,) = PUBLISHED["pvduy/sharegpt_alpaca_oa_vicuna_format"].row_format.read(row, "")
    assert CITATION.sub("", f"{spaces}[{spaces}") == f"{spaces}[{spaces}"
    assert time.process_time() - start < 0.3
    assert example.prompt.messages == (user(f"a{spaces}b"), assistant("c"), user("d"))


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("USER: my SUPER USER: x ASSISTANT: b USER: c ASSISTANT:", (user("my SUPER USER: x"), *TWO_TURNS.messages[1:])),
        ("USER: the LAB ASSISTANT: x ASSISTANT:", (user("the LAB ASSISTANT: x"),)),
        ("Be an ASSISTANT: kind. </s> USER: Hi ASSISTANT:", (Message("system", "Be an ASSISTANT: kind."), user("Hi"))),
        ("USER: Hi", (user("Hi"),)),
    ],
)
def test_marks_that_are_ordinary_words(prompt: str, messages: tuple[Message, ...]) -> None:
    row = {"prompt": prompt, "label": "Yes"}
    (example,) = PUBLISHED["pvduy/sharegpt_alpaca_oa_vicuna_format"].row_format.read(row, "")
    assert example.prompt.messages == messages


@pytest.mark.parametrize(
    "prompt", ["ASSISTANT: Hi USER: a ASSISTANT:", "USER: a ASSISTANT: b", "ASSISTANT: b ASSISTANT:"]
)
def test_dialogues_that_the_assistant_begins_or_ends_are_refused(prompt: str) -> None:
    with pytest.raises(BadRowError, match="message of the"):
        PUBLISHED["pvduy/sharegpt_alpaca_oa_vicuna_format"].row_format.read({"prompt": prompt, "label": "Yes"}, "")


def test_columns_of_another_dataset_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"format stanfordnlp/SHP \(history, .*\) needs 'history', .*are prompt, chosen"
    ):
        opened(tmp_path, [{"prompt": "a", "chosen": "b"}], "stanfordnlp/SHP")


def test_the_documentation_names_every_format_and_dataset() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")
    for row_format in FORMATS.values():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{row_format.name}` |")]
        assert all(f"`{column}`" in line for column in row_format.known_columns() if column != "reference"), line
    assert all(f"| `{name}` |" in page for name in PUBLISHED)

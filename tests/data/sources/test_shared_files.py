"""Every real file: its format is found out without a mapping, and all its rows are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from threefold.config.data import DemoDataSection, SourceSection
from threefold.data.sources import SourceReading, open_source
from threefold.errors import DataError
from threefold.types import Example

FILES = {
    "gsm8k/train.jsonl": ("question_answer", 7473, 7473, 0),
    "gsm8k/test.jsonl": ("question_answer", 1319, 1319, 0),
    "hh_rlhf/harmless_1600.jsonl.gz": ("implicit_preference", 1600, 1595, 1595),
    "llama_factory/alpaca_en_demo.json": ("alpaca", 999, 999, 0),
    "llama_factory/alpaca_zh_demo.json": ("alpaca", 1000, 1000, 0),
    "llama_factory/c4_demo.jsonl": ("text", 300, 300, 0),
    "llama_factory/dpo_en_demo.json": ("sharegpt_preference", 300, 300, 300),
    "llama_factory/dpo_zh_demo.json": ("sharegpt_preference", 300, 300, 300),
    "llama_factory/kto_en_demo.json": ("kto", 300, 300, 0),
    "llama_factory/oaast_rm_zh.json": ("ranked", 775, 775, 1798),
    "oasst/en_100_tree.jsonl": ("oasst_tree", 100, 254, 754),
    "tinystories/val.txt": ("text", None, None, 0),
}
"""Name to format, rows, examples, pairs that the ranks tell apart. (The pairs of oaast_rm_zh: 434 * 1 + 263 * 3 +
63 * 6 + 12 * 10 + 15 + 45 + 28 by the lengths of its lists, less those of answers that are given twice.)"""

pytestmark = pytest.mark.real


def opened(shared: Path, name: str) -> SourceReading:
    return open_source(SourceSection(path=[str(shared / "data" / name)]), DemoDataSection(), 0, "drop")


def num_pairs(example: Example) -> int:
    ranks = example.ranks or tuple(range(len(example.answers)))
    return sum(better < worse for better in ranks for worse in ranks)


def test_no_file_is_forgotten(shared: Path) -> None:
    files = {path.relative_to(shared / "data").as_posix() for path in (shared / "data").rglob("*.*") if path.is_file()}
    assert files == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_real_files(shared: Path, name: str) -> None:
    format_name, num_rows, num_examples, pairs = FILES[name]
    reading = opened(shared, name)
    examples = list(reading)
    assert reading.format_name == format_name
    assert reading.num_rows == (num_rows or reading.num_rows)
    assert len(examples) == (num_examples or reading.num_rows)
    assert sum(map(num_pairs, examples)) == pairs
    assert all(not example.prompt.messages or example.prompt.messages[-1].role == "user" for example in examples)


def test_hh_rlhf(shared: Path) -> None:
    """Of 1,600 rows four have an empty answer, and one compares answers to different questions."""
    reading = opened(shared, "hh_rlhf/harmless_1600.jsonl.gz")
    example = next(iter(reading))
    assert [message.role for message in example.prompt.messages] == ["user", "assistant"] * 2 + ["user"]
    assert example.prompt.messages[0].content == "what are some pranks with a pen i can do?"
    assert example.answers[0].startswith("No, sorry!  All of these involve a pen")
    assert example.answers[1].endswith("It’s really funny.")
    assert sum(1 for _ in reading) == 1594
    assert reading.dropped == {"with an empty answer": 4, "with dialogues that differ before the last answer": 1}
    section = SourceSection(path=[str(shared / "data/hh_rlhf/harmless_1600.jsonl.gz")])
    with pytest.raises(DataError, match=r"harmless_1600\.jsonl\.gz row 87: field 'chosen' has an empty answer"):
        list(open_source(section, DemoDataSection(), 0, "error"))


def test_every_question_of_gsm8k_has_a_reference(shared: Path) -> None:
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        for example in opened(shared, name):
            assert example.reference == example.demonstration.split("####")[1].strip() != ""


def test_a_tree_is_ranked_where_people_ranked_it(shared: Path) -> None:
    examples = list(opened(shared, "oasst/en_100_tree.jsonl"))
    assert examples[0].prompt.messages[0].content == "How can I find the best 401k plan for my needs?"
    assert all(example.demonstration == example.answers[0] for example in examples if example.answers)


def test_labels_of_kto(shared: Path) -> None:
    examples = list(opened(shared, "llama_factory/kto_en_demo.json"))
    assert sum(bool(example.demonstration) for example in examples) == 150
    assert all(len(example.answers) == 1 for example in examples)

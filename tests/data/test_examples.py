"""The table of a source: what goes in comes out, under a key that changes with whatever it depends on."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.config.recipe import Recipe
from threefold.data import examples as examples_module
from threefold.data.cache import silent
from threefold.data.examples import ExampleList, SourceTable, open_table
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt

Row = dict[str, Any]


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, word: str = "q") -> list[Row]:
    return [{"prompt": f"{word} {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(count)]


def table_of(source: Any, cache: Path, **data: Any) -> SourceTable:
    recipe = Recipe.model_validate({"data": {"sources": [source], **data}})
    return open_table(recipe.data.sources[0], recipe, cache, silent)


def everything(table: SourceTable) -> list[Example]:
    return list(ExampleList([table], [np.arange(len(table))]))


def test_examples_come_back_by_number_and_in_batches(tmp_path: Path) -> None:
    table = table_of(write(tmp_path / "f.jsonl", pairs(2500)), tmp_path / "cache")
    found = everything(table)
    assert [example.prompt for example in found] == [Prompt((Message("user", f"q {n}"),)) for n in range(2500)]
    assert found[1500].answers == ("yes 1500", "no")
    assert found[1500].origin == f"{tmp_path / 'f.jsonl'} row 1501"
    keep = np.arange(2500) % 7 == 3
    batched = [pair for numbers, some in table.batches(keep) for pair in zip(numbers.tolist(), some, strict=True)]
    assert batched == [(n, found[n]) for n in range(3, 2500, 7)]
    assert [str(origin) for _, part in table.origins() for origin in part] == [example.origin for example in found]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), max_size=4),
    texts,
    st.lists(texts, max_size=4),
    st.lists(st.integers(0, 9), max_size=4),
    texts,
)
def test_any_example_survives_the_table(
    turns: list[tuple[Any, str]], demonstration: str, answers: list[str], ranks: list[int], reference: str
) -> None:
    prompt = Prompt(tuple(Message(role, content) for role, content in turns))
    example = Example(prompt, demonstration, tuple(answers), "f row 1", tuple(ranks), reference)
    values, _ = examples_module._values(example)
    assert examples_module._example(values[:7]) == example


def test_the_place_of_a_conversation_is_that_of_its_first_question(tmp_path: Path) -> None:
    def talk(*said: str) -> Row:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]}

    longer = [talk("Hi", "a", "And then?", "b"), talk("hi ", "other", "So?", "c")]
    rows = [talk("Hi", "a"), *longer, talk("And then?", "d")]
    table = table_of(write(tmp_path / "f.jsonl", rows), tmp_path / "cache")
    assert len(set(table.openings[:3].tolist())) == 1
    assert table.openings[3] != table.openings[0]
    assert len(set(table.digests.tolist())) == 4


def test_a_question_is_the_same_with_reasoning_and_without(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)])
    plain = table_of(path, tmp_path / "cache")
    asked = table_of({"path": path, "reasoning": "english", "few_shot": 2}, tmp_path / "cache")
    assert asked.openings.tolist() == plain.openings.tolist()
    assert "Final answer" in everything(asked)[0].prompt.messages[0].content


def test_a_file_that_changes_while_it_is_read_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.jsonl"
    write(path, pairs(20))
    original = examples_module._write

    def while_it_is_written_to(*arguments: Any) -> Any:
        info = original(*arguments)
        write(path, pairs(21))
        return info

    monkeypatch.setattr(examples_module, "_write", while_it_is_written_to)
    with pytest.raises(DataError, match=r"f\.jsonl: changed while it was read"):
        table_of(str(path), tmp_path / "cache")
    assert not [each for each in (tmp_path / "cache").iterdir() if each.is_dir()]
    monkeypatch.undo()
    assert len(table_of(str(path), tmp_path / "cache")) == 21


def test_a_renamed_file_is_named_by_its_new_name(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3))
    pattern = str(tmp_path / "*.jsonl")
    assert "a.jsonl row 1" in everything(table_of(pattern, tmp_path / "cache"))[0].origin
    (tmp_path / "a.jsonl").rename(tmp_path / "z.jsonl")
    assert "z.jsonl row 1" in everything(table_of(pattern, tmp_path / "cache"))[0].origin


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's that reads rows.jsonl beside it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rows.py").write_text(
        "import json, pathlib\n"
        "def rows():\n"
        "    return map(json.loads, pathlib.Path(__file__).with_name('rows.jsonl').read_text().splitlines())\n"
    )
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("my_rows", None)


def test_rows_of_a_function_are_read_again_when_what_it_reads_has_changed(own_module: Path) -> None:
    write(own_module / "rows.jsonl", pairs(4))
    first = table_of("python:my_rows:rows", own_module / "cache")
    write(own_module / "rows.jsonl", pairs(4, "other"))
    second = table_of("python:my_rows:rows", own_module / "cache")
    assert everything(first)[0].prompt.messages[0].content == "q 0"
    assert everything(second)[0].prompt.messages[0].content == "other 0"


def test_half_a_character_of_a_function_is_one_line(own_module: Path) -> None:
    write(own_module / "rows.jsonl", [*pairs(1), {"prompt": "\ud83d", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"python:my_rows:rows row 2: holds half of a character"):
        table_of("python:my_rows:rows", own_module / "cache")


def test_large_rows_end_a_batch_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threefold.data.cache.BYTES_PER_BATCH", 1000)
    rows = [{"text": f"{n} " + "word " * (n % 90)} for n in range(300)]
    table = table_of(write(tmp_path / "f.jsonl", rows), tmp_path / "cache")
    sizes = [len(some) for _, some in table.batches(np.ones(300, dtype=np.bool_))]
    assert len(sizes) > 30
    assert sum(sizes) == 300
    assert [example.demonstration for example in everything(table)] == [row["text"].strip() for row in rows]

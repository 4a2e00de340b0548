"""Finding out the format of a source, columns of other names, rows of several formats, the source "demo"."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.rows import ANSWERED, DEMO, GO, GOOD, HELLO, HI, opened, read, write
from threefold.config.data import SourceSection
from threefold.data.demo import generate_examples
from threefold.data.sources import FORMATS, fingerprint, open_source
from threefold.errors import ConfigError, DataError


def test_a_mapping_names_the_columns_of_the_file(tmp_path: Path) -> None:
    row = {"frage": "Hi", "gut": "Hello", "schlecht": "Go", "prompt": "of another kind"}
    mapping = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    reading = opened(tmp_path, row, mapping=mapping)
    assert (reading.format_name, reading.columns) == ("preference", tuple(row))
    (example,) = reading
    assert (example.prompt.messages[0].content, example.answers) == ("Hi", ("Hello", "Go"))
    (example,) = read(tmp_path, row, format="prompt_completion", mapping={"prompt": "frage", "completion": "gut"})
    assert (example.demonstration, example.answers) == ("Hello", ())


def test_a_mapping_overrides_what_would_be_detected(tmp_path: Path) -> None:
    row = {**GOOD, "text": "An essay"}
    assert opened(tmp_path, row).format_name == "preference"
    (example,) = read(tmp_path, row, format="text")
    assert example.demonstration == "An essay"
    columns = {"prompt": "Q", "chosen": "[Human] x", "rejected": "y"}
    (example,) = read(tmp_path, columns, mapping={"question": "prompt", "answer": "chosen"}, format="question_answer")
    assert example.demonstration == "[Human] x"


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"mapping": {"promt": "id"}}, ConfigError, r"'promt' is no column of any format \(did you mean prompt\?\)"),
        (
            {"mapping": {"completion": "chosen"}, "format": "preference"},
            ConfigError,
            "'completion' is no column of format preference: use prompt, chosen, rejected, system, reference",
        ),
        (
            {"mapping": {"prompt": "prmpt"}},
            DataError,
            r'mapping prompt = "prmpt": there is no such column \(did you mean prompt\?\): it has prompt, chosen, rej',
        ),
        ({"format": "preferense"}, ConfigError, r'no format "preferense" \(did you mean preference\?\): use auto, '),
        ({"format": "dahoas/rm-static"}, ConfigError, r"did you mean Dahoas/rm-static\?"),
        ({"format": "messages"}, DataError, r"format messages \(messages\) needs 'messages', and the columns are"),
    ],
)  # fmt: skip
def test_wrong_names_are_one_line(tmp_path: Path, section: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        opened(tmp_path, GOOD, **section)
    assert "pairs.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_that_fit_no_format(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(tmp_path, {"prompts": "a", "choosen": "b", "rejectd": "c", "id": 4})
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/pairs.jsonl: its columns (prompts, choosen, rejectd, id) fit no format")
    assert "the nearest is preference (prompt, chosen, rejected)" in line
    assert 'mapping = {prompt = "prompts", chosen = "choosen", rejected = "rejectd"}' in line
    assert all(name in line for name in FORMATS)
    assert "\n" not in line


def test_a_column_without_values_counts_as_absent(tmp_path: Path) -> None:
    """Parquet and csv give every row all columns."""
    row = {"prompt": "Hi", "completion": "Hello", "chosen": None, "rejected": None, "label": None}
    assert opened(tmp_path, row).format_name == "prompt_completion"


MIXED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("preference", GOOD, "messages", {"messages": [HI, HELLO]}),
    ("messages", {"messages": [HI, HELLO]}, "kto", {"messages": [HI, HELLO], "label": False}),
    ("implicit_preference", {"chosen": [HI, HELLO], "rejected": [HI, GO]}, "preference", GOOD),
    ("alpaca", {"instruction": "a", "output": "b"}, "ranked", {"instruction": "a", "output": ["b", "c"]}),
    ("sharegpt", {"conversations": ANSWERED}, "question_answer", {"question": "a", "answer": "b"}),
]


@pytest.mark.parametrize(("name", "row", "other_name", "other"), MIXED)
@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_rows_of_two_formats(
    tmp_path: Path, name: str, row: dict[str, Any], other_name: str, other: dict[str, Any], bad_rows: Any
) -> None:
    """Both where the first rows show it, and in the 200th row."""
    late = SourceSection(path=[write(tmp_path, *[row] * 199, other)])
    with pytest.raises(DataError, match=rf"pairs\.jsonl row 200: is of format {other_name} .* is of format {name} "):
        list(open_source(late, DEMO, 0, bad_rows))
    early = SourceSection(path=[write(tmp_path, row, row, other)])
    with pytest.raises(DataError, match=rf"pairs\.jsonl row [123]: is of format ({name}|{other_name}) ") as caught:
        open_source(early, DEMO, 0, bad_rows)
    assert f"format {name} (" in str(caught.value)
    assert f"format {other_name} (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_format_that_is_given_makes_rows_of_others_bad_rows(tmp_path: Path) -> None:
    section = SourceSection(path=[write(tmp_path, GOOD, {"messages": [HI, HELLO]})], format="preference")
    reading = open_source(section, DEMO, 0, "drop")
    assert len(list(reading)) == 1
    assert reading.dropped == {"without 'prompt'": 1}


def test_a_row_that_lacks_a_field_is_a_bad_row_and_no_other_format(tmp_path: Path) -> None:
    rows = [GOOD, {"prompt": "Hi", "chosen": "Hello"}, {"chosen": "Hello", "rejected": "Go"}]
    reading = open_source(SourceSection(path=[write(tmp_path, *rows)]), DEMO, 0, "drop")
    assert len(list(reading)) == 1
    assert reading.dropped == {"without 'rejected'": 1, "without 'prompt'": 1}


def test_optional_columns_of_some_rows_only(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 150 + [{"instruction": "a", "input": "x", "output": "b", "id": 1}]
    assert len(read(tmp_path, *rows)) == 151


@pytest.mark.parametrize(("good", "bad"), [("true", "false"), ("1.0", "0.0")])
def test_csv_gives_texts(tmp_path: Path, good: str, bad: str) -> None:
    """Data frames write a column of 1 and 0 in which a value is missing as 1.0 and 0.0."""
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion", "label"], ["Hi", "Hello", good], ["Hi", "12", bad]])
    reading = open_source(SourceSection(path=[str(path)]), DEMO, 0)
    assert reading.format_name == "kto"
    assert [(example.demonstration, example.answers) for example in reading] == [("Hello", ("Hello",)), ("", ("12",))]


def test_reasoning_is_asked_for_with_worked_examples_of_a_file(tmp_path: Path) -> None:
    shots = tmp_path / "shots.json"
    shots.write_text(json.dumps([{"question": "How many legs has a dog?", "answer": "Two pairs.\n#### 4"}]))
    row = {"question": "How many?", "answer": "24 + 48 = 72\n#### 72"}
    options = {"reasoning": "english", "few_shot": 1, "few_shot_file": str(shots)}
    (example,) = read(tmp_path, row, **options)
    assert "How many legs has a dog?" in example.prompt.messages[-1].content
    assert example.prompt.messages[-1].content.endswith("How many?")
    assert example.demonstration.endswith("72")
    assert ("####" in example.demonstration, example.reference) == (False, "72")
    section = SourceSection(path=[write(tmp_path, row, row | {"answer": "Many."})], reasoning="english")
    reading = open_source(section, DEMO, 0, "drop")
    assert len(list(reading)) == 1
    assert reading.dropped == {"without a question or a final answer": 1}
    with pytest.raises(DataError, match=r"row 2: reasoning = \"english\" needs answers with a final answer"):
        list(open_source(section, DEMO, 0, "error"))


def test_a_stream_ends_at_max_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{number}?", "answer": "x"} for number in range(300)]
    reading = opened(tmp_path, *rows, streaming=True, max_rows=150)
    assert [example.prompt.messages[0].content for example in reading] == [f"{number}?" for number in range(150)]


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        open_source(SourceSection(path=["absent.jsonl"]), DEMO, 0)


def test_demo_needs_no_file() -> None:
    reading = open_source(SourceSection(path=["demo"]), DEMO, seed=3)
    assert (reading.name, reading.format_name) == ("demo", "demo")
    examples = list(reading)
    assert examples == generate_examples(DEMO.num_prompts, DEMO.flawed_fraction, DEMO.flip_rate, 3)
    assert (reading.num_rows, reading.dropped) == (len(examples), {})


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    section = SourceSection(path=[write(tmp_path, GOOD)])
    first = fingerprint(section)
    assert first == fingerprint(section)
    write(tmp_path, GOOD, GOOD)
    assert first != fingerprint(section)


def test_reading_costs_little_beside_json(tmp_path: Path) -> None:
    """Well below 30 microseconds a small row; the bound leaves room for a machine that does other things."""
    rows = [{"prompt": f"Question {number}?", "chosen": "Yes, indeed.", "rejected": "No."} for number in range(20_000)]
    lines = [json.dumps(row) for row in rows]
    section = SourceSection(path=[write(tmp_path, *rows)])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for line in lines:
            json.loads(line)
        parsed = time.process_time()
        assert sum(1 for _ in open_source(section, DEMO, 0)) == len(rows)
        seconds.append((time.process_time() - parsed) - (parsed - start))
    assert min(seconds) / len(rows) < 60e-6

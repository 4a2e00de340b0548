"""Reading csv, tsv and txt files: exact texts, and every fault with its file and line."""

from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path

import pytest

from threefold.data.sources import streams
from threefold.data.sources.text_rows import read_csv, read_tsv, read_txt
from threefold.errors import DataError


@pytest.mark.parametrize(("reader", "separator"), [(read_csv, ","), (read_tsv, "\t")])
def test_texts_are_those_of_the_file(tmp_path: Path, reader: object, separator: str) -> None:
    """What Python's own writer puts into a file comes back, with line ends, quotes, separators and spaces in it."""
    assert callable(reader)
    pieces = ["a", " ", '"', ",", "\t", "\n", "\r\n", "漢", "007", "", "1.50", "NaN", "x" * 200_000]
    generator = random.Random(0)
    rows = [
        {name: "".join(generator.choices(pieces, k=3)) for name in ("prompt", "the answer", "n")} for _ in range(30)
    ]
    path = tmp_path / "a.table"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    assert list(reader(path)) == rows


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n\n1,\n\n,\n", encoding="utf-8")
    assert list(read_csv(path)) == [{"a": "1", "b": ""}]


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    """The index of a data frame, and what a spreadsheet writes beside its table."""
    path = tmp_path / "a.csv"
    path.write_text(',a,b,,\n0,1,"x, y",,\n1,2,,,\n,,,,\n', encoding="utf-8")
    assert list(read_csv(path)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    path.write_text('"a, b"\n1\n', encoding="utf-8")
    assert list(read_csv(path)) == [{"a, b": "1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv: is empty; it must hold a line of column names"),
        ("a,b\n", "a.csv: holds no rows, only column names"),
        ("a,b\n1,2\n\n3\n", "a.csv line 4: has 1 fields, and the first line names 2 columns"),
        ('a,b\n"1\n1",2\nHello, you, there\n', "a.csv line 4: has 3 fields, and the first line names 2 columns; put a"),
        ("a,b,a\n1,2,3\n", "a.csv line 1: names column 'a' twice"),
        ('a,b\n1,2\n3,"4\n5,6\n', "a.csv line 3: is not a row of .* by commas: its quote is never closed"),
        ('a,b\n"x" y,2\n', "a.csv line 2: is not a row of fields .*',' expected after '\"'"),
        ("a,b\n1,2\r3,4\n", "a.csv line 2: is not a row of fields .*old Macs"),
        ("prompt;chosen;rejected\n1;2;3\n", "a.csv line 1: has the one column 'prompt;chosen;r.* by ';'; a csv"),
        ("Frage (de);Antwort!\n1;2\n", "a.csv line 1: has the one column 'Frage .* by ';'; .* commas: save it so"),
        (",,\n1,2,3\n", "a.csv: is empty"),
        ("a,b\n,\n", "a.csv: holds no rows, only column names"),
        ("prompt\tchosen\n1\t2\n", r"a.csv line 1: has the one column 'prompt\\tchosen', .* is separated by commas"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    with pytest.raises(DataError, match=message) as caught:
        list(read_csv(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_bytes", [1, 4, 13, 1 << 20])
def test_documents_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """The mark between documents may lie across the end of a chunk."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes(
        "\ufeffone\r\n\r\n  two 漢\r\n<|endoftext|>\n <|endof three <|endoftext|> <|endoftext|>four".encode()
    )
    assert list(read_txt(path)) == [{"text": "one\n\n  two 漢"}, {"text": "<|endof three"}, {"text": "four"}]
    path.write_text("A paragraph.\n\nAnother one.\n", encoding="utf-8")
    assert list(read_txt(path)) == [{"text": "A paragraph.\n\nAnother one."}]
    path.write_text(" <|endoftext|>\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt: holds no text"):
        list(read_txt(path))


@pytest.mark.real
def test_the_stories_are_those_between_the_marks(shared: Path, tmp_path: Path) -> None:
    path = shared / "data/tinystories/val.txt"
    whole = path.read_text("utf-8").split("<|endoftext|>")
    expected = [{"text": story.strip()} for story in whole if story.strip()]
    assert list(read_txt(path)) == expected
    packed = tmp_path / "val.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    assert list(read_txt(packed)) == expected

"""Reading json files: the very values, as a stream, and every fault with its file and line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from threefold.data.sources import json_rows, streams
from threefold.data.sources.json_rows import read_json
from threefold.errors import DataError

ROWS: list[dict[str, object]] = [
    {"prompt": "2020-01-01", "chosen": "12", "rejected": "2020-01-01T00:00:00"},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": 5, "rejected": None},
    {"prompt": "Hi", "extra": {"a": [1, "x"]}},
]


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_values_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    """Texts that look like dates or numbers stay texts; a column of several types is read as it is."""
    text = lines(ROWS) if "jsonl" in name else "\ufeff" + json.dumps(ROWS, indent=1)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.replace("\n", "\r\n").encode())
    assert list(read_json(path)) == ROWS


def test_the_ending_does_not_decide(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n " + lines(ROWS), encoding="utf-8")
    assert list(read_json(path)) == ROWS
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff\n " + json.dumps(ROWS), encoding="utf-8")
    assert list(read_json(path)) == ROWS


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": "\u2028"}\n\n \n{"a": "c"}', encoding="utf-8")
    assert list(read_json(path)) == [{"a": "\u2028"}, {"a": "c"}]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_chunks_of_any_size_give_what_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """Cuts fall within numbers, escapes, characters of several bytes, words: json.loads of the whole is the oracle."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    generator = random.Random(0)

    def value(depth: int) -> Any:
        leaves = ["", 'a\\"b\n', "漢字😀", 0, -1.5e-7, 123456789, True, False, None]
        if depth == 0 or generator.random() < 0.5:
            return generator.choice(leaves)
        if generator.random() < 0.5:
            return [value(depth - 1) for _ in range(generator.randrange(4))]
        return {f"k{index}": value(depth - 1) for index in range(generator.randrange(4))}

    rows = [{"a": value(3), "b": value(1)} for _ in range(40)]
    path = tmp_path / "a.json"
    for ascii_only, indent in ((True, None), (False, 2)):
        path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
        assert list(read_json(path)) == json.loads(path.read_text("utf-8")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: is empty"),
        ("a.json", b"[]", "a.json: holds no rows"),
        ("a.jsonl", b'{"a": "b"}\n\n{"a": \n', "a.jsonl line 3: is not JSON: Expecting .*; 1 of its 3 lines is not"),
        (
            "a.jsonl",
            b'{"a": "b"} {"a": "c"}\n{"a": 1}\n\nnonsense\n',
            r"a.jsonl line 1: is not JSON: Extra data at column 12 .*object per line\); 2 of its 4 lines are not$",
        ),
        (
            "a.jsonl",
            b"hello\n" + b"{}\n" * 400_000 + b"\xff\n",
            "a.jsonl line 1: .*; 1 of its 400001 lines is not, and what follows cannot be read",
        ),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl line 1: is not JSON: Exceeds the limit .*digits"),
        ("a.jsonl", b'{"a": ' * 100000, "a.jsonl line 1: is not JSON: maximum recursion depth"),
        ("a.json", b'[{"a": ' + b"[" * 100000, "a.json line 1: is not JSON: maximum recursion depth"),
        ("a.json", b'[{"a": "b"},\n{"a": }]', "a.json line 2: is not JSON: Expecting value at column 7"),
        ("a.json", b'[{"a": "b"}\n{"a": 1}]', "a.json line 2: is not JSON: Expecting ',' delimiter at column 1"),
        ("a.json", b'[{"a": "b"},\n]', "a.json line 2: is not JSON: Expecting value at column 1"),
        ("a.json", b'[{"a": "b"}]\n[{"a": "c"}]', "a.json line 2: is not JSON: Extra data after the list at column 1"),
        ("a.json", b'[{"a": "b"}', "a.json line 1: is not JSON: the list ends in the middle, after 1 whole rows"),
        ("a.json", b'[{"a": "b"},\n', "a.json line 2: is not JSON: the list ends in the middle, after 1 whole rows"),
        ("a.json", b'[{"a": "b"}, {"a": "b', "a.json line 1: is not JSON: the list ends in the middle, after 1 whole"),
        ("a.json", b'[{"a": "b"}, {"a": tr', "a.json line 1: is not JSON: Expecting value at column 20"),
        ("a.jsonl", b'"x"\n', 'a.jsonl row 1: is "x", and must be an object'),
        ("a.jsonl", b'{"a": "b"}\n5\n', "a.jsonl row 2: is 5, and must be an object"),
        ("a.json", b"[1, 2]", "a.json row 1: is 1, and must be an object"),
        ("a.json", b'["x", "y"]', 'a.json row 1: is "x", and must be an object'),
        ("a.jsonl", b'{"a": "b"}\n\n{"a": "\\ud83d"}\n', r"a.jsonl row 2: field 'a' holds half of .* \('\\ud83d"),
        ("a.json", b'[{"a": "\\ud83d\\ude00"}, {"a": ["\\uDE00"]}]', "a.json row 2: field 'a' holds half of"),
        ("a.json", b'[{"\\ud83d": 1}]', r"a.json row 1: field '\\ud83d' holds half of a character"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_json(path))
    assert "\n" not in str(caught.value)


def test_rows_before_a_fault_are_given(tmp_path: Path) -> None:
    """It is a stream: what stands before a fault has been read when the fault is found."""
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"a": 2}, nonsense', encoding="utf-8")
    rows = read_json(path)
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="line 2: is not JSON: Expecting value at column 12"):
        next(rows)

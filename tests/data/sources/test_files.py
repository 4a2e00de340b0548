"""Reading json files: the very values, and every fault with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from threefold.data.sources.files import read_rows
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
    table = read_rows(str(path))
    assert table.columns == ("prompt", "chosen", "rejected", "extra")
    assert table.rows == ROWS


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": "\u2028"}\n\n \n{"a": "c"}', encoding="utf-8")
    assert read_rows(str(path)).rows == [{"a": "\u2028"}, {"a": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: is empty"),
        ("a.json", b"[]", "a.json: holds no rows"),
        ("a.jsonl", b'{"a": "b"}\n\n{"a": \n', "a.jsonl line 3: is not JSON: Expecting value"),
        ("a.jsonl", b'{"a": "b"} {"a": "c"}\nnonsense\n', "a.jsonl line 1: is not JSON: Extra data"),
        ("a.jsonl", b"hello\n", "a.jsonl line 1: is not JSON"),
        ("a.json", b'[{"a": "b"},\n{"a": }]', "a.json line 2: is not JSON"),
        ("a.json", b'[{"a": "b"}', "a.json line 1: is not JSON"),
        ("a.jsonl", b'"x"\n', 'a.jsonl row 1: is "x", and must be an object'),
        ("a.jsonl", b'{"a": "b"}\n5\n', "a.jsonl row 2: is 5, and must be an object"),
        ("a.json", b"[1, 2]", "a.json row 1: is 1, and must be an object"),
        ("a.json", b'["x", "y"]', 'a.json row 1: is "x", and must be an object'),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl: is not UTF-8 text"),
        ("a.jsonl.gz", b'{"a": "b"}\n', "a.jsonl.gz: cannot be read: .*is the file whole"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 50)[:-12], "a.jsonl.gz: cannot be read: .*is the file whole"),
        ("a.csv", b"a,b\n", r"a.csv: cannot tell its format from its name; it must end in one of \.json, \.jsonl"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl: no such file"):
        read_rows(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(DataError, match="is a directory; name a file in it"):
        read_rows(str(tmp_path))

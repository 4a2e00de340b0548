"""The cache: built once, whole or not at all, safe beside other processes, and read as it was written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from threefold.data import cache
from threefold.data.cache import (
    ROWS_PER_BATCH,
    TableReader,
    TableWriter,
    cached,
    read_info,
    read_numbers,
    write_numbers,
)
from threefold.errors import ConfigError, DataError

SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("number", pa.int64())])
KEY = {"content": "abc", "settings": [1, 2.5, "é"]}


def writer_of(rows: int) -> Any:
    def build(partial: Path) -> Mapping[str, Any]:
        with TableWriter(partial / "rows.arrow", SCHEMA) as writer:
            for number in range(rows):
                writer.append([number] * (number % 5), number * 7)
        return {"rows": rows}

    return build


def refuse(_: Path) -> Mapping[str, Any]:
    raise AssertionError("built again")


@pytest.mark.parametrize("rows", [0, 1, ROWS_PER_BATCH, 2 * ROWS_PER_BATCH + 3])
def test_rows_come_back_as_they_were_written(tmp_path: Path, rows: int) -> None:
    directory = cached(tmp_path, "rows", KEY, writer_of(rows))
    assert read_info(directory) == {"rows": rows}
    table = TableReader(directory / "rows.arrow")
    assert len(table) == rows
    for number in {0, 1, ROWS_PER_BATCH - 1, ROWS_PER_BATCH, rows - 1} & set(range(rows)):
        columns, place = table.row(number)
        assert columns[0][place].as_py() == [number] * (number % 5)
        assert columns[1][place].as_py() == number * 7
    assert table.numbers("number").tolist() == [number * 7 for number in range(rows)]
    assert sum(batch.num_rows for _, batch in table.batches()) == rows


def test_a_key_is_built_once_and_another_key_apart(tmp_path: Path) -> None:
    first = cached(tmp_path, "rows", KEY, writer_of(3))
    assert cached(tmp_path, "rows", KEY, refuse) == first
    other = cached(tmp_path, "rows", {**KEY, "content": "abd"}, writer_of(4))
    assert other != first
    assert (read_info(first)["rows"], read_info(other)["rows"]) == (3, 4)


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    def fails(partial: Path) -> Mapping[str, Any]:
        (partial / "half.arrow").write_bytes(b"half")
        raise DataError("f.jsonl row 7: is bad")

    with pytest.raises(DataError, match="row 7"):
        cached(tmp_path, "rows", KEY, fails)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert read_info(cached(tmp_path, "rows", KEY, writer_of(1))) == {"rows": 1}


def test_a_killed_builder_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom threefold.data.cache import cached\n"
        "def build(partial):\n    (partial / 'rows.arrow').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached(Path(sys.argv[1]), 'rows', {'content': 'abc', 'settings': [1, 2.5, 'é']}, build)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    directory = cached(tmp_path, "rows", KEY, writer_of(2))
    assert len(TableReader(directory / "rows.arrow")) == 2
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "removed", "no record", "no JSON"])
def test_a_damaged_directory_is_built_again(tmp_path: Path, damage: str) -> None:
    directory = cached(tmp_path, "rows", KEY, writer_of(5))
    if damage == "cut":
        os.truncate(directory / "rows.arrow", 100)
    elif damage == "removed":
        (directory / "rows.arrow").unlink()
    elif damage == "no record":
        (directory / cache.INFO_FILE).unlink()
    else:
        (directory / cache.INFO_FILE).write_text("{", encoding="utf-8")
    assert len(TableReader(cached(tmp_path, "rows", KEY, writer_of(5)) / "rows.arrow")) == 5


def test_of_two_at_once_one_builds(tmp_path: Path) -> None:
    built = []

    def slow(partial: Path) -> Mapping[str, Any]:
        built.append(partial)
        time.sleep(0.2)
        return writer_of(3)(partial)

    threads = [threading.Thread(target=cached, args=(tmp_path, "rows", KEY, slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_reader_of_the_old_survives_its_renewal(tmp_path: Path) -> None:
    """Rows that are mapped stay readable when another run finds the directory damaged and builds it again."""
    directory = cached(tmp_path, "rows", KEY, writer_of(9))
    table = TableReader(directory / "rows.arrow")
    (directory / cache.INFO_FILE).unlink()
    cached(tmp_path, "rows", KEY, writer_of(9))
    assert table.row(8)[0][1][8].as_py() == 56


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, DataError), match="file") as caught:
        cached(tmp_path / "file" / "cache", "rows", KEY, writer_of(1))
    assert "\n" not in str(caught.value)


def test_the_code_is_part_of_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = cache.code_version()
    package = tmp_path / "data"
    package.mkdir()
    (tmp_path / "types.py").write_text("x = 1")
    (package / "cache.py").write_text("y = 1")
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    cache.code_version.cache_clear()
    first = cache.code_version()
    (package / "cache.py").write_text("y = 2")
    cache.code_version.cache_clear()
    assert len({before, first, cache.code_version()}) == 3
    monkeypatch.undo()
    cache.code_version.cache_clear()
    assert cache.code_version() == before


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_root("") == tmp_path / "threefold" / "data" / cache.VERSION
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root("").is_relative_to(tmp_path / ".cache" / "threefold")
    assert cache.cache_root("~/mine") == tmp_path / "mine" / cache.VERSION


def test_numbers_come_back(tmp_path: Path) -> None:
    columns = {"order": np.array([3, 1, 2]), "source": np.array([0, 1, 1], dtype=np.int16)}
    write_numbers(tmp_path / "n.arrow", columns)
    read = read_numbers(tmp_path / "n.arrow")
    assert {name: (values.tolist(), values.dtype) for name, values in read.items()} == {
        name: (values.tolist(), values.dtype) for name, values in columns.items()
    }
    write_numbers(tmp_path / "none.arrow", {"order": np.array([], dtype=np.int64)})
    assert read_numbers(tmp_path / "none.arrow")["order"].tolist() == []

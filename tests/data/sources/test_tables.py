"""Rows of any source: what its paths name, in which order, where each row stands, and when the fingerprint changes."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from threefold.config.data import SourceSection
from threefold.data.sources.tables import fingerprint, read_rows
from threefold.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "2020-01-01", "answers": ["a", "漢"], "score": 0.5},
    {"prompt": "12", "answers": [], "score": None},
    {"prompt": "", "answers": None, "score": 3.0},
]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def section(*paths: str, **fields: Any) -> SourceSection:
    return SourceSection(path=list(paths), **fields)


def rows_of(*paths: str, **fields: Any) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(section(*paths, **fields))]


def origins_of(*paths: str, **fields: Any) -> list[str]:
    return [row.origin for row in read_rows(section(*paths, **fields))]


def write(name: str, *values: int) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(f'{{"n": {value}}}\n' for value in values), encoding="utf-8")
    return name


def message_of(*paths: str, **fields: Any) -> str:
    """The error, which `read_rows` and `fingerprint` raise alike and at once."""
    with pytest.raises(DataError) as caught:
        read_rows(section(*paths, **fields))
    with pytest.raises(DataError) as again:
        fingerprint(section(*paths, **fields))
    assert str(caught.value) == str(again.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_kind_of_file(packing: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    contents: dict[str, tuple[bytes, list[dict[str, Any]]]] = {
        ".json": (json.dumps(ROWS).encode(), ROWS),
        ".jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS).encode(), ROWS),
        ".parquet": (sink.getvalue().to_pybytes(), ROWS),
        ".csv": (b'a,b\n007,"x,\ny"\n', [{"a": "007", "b": "x,\ny"}]),
        ".tsv": (b"a\tb\n007\tx,y\n", [{"a": "007", "b": "x,y"}]),
        ".txt": (b"one<|endoftext|>two", [{"text": "one"}, {"text": "two"}]),
    }
    for ending, (content, rows) in contents.items():
        name = f"a{ending}{packing}"
        Path(name).write_bytes(pack(content))
        assert rows_of(name) == rows
        assert origins_of(name) == [f"{name} row {number}" for number in range(1, len(rows) + 1)]


def test_files_and_patterns_in_order(tmp_path: Path) -> None:
    """As listed; of a pattern by name; rows count from 1 in each file."""
    for number, name in enumerate(["b/y.jsonl", "b/x.jsonl", "b/c/x.jsonl", "a.jsonl", "b/[1].jsonl"]):
        write(name, number, number + 10)
    assert rows_of("b/y.jsonl", "a.jsonl") == [{"n": 0}, {"n": 10}, {"n": 3}, {"n": 13}]
    assert origins_of("a.jsonl", "b/?.jsonl")[1:4] == ["a.jsonl row 2", "b/x.jsonl row 1", "b/x.jsonl row 2"]
    assert [row["n"] for row in rows_of("b/**/*.jsonl")][::2] == [4, 2, 1, 0]
    assert [row["n"] for row in rows_of("b/[1].jsonl")] == [4, 14]
    assert origins_of(str(tmp_path / "a.jsonl"))[0] == f"{tmp_path}/a.jsonl row 1"


def test_an_existing_path_is_no_hub_id() -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk("Dahoas/rm-static")
    assert rows_of("Dahoas/rm-static") == ROWS
    assert origins_of("Dahoas/rm-static")[0] == "Dahoas/rm-static row 1"


def test_the_name_of_deepspeed_chat_for_files_of_ones_own() -> None:
    write("data/train.json", 1)
    assert message_of("local/jsonfile").startswith("data/eval.json: no such file")
    write("data/eval.json", 2)
    assert origins_of("local/jsonfile") == ["data/train.json row 1", "data/eval.json row 1"]


# ---------------------------------------------------------------------------------------------------- saved datasets


def test_saved_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact values, also where the dataset was saved in the format of another library; of several splits train."""
    saved = datasets.Dataset.from_list(ROWS)
    saved.with_format("numpy").save_to_disk("one", num_shards=2)
    assert rows_of("one") == ROWS
    both = datasets.DatasetDict({"test": saved.select([0]), "train": saved.select([2, 1])})
    both.save_to_disk("both")
    assert rows_of("both") == [ROWS[2], ROWS[1]]
    assert rows_of("both", hub_split="test") == rows_of("both/test") == [ROWS[0]]
    assert fingerprint(section("both")) != fingerprint(section("both", hub_split="test"))
    assert fingerprint(section("both", hub_split="test")) == fingerprint(section("both/test"))
    datasets.DatasetDict({"all": saved}).save_to_disk("only")
    assert rows_of("only") == ROWS
    assert rows_of("o*") == ROWS * 2  # directories that are saved datasets fit a pattern
    datasets.DatasetDict({"a": saved, "b": saved}).save_to_disk("no_train")
    assert message_of("no_train") == "no_train: has no split 'train', but a, b: name one as hub_split of the source"
    assert message_of("both", hub_split="tets") == (
        "both: has no split 'tets' (did you mean 'test'?); it has test, train"
    )


def test_damaged_datasets() -> None:
    datasets.Dataset.from_list(ROWS * 100).save_to_disk("data")
    (arrow,) = Path("data").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:700])
    with pytest.raises(DataError, match=r"data: cannot be read as a saved dataset: .*; is it whole\?"):
        rows_of("data")
    arrow.unlink()
    with pytest.raises(DataError, match="data: cannot be read as a saved dataset: "):
        rows_of("data")
    with pytest.raises(DataError, match=r"data/data-00000.*\.arrow: cannot be read: No such file"):
        fingerprint(section("data"))
    Path("data/state.json").write_text("{")
    with pytest.raises(DataError, match=r"data/state\.json: cannot be read as the state of a saved dataset"):
        fingerprint(section("data"))
    datasets.Dataset.from_dict({"a": []}).save_to_disk("empty")
    with pytest.raises(DataError, match="empty: holds no rows"):
        rows_of("empty")


def test_damaged_parquet() -> None:
    table = pyarrow.Table.from_pylist(ROWS * 1000)
    pyarrow.parquet.write_table(table, "a.parquet")
    whole = Path("a.parquet").read_bytes()
    for content in (b"", whole[:-10], whole[len(whole) // 2 :], whole[:100] + b"\xff" * 400 + whole[500:]):
        Path("a.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet: .*; is the file whole") as caught:
            rows_of("a.parquet")
        assert "\n" not in str(caught.value)
    twice = pyarrow.Table.from_arrays([table["prompt"], table["prompt"]], names=["a", "a"])
    pyarrow.parquet.write_table(twice, "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: names column 'a' twice"):
        rows_of("a.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: holds no rows"):
        rows_of("a.parquet")
    text = pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"a": text}), "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet: 'utf-8' codec"):
        rows_of("a.parquet")


# ---------------------------------------------------------------------------------------------- paths that name nothing


def test_paths_that_name_nothing() -> None:
    write("data/pairs.jsonl", 1)
    assert message_of("data/pair.jsonl").startswith("data/pair.jsonl: no such file (did you mean 'pairs.jsonl'?)")
    assert message_of("date/pairs.jsonl").startswith("date/pairs.jsonl: no such file; there is no directory 'date'")
    assert "a dataset of the Hub is named OWNER/NAME" in message_of("gsm8k")
    assert message_of("data/*.json").startswith("data/*.json: no file fits this pattern")
    assert message_of("data") == (
        "data: is a directory, and none of datasets.save_to_disk; name a file in it, or a pattern such as data/*.jsonl"
    )
    Path("nothing").mkdir()
    assert message_of("nothing").startswith("nothing: is an empty directory; name a file")
    Path("nothing/README").write_text("x")
    assert message_of("nothing").endswith("none of datasets.save_to_disk (no state.json in it, and no file of rows)")
    write("data/pairs.xml", 1)
    assert message_of("data/pairs.xml") == (
        "data/pairs.xml: cannot tell its format from its name; it must end in one of .json, .jsonl, .csv, .tsv, "
        ".parquet, .txt, or one of these with .gz or .zst"
    )
    assert message_of("data/*").startswith("data/pairs.xml: cannot tell its format")
    assert message_of("data/pairs.jsonl", "data/*.jsonl") == (
        "data/pairs.jsonl: is listed twice in the paths of source 'data/pairs.jsonl,data/*.jsonl'; list it once"
    )
    assert "a Hub id is a source of its own" in message_of("data/pairs.jsonl", "openai/gsm8k")
    assert "a Python function is a source of its own" in message_of("python:a:b", "data/pairs.jsonl")


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_of_the_content() -> None:
    """It changes with content, order and kind; not with names, dates or what lies beside."""
    write("a.jsonl", 1, 2)
    write("b.jsonl", 3)
    before = fingerprint(section("a.jsonl", "b.jsonl"))
    assert len(before) == 64
    write("x/a.jsonl", 1, 2)
    write("x/b.jsonl", 3)
    assert fingerprint(section("x/*.jsonl")) == before
    assert fingerprint(section("b.jsonl", "a.jsonl")) != before
    write("x/b.jsonl", 4)
    assert fingerprint(section("x/*.jsonl")) != before
    write("ab.jsonl", 1, 2, 3)
    assert fingerprint(section("ab.jsonl")) != before
    Path("a.txt").write_bytes(Path("a.jsonl").read_bytes())
    assert fingerprint(section("a.txt")) != fingerprint(section("a.jsonl"))
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk("one")
    of_directory = fingerprint(section("one"))
    Path("one/cache-1.arrow").write_text("made by using it")
    assert fingerprint(section("one")) == of_directory
    saved.select([1]).save_to_disk("two")
    assert fingerprint(section("two")) != of_directory


# ------------------------------------------------------------------------------------------------------ own functions


def write_module(name: str, text: str) -> None:
    sys.modules.pop(name, None)
    Path(f"{name}.py").write_text(text, encoding="utf-8")


def test_rows_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_module(
        "own_rows_a", "def rows():\n    for n in range(3):\n        yield {'n': n}\n\nTABLE = lambda: [{'n': 5}]\n"
    )
    assert rows_of("python:own_rows_a:rows") == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert origins_of("python:own_rows_a:rows")[2] == "python:own_rows_a:rows row 3"
    assert rows_of("python:own_rows_a:TABLE") == [{"n": 5}]
    before = fingerprint(section("python:own_rows_a:rows"))
    assert before != fingerprint(section("python:own_rows_a:TABLE"))
    write_module("own_rows_a", "def rows():\n    return [{'n': 7}]\n\nrows.fingerprint = lambda: open('v').read()\n")
    Path("v").write_text("1")
    changed = fingerprint(section("python:own_rows_a:rows"))
    assert changed != before
    assert rows_of("python:own_rows_a:rows") == [{"n": 7}]
    Path("v").write_text("2")
    assert fingerprint(section("python:own_rows_a:rows")) != changed
    Path("v").unlink()
    with pytest.raises(DataError, match=r"own_rows_a:rows\.fingerprint: raised FileNotFoundError: .*\(own_rows_a\.py"):
        fingerprint(section("python:own_rows_a:rows"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python:own_rows_b", "must be python:MODULE:FUNCTION, as in python:my_data:rows"),
        ("python:own_rows_b:a b", "must be python:MODULE:FUNCTION"),
        ("python:no_such_module_x:rows", "there is no module 'no_such_module_x' in this directory or among the"),
        ("python:own_rows_b:row", "module 'own_rows_b' has no function 'row'; it has rows, empty, text, number, late"),
        ("python:own_rows_b:VALUE", r"module 'own_rows_b' has no function \(but a value\) 'VALUE'"),
        ("python:own_rows_b:empty", "gave no rows"),
        ("python:own_rows_b:text", "returned str, and must return an iterable of dicts"),
        ("python:own_rows_b:number", "row 2: is '5', and must be a dict"),
        (
            "python:own_rows_b:late",
            r"raised after 1 rows ZeroDivisionError: division by zero \(own_rows_b.py line 13\)",
        ),
        ("python:own_rows_b:needs", r"raised after 0 rows TypeError: needs\(\) missing 1 required"),
        ("python:own_rows_c:rows", r"cannot be imported, it raised NameError: .*\(own_rows_c.py line 1\)"),
        ("python:own_rows_d:rows", r"cannot be imported, it raised ModuleNotFoundError: No module named 'no_such_x'"),
    ],
)
def test_functions_that_do_not_work(monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_module("own_rows_c", "undefined_name\n")
    write_module("own_rows_d", "import no_such_x\n")
    write_module(
        "own_rows_b",
        "VALUE = 5\ndef rows():\n    return [{}]\ndef empty():\n    return []\ndef text():\n    return 'x'\n"
        "def number():\n    return [{}, 5]\ndef late():\n    yield {}\n    yield {\n        'a': 1 / 0}\n"
        "def needs(a):\n    return []\n",
    )
    with pytest.raises(DataError, match=f"^{spec}( |: ){message}") as caught:
        rows_of(spec)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- real files


@pytest.mark.real
def test_rows_of_every_real_file_are_counted(shared: Path) -> None:
    """The numbers of shared/README.md."""
    counts = {
        "hh_rlhf/harmless_1600.jsonl.gz": 1600,
        "gsm8k/train.jsonl": 7473,
        "gsm8k/test.jsonl": 1319,
        "tinystories/val.txt": 1911,
        "oasst/en_100_tree.jsonl": 100,
        "llama_factory/dpo_en_demo.json": 300,
        "llama_factory/dpo_zh_demo.json": 300,
        "llama_factory/alpaca_en_demo.json": 999,
        "llama_factory/alpaca_zh_demo.json": 1000,
        "llama_factory/kto_en_demo.json": 300,
        "llama_factory/oaast_rm_zh.json": 775,
        "llama_factory/c4_demo.jsonl": 300,
    }
    for name, count in counts.items():
        assert sum(1 for _ in read_rows(section(str(shared / "data" / name)))) == count, name
    assert sum(1 for _ in read_rows(section(str(shared / "data/gsm8k/*.jsonl")))) == 8792
    for name in ("llama_factory/oaast_rm_zh.json", "llama_factory/dpo_zh_demo.json"):
        path = shared / "data" / name
        assert rows_of(str(path)) == json.loads(path.read_text("utf-8"))

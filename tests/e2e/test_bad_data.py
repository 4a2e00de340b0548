"""Datasets that cannot be used: exit code 2, one line that says where and what to do, and nothing half-made on disk.

Each case is a recipe of a user and a file as users have them. Afterwards the cache of prepared data holds whole
directories only, and the run directory no step.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import TINY, pair_rows, write_rows
from threefold import cli
from threefold.data.cache import INFO_FILE

Complain = Callable[..., str]
FLAGS = [f"--{name}={value}" for name, value in TINY.items() if name != "run.name"]
LEFT_BY_A_REFUSAL = {".lock", "run.json", "data.json", "data_places.parquet", "metrics.jsonl", "tensorboard"}
"""What a run directory may hold that has no step: locks and records, all of which the next run takes over."""


def toml_of_source(path: object, more: str = "") -> str:
    """A recipe with one source."""
    return f"[data]\nsplit = [2, 4, 4]\n[[data.sources]]\npath = {json.dumps(str(path))}\n{more}\n"


def command_line(directory: Path, toml: str, arguments: Sequence[str]) -> list[str]:
    """`threefold train` of a recipe, step 1 of a tiny model, with its own cache and run directory."""
    (directory / "mine.toml").write_text(toml, encoding="utf-8")
    places = ["--data.cache_dir", str(directory / "cache"), "--output-dir", str(directory / "output")]
    return ["train", str(directory / "mine.toml"), *FLAGS, *places, "--step", "1", *arguments]


def check_nothing_is_half_made(directory: Path) -> None:
    """The cache holds whole directories and empty locks; the run directory holds no step."""
    for path in (directory / "cache").glob("*/*"):
        if path.is_dir():
            sizes = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))["sizes"]
            assert {file.name: file.stat().st_size for file in path.iterdir() if file.name != INFO_FILE} == sizes
        else:
            assert (path.suffix, path.stat().st_size) == (".lock", 0), path
    if (directory / "output").exists():
        assert {path.name for path in (directory / "output").iterdir()} <= LEFT_BY_A_REFUSAL


def only_line(code: int, out: str, err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), err
    assert lines[0].startswith("threefold: ")
    assert "Traceback" not in out + err
    return lines[0]


@pytest.fixture
def complaint(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Complain:
    """Runs `threefold train` on a recipe's text, in the test's directory, and returns the one line that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(toml: str, *arguments: str) -> str:
        capfd.readouterr()
        code = cli.main(command_line(tmp_path, toml, arguments))
        printed = capfd.readouterr()
        check_nothing_is_half_made(tmp_path)
        return only_line(code, printed.out, printed.err)

    return run


def has_all(line: str, *parts: object) -> bool:
    missing = [str(part) for part in parts if str(part) not in line]
    assert not missing, (missing, line)
    return True


# --- files ----------------------------------------------------------------------------------------------------------


def json_lines(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(answer: str) -> str:
    return "prompt,chosen,rejected\n" + "".join(f"Question {n}?,{answer} {n},no\n" for n in range(60))


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(pair_rows(60)), file)
    return file.getvalue()


def with_broken_lines() -> bytes:
    """100 rows, of which the lines 7, 50 and 93 are cut."""
    lines = json_lines(pair_rows(100)).splitlines()
    for number in (7, 50, 93):
        lines[number - 1] = lines[number - 1][:-3]
    return "\n".join(lines).encode()


PAIRS = json_lines(pair_rows(400))
WHOLE_LIST = json.dumps(pair_rows(60), indent=1)
MESSAGES = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]
MIXED = json_lines([*pair_rows(150), *[{"messages": MESSAGES}] * 50])
PROMPTED = json_lines([{"inquiry": f"Question {n}?", "good": "Yes.", "bad": "No."} for n in range(60)])

FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "utf16.jsonl": (PAIRS.encode("utf-16"), ("is not UTF-8 text", "UTF-16", "save it as UTF-8")),
    "utf16-without-mark.jsonl": (PAIRS.encode("utf-16-le"), ("is not UTF-8 text", "UTF-16", "save it as UTF-8")),
    "latin1.csv": (csv_text("Café").encode("latin-1"), ("is not UTF-8 text (byte 38", "Latin-1", "save it as UTF-8")),
    "chinese.csv": (csv_text("这是我的回答").encode("gbk"), ("is not UTF-8 text", "GBK", "save it as UTF-8")),
    "half.jsonl.gz": (gzip.compress(PAIRS.encode())[:-200], ("cannot be read", "is the file whole?")),
    "half.jsonl.zst": (bytes(pa.compress(PAIRS.encode(), "zstd", asbytes=True))[:-200], ("is the file whole?",)),
    "not-packed.jsonl.gz": (PAIRS.encode(), ("cannot be read", "ot a gzip")),
    "not-packed.jsonl.zst": (PAIRS.encode(), ("cannot be read",)),
    "broken.jsonl": (with_broken_lines(), ("broken.jsonl line 7: is not JSON", "3 of its 100 lines are not")),
    "cut.json": (WHOLE_LIST[: len(WHOLE_LIST) // 2].encode(), ("the list ends in the middle", "whole rows", "whole?")),
    "object.json": (b'{"train": {"rows": []}}', ("columns (train)", "fit no format")),
    "numbers.json": (b"[1, 2, 3]", ("numbers.json row 1: is 1, and must be an object",)),
    "strange.jsonl": (
        PROMPTED.encode(),
        (
            "its columns (inquiry, good, bad) fit no format; the nearest is preference (prompt, chosen, rejected)",
            'mapping = {prompt = "inquiry", chosen = "good", rejected = "bad"}',
            "the others are oasst_tree",
        ),
    ),
    "mixed.jsonl": (
        MIXED.encode(),
        ("mixed.jsonl row 151: is of format messages", "preference (prompt, chosen, rejected)", "different files"),
    ),
    "one.jsonl": (
        json_lines(pair_rows(1)).encode(),
        ("data.sources: 1 different prompt is too few", "data.split", "give"),
    ),
    "empty.jsonl": (b"", ("is empty", "at least one row")),
    "empty.csv": (b"", ("is empty", "column names")),
    "names-alone.csv": (b"prompt,chosen,rejected\n", ("holds no rows, only column names",)),
    "empty.txt": (b"\n", ("holds no text",)),
    "empty.parquet": (b"", ("cannot be read as parquet", "is the file whole?")),
    "empty.jsonl.gz": (gzip.compress(b""), ("is empty", "at least one row")),
    "parquet.jsonl": (
        parquet_bytes(),
        ("parquet.jsonl: is not what its ending says, but a parquet file", "the ending .parquet"),
    ),
    "packed.jsonl": (
        gzip.compress(PAIRS.encode()),
        ("packed.jsonl: is not what its ending says, but packed by gzip", "further ending .gz"),
    ),
    "lines.parquet": (PAIRS.encode(), ("lines.parquet: cannot be read as parquet",)),
    "cut.parquet": (parquet_bytes()[:-60], ("cannot be read as parquet", "is the file whole?")),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("Git LFS", "git lfs pull")),
    "pointer.csv": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("Git LFS", "git lfs pull")),
    "wrapped.json": (
        json.dumps({"data": pair_rows(9)}).encode(),
        ("its columns (data) fit no format", "the rows seem to be in the list 'data': save that list alone"),
    ),
    "unrated.jsonl": (
        json_lines([{"prompt": f"Question {n}?", "chosen": None, "rejected": "No."} for n in range(60)]).encode(),
        ("its columns (prompt, rejected) fit no format (no value in the first 60 rows: chosen)", "preference (prompt"),
    ),
    "other-types.jsonl": (
        json_lines([{"prompt": f"Question {n}?", "answers": "Yes."} for n in range(60)]).encode(),
        ("its columns (prompt, answers) fit no format", "nearest is scored", "its values are of other types"),
    ),
    "wide.jsonl": (json_lines([{f"c{n}": "v" for n in range(60)}]).encode(), ("c18, c19 and 40 more) fit no format",)),
    "no-names.csv": (
        "".join(f"Why {n}?,Yes {n},no\n" for n in range(60)).encode(),
        ("(the first line of a file must name its columns)", "the nearest is preference (prompt, chosen, rejected)"),
    ),
    "semicolons.csv": (csv_text("Yes").replace(",", ";").encode(), ("separated by ';'", "by commas: save it so")),
    "comma.csv": (csv_text("Yes, but").encode(), ("line 2: has 4 fields", "names 3 columns", "double quotes")),
    "quote.csv": (csv_text('"Yes').encode(), ("quote", "doubled")),
    "excel.xlsx": (b"PK\x03\x04", ("excel.xlsx: cannot tell its format", ".csv")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used(complaint: Complain, tmp_path: Path, name: str) -> None:
    content, parts = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert has_all(complaint(toml_of_source(name)), *parts)


def test_the_second_of_two_files_is_damaged(complaint: Complain, tmp_path: Path) -> None:
    """Rows of the first are written by then: they must not stay."""
    write_rows(tmp_path / "a.jsonl", pair_rows(3000))
    (tmp_path / "b.jsonl").write_bytes(with_broken_lines())
    assert has_all(complaint(toml_of_source("*.jsonl")), "b.jsonl line 7", "3 of its 100 lines are not")
    assert not [path for path in (tmp_path / "cache").glob("*/*") if path.is_dir()]


# --- paths ----------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network(complaint: Complain) -> None:
    """The tests run with HF_HUB_OFFLINE."""
    line = complaint(toml_of_source("Dahoas/rm-static"))
    assert has_all(line, "Dahoas/rm-static: there is no such file", "the Hub cannot be reached", "give the path of")


def test_a_directory_that_is_no_dataset(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert has_all(complaint(toml_of_source("folder")), "folder: is an empty directory", "name a file")
    write_rows(tmp_path / "folder/pairs.jsonl", pair_rows(3))
    assert has_all(complaint(toml_of_source("folder")), "none of datasets.save_to_disk", "folder/*.jsonl")


def test_a_saved_dataset_that_lacks_a_file(complaint: Complain, tmp_path: Path) -> None:
    datasets.Dataset.from_list(pair_rows(60)).save_to_disk(str(tmp_path / "saved"))
    (data,) = (tmp_path / "saved").glob("*.arrow")
    data.unlink()
    assert has_all(complaint(toml_of_source("saved")), data.name)


def test_a_saved_dataset_without_a_train_split(complaint: Complain, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(pair_rows(60))
    datasets.DatasetDict({"first": rows, "second": rows}).save_to_disk(str(tmp_path / "saved"))
    assert has_all(complaint(toml_of_source("saved")), "has no split 'train', but first, second", "hub_split")


def test_a_pattern_without_a_match(complaint: Complain, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", pair_rows(3))
    assert has_all(complaint(toml_of_source("pair*.json")), "pair*.json: no file fits this pattern")
    assert has_all(complaint(toml_of_source("pair.jsonl")), "no such file (did you mean 'pairs.jsonl'?)")


PATHS = {
    "https://huggingface.co/datasets/openai/gsm8k": ("is an address", "(here 'openai/gsm8k')"),
    "https://example.org/pairs.jsonl": ("is an address; download the file and give its path",),
    "~/no-such-file.jsonl": (f"{Path.home()}/no-such-file.jsonl: no such file",),
    "gsm8k": ("gsm8k: no such file", "a dataset of the Hub is named OWNER/NAME"),
    "": ("a path is empty",),
    "link.jsonl": ("is a link to 'nowhere.jsonl', which does not exist",),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leads_nowhere(complaint: Complain, tmp_path: Path, path: str) -> None:
    (tmp_path / "link.jsonl").symlink_to("nowhere.jsonl")
    assert has_all(complaint(toml_of_source(path)), *PATHS[path])


ENTRY_POINTS = {
    "raises.py": (
        'def rows():\n    yield {"prompt": "p", "chosen": "a", "rejected": "b"}\n    raise KeyError("chosen")\n',
        ("raised after 1 rows KeyError", "'chosen'", "raises.py line 3"),
    ),
    "refuses_import.py": ("import no_such_package_here\n", ("cannot be imported", "no_such_package_here")),
    "wrong_type.py": ("def rows():\n    return 3\n", ("returned int", "iterable of dicts")),
    "no_rows.py": ("def rows():\n    return []\n", ("gave no rows",)),
    "other_name.py": ("def read():\n    return []\n", ("has no function 'rows'", "it has read")),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_function_that_fails(complaint: Complain, tmp_path: Path, name: str) -> None:
    source, parts = ENTRY_POINTS[name]
    (tmp_path / name).write_text(source)
    spec = f"python:{name.removesuffix('.py')}:rows"
    assert has_all(complaint(toml_of_source(spec)), spec, *parts)


def test_a_function_that_is_not_there(complaint: Complain) -> None:
    assert has_all(complaint(toml_of_source("python:nowhere_to_find:rows")), "there is no module 'nowhere_to_find'")


# --- fields ---------------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    'weights = ""': ("data", ("data.weights", '""')),
    "weights = [1, 2]": ("data", ("data", "weights has 2 numbers for 1 sources", "one each")),
    "weights = [0]": ("data", ("data.weights[0] = 0 is not allowed", "must be greater than 0")),
    "split = [0, 0, 0]": ("data", ("data", "split needs at least one share above 0")),
    "split = [0, 0, 0.0]": ("source", ("split [0.0, 0.0, 0.0]", "at least one of them above 0")),
    "split = [0, 1, 1]": ("data", ("data.split = [0.0, 1.0, 1.0]", "step 1, sft, no data", "--step")),
    'mapping = { prompt = "inquiry" }': ("source", ('prompt = "inquiry"', "no such column", "it has prompt, chosen")),
    'mapping = { quesion = "prompt" }': ("source", ("'quesion' is no column", "did you mean question?")),
    'format = "preferences"': ("source", ('no format "preferences"', "did you mean preference?", "sharegpt")),
    'format = "messages"': ("source", ("format messages (messages) needs 'messages'", "prompt, chosen, rejected")),
    'reasoning = "english"': ("source", ("pairs.jsonl row 1:", "needs answers with a final answer", '"none"')),
    'reasoning = "german"': ("source", ("reasoning", '"german"', "'english' or 'chinese'")),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_does_not_fit_the_data(complaint: Complain, tmp_path: Path, field: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    section, parts = FIELDS[field]
    toml = toml_of_source("pairs.jsonl", field)
    if section == "data":
        toml = f'[data]\nsources = ["pairs.jsonl"]\n{field}\n'
    assert has_all(complaint(toml), *parts)


def test_a_cache_that_cannot_be_written(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    (tmp_path / "file").write_text("mine")
    line = complaint(toml_of_source("pairs.jsonl"), "--data.cache_dir", str(tmp_path / "file"))
    assert has_all(line, "data.cache_dir", f"{tmp_path / 'file'}/v1 cannot be made", "set --data.cache_dir")
    assert (tmp_path / "file").read_text() == "mine"
    line = complaint(toml_of_source("pairs.jsonl"), "--data.cache_dir", "/proc/threefold")
    assert has_all(line, "data.cache_dir", "/proc/threefold", "set --data.cache_dir DIR")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    (tmp_path / "cache").mkdir(mode=0o555)
    assert has_all(complaint(toml_of_source("pairs.jsonl")), "data.cache_dir", "set --data.cache_dir DIR")


def test_rows_that_are_all_too_long(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    for policy in ("drop", "truncate"):
        line = complaint(toml_of_source("pairs.jsonl"), "--data.max_length", "3", "--data.long_rows", policy)
        assert has_all(line, "all", "longer than data.max_length = 3", "the shortest has", "raise data.max_length")
    line = complaint(toml_of_source("pairs.jsonl"), "--data.max_length", "3", "--data.long_rows", "error")
    assert has_all(line, "pairs.jsonl row ", "data.max_length = 3", '"drop"')


def test_a_template_that_takes_no_system_message(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    (tmp_path / "strict.jinja").write_text(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    template = ("--model.chat_template", "strict.jinja", "--model.system_prompt", "Be brief.")
    assert has_all(complaint(toml_of_source("pairs.jsonl"), *template), "model.system_prompt", "no system role")


def test_final_answers_that_are_not_there(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    """Refused before step 1, though it is step 3 that would compare."""
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    arguments = ("--ppo.final_answer_coef", "1", "--step", "1", "2", "3", "--model.actor", str(tiny_run / "sft"))
    line = complaint(toml_of_source("pairs.jsonl"), *arguments)
    assert has_all(line, "ppo.final_answer_coef = 1", "no prompt of step 3 has a final answer", "set it to 0")


# --- the command itself, in a process of its own ----------------------------------------------------------------------


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """No file may grow above 64 kB, so the cache cannot hold 3000 rows."""
    write_rows(tmp_path / "pairs.jsonl", pair_rows(3000))
    command = command_line(tmp_path, toml_of_source("pairs.jsonl"), ())
    ran = subprocess.run(
        [sys.executable, "-m", "threefold", *command],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert has_all(
        only_line(ran.returncode, ran.stdout, ran.stderr), tmp_path / "cache", "File too large", "free space"
    )
    check_nothing_is_half_made(tmp_path)
    assert not [path for path in (tmp_path / "cache").glob("*/*") if path.is_dir()]


def test_broken_lines_as_a_user_sees_them(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(with_broken_lines())
    command = command_line(tmp_path, toml_of_source("broken.jsonl"), ())
    ran = subprocess.run([sys.executable, "-m", "threefold", *command], cwd=tmp_path, capture_output=True, text=True)
    line = only_line(ran.returncode, ran.stdout, ran.stderr)
    assert line == (
        "threefold: broken.jsonl line 7: is not JSON: Unterminated string starting at column 60 (a file is one list of "
        "objects, or one object per line); 3 of its 100 lines are not"
    )
    check_nothing_is_half_made(tmp_path)

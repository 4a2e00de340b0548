"""Datasets of the Hub, read from a Hub on this machine by the real client, in a process of its own each time, as the
client's settings are read when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.hub_server import commit_of, hub
from threefold.config.data import SourceSection
from threefold.data.sources.tables import fingerprint, read_rows
from threefold.errors import DataError

ROOT = Path(__file__).resolve().parent.parent.parent.parent

READER = """
import json, sys
from threefold.config.data import SourceSection
from threefold.data.sources.tables import fingerprint, read_rows
from threefold.errors import DataError

for fields in json.load(sys.stdin):
    section = SourceSection(**fields)
    try:
        answer = {"fingerprint": fingerprint(section), "rows": [[row.origin, row.values] for row in read_rows(section)]}
    except DataError as error:
        answer = {"error": str(error)}
    print("ANSWER", json.dumps(answer))
"""


def rows(*values: str) -> bytes:
    return "".join(json.dumps({"n": value}) + "\n" for value in values).encode()


CONFIGS = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}]
- config_name: socratic
  data_files: [{split: train, path: socratic/train.jsonl}]
---
"""
SERVED = {
    ("org/plain", "main"): {"train.jsonl": rows("one", "two", "three"), "test.jsonl": rows("four")},
    ("org/plain", "v1"): {"train.jsonl": rows("old")},
    ("org/subsets", "main"): {
        "README.md": CONFIGS,
        "main/train.jsonl": rows("m"),
        "socratic/train.jsonl": rows("s"),
    },
    ("org/splits", "main"): {"test.jsonl": rows("t"), "validation.jsonl": rows("v")},
    ("org/script", "main"): {"script.py": b"raise SystemExit"},
    ("org/script", "refs/convert/parquet"): {"default/train/0000.jsonl": rows("converted")},
    ("org/gated", "main"): {"train.jsonl": rows("secret")},
    ("org/nothing", "main"): {"LICENSE": b"none"},
    ("org/broken", "main"): {"train.jsonl": rows("good") + b"nonsense\n"},
}


def answers(calls: list[dict[str, Any]], endpoint: str, home: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(calls),
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(found) == len(calls)
    return found


CALLS: dict[str, dict[str, Any]] = {
    "v1": {"path": "org/plain", "revision": "v1"},
    "plain": {"path": "org/plain"},
    "test": {"path": "org/plain", "hub_split": "test"},
    "no split": {"path": "org/plain", "hub_split": "tets"},
    "streamed": {"path": "org/plain", "streaming": True},
    "streamed two": {"path": "org/plain", "streaming": True, "max_rows": 2},
    "no revision": {"path": "org/plain", "revision": "v2"},
    "subset": {"path": "org/subsets", "subset": "socratic"},
    "which subset": {"path": "org/subsets"},
    "no subset": {"path": "org/subsets", "subset": "x"},
    "splits": {"path": "org/splits"},
    "script": {"path": "org/script"},
    "gated": {"path": "org/gated"},
    "nothing": {"path": "org/nothing"},
    "absent": {"path": "org/absent"},
    "broken": {"path": "org/broken"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def read(home: Path) -> dict[str, dict[str, Any]]:
    """What each of CALLS gives while the Hub can be reached."""
    with hub(SERVED, gated=frozenset({"org/gated"})) as endpoint:
        found = answers([{**fields, "path": [fields["path"]]} for fields in CALLS.values()], endpoint, home)
    return dict(zip(CALLS, found, strict=True))


def test_rows_of_a_hub_id(read: dict[str, dict[str, Any]]) -> None:
    assert read["plain"]["rows"] == [
        ["org/plain row 1", {"n": "one"}],
        ["org/plain row 2", {"n": "two"}],
        ["org/plain row 3", {"n": "three"}],
    ]
    assert read["streamed"]["rows"] == read["plain"]["rows"]
    assert read["streamed two"]["rows"] == read["plain"]["rows"][:2]
    assert [values["n"] for _, values in read["test"]["rows"]] == ["four"]
    assert [values["n"] for _, values in read["v1"]["rows"]] == ["old"]
    assert [values["n"] for _, values in read["subset"]["rows"]] == ["s"]
    assert [values["n"] for _, values in read["script"]["rows"]] == ["converted"]
    fingerprints = [answer["fingerprint"] for name, answer in read.items() if "fingerprint" in answer]
    assert len(set(fingerprints)) == len(fingerprints) - 1
    assert read["streamed"]["fingerprint"] == read["plain"]["fingerprint"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("no split", "org/plain: has no split 'tets' (did you mean 'test'?); it has "),
        ("no revision", "org/plain: has no revision 'v2' on the Hub"),
        ("which subset", "org/subsets: has several subsets, ['main', 'socratic']: name one as subset of the source"),
        ("no subset", "org/subsets: has no subset 'x'; it has ['main', 'socratic']"),
        ("splits", "org/splits: has no split 'train', but "),
        ("gated", "org/gated: its owner asks for agreement before it is read: agree on http://127.0.0.1:"),
        ("nothing", "org/nothing: holds no rows that `datasets` can read"),
        ("absent", "org/absent: there is no such file or directory here, and no such dataset on the Hub (or it is pri"),
        ("broken", "org/broken: cannot be read from the Hub: JSON parse error"),
    ],
)
def test_what_the_hub_does_not_give(read: dict[str, dict[str, Any]], call: str, message: str) -> None:
    assert read[call]["error"].startswith(message)
    assert "\n" not in read[call]["error"]


def test_without_a_network_what_was_downloaded_is_read(read: dict[str, dict[str, Any]], home: Path) -> None:
    """But only as the revision that it is: the last download of org/plain here is that of main."""
    names = ["plain", "test", "subset", "script", "v1", "absent"]
    calls = [{**CALLS[name], "path": [CALLS[name]["path"]]} for name in names]
    found = dict(zip(names, answers(calls, "http://127.0.0.1:9", home), strict=True))
    for name in ("plain", "test", "subset", "script"):
        assert found[name] == read[name]
    main = commit_of(SERVED["org/plain", "main"])
    assert found["v1"]["error"] == (
        f"org/plain: the Hub cannot be reached, and what was downloaded last is commit {main}, which is not known to "
        f"be revision 'v1': set revision = \"{main}\" of the source to use it"
    )
    assert found["absent"]["error"].startswith(
        "org/absent: there is no such file or directory here, and the Hub cannot be reached ("
    )


def test_offline_mode_asks_for_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run with HF_HUB_OFFLINE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pairs.jsonl").write_text("{}")
    for act in (fingerprint, read_rows):
        with pytest.raises(DataError) as caught:
            list(act(SourceSection(path=["data/pairs"])))
        assert str(caught.value) == (
            "data/pairs: there is no such file or directory here (did you mean 'pairs.jsonl'?), and the Hub cannot be "
            "reached (HF_HUB_OFFLINE is set): download the dataset where there is a network, and give the path of its "
            "files or of its save_to_disk directory"
        )

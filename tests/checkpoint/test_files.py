"""Run state on disk: whole or not at all, and hashes of what is in it. Real files and, for crashes, real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from threefold.checkpoint import files as checkpoint
from threefold.checkpoint.files import (
    LOCK_FILE,
    OWNER_FILE,
    STAGE_FILE,
    building,
    content_hash,
    hash_of,
    locked,
    read_json,
    recover,
    stage_record,
    write_json,
    write_text,
)
from threefold.engine.distributed import World
from threefold.errors import CheckpointError


def make(directory: Path, text: str) -> None:
    with building(directory) as partial:
        (partial / "weights").write_text(text)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------------------------ building


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "sft"
    with building(directory) as partial:
        (partial / "weights").write_text("new")
        assert not directory.exists()
        assert partial.parent == directory.parent  # one file system, so that the rename is one act
        assert partial.name.startswith(".")
    assert (directory / "weights").read_text() == "new"
    assert names(directory.parent) == ["sft"]


def test_the_new_replaces_the_old_as_a_whole(tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    directory.mkdir()
    (directory / "weights").write_text("old")
    (directory / "of the old only").write_text("")
    with building(directory) as partial:
        (partial / "weights").write_text("new")
        assert (directory / "weights").read_text() == "old"
    assert (directory / "weights").read_text() == "new"
    assert names(directory) == ["weights"]
    assert names(tmp_path) == ["sft"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("had_old", [True, False])
def test_a_block_that_fails_leaves_what_was_there(had_old: bool, error: type[BaseException], tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    if had_old:
        make(directory, "old")

    def fail() -> None:
        with building(directory) as partial:
            (partial / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == (["sft"] if had_old else [])
    if had_old:
        assert (directory / "weights").read_text() == "old"


def test_a_swap_that_cannot_be_done_leaves_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    make(directory, "old")
    with pytest.raises(FileNotFoundError), building(directory) as partial:
        partial.rmdir()
    assert (directory / "weights").read_text() == "old"
    assert names(tmp_path) == ["sft"]


def test_what_an_earlier_crash_left_is_swept_away(tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    for leftover in (".sft.building", ".sft.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "junk").write_text("")
    make(directory, "new")
    assert names(directory) == ["weights"]
    assert names(tmp_path) == ["sft"]


def test_recover_puts_the_old_back_after_a_cut_swap(tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    make(directory, "old")
    directory.rename(tmp_path / ".sft.old")  # a crash between the two renames leaves this
    recover(directory)
    assert (directory / "weights").read_text() == "old"
    assert names(tmp_path) == ["sft"]


def test_recover_keeps_the_new_after_a_finished_swap(tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    make(directory, "new")
    (tmp_path / ".sft.old").mkdir()
    recover(directory)
    assert (directory / "weights").read_text() == "new"
    recover(tmp_path / "never made")
    assert not (tmp_path / "never made").exists()


def test_a_killed_process_leaves_the_old_and_the_next_one_succeeds(tmp_path: Path) -> None:
    directory = tmp_path / "sft"
    make(directory, "old")
    program = (
        "import pathlib, sys, time\n"
        "from threefold.checkpoint.files import building\n"
        "with building(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'weights').write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    recover(directory)
    assert (directory / "weights").read_text() == "old"
    make(directory, "new")
    assert (directory / "weights").read_text() == "new"
    assert names(tmp_path) == ["sft"]


# ---------------------------------------------------------------------------------------------------------- JSON files


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"text": "häß\n"}}
    write_json(tmp_path / "run.json", value)
    assert read_json(tmp_path / "run.json") == value
    assert "häß" in (tmp_path / "run.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "absent.json") is None
    assert names(tmp_path) == ["run.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "x" * 100_000 + "\ud800")  # fails in the middle of the text
    assert read_json(file) == {"old": 1}
    assert names(tmp_path) == ["run.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Another process rewrites the file all the time, with values of very different length."""
    file = tmp_path / "run.json"
    write_json(file, [0])
    program = (
        "import pathlib, sys\n"
        "from threefold.checkpoint.files import write_json\n"
        "while True:\n"
        "    for size in (1, 50_000):\n"
        "        write_json(pathlib.Path(sys.argv[1]), [size] * size)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(file)])
    seen = set()
    try:
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            value = json.loads(file.read_text())
            assert len(value) == max(value[0], 1)
            seen.add(len(value) + value[0])
    finally:
        process.kill()
        process.wait()
    assert len(seen) == 3
    read_json(file)


@pytest.mark.parametrize("text", [b'{"half": ', b"", b"\xff\xfe"])
def test_a_damaged_file_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / STAGE_FILE).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"stage\.json: is damaged .* delete it, or choose another") as caught:
        stage_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_stage_record(tmp_path: Path) -> None:
    assert stage_record(tmp_path / "absent") is None
    assert stage_record(tmp_path) is None
    record = {"key": "abc", "summary": {"loss": 1.5}, "seconds": 2.0}
    write_json(tmp_path / STAGE_FILE, record)
    assert stage_record(tmp_path) == record
    for value in ({"key": "abc", "seconds": 2.0}, ["key", "summary", "seconds"], 3):
        write_json(tmp_path / STAGE_FILE, value)
        with pytest.raises(CheckpointError, match=r"stage\.json: is damaged .* no field '\w+'"):
            stage_record(tmp_path)


# -------------------------------------------------------------------------------------------------------------- hashes


def test_hash_of_a_value() -> None:
    assert hash_of({"a": 1, "b": {"c": 2, "d": 3}}) == hash_of({"b": {"d": 3, "c": 2}, "a": 1})
    different = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}, {}, [1, 2], [2, 1], "", None]
    assert len({hash_of(value) for value in different}) == len(different)
    # The sha256 of the two characters {}, so a key does not depend on the version of Python.
    assert hash_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_content_hash_of_a_file_is_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text("some rows")
    other.write_text("some rows")
    before = content_hash(str(one))
    assert content_hash(str(other)) == before
    os.utime(one, (1, 1))
    assert content_hash(str(one)) == before
    one.write_text("some rowz")
    assert content_hash(str(one)) != before


def test_content_hash_of_a_directory(tmp_path: Path) -> None:
    def fill(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return content_hash(str(tmp_path / name))

    original = {"config.json": "{}", "deep/weights": "abc"}
    before = fill("a", original)
    assert fill("b", dict(reversed(original.items()))) == before
    for path in (tmp_path / "a").rglob("*"):
        os.utime(path, (1, 1))
    assert content_hash(str(tmp_path / "a")) == before
    changes = [
        {"config.json": "{ }"},
        {"deep/weights": "abd"},
        {"more": ""},
        {"weights": "abc"},
    ]
    hashes = [fill(f"c{index}", original | change) for index, change in enumerate(changes)]
    moved = fill("moved", {"config.json": "{}", "weights": "abc"})
    joined = fill("joined", {"config.json": "{}deep/weightsabc"})
    assert len({before, moved, joined, *hashes}) == 7


def test_content_hash_of_what_is_no_path_is_the_name() -> None:
    assert content_hash("facebook/opt-125m") == "facebook/opt-125m"


def test_content_hash_of_a_large_file_sees_its_size_and_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_HASHED_WHOLE_BYTES", 3 * 2**20)
    file = tmp_path / "weights"
    data = bytearray(os.urandom(4 * 2**20))

    def hash_with(place: int | None = None, more: bytes = b"") -> str:
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        file.write_bytes(changed + more)
        return content_hash(str(file))

    before = hash_with()
    assert hash_with() == before
    changed = [hash_with(0), hash_with(2**20 - 1), hash_with(-1), hash_with(-(2**20)), hash_with(more=b"x")]
    assert len({before, *changed}) == 6
    data = bytearray(4 * 2**20)
    assert hash_with() != hash_with(more=bytes(2**20))  # the ends are alike, the size is not


def test_a_locked_directory_refuses_a_second_holder_and_is_free_again_afterwards(tmp_path: Path) -> None:
    with locked(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", LOCK_SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert "another run is using this directory" in other.stdout
    other = subprocess.run(
        [sys.executable, "-c", LOCK_SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert other.stdout.strip() == "mine"


LOCK_SCRIPT = """
import sys
from pathlib import Path
from threefold.checkpoint.files import locked
from threefold.errors import CheckpointError
try:
    with locked(Path(sys.argv[1])):
        print("mine")
except CheckpointError as error:
    print(error)
"""


def test_the_refusal_names_who_holds_the_directory(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CheckpointError) as refusal, locked(tmp_path):
        pass
    for part in (f"process {os.getpid()} on {socket.gethostname()}", "since 20", "arguments: ", "choose another"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == [LOCK_FILE]


def test_an_owner_without_a_lock_is_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).write_text('{"pid": 1, "host": "elsewhere", "since": "long ago", "command": ""}')
    with locked(tmp_path):
        assert read_json(tmp_path / OWNER_FILE)["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_an_owner_that_cannot_be_read_is_not_named(tmp_path: Path, text: str) -> None:
    with locked(tmp_path):
        (tmp_path / OWNER_FILE).write_text(text)
        with pytest.raises(CheckpointError, match="another run is using this directory; wait"), locked(tmp_path):
            pass


# -------------------------------------------------------------------------------------------------- several processes


def build_together(world: World, directory: Path) -> list[str]:
    with building(directory, world) as partial:
        (partial / f"of rank {world.rank}").write_text("")
    return names(directory)


def test_processes_build_one_directory(tmp_path: Path) -> None:
    make(tmp_path / "sft", "old")
    both = ["of rank 0", "of rank 1"]
    assert run_on_ranks(build_together, 2, tmp_path / "sft") == [both, both]
    assert names(tmp_path) == ["sft"]


def fail_together(world: World, directory: Path) -> bool:
    try:
        with building(directory, world):
            raise CheckpointError("the same on all")
    except CheckpointError:
        world.barrier()
        return (directory / "weights").read_text() == "old"


def test_processes_that_fail_leave_what_was_there(tmp_path: Path) -> None:
    make(tmp_path / "sft", "old")
    assert run_on_ranks(fail_together, 2, tmp_path / "sft") == [True, True]
    assert names(tmp_path) == ["sft"]


def lock_together(world: World, directory: Path) -> str:
    try:
        with locked(directory, world):
            return "held"
    except CheckpointError as error:
        return str(error)


def test_processes_of_a_run_hold_one_lock_and_are_refused_alike(tmp_path: Path) -> None:
    assert run_on_ranks(lock_together, 2, tmp_path) == ["held", "held"]
    with locked(tmp_path):
        first, second = run_on_ranks(lock_together, 2, tmp_path)
        assert first == second
        assert f"process {os.getpid()}" in first
        assert read_json(tmp_path / OWNER_FILE)["pid"] == os.getpid()

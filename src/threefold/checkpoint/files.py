"""Run state on disk: finished stages as directories that appear whole or not at all, and run.json.

A stage writes into a hidden directory beside its final place; only when it is complete, stage.json included, does it
take that place. What stood there before stays until that moment, so an interrupted run loses nothing that was
finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from threefold.config.arguments import given_arguments
from threefold.engine.distributed import World
from threefold.errors import CheckpointError

STAGE_FILE = "stage.json"
RUN_FILE = "run.json"
TEMPORARY = ".tmp"
"""End of the names, hidden, of files that are there for a moment."""
LOCK_FILE = ".lock"
OWNER_FILE = ".lock-owner.json"
EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.jsonl"
ALONE = World()
_HASHED_WHOLE_BYTES = 256 * 2**20


def write_json(path: Path, value: Any) -> None:
    """Write one indented JSON value; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write a file to, which takes the place of `path` when it is complete."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read one of our JSON files; None if it is absent."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); delete it, or choose another output directory") from error


def read_record(path: Path, *fields: str) -> dict[str, Any] | None:
    """Read one of our JSON files that holds an object with at least these fields; None if it is absent."""
    record = read_json(path)
    if record is None:
        return None
    missing = [name for name in fields if name not in record] if isinstance(record, dict) else list(fields)
    if missing:
        raise CheckpointError(
            f"{path}: is damaged (it has no field {missing[0]!r}); delete it, or choose another output directory"
        )
    return dict(record)


@contextmanager
def locked(directory: Path, world: World = ALONE) -> Iterator[None]:
    """Keep other runs out of a run directory for the time of the block; the lock goes with the process, however it
    ends. Of many processes the first holds it for all.

    Raises:
        CheckpointError: another run holds it; the message says which.
    """
    lock = FileLock(directory / LOCK_FILE)
    owner = directory / OWNER_FILE
    try:
        world.from_first(lambda: _take(lock, directory))
        yield
    finally:
        if lock.is_locked:
            owner.unlink(missing_ok=True)
            lock.release()


def _take(lock: FileLock, directory: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise CheckpointError(f"{directory}: cannot be written to; choose another --output-dir") from error
    except Timeout as error:
        raise CheckpointError(
            f"{directory}: another run is using this directory{_owner(directory)}; wait for it, or choose another "
            "--output-dir"
        ) from error
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(given_arguments(None)),
    }
    write_json(directory / OWNER_FILE, owner)


def _owner(directory: Path) -> str:
    """Who holds the lock, as far as can be told: it may have taken it just now, or be an older version."""
    try:
        owner = json.loads((directory / OWNER_FILE).read_text("utf-8"))
        command = f", arguments: {owner['command']}" if owner["command"] else ""
        return f" (process {owner['pid']} on {owner['host']}, since {owner['since']}{command})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def building(directory: Path, world: World = ALONE) -> Iterator[Path]:
    """A fresh hidden directory that replaces `directory` when the block ends, and is removed if the block fails.

    Every process is given its path; the first makes it and puts it in place, when all have come to the end.
    """
    temporary = directory.with_name(f".{directory.name}.building")
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    try:
        yield temporary
        world.barrier()
        if world.is_first:
            old = directory.with_name(f".{directory.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if directory.exists():
                os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old, ignore_errors=True)
        world.barrier()
    finally:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            recover(directory)


FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}
"""What it means, by errno, that something could not be written because there is no room."""


@contextmanager
def full_disk_named(directory: Path) -> Iterator[None]:
    """Turn what a full disk raises inside the block, from Python or from safetensors, into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_of(str(error))
        if number not in FULL:
            raise
        raise CheckpointError(
            f"{directory}: {FULL[number]}; finished steps and checkpoints are as they were: free space, and run the "
            "same command again to go on"
        ) from error


def _errno_of(text: str) -> int | None:
    """safetensors says only "... (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", text)
    return None if found is None else int(found[1])


def is_left_over(path: Path) -> bool:
    """Whether a file of a run directory is one that a run makes before it has written anything, or while it writes."""
    hidden = path.name.startswith(".") and path.name.endswith(TEMPORARY)
    return hidden or path.name in (LOCK_FILE, OWNER_FILE)


def remove_directories(parent: Path, pattern: str) -> None:
    """Remove the directories of a name with all that is in them, and the one that they are in if that is empty then."""
    for directory in parent.glob(pattern):
        shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        parent.rmdir()


def recover(directory: Path) -> None:
    """Undo a swap that was cut between its two renames: the old directory goes back to its place."""
    old = directory.with_name(f".{directory.name}.old")
    if old.is_dir() and not directory.exists():
        os.replace(old, directory)


def stage_record(directory: Path) -> dict[str, Any] | None:
    """The stage.json of a finished stage, or None."""
    return read_record(directory / STAGE_FILE, "key", "summary", "seconds")


def hash_of(value: Any) -> str:
    """sha256 of a JSON value, hexadecimal; equal values give equal hashes whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def content_hash(source: str) -> str:
    """Hash of what a file or checkpoint directory holds; the name itself where there is no such path (a Hub id).

    Files over 256 MiB count with their size, first and last MiB, so that large checkpoints do not have to be read
    whole.
    """
    path = Path(source)
    try:
        if path.is_file():
            return _file_hash(path)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return hash_of([(file.relative_to(path).as_posix(), _file_hash(file)) for file in files])
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: cannot be read ({error.strerror})") from error
    return source


def _file_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            digest.update(str(size).encode() + file.read(2**20))
            file.seek(-(2**20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()

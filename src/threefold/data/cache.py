"""Prepared data on disk: Arrow files in directories that are named by a hash of all that they depend on.

A directory appears whole or not at all. Whoever builds one holds its lock, so that processes of one run, or two runs at
once, build it once and the others read it. Nothing is pickled: columns are Arrow, the rest is JSON. The cache may be
deleted whenever no run is preparing data.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from threefold.errors import ConfigError, DataError

VERSION = "v1"
ROWS_PER_BATCH = 1024
"""Most rows of a record batch."""
BYTES_PER_BATCH = 64 * 2**20
"""A batch ends early where its rows are this large together."""
PATIENCE_SECONDS = 2.0
INFO_FILE = "info.json"
PARTIAL = ".partial"


def silent(_: str) -> None:
    """A `tell` that says nothing."""


def cache_root(cache_dir: str) -> Path:
    """Where prepared data are kept, from `data.cache_dir`."""
    if cache_dir:
        return Path(cache_dir).expanduser() / VERSION
    try:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    except RuntimeError as error:  # a container's user without a home
        raise ConfigError(f"data.cache_dir: {error}; set --data.cache_dir DIR") from error
    return Path(home) / "threefold" / "data" / VERSION


@cache
def code_version() -> str:
    """Hash of the code that prepares data: what an older version has prepared is not taken for this one's."""
    package = Path(__file__).parent
    files = [path for path in sorted(package.rglob("*.py")) if path.parent.name != "doctor"]  # which only looks
    files.append(package.parent / "types.py")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(package.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def key_hash(key: Mapping[str, Any]) -> str:
    """Hash of a JSON-able key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def cached(
    root: Path,
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    tell: Callable[[str], None] = silent,
) -> Path:
    """The directory of what `key` stands for, built if it is not there.

    Args:
        root: see `cache_root`.
        kind: first part of the directory's name.
        key: all that the content depends on, the code included.
        build: fills an empty directory, and returns what `read_info` will give.
        tell: is called with a line if another process is building it, which this one then waits for.

    Raises:
        ConfigError: the cache cannot be written.
        DataError: the disk is full.
        Whatever `build` raises; nothing is left on disk then.
    """
    name = f"{kind}-{key_hash(key)[:32]}"
    directory = root / name
    if _is_whole(directory):
        return directory
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {root} cannot be made ({error.strerror or error}): set --data.cache_dir DIR"
        ) from error
    try:
        with _locked(root / f"{name}.lock", tell):
            if not _is_whole(directory):
                _build(directory, key, build)
    except PermissionError as error:
        raise ConfigError(f"data.cache_dir: {root} cannot be written; set --data.cache_dir DIR") from error
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(root)):
            raise
        raise DataError(
            f"data.cache_dir: prepared data cannot be written to {root} ({error.strerror or error}): free space there, "
            "or set --data.cache_dir DIR"
        ) from error
    return directory


@contextmanager
def _locked(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        tell(f"waiting for another process that prepares the same data ({path.stem})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(directory: Path, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> None:
    """Fill a directory beside its final place, then give it its name; the caller holds the lock."""
    partial = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed
    shutil.rmtree(directory, ignore_errors=True)  # damaged
    partial.mkdir()
    try:
        with _seldom_collecting():
            info = dict(build(partial))
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        text = json.dumps({"key": key, "sizes": sizes, "info": info}, ensure_ascii=False, indent=1)
        with (partial / INFO_FILE).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Python looks for cycles after every 700 new objects; rows are many objects without any, and looking at them took
    a sixth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _is_whole(directory: Path) -> bool:
    """Whether all files are there at their full size."""
    try:
        record = json.loads((directory / INFO_FILE).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in record["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_info(directory: Path) -> dict[str, Any]:
    """What `build` returned."""
    info: dict[str, Any] = json.loads((directory / INFO_FILE).read_text(encoding="utf-8"))["info"]
    return info


class TableWriter:
    """Writes rows to an Arrow file, a batch at a time. A context manager.

    Attributes:
        num_rows: rows so far.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._columns: list[list[Any]] = [[] for _ in schema]
        self.num_rows, self._num_bytes = 0, 0

    def __enter__(self) -> TableWriter:
        self._file = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        return self

    def append(self, *values: Any, num_bytes: int = 0) -> None:
        """Add a row, its values in the schema's order; `num_bytes` is about its size."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self.num_rows += 1
        self._num_bytes += num_bytes
        if len(self._columns[0]) == ROWS_PER_BATCH or self._num_bytes >= BYTES_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        arrays = [pa.array(column, field.type) for column, field in zip(self._columns, self._schema, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        for column in self._columns:
            column.clear()
        self._num_bytes = 0

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._columns[0]:
                self._flush()
            self._writer.close()
        finally:
            self._file.close()
        if kind is None:
            _to_disk(self._path)


class TableReader:
    """Rows of a file of `TableWriter`, mapped into memory: only what is read is loaded."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "rb")  # stays readable if the directory is removed meanwhile
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._schema = reader.schema
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> tuple[Sequence[pa.Array], int]:
        """The columns of the batch that holds a row, and the row's place in it."""
        number = bisect_right(self._ends, index)
        return self._batches[number].columns, index - (self._ends[number - 1] if number else 0)

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each batch, with the number of its first row; not mapped, so that what was read can be given back."""
        reader = pa.ipc.open_file(self._file)
        first = 0
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            yield first, batch
            first += batch.num_rows

    def numbers(self, name: str) -> Any:
        """A column of numbers as one numpy array."""
        column = pa.chunked_array([batch.column(name) for batch in self._batches], self._schema.field(name).type)
        return column.to_numpy()


def write_numbers(path: Path, columns: Mapping[str, Any]) -> None:
    """Write numpy arrays of one length as an Arrow file."""
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    _to_disk(path)


def _to_disk(path: Path) -> None:
    """Wait until a file's content would survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_numbers(path: Path) -> dict[str, Any]:
    """What `write_numbers` wrote, mapped into memory."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}

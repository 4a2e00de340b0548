"""Rows of parquet files, and of the directories that `save_to_disk` of the library datasets writes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow
import pyarrow.parquet

from threefold.data.sources.streams import SAMPLE_BYTES, opened, refuse_other_kind
from threefold.errors import DataError

BATCH_ROWS = 256

READ_ERRORS = (pyarrow.ArrowException, OSError, UnicodeDecodeError)


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, a few at a time.

    Raises:
        DataError: it is damaged, names a column twice, or holds no rows.
    """
    try:
        with _seekable(path) as source, pyarrow.parquet.ParquetFile(source) as file:
            twice = [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]
            if twice:
                raise DataError(f"{path}: names column {twice[0]!r} twice; rename or remove one")
            if not file.metadata.num_rows:
                raise DataError(f"{path}: holds no rows; it must hold at least one")
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                yield from batch.to_pylist()
    except READ_ERRORS as error:
        reason = first_line(error).rstrip(".")
        raise DataError(f"{path}: cannot be read as parquet: {reason}; is the file whole?") from error


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """A parquet file has its table of contents at the end, so a packed one is unpacked to a file that vanishes."""
    if path.suffix.lower() == ".parquet":
        with path.open("rb") as file:
            if not (sample := file.read(SAMPLE_BYTES)).startswith(b"PAR1"):
                refuse_other_kind(path, sample)
            file.seek(0)
            yield file
    else:
        with tempfile.TemporaryFile() as unpacked:
            with opened(path) as stream:
                shutil.copyfileobj(stream, unpacked)
            yield unpacked


def read_dataset_directory(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a directory that `Dataset.save_to_disk` wrote; its files are mapped into memory, not loaded.

    Raises:
        DataError: it is damaged, or holds no rows.
    """
    dataset_files(path)
    try:
        dataset = datasets.load_from_disk(str(path))
        if not len(dataset):
            raise DataError(f"{path}: holds no rows; it must hold at least one")
        yield from rows_of_dataset(dataset)
    except (*READ_ERRORS, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a saved dataset: {first_line(error)}; is it whole?") from error


def dataset_files(path: Path) -> list[Path]:
    """Files of a saved dataset: those that it lists, as caches of its use may lie beside them.

    Raises:
        DataError: its list cannot be read, or is empty.
    """
    state = path / "state.json"
    try:
        names = [str(part["filename"]) for part in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: cannot be read as the state of a saved dataset; is it whole?") from error
    if not names:
        raise DataError(f"{path}: holds no rows; it must hold at least one")
    return [path / "dataset_info.json", *(path / name for name in names)]


def rows_of_dataset(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset` or `IterableDataset` as plain Python values."""
    for batch in dataset.with_format(None).iter(batch_size=BATCH_ROWS):
        names = tuple(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Rows of datasets on the Hugging Face Hub, through the library `datasets`, which keeps what it downloads."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import datasets
from datasets.load import httpx  # the one of its names that the installed huggingface_hub uses
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name

from threefold.config.data import SourceSection
from threefold.data.sources.arrow_rows import READ_ERRORS, first_line, rows_of_dataset
from threefold.data.sources.locations import choose_split, nearest_here
from threefold.errors import DataError

MAIN = "main"
PARQUET_CONVERSION = "refs/convert/parquet"
"""Branch on which the Hub keeps the rows of each dataset as parquet, also of those that come as a script."""
REACH_SECONDS = 10.0
HUB_ERRORS = (*READ_ERRORS, httpx.HTTPError, datasets.exceptions.DatasetsError, ValueError, RuntimeError)


def read_hub(hub_id: str, section: SourceSection) -> Iterator[dict[str, Any]]:
    """Rows of a split of a dataset; with `section.streaming` they are fetched as they are read, and `section.max_rows`
    of them end it.

    A dataset that comes as a script is read from the Hub's own conversion to parquet, as `datasets` runs no scripts.

    Raises:
        DataError: the Hub cannot be reached, has no such dataset, subset, split or revision, or asks for access.
    """
    builder, split = _opened(hub_id, section)
    try:
        if section.streaming:
            rows = rows_of_dataset(builder.as_streaming_dataset(split=split))
            yield from itertools.islice(rows, section.max_rows or None)
        else:
            builder.download_and_prepare()
            yield from rows_of_dataset(builder.as_dataset(split=split))
    except HUB_ERRORS as error:
        raise DataError(f"{hub_id}: cannot be read from the Hub: {_innermost(error)}") from error


def hub_fingerprint(hub_id: str, section: SourceSection) -> str:
    """Hexadecimal sha256 of the commit of a dataset and of what is read of it."""
    builder, split = _opened(hub_id, section)
    limit = section.max_rows if section.streaming else 0
    return hashlib.sha256(json.dumps([hub_id, builder.hash, builder.config.name, split, limit]).encode()).hexdigest()


def _opened(hub_id: str, section: SourceSection) -> tuple[Any, str]:
    builder = _builder(hub_id, section.subset, section.revision)
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or ()]
    return builder, choose_split(hub_id, splits, section.hub_split)


@functools.lru_cache(maxsize=64)
def _builder(hub_id: str, subset: str, revision: str) -> Any:
    """Kept for the life of the process, so that what is read is the commit that the fingerprint names."""
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(hub_id, revision=revision, timeout=REACH_SECONDS)
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        return _downloaded_before(hub_id, subset, revision, error)
    except RevisionNotFoundError as error:
        raise DataError(f"{hub_id}: has no revision {revision!r} on the Hub (a branch, tag or commit)") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{_not_here(hub_id)}, and no such dataset on the Hub (or it is private: log in with `hf auth login`)"
        ) from error
    except httpx.HTTPError as error:
        raise DataError(
            f"{hub_id}: the Hub does not answer: {first_line(error)}; try again, or give a local path"
        ) from error
    try:
        try:
            return datasets.load_dataset_builder(hub_id, subset or None, revision=revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or revision != MAIN:
                raise
            return datasets.load_dataset_builder(hub_id, subset or None, revision=PARQUET_CONVERSION)
    except HUB_ERRORS as error:
        _refuse(hub_id, subset, error)


def _downloaded_before(hub_id: str, subset: str, revision: str, unreachable: Exception) -> Any:
    """What `datasets` keeps of an earlier download: the last one, of whatever revision, so that is checked."""
    try:
        with _without_hub():
            builder = datasets.load_dataset_builder(hub_id, subset or None)
    except HUB_ERRORS as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(unreachable, OfflineModeIsEnabled) else first_line(unreachable)
        raise DataError(
            f"{_not_here(hub_id)}, and the Hub cannot be reached ({reason}): download the dataset where there is a "
            "network, and give the path of its files or of its save_to_disk directory"
        ) from error
    meant = {revision, _commit(hub_id, revision)} | (
        {_commit(hub_id, PARQUET_CONVERSION)} if revision == MAIN else set()
    )
    if builder.hash not in meant:
        raise DataError(
            f"{hub_id}: the Hub cannot be reached, and what was downloaded last is commit {builder.hash}, which is not "
            f'known to be revision {revision!r}: set revision = "{builder.hash}" of the source to use it'
        )
    return builder


def _commit(hub_id: str, revision: str) -> str:
    """Commit that a branch or tag was when something of it was downloaded last; "" if nothing was."""
    folder = repo_folder_name(repo_id=hub_id, repo_type="dataset")
    file = Path(HF_HUB_CACHE) / folder / "refs" / revision
    return file.read_text("utf-8").strip() if file.is_file() else ""


@contextmanager
def _without_hub() -> Iterator[None]:
    """Lets `datasets` look into its downloads at once, instead of after half a minute of further attempts."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _not_here(hub_id: str) -> str:
    return f"{hub_id}: there is no such file or directory here{nearest_here(Path(hub_id))}"


def _refuse(hub_id: str, subset: str, error: BaseException) -> NoReturn:
    message = str(error)
    known = re.search(r"\[.*?\]", message)
    if "Config name is missing" in message and known:
        raise DataError(f"{hub_id}: has several subsets, {known[0]}: name one as subset of the source") from error
    if "BuilderConfig" in message and known:
        raise DataError(f"{hub_id}: has no subset {subset!r}; it has {known[0]}") from error
    if isinstance(error, FileNotFoundError) and "gated" not in message:
        raise DataError(f"{hub_id}: holds no rows that `datasets` can read ({first_line(error)})") from error
    if "gated" in message:
        raise DataError(
            f"{hub_id}: its owner asks for agreement before it is read: agree on "
            f"{datasets.config.HF_ENDPOINT}/datasets/{hub_id} and log in with `hf auth login`"
        ) from error
    raise DataError(f"{hub_id}: cannot be read from the Hub: {first_line(error)}") from error


def _innermost(error: BaseException) -> str:
    """What went wrong beneath the "error occurred while generating the dataset" of `datasets`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)

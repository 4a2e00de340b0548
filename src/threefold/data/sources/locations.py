"""What the paths of a source name: files, patterns, directories of saved datasets, a Hub id, a Python function."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from threefold.config.data import SourceSection
from threefold.data.sources.entry_point import PREFIX
from threefold.errors import DataError

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
PACKINGS = (".gz", ".zst")
ENDINGS_TEXT = f"{', '.join(ENDINGS)}, or one of these with {' or '.join(PACKINGS)}"
DATASET = "dataset"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://(?:huggingface\.co/datasets/([\w.-]+/[\w.-]+))?")
FILE_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,7}")
LOCAL_JSONFILE = {"local/jsonfile": ("data/train.json", "data/eval.json")}
"""DeepSpeed-Chat's name for two files of one's own below the directory where the command is run."""


@dataclass(frozen=True)
class TableFile:
    """A file of rows, or a directory that holds one saved dataset.

    Attributes:
        path: as messages name it.
        kind: its ending without packing (".json"), or "dataset".
    """

    path: Path
    kind: str


@dataclass(frozen=True)
class Location:
    """Where the rows of a source are: one of the three is not empty.

    Attributes:
        files: in the order in which they are read.
        hub_id: dataset of the Hub.
        entry_point: python:MODULE:FUNCTION.
    """

    files: tuple[TableFile, ...] = ()
    hub_id: str = ""
    entry_point: str = ""


def resolve(section: SourceSection) -> Location:
    """Finds what `section.path` names, patterns sorted by name; reads no rows.

    Raises:
        DataError: something is missing, of unknown kind, listed twice, or listed beside a source that stands alone.
    """
    files: list[TableFile] = []
    for spec in section.path:
        remote = spec.startswith(PREFIX) or _is_hub_id(spec)
        if remote and len(section.path) > 1:
            raise DataError(
                f"{spec}: stands beside other paths, and {'a Hub id' if _is_hub_id(spec) else 'a Python function'} is "
                "a source of its own: list it apart"
            )
        if remote:
            return Location(entry_point=spec) if spec.startswith(PREFIX) else Location(hub_id=spec)
        files += _local(spec, section.hub_split)
    seen: set[str] = set()
    for file in files:
        place = os.path.abspath(file.path)
        if place in seen:
            raise DataError(f"{file.path}: is listed twice in the paths of source {section.label!r}; list it once")
        seen.add(place)
    unused = [name for name in ("subset", "revision") if getattr(section, name) not in ("", "main")]
    if unused:
        raise DataError(f"{section.label}: {unused[0]} is for Hub datasets, and nothing to local files: leave it out")
    return Location(files=tuple(files))


def choose_split(spec: str, available: Sequence[str], wanted: str) -> str:
    """The split to read: the one that is wanted, else train, else the only one.

    Raises:
        DataError: there is no such split, or none is called train and there are several.
    """
    if wanted:
        if wanted not in available:
            near = nearest(wanted, available)
            raise DataError(f"{spec}: has no split {wanted!r}{near}; it has {', '.join(available)}")
        return wanted
    if "train" in available:
        return "train"
    if len(available) == 1:
        return available[0]
    raise DataError(f"{spec}: has no split 'train', but {', '.join(available)}: name one as hub_split of the source")


def nearest(name: str, names: Sequence[str]) -> str:
    """ " (did you mean …?)", or "" where nothing is near."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def nearest_here(path: Path) -> str:
    """`nearest` among what stands beside a path that does not exist."""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])


def _is_hub_id(spec: str) -> bool:
    """One slash, no ending of a file, and nothing of that name here."""
    return (
        HUB_ID.fullmatch(spec) is not None
        and not FILE_ENDING.fullmatch(Path(spec).suffix)
        and not os.path.lexists(spec)
        and spec not in LOCAL_JSONFILE
    )


def _local(spec: str, wanted_split: str) -> list[TableFile]:
    if not spec.strip():
        raise DataError("data.sources: a path is empty; name a file, a pattern, a directory or a dataset of the Hub")
    if address := ADDRESS.match(spec):
        hub_id = f" (here {address[1]!r})" if address[1] else ""
        raise DataError(
            f"{spec}: is an address; download the file and give its path, or name a dataset of the Hub as OWNER/NAME"
            f"{hub_id}"
        )
    spec = os.path.expanduser(spec)
    path = Path(spec)
    if path.is_dir():
        return [TableFile(_dataset_directory(path, wanted_split), DATASET)]
    if path.exists():
        return [TableFile(path, _kind(path))]
    if spec in LOCAL_JSONFILE:
        return [_existing(Path(file)) for file in LOCAL_JSONFILE[spec]]
    if glob.has_magic(spec):
        return _matches(spec, wanted_split)
    return [_existing(path)]


def _existing(path: Path) -> TableFile:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: is a link to {os.readlink(path)!r}, which does not exist; mend the link")
    if not path.is_file():
        folder = path.parent
        where = "" if folder.is_dir() else f"; there is no directory {str(folder)!r}"
        alone = "; a dataset of the Hub is named OWNER/NAME" if "/" not in str(path) and not path.suffix else ""
        raise DataError(
            f"{path}: no such file{nearest_here(path)}{where} (paths are relative to the directory where the "
            f"command is run{alone})"
        )
    return TableFile(path, _kind(path))


def _kind(path: Path) -> str:
    name = path.name.lower()
    for packing in PACKINGS:
        name = name.removesuffix(packing)
    ending = Path(name).suffix
    if ending not in ENDINGS:
        raise DataError(f"{path}: cannot tell its format from its name; it must end in one of {ENDINGS_TEXT}")
    return ending


def _matches(pattern: str, wanted_split: str) -> list[TableFile]:
    """Files that fit a pattern; of the directories that fit, those that are saved datasets."""
    paths = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    found = []
    for path in paths:
        if path.is_file():
            found.append(TableFile(path, _kind(path)))
        elif _is_saved_dataset(path):
            found.append(TableFile(_dataset_directory(path, wanted_split), DATASET))
    if not found:
        raise DataError(f"{pattern}: no file fits this pattern (it is relative to the directory of the command)")
    return found


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _dataset_directory(path: Path, wanted_split: str) -> Path:
    """The directory that holds the rows: this one, or the one of a split."""
    if (path / "state.json").is_file():
        return path
    contents = path / "dataset_dict.json"
    if not contents.is_file():
        raise DataError(f"{path}: {_not_a_dataset(path)}")
    try:
        available = [str(name) for name in json.loads(contents.read_text("utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{contents}: cannot be read as the list of a dataset's splits; is it whole?") from error
    chosen = path / choose_split(str(path), available, wanted_split)
    if not (chosen / "state.json").is_file():
        raise DataError(f"{chosen}: is named in {contents.name}, but is no saved dataset; is it whole?")
    return chosen


def _not_a_dataset(path: Path) -> str:
    """What is wrong with a directory, and how to name what it holds."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if any(ending in file.name.lower() for ending in ENDINGS)]
    if not files:
        return "is an empty directory; name a file, or a directory of datasets.save_to_disk"
    what = "is a directory, and none of datasets.save_to_disk"
    if not tables:
        return f"{what} (no state.json in it, and no file of rows)"
    pattern = f"{tables[0].parent}/*{_ending_with_packing(tables[0])}"
    return f"{what}; name a file in it, or a pattern such as {pattern}"


def _ending_with_packing(path: Path) -> str:
    suffixes = path.suffixes
    return "".join(suffixes[-2:]) if suffixes[-1].lower() in PACKINGS else suffixes[-1]

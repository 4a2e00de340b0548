"""Datasets to examples: a source is named in the recipe, its rows are recognised by their columns."""

from threefold.config.data import DEMO, SourceSection
from threefold.data.sources import tables
from threefold.data.sources.formats import FORMATS
from threefold.data.sources.locations import resolve
from threefold.data.sources.published import PUBLISHED, located
from threefold.data.sources.reading import BadRows, SourceReading, counts_note, open_source

__all__ = [
    "FORMATS",
    "PUBLISHED",
    "BadRows",
    "SourceReading",
    "counts_note",
    "file_names",
    "fingerprint",
    "open_source",
]


def file_names(section: SourceSection) -> list[str]:
    """The files of a source, in the order in which they are read; none where it is no file."""
    return [str(file.path) for file in resolve(located(section)).files] if section.path != [DEMO] else []


def fingerprint(section: SourceSection) -> str:
    """Hash of a source's content, also of one that is named by a published dataset's name."""
    return tables.fingerprint(located(section))

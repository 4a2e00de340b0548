"""Finds what is wrong with data before a model is trained on them.

findings, rows        what is found; what is looked at
patterns, rules       faults of one text, or of one row
ranking, repeats      what rankings give away; rows that are equal, or in two places
near                  near duplicates
rendered, samples     rows as tokens
examination           all of it over all sources
"""

from threefold.data.doctor.examination import FAST, FULL, Depth, Examined, examine
from threefold.data.doctor.findings import Finding, Report
from threefold.data.doctor.reading import Opened, fast_report, open_for_doctor, source_rows
from threefold.data.doctor.rows import BadRows, SourceRows
from threefold.data.doctor.samples import TokenPiece, TokenSample

__all__ = [
    "FAST",
    "FULL",
    "BadRows",
    "Depth",
    "Examined",
    "Finding",
    "Opened",
    "Report",
    "SourceRows",
    "TokenPiece",
    "TokenSample",
    "examine",
    "fast_report",
    "open_for_doctor",
    "source_rows",
]

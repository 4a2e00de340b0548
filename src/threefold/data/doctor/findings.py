"""What the doctor says: findings, and how they are counted while rows go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]

MAX_ORIGINS = 5
"""Rows that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or likely to be.

    Attributes:
        severity: an error stops a run before its first step; a warning is shown.
        check: short name of the check, the same in every run ("mojibake").
        message: one line: what, how often, where first, what to do.
        origin: file and row of the first; "" where no single row is at fault.
        count: rows with it.
        looked_at: rows that were looked at.
        examples: origins of the first few.
    """

    severity: Severity
    check: str
    message: str
    origin: str = ""
    count: int = 0
    looked_at: int = 0
    examples: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class Tally:
    """Counts rows with one fault and remembers the first few of them, and what was found in the first."""

    count: int = 0
    origins: list[str] = field(default_factory=list)
    shown: str = ""

    def add(self, origin: str, shown: str = "") -> None:
        """Count one row."""
        self.count += 1
        if len(self.origins) < MAX_ORIGINS:
            self.origins.append(origin)
            self.shown = self.shown or shown

    def finding(self, severity: Severity, check: str, looked_at: int, what: str, fix: str) -> Finding:
        """A finding about these rows: "3 of 300 rows hold … ('Ã©' in pairs.jsonl row 7): read the file as UTF-8"."""
        where = f"{self.shown} in {self.origins[0]}" if self.shown else f"first: {self.origins[0]}"
        message = f"{of_rows(self.count, looked_at)} {what} ({where}): {fix}"
        return Finding(severity, check, message, self.origins[0], self.count, looked_at, tuple(self.origins))


@dataclass(frozen=True)
class Report:
    """All that an examination found.

    Attributes:
        mode: "fast" or "full".
        findings: errors first, in the order of the checks.
        statistics: by check, whether or not it led to a finding; plain values, for JSON.
        extent: lines that say how many rows each kind of check looked at.
    """

    mode: str
    findings: tuple[Finding, ...]
    statistics: Mapping[str, Any]
    extent: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Those that stop a run."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Those that are shown only."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def exit_code(self) -> int:
        """2 where there are errors, else 0."""
        return 2 if self.errors else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mode": self.mode,
            "exit_code": self.exit_code,
            "num_errors": len(self.errors),
            "num_warnings": len(self.warnings),
            "findings": [finding.as_dict() for finding in self.findings],
            "extent": list(self.extent),
            "statistics": dict(self.statistics),
        }


def errors_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The same, errors before warnings, otherwise in their order."""
    return tuple(sorted(findings, key=lambda finding: finding.severity != "error"))


def of_rows(count: int, total: int, noun: str = "rows") -> str:
    """ "3 of 300 rows (1 %)"."""
    return f"{count:,} of {total:,} {noun} ({_percent(count, total)} %)"


def clip(text: str, length: int = 40) -> str:
    """A text as it is shown within one line: quoted, cut, its control characters escaped."""
    cut = text if len(text) <= length else text[:length] + "…"
    return repr(cut)


def _percent(count: int, total: int) -> str:
    """Two figures, none behind the point from ten per cent on, and no power of ten."""
    share = 100 * count / max(total, 1)
    if 0 < share < 0.01:
        return "under 0.01"
    return f"{share:.0f}" if share >= 10 else f"{share:.2g}"

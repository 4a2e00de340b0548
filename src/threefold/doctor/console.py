"""What the doctor found, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from threefold.data.doctor import Examined, TokenSample
from threefold.data.doctor.samples import TokenKind, runs

STYLES: dict[TokenKind, str] = {
    "context": "dim",
    "trained": "green",
    "stop": "black on green",
    "control": "cyan",
    "cut": "red strike",
}
MAX_PIECES_SHOWN = 120


def show(examined: Examined, console: Console | None = None) -> None:
    """Print the findings, one sample of each step, and how much was looked at."""
    console = console or Console()
    report = examined.report
    if report.findings:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("", "check", "what"):
            table.add_column(heading, overflow="fold")
        for finding in report.findings:
            style = "bold red" if finding.severity == "error" else "yellow"
            table.add_row(Text(finding.severity, style), Text(finding.check), Text(finding.message))
        console.print(table)
    for sample in _first_of_each(examined):
        console.print()
        console.print(_sample(sample))
    console.print()
    for line in report.extent:
        console.print(Text(line, "dim"))
    console.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings ({report.mode})")


def _first_of_each(examined: Examined) -> list[TokenSample]:
    return list({sample.step: sample for sample in reversed(examined.samples)}.values())[::-1]


def _sample(sample: TokenSample) -> Text:
    text = Text(f"{sample.step}: {sample.title} of {sample.origin}, {sample.num_tokens} tokens, ", "bold")
    text.append(f"{sample.num_trained} of them trained", STYLES["trained"])
    text.append("\n")
    for piece in runs(sample.pieces[:MAX_PIECES_SHOWN]):
        text.append(piece.text, STYLES[piece.kind])
    if len(sample.pieces) > MAX_PIECES_SHOWN:
        text.append(" …", "dim")
    return text

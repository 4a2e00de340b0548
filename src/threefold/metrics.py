"""What a run says about itself: metrics.jsonl, TensorBoard, and the console (progress bars with ETA, notes, tables)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter


class ProgressTask:
    """One bar: `advance` it once per unit of work, with a few numbers to show beside it."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, numbers="")

    def advance(self, **numbers: float) -> None:
        """Move on by one; `numbers` replace those shown."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._progress.update(self._task, advance=1, numbers=shown)


class RunLog:
    """Writes one run's metrics and talks to the console.

    metrics.jsonl is append-only: each line is {"stage", "step", ...values}; a line {"stage", "event": "start"} opens
    each attempt of a stage, so a reader takes what follows the last one.
    """

    def __init__(self, directory: Path, console: Console | None = None) -> None:
        self.directory = directory
        self.console = console or Console(highlight=False)
        self._file: TextIO | None = None  # opened with the first record, so that a refused recipe leaves nothing behind
        self._writer: SummaryWriter | None = None
        self._stage = ""

    @contextmanager
    def stage(self, stage: str, key: str) -> Iterator[None]:
        """Everything logged inside belongs to `stage`; `key` (its hash) names the TensorBoard run."""
        self._stage = stage
        self._writer = SummaryWriter(log_dir=str(self.directory / "tensorboard" / f"{stage}-{key[:8]}"))
        self._write({"stage": stage, "event": "start", "key": key})
        try:
            yield
        finally:
            self._writer.close()
            self._writer, self._stage = None, ""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step; a value that is not finite is written as null (JSON has no NaN)."""
        clean = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._write({"stage": self._stage, "step": step, **clean})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def _open(self) -> TextIO:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "metrics.jsonl"
        was_cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        file = path.open("a", encoding="utf-8")
        if was_cut:  # a crash left half a line: the next record must not become part of it
            file.write("\n")
        return file

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def note_long_warmup(self, field: str, warmup_steps: int, total_steps: int) -> None:
        """Say so if a warm-up does not end before its stage does: the peak is then reached last, or never."""
        if warmup_steps >= total_steps:
            self.note(f"note: {field} = {warmup_steps} is not below the {total_steps} optimizer steps of this stage")

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[ProgressTask]:
        """A progress bar with elapsed and remaining time."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console) as bar:
            yield ProgressTask(bar, description, total)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A closing table."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            self._file.close()

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

    def __init__(self, progress: Progress, description: str, total: int, completed: int = 0) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, completed=completed, numbers="")

    def advance(self, **numbers: float) -> None:
        """Move on by one; `numbers` replace those shown."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._progress.update(self._task, advance=1, numbers=shown)


class RunLog:
    """Writes one run's metrics and talks to the console.

    Each line of metrics.jsonl is {"stage", "step", ...values}; a line {"stage", "event": "start"} opens each attempt of
    a stage, so a reader takes what follows the last one. An attempt that goes on from a checkpoint takes back what was
    written after it, and says "resume".
    """

    def __init__(self, directory: Path, console: Console | None = None) -> None:
        self.directory = directory
        self.console = console or Console(highlight=False)
        self._file: TextIO | None = None  # opened with the first record, so that a refused recipe leaves nothing behind
        self._writer: SummaryWriter | None = None
        self._stage = ""

    @contextmanager
    def stage(self, stage: str, key: str, resume_at: int | None = None) -> Iterator[None]:
        """Everything logged inside belongs to `stage`; `key` (its hash) names the TensorBoard run.

        Args:
            resume_at: what `position` said when the checkpoint was written that this stage goes on from.
        """
        self._stage = stage
        last_step = None if resume_at is None else self._take_back(stage, resume_at)
        # TensorBoard drops the steps from purge_step on that it has read so far
        self._writer = SummaryWriter(
            log_dir=str(self.directory / "tensorboard" / f"{stage}-{key[:8]}"),
            purge_step=None if last_step is None else last_step + 1,
        )
        self._write({"stage": stage, "event": "start" if resume_at is None else "resume", "key": key})
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

    def position(self) -> int:
        """Bytes of metrics.jsonl so far."""
        if self._file is None:
            self._file = self._open()
        self._file.flush()
        return self._path.stat().st_size

    def _take_back(self, stage: str, position: int) -> int | None:
        """Remove what a stage has written after a position; its last step before, None if there is none. What other
        stages have written stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
        before, after = b"", b""
        if self._path.is_file():
            text = self._path.read_bytes()
            before, after = text[:position], text[position:]
        kept = b"".join(line for line in after.splitlines(True) if _stage_of(line) not in (stage, None))
        if kept != after:
            with self._path.open("r+b") as file:
                file.seek(position)
                file.write(kept)
                file.truncate()
        steps = [json.loads(line).get("step") for line in before.splitlines() if _stage_of(line) == stage]
        return next((step for step in reversed(steps) if step is not None), None)

    @property
    def _path(self) -> Path:
        return self.directory / "metrics.jsonl"

    def _open(self) -> TextIO:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path
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
    def progress(self, description: str, total: int, completed: int = 0) -> Iterator[ProgressTask]:
        """A progress bar with elapsed and remaining time, of which some units may be done already."""
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
            yield ProgressTask(bar, description, total, completed)

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


class SilentLog(RunLog):
    """A log that writes and prints nothing: of the processes that leave talking to the first."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, Console(quiet=True))

    @contextmanager
    def stage(self, stage: str, key: str, resume_at: int | None = None) -> Iterator[None]:
        """Nothing happens."""
        yield

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing happens."""

    def position(self) -> int:
        """The first process knows."""
        return 0

    @contextmanager
    def progress(self, description: str, total: int, completed: int = 0) -> Iterator[ProgressTask]:
        """A bar that is not shown."""
        yield ProgressTask(Progress(disable=True), description, total, completed)


def _stage_of(line: bytes) -> str | None:
    """Stage of a record; None of half a line."""
    try:
        return str(json.loads(line)["stage"])
    except (ValueError, KeyError, TypeError):
        return None

"""Launchers and their processes, for tests that kill them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60.0
"""Within which a run must end after one of its processes has."""
START_SECONDS = 90.0
"""Within which processes must have met, on a machine that does much else."""


_STARTED: list[subprocess.Popen[str]] = []


def kill_launchers() -> None:
    """End all launchers that still run; their processes end with them."""
    while _STARTED:
        launcher = _STARTED.pop()
        launcher.kill()
        launcher.wait()


def start_launcher(what: str, directory: Path, *numbers: object, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """launcher_script.py, with a temporary directory of its own for what the processes print."""
    logs = directory / "logs"
    logs.mkdir(exist_ok=True)
    command = [*prefix, sys.executable, "-m", "tests.launch.launcher_script", what, str(directory), *map(str, numbers)]
    launcher = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(logs), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _STARTED.append(launcher)
    return launcher


def end_of(launcher: subprocess.Popen[str], seconds: float = DEADLINE_SECONDS) -> tuple[int, str, str]:
    """Exit code, output and errors of a launcher, which must end in time."""
    out, err = launcher.communicate(timeout=seconds)
    return launcher.returncode, out, err


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Poll until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def started(directory: Path, processes: int) -> dict[int, int]:
    """Process numbers by rank, once all have met."""
    files = [directory / f"rank-{rank}" for rank in range(processes)]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files), START_SECONDS)
    return {rank: int(file.read_text().split()[0]) for rank, file in enumerate(files)}


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits for its parent does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"

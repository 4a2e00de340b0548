"""A process that its launcher started ends with it, from its first moment on: the other imports take seconds."""

from __future__ import annotations

import os
import threading
import time

LAUNCHER_PID = "THREEFOLD_LAUNCHER_PID"
"""Set by our launcher: the process whose end is the end of its processes."""
EXIT_ORPHANED = 1
_WATCH_SECONDS = 0.5


def end_with_launcher() -> None:
    """From now on this process ends when the process that started it has; under our launcher, or torchrun's."""
    parent = int(os.environ.get(LAUNCHER_PID, 0)) or os.getppid()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def is_launched() -> bool:
    """Whether our launcher has started this process."""
    return LAUNCHER_PID in os.environ


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(EXIT_ORPHANED)

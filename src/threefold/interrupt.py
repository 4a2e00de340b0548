"""Ctrl-C while the libraries load, which takes seconds and would end in their traceback."""

import os
import signal
from types import FrameType


def heard_early() -> None:
    """From now on Ctrl-C ends the process at once, with one line and exit code 130."""
    signal.signal(signal.SIGINT, _leave)


def heard_normally() -> None:
    """From now on Ctrl-C is Python's KeyboardInterrupt again, which `cli.run_guarded` turns into one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signal_number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)

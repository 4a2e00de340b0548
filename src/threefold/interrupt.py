"""Signals: Ctrl-C while the libraries load, which takes seconds and would end in their traceback, and SIGTERM, with
which clusters and launchers ask a run to stop."""

import os
import signal
import time
from types import FrameType

EXIT_TERMINATED = 143
SAME_REQUEST_SECONDS = 5.0
"""SIGTERM may arrive twice, from the scheduler and passed on by the launcher: within this time it counts once."""

_requested_at: float | None = None


def heard_early() -> None:
    """From now on Ctrl-C ends the process at once, with one line and exit code 130."""
    signal.signal(signal.SIGINT, _leave)


def heard_normally() -> None:
    """From now on Ctrl-C is Python's KeyboardInterrupt again, which `cli.run_guarded` turns into one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def heard_as_request() -> None:
    """From now on SIGTERM is a request, see `stop_requested`; one that comes more than SAME_REQUEST_SECONDS after the
    first ends the process at once, with exit code 143."""
    signal.signal(signal.SIGTERM, _request)


def stop_requested() -> bool:
    """Whether SIGTERM has arrived: save, then leave."""
    return _requested_at is not None


def _leave(signal_number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def _request(signal_number: int, frame: FrameType | None) -> None:
    global _requested_at
    now = time.monotonic()
    if _requested_at is None:
        _requested_at = now
    elif now - _requested_at > SAME_REQUEST_SECONDS:
        os.write(2, b"\nterminated before its checkpoint was written\n")
        os._exit(EXIT_TERMINATED)

"""`threefold` and `python -m threefold`: the command line, with Ctrl-C heard from the first moment.

Loading the libraries takes seconds, and an interrupt in that time would end in their traceback.
"""

import os
import signal
from types import FrameType


def _leave(signal_number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


signal.signal(signal.SIGINT, _leave)

from threefold import cli  # noqa: E402


def main() -> int:
    """Run the command line with Python's own handling of Ctrl-C, which `cli` turns into one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())

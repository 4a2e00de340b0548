"""One process of a run, from its first act to its end: it leaves a record of what ended it, and never outlives its
launcher."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from threefold.interrupt import heard_as_request
from threefold.launch.failures import FINISHED_FILE, Failure, Kind, error_file, exit_code, failure_of, write_failure
from threefold.launch.orphans import end_with_launcher, is_launched

TROUBLE_FILE = "THREEFOLD_TROUBLE_FILE"
"""Set by our launcher: a file that appears when another machine has failed."""
LOST_PEER_SECONDS = 2.0
"""How long a process that lost another stays, so that the launcher sees the other's end first."""
_WATCH_SECONDS = 0.5
_TROUBLE_GRACE_SECONDS = 5.0
_STORE_SECONDS = 5.0


def work_as_rank(work: Callable[[], None]) -> NoReturn:
    """Do the work of one process that torchrun has started, and end the process.

    SIGTERM is a request (threefold.interrupt); Ctrl-C, the end of the launcher, and the failure of another machine end
    it at once. The interpreter is left without its usual clearing up, which gloo's threads do not always survive.
    """
    heard_as_request()
    _start_watching()
    with _Rank():
        work()
    raise AssertionError("a rank ends its process")


class _Rank:
    """Ends the process when the block ends, whatever ended it."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left to be saved
        sys.stdout.flush()
        if error is None:
            if (path := error_file()) is not None:
                path.with_name(FINISHED_FILE).touch()
            _leave(0)
        if isinstance(error, SystemExit):  # --help, say
            _leave(error.code if isinstance(error.code, int) else int(error.code is not None))
        failure = failure_of(error, *_numbers())
        _record(failure)
        if not is_launched():
            _report(failure)
        elif failure.rank > 0:  # whose stderr is a file; the launcher prints what is the cause
            sys.stderr.write(failure.trace)
        if not failure.kind.is_own:
            time.sleep(LOST_PEER_SECONDS)
        _leave(exit_code(failure.kind))


def _numbers() -> tuple[int, int]:
    """Rank of this process, and number of its machine."""
    return int(os.environ["RANK"]), int(os.environ.get("GROUP_RANK", 0))


def _record(failure: Failure) -> None:
    path = error_file()
    if path is not None:
        write_failure(failure, path)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_watching() -> None:
    """Watch from a thread of its own: the main one may be inside a collective operation, where it hears nothing."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _nothing)  # the watching thread hears it
    end_with_launcher()
    trouble = os.environ.get(TROUBLE_FILE, "")
    threading.Thread(target=_watch, args=(read_end, Path(trouble) if trouble else None), daemon=True).start()


def _nothing(signal_number: int, frame: FrameType | None) -> None:
    pass


def _watch(signals: int, trouble: Path | None) -> NoReturn:
    seen_at: float | None = None
    while True:
        ready, _, _ = select.select([signals], [], [], _WATCH_SECONDS)
        if ready and signal.SIGINT in os.read(signals, 64):
            os._exit(exit_code(Kind.INTERRUPTED))
        if trouble is not None and seen_at is None and trouble.exists():
            seen_at = time.monotonic()
        if seen_at is not None and time.monotonic() - seen_at > _TROUBLE_GRACE_SECONDS:
            _record(failure_of(ConnectionError("another machine has failed"), *_numbers()))
            os._exit(exit_code(Kind.LOST))


def _report(failure: Failure) -> None:
    """Without our launcher (plain torchrun, srun): say what happened, and what all processes say only once."""
    rank = failure.rank
    if failure.kind is Kind.MISTAKE:
        text = f"threefold: {failure.message}\n"
    elif failure.kind is Kind.PREEMPTED:
        text = f"{failure.message}\n"
    else:
        text = f"{failure.trace}threefold: rank {rank} (host {failure.host}): {failure.message}\n"
    if failure.kind not in (Kind.MISTAKE, Kind.PREEMPTED) or _is_first_to_say(failure.message, os.environ):
        sys.stderr.write(text)


def _is_first_to_say(message: str, environment: Mapping[str, str]) -> bool:
    """Whether no other process of the run has claimed this message; if nobody can be asked, it is said."""
    try:
        store = TCPStore(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )
        return bool(store.add(f"threefold/said/{message}", 1) == 1)
    except DistError:
        return True

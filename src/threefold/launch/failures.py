"""What ended a process of a run, as a record on disk, and which of several records is the cause of the others.

When one process dies, all others soon fail too, for they wait for it. So each says what it met, and a process that died
of itself (its own error, a signal) is the cause before any that only lost another.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from threefold.errors import Preempted, ThreefoldError
from threefold.interrupt import EXIT_TERMINATED

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
GO_ON = "run the same command again to go on from what was saved"


class Kind(StrEnum):
    """What ended a process, the likeliest cause of a run's end first."""

    MISTAKE = "mistake"  # ThreefoldError: the user can mend it
    BUG = "bug"  # any other error of its own
    KILLED = "killed"  # a signal, or an exit without a word
    PREEMPTED = "preempted"  # asked to stop, and saved
    INTERRUPTED = "interrupted"  # Ctrl-C
    GONE = "gone"  # a whole machine that is not heard of any more
    STALLED = "stalled"  # another did not come to a collective operation in time
    LOST = "lost"  # another went away
    TERMINATED = "terminated"  # the launcher ended it, because of another

    @property
    def is_own(self) -> bool:
        """Whether the process ended for a reason of its own, not because of another."""
        return self not in (Kind.STALLED, Kind.LOST, Kind.TERMINATED)


@dataclass(frozen=True)
class Failure:
    """How one process, or with rank -1 one machine, ended.

    Attributes:
        message: one line; what a ThreefoldError or Preempted says, or type and text of another error.
        trace: Python's traceback of a bug.
        time: of the record, seconds since 1970.
        node: number of its machine.
    """

    kind: Kind
    rank: int
    message: str
    host: str = ""
    trace: str = ""
    time: float = 0.0
    node: int = 0

    def text(self) -> str:
        """As JSON, for a file or for another machine."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str | bytes) -> Failure:
        """The inverse of `text`."""
        values = json.loads(text)
        return cls(**{**values, "kind": Kind(values["kind"])})


AGENT_PATIENCE_SECONDS = 20.0
"""torchrun's agent kills processes 30 s after it has asked them to end because another failed."""
_KILLED_BY_SIGKILL = "was killed by SIGKILL"
_HUNG = "did not end when it was asked to"


class RunFailed(Exception):  # noqa: N818 - one line about a process, not an error of this one
    """A process of the run ended by a signal or a bug; the command line prints the line and exits with code 1."""


_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|aborted)|broken pipe|closed by (remote )?peer|remote peer"
    r"|socket (error|timeout)|\bgloo\b|\bnccl\b|failed to (recv|send)|rendezvous|store->",
    re.IGNORECASE,
)
_STALLED = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_COLLECTIVE = re.compile(r"\b(recv|send|collective|watchdog|barrier|allreduce|broadcast|wait)", re.IGNORECASE)


def failure_of(error: BaseException, rank: int, node: int) -> Failure:
    """The record of an exception that a process ended with."""
    kinds = [kind for link in _chain(error) if (kind := _collective_kind(link)) is not None]
    first_line = " ".join(str(error).split())
    trace = ""
    if isinstance(error, Preempted):
        kind = Kind.PREEMPTED
    elif isinstance(error, KeyboardInterrupt):
        kind = Kind.INTERRUPTED
    elif kinds:
        kind = kinds[0]
    elif isinstance(error, ThreefoldError):
        kind = Kind.MISTAKE
    else:
        kind = Kind.BUG
        first_line = f"{type(error).__name__}: {first_line}"
    if kind in (Kind.BUG, Kind.LOST, Kind.STALLED):
        trace = "".join(traceback.format_exception(error))
    return Failure(kind, rank, first_line, socket.gethostname(), trace, time.time(), node)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _collective_kind(error: BaseException) -> Kind | None:
    """Whether this is what a collective operation raises because of another process."""
    if not isinstance(error, RuntimeError | ConnectionError | DistError) or isinstance(error, NotImplementedError):
        return None
    text = str(error)
    if _STALLED.search(text) and (isinstance(error, DistError) or _COLLECTIVE.search(text)):
        return Kind.STALLED
    if isinstance(error, DistError | ConnectionError) or _LOST.search(text):
        return Kind.LOST
    return None


def write_failure(failure: Failure, path: Path) -> None:
    """Write a record where torchrun's agent looks for it, in its form (its own report then shows the error too)."""
    extra = {"py_callstack": failure.trace or failure.message, "timestamp": str(int(failure.time))}
    record = {"message": {"message": failure.message, "extraInfo": extra}, "threefold": failure.text()}
    path.write_text(json.dumps(record), encoding="utf-8")


def read_failure(path: Path, node: int) -> Failure:
    """The record that `write_failure` wrote."""
    return replace(Failure.of_text(json.loads(path.read_text(encoding="utf-8"))["threefold"]), node=node)


def exit_code(kind: Kind) -> int:
    """What a process that ended so exits with."""
    return {
        Kind.MISTAKE: EXIT_MISTAKE,
        Kind.PREEMPTED: EXIT_TERMINATED,
        Kind.INTERRUPTED: EXIT_INTERRUPTED,
    }.get(kind, 1)


def collected(ended: Mapping[int, ProcessFailure], node: int) -> list[Failure]:
    """The records of the processes of this machine that did not end well.

    Args:
        ended: by rank, from torchrun's agent.
    """
    found = [_collected(rank, process, node) for rank, process in sorted(ended.items())]
    first = min((failure.time for failure in found), default=0.0)
    return [_by_the_agent(failure, first) for failure in found]


def _by_the_agent(failure: Failure, first: float) -> Failure:
    """A SIGKILL long after the first failure came from the agent, whose SIGTERM had no effect."""
    if failure.message.startswith(_KILLED_BY_SIGKILL) and failure.time - first > AGENT_PATIENCE_SECONDS:
        return replace(failure, kind=Kind.TERMINATED, message=_HUNG)
    return failure


def _collected(rank: int, process: ProcessFailure, node: int) -> Failure:
    data: Mapping[str, Any] = process.error_file_data
    if "threefold" in data:
        return replace(Failure.of_text(data["threefold"]), node=node)
    code = process.exitcode
    host = socket.gethostname()
    when = float(process.timestamp)
    if code == -signal.SIGTERM:
        return Failure(Kind.TERMINATED, rank, "was ended by SIGTERM", host, time=when, node=node)
    if code == EXIT_TERMINATED:
        return Failure(Kind.PREEMPTED, rank, f"ended by SIGTERM before its checkpoint was written; {GO_ON}", host)
    if code < 0:
        name = process.signal_name()
        memory = ", maybe because the machine ran out of memory" if code == -signal.SIGKILL else ""
        return Failure(Kind.KILLED, rank, f"was killed by {name}{memory}", host, time=when, node=node)
    if code == EXIT_INTERRUPTED:
        return Failure(Kind.INTERRUPTED, rank, "was interrupted", host, time=when, node=node)
    return Failure(Kind.KILLED, rank, f"ended with exit code {code} and no error of its own", host, "", when, node)


def cause(failures: list[Failure]) -> Failure:
    """The one that the others follow from: of the likeliest kind the earliest. Of processes that waited in vain the
    message names those that did not move."""
    order = list(Kind)
    first = min(failures, key=lambda failure: (order.index(failure.kind), failure.time, failure.rank))
    hung = [str(failure.rank) for failure in failures if failure.message == _HUNG]
    if first.kind is Kind.STALLED and hung:
        return replace(first, message=f"{first.message}; rank {', '.join(hung)} hung")
    return first


def line_of(failure: Failure, logs: str, collective_timeout_seconds: float) -> str:
    """One line for the user about what ended the run; `logs` is where the processes' output is kept."""
    who = f"rank {failure.rank} (host {failure.host})"
    if failure.kind in (Kind.MISTAKE, Kind.PREEMPTED):
        return failure.message
    if failure.kind is Kind.GONE:
        return f"{failure.message}; {GO_ON}"
    if failure.kind is Kind.BUG:
        return f"{who} failed: {_cut(failure.message)}; its output is in {logs}; {GO_ON}"
    if failure.kind is Kind.STALLED:
        return (
            f"{who} waited in vain for another process ({_cut(failure.message)}); launch.collective_timeout_seconds = "
            f"{collective_timeout_seconds:g}; the processes' output is in {logs}; {GO_ON}"
        )
    if failure.kind is Kind.LOST:
        return (
            f"{who} lost the connection to another process ({_cut(failure.message)}); the processes' output is in "
            f"{logs}; {GO_ON}"
        )
    return f"{who} {failure.message}; the processes' output is in {logs}; {GO_ON}"


def _cut(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


FINISHED_FILE = "finished"
"""Beside the record that a process would have left: it came to its end."""


def error_file() -> Path | None:
    """Where torchrun's agent looks for the record of this process; None where no agent started it."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(name) if name else None

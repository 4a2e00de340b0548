"""The launcher: runs torchrun's agent in this process, which starts the processes of this machine and watches them.

There are no restarts: a run that failed is started again by its user (or scheduler), and goes on from its checkpoint.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std

from threefold.config.scale import LaunchSection
from threefold.errors import Preempted, ThreefoldError
from threefold.launch.failures import (
    FINISHED_FILE,
    GO_ON,
    Failure,
    Kind,
    RunFailed,
    cause,
    collected,
    line_of,
    read_failure,
)
from threefold.launch.hostfile import Remotes
from threefold.launch.layout import Layout, threads_per_process
from threefold.launch.neighbours import NeighbourWatch
from threefold.launch.network import interface_to
from threefold.launch.orphans import LAUNCHER_PID
from threefold.launch.rendezvous import Meeting
from threefold.launch.worker import TROUBLE_FILE

MONITOR_SECONDS = 0.1
REMOTE_SECONDS = 30.0
"""How long other machines of a hostfile have to leave after this one."""
EXIT_BARRIER_SECONDS = 1.0
"""torchrun's wait for other agents; whether they finish well is heard from neighbours.NeighbourWatch."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch(
    command: Sequence[str], layout: Layout, settings: LaunchSection, digest: str, remotes: Remotes | None = None
) -> None:
    """Run `command` in every process of this machine, and return when all of the run have ended well.

    Args:
        command: program and arguments of each process, which calls worker.work_as_rank.
        layout: processes and machines.
        settings: for its time-outs.
        digest: of the recipe, compared with the other machines'.
        remotes: of the hostfile; started here.

    Raises:
        ThreefoldError: what the processes ran into, where the user can mend it; or the machines did not meet.
        Preempted: the run was asked to stop; its processes have saved.
        KeyboardInterrupt: Ctrl-C.
        RunFailed: a process ended by a bug or a signal; the message names it.
    """
    directory = Path(tempfile.mkdtemp(prefix="threefold-"))
    keeps_logs = False
    try:
        with _signals_heard(), _quiet_logging(), _environment(layout, directory):
            _Launch(command, layout, settings, digest, remotes, directory).run()
    except RunFailed:
        keeps_logs = True
        raise
    finally:
        if not keeps_logs:
            shutil.rmtree(directory, ignore_errors=True)


class _Launch:
    """One launch; see `launch`."""

    def __init__(
        self,
        command: Sequence[str],
        layout: Layout,
        settings: LaunchSection,
        digest: str,
        remotes: Remotes | None,
        directory: Path,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.directory = directory
        self.remotes = remotes
        trouble = remotes.failure if remotes is not None else lambda: ""
        self.meeting = Meeting(layout, settings.rdzv_timeout_seconds, digest, trouble, self._met)
        self.agent = _agent(command, layout, settings, self.meeting, directory)
        self.watch: NeighbourWatch | None = None

    def _met(self) -> None:
        if self.layout.nodes > 1:
            self.watch = NeighbourWatch(self.meeting, self._neighbour_failed)

    def _neighbour_failed(self, failure: Failure) -> None:
        trouble_file(self.directory).write_text(failure.text(), encoding="utf-8")

    def run(self) -> None:
        """Start everything, wait for its end, and raise what it was."""
        if self.remotes is not None:
            self.remotes.start()
        try:
            signal_number, failures = self._run_agent()
            if signal_number and not self._all_finished():
                self._conclude_asked(signal_number, failures)
            self._conclude(failures)
        finally:
            if self.watch is not None:
                self.watch.stop()
            if self.remotes is not None:
                self.remotes.finish(REMOTE_SECONDS)

    def _run_agent(self) -> tuple[int, list[Failure]]:
        """The signal that ended the agent, if one did, and how the processes ended that did not end well."""
        try:
            result = self.agent.run()
            return 0, collected(result.failures, self.layout.node_rank) if result.is_failed() else []
        except SignalException as error:
            records = self.directory.glob("**/error.json")
            return int(error.sigval), [read_failure(path, self.layout.node_rank) for path in records]
        finally:
            for number in _SIGNALS:  # what is left to do takes seconds, and a signal may not cut it short
                signal.signal(number, signal.SIG_IGN)

    def _all_finished(self) -> bool:
        """Whether every process here came to its end, though it had been asked to stop."""
        return len(list(self.directory.glob(f"**/{FINISHED_FILE}"))) == self.layout.processes

    def _conclude_asked(self, signal_number: int, failures: list[Failure]) -> NoReturn:
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        own = cause(failures) if failures else None
        if own is not None and own.kind in (Kind.MISTAKE, Kind.BUG):
            self._raise(own)
        if own is not None and own.kind is Kind.PREEMPTED:
            raise Preempted(own.message)
        name = signal.Signals(signal_number).name
        raise Preempted(f"stopped by {name} before a checkpoint could be written; {GO_ON}")

    def _conclude(self, failures: list[Failure]) -> None:
        if failures:
            own = cause(failures)
            if self.watch is not None and own.kind is not Kind.PREEMPTED:
                own = self.watch.cause(own)
            self._raise(own)
        if self.watch is not None:
            failure = self.watch.finished()
            if failure is not None:
                self._raise(failure)

    def _raise(self, failure: Failure) -> NoReturn:
        line = line_of(failure, str(self.directory), self.settings.collective_timeout_seconds)
        if failure.kind is Kind.MISTAKE:
            raise ThreefoldError(line)
        if failure.kind is Kind.PREEMPTED:
            raise Preempted(line)
        if failure.kind is Kind.BUG:
            sys.stderr.write(failure.trace)
        raise RunFailed(line)


def _agent(
    command: Sequence[str], layout: Layout, settings: LaunchSection, meeting: Meeting, directory: Path
) -> LocalElasticAgent:
    spec = WorkerSpec(
        role="rank",
        local_world_size=layout.processes,
        entrypoint=command[0],
        args=tuple(argument.replace("$", "$$") for argument in command[1:]),  # torchrun fills in $-names
        rdzv_handler=meeting,
        max_restarts=0,
        monitor_interval=MONITOR_SECONDS,
    )
    first = 1 if layout.node_rank == 0 else 0
    logs = DefaultLogsSpecs(log_dir=str(directory), redirects=dict.fromkeys(range(first, layout.processes), Std.ALL))
    options: dict[str, Any] = {"exit_barrier_timeout": EXIT_BARRIER_SECONDS}
    if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters:  # not in every torch of our range
        options["shutdown_timeout"] = math.ceil(settings.shutdown_seconds)
    return LocalElasticAgent(spec, logs, **options)


def trouble_file(directory: Path) -> Path:
    """What appears in a launch's directory when another machine has failed."""
    return directory / "trouble.json"


@contextmanager
def _environment(layout: Layout, directory: Path) -> Iterator[None]:
    """Set what the processes inherit; what the user has set stays."""
    before = dict(os.environ)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ[TROUBLE_FILE] = str(trouble_file(directory))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT"
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(layout.processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_to(layout.host))
    if not os.environ["GLOO_SOCKET_IFNAME"]:
        del os.environ["GLOO_SOCKET_IFNAME"]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals_heard() -> Iterator[None]:
    """A request to stop while the machines still meet; from the start of the processes on the agent hears signals.

    A closed terminal (SIGHUP) asks like SIGTERM, so that the processes save.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    signal.signal(signal.SIGTERM, _stop_before_start)
    signal.signal(signal.SIGHUP, _as_request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_before_start(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise Preempted(f"stopped by SIGTERM before training began; {GO_ON}")


def _as_request(signal_number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """torchrun's own reports of a failure are longer than ours and name no cause."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)

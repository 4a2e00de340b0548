"""Which record of several is the cause, and what a collective operation raises when another process has gone."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from threefold.errors import CheckpointError, ConfigError, Preempted
from threefold.launch.failures import Failure, Kind, cause, collected, failure_of, line_of, read_failure, write_failure


def raised(error: BaseException, under: BaseException | None = None) -> BaseException:
    """The error as it is caught, while another was being handled."""
    try:
        if under is None:
            raise error
        try:
            raise under
        except type(under) as inner:
            raise error from inner
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("run.seed = -1"), Kind.MISTAKE),
        (Preempted("saved"), Kind.PREEMPTED),
        (KeyboardInterrupt(), Kind.INTERRUPTED),
        (ZeroDivisionError("division by zero"), Kind.BUG),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), Kind.BUG),
        (NotImplementedError("socket timeout"), Kind.BUG),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31337"), Kind.LOST),
        (RuntimeError("[../third_party/gloo/pair.cc] Read error [::1]: Connection reset by peer"), Kind.LOST),
        (RuntimeError("[gloo/buffer.cc] Timed out waiting 5000ms for recv operation to complete"), Kind.STALLED),
        (RuntimeError("NCCL error in: NCCLUtils.cpp, remote process exited or there was a network error"), Kind.LOST),
        (RuntimeError("[Rank 0] Watchdog caught collective operation timeout: OpType=ALLREDUCE"), Kind.STALLED),
        (DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), Kind.LOST),
        (DistStoreError("wait timeout after 5000ms, keys: /x"), Kind.STALLED),
        (BrokenPipeError("[Errno 32] Broken pipe"), Kind.LOST),
    ],
)
def test_kinds_of_errors(error: BaseException, kind: Kind) -> None:
    failure = failure_of(raised(error), 3, 1)
    assert (failure.kind, failure.rank, failure.node) == (kind, 3, 1)
    assert bool(failure.trace) == (kind in (Kind.BUG, Kind.LOST, Kind.STALLED))
    assert Failure.of_text(failure.text()) == failure


def test_a_mistake_that_follows_from_a_lost_process_is_none() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert failure_of(raised(CheckpointError("cannot be written"), under=lost), 0, 0).kind is Kind.LOST


def test_what_stands_in_the_file_is_read_by_torchrun_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    failure = failure_of(raised(ZeroDivisionError("by zero")), 1, 0)
    write_failure(failure, path)
    process = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(path))
    assert process.timestamp == int(failure.time)
    assert json.dumps(process.message).count("ZeroDivisionError") >= 1
    assert collected({1: process}, 0) == [failure] == [read_failure(path, 0)]


def ended(exitcode: int, local_rank: int = 0, when: int = 0) -> ProcessFailure:
    process = ProcessFailure(local_rank=local_rank, pid=1, exitcode=exitcode, error_file="nowhere")
    process.timestamp = when or process.timestamp
    return process


def of_kind(kind: Kind, rank: int, time: float = 0.0) -> Failure:
    return Failure(kind, rank, f"message of {rank}", "host", time=time)


@pytest.mark.parametrize(
    ("exitcode", "kind", "part"),
    [
        (-9, Kind.KILLED, "SIGKILL, maybe because the machine ran out of memory"),
        (-11, Kind.KILLED, "SIGSEGV"),
        (-15, Kind.TERMINATED, "SIGTERM"),
        (1, Kind.KILLED, "exit code 1"),
        (130, Kind.INTERRUPTED, "interrupted"),
        (143, Kind.PREEMPTED, "before its checkpoint was written"),
    ],
)
def test_processes_that_left_no_record(exitcode: int, kind: Kind, part: str) -> None:
    (failure,) = collected({5: ended(exitcode)}, 2)
    assert (failure.kind, failure.rank) == (kind, 5)
    assert part in line_of(failure, "LOGS", 1800.0)


def test_a_process_that_died_of_itself_comes_before_those_that_lost_it() -> None:
    assert cause([of_kind(Kind.LOST, 0), of_kind(Kind.KILLED, 1, 5.0), of_kind(Kind.LOST, 2)]).rank == 1
    assert cause([of_kind(Kind.KILLED, 0), of_kind(Kind.BUG, 1)]).rank == 1
    assert cause([of_kind(Kind.BUG, 0, 2.0), of_kind(Kind.BUG, 1, 1.0)]).rank == 1
    assert cause([of_kind(Kind.PREEMPTED, 0), of_kind(Kind.MISTAKE, 1)]).rank == 1
    assert cause([of_kind(Kind.TERMINATED, 0), of_kind(Kind.LOST, 1)]).rank == 1


def test_a_process_that_the_agent_had_to_kill_is_not_the_cause_but_is_named() -> None:
    """torchrun's agent asks with SIGTERM and kills 30 s later."""
    stalled = of_kind(Kind.STALLED, 0, time=1000.0)
    killed = collected({0: ended(1, when=1000), 1: ended(-9, 1, when=1031)}, 0)[1]
    assert killed.kind is Kind.TERMINATED
    found = cause([stalled, killed])
    assert (found.rank, found.message) == (0, "message of 0; rank 1 hung")
    at_once = collected({0: ended(1, when=1000), 1: ended(-9, 1, when=1001)}, 0)[1]
    assert at_once.kind is Kind.KILLED


def test_lines_name_rank_host_cause_logs_and_what_to_do() -> None:
    line = line_of(Failure(Kind.BUG, 3, "ValueError: x", "gpu7"), "LOGS", 1800.0)
    assert line.startswith(
        "rank 3 (host gpu7) failed: ValueError: x; its output is in LOGS; run the same command again"
    )
    assert line_of(Failure(Kind.MISTAKE, 3, "run.seed", "gpu7"), "LOGS", 1800.0) == "run.seed"
    stalled = line_of(Failure(Kind.STALLED, 0, "Timed out", "gpu7"), "LOGS", 1800.0)
    assert "launch.collective_timeout_seconds = 1800" in stalled


def test_a_real_error_of_gloo_is_recognised() -> None:
    """A store that is not there."""
    with pytest.raises(RuntimeError) as caught:
        torch.distributed.TCPStore("127.0.0.1", 1, is_master=False, timeout=timedelta(seconds=1))
    assert not failure_of(caught.value, 0, 0).kind.is_own

"""What becomes of a launch when its processes end well, fail, are killed, or are asked to stop: real processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.launch.processes import end_of, is_alive, start_launcher, started, wait_until
from threefold.config.scale import LaunchSection
from threefold.errors import ThreefoldError
from threefold.launch.agent import launch
from threefold.launch.failures import RunFailed
from threefold.launch.layout import Layout

WORKER = Path(__file__).with_name("worker_script.py")
ORPHAN_SECONDS = 10.0


def run(what: str, directory: Path, processes: int = 2) -> None:
    command = [sys.executable, str(WORKER), what, str(directory), "$HOME $$ ${local_rank}"]
    launch(command, Layout(processes), LaunchSection(), "digest")


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a launch keeps what its processes print."""
    directory = tmp_path / "logs"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


def test_processes_meet_share_the_cores_and_leave_nothing(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    environment = dict(os.environ)
    run("well", tmp_path)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text().split()[1:] == ["3", str(threads)]
    assert capfd.readouterr() == ("all is well\n", "")
    assert list(logs.iterdir()) == []
    assert before == {number: signal.getsignal(number) for number in before}
    assert environment == dict(os.environ)


@pytest.mark.parametrize(
    ("what", "line"), [("mistake", "run.seed = -1 is no seed"), ("own mistake", "only this one cannot read the file")]
)
def test_a_mistake_is_said_once_whether_all_make_it_or_one(
    tmp_path: Path, logs: Path, capfd: pytest.CaptureFixture[str], what: str, line: str
) -> None:
    with pytest.raises(ThreefoldError) as caught:
        run(what, tmp_path)
    assert str(caught.value) == line
    assert capfd.readouterr() == ("", "")
    assert list(logs.iterdir()) == []


def test_a_bug_of_one_process_is_named_with_its_traceback(
    tmp_path: Path, logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        RunFailed, match=r"^rank 1 \(host .+\) failed: ZeroDivisionError: division of all things; "
    ) as e:
        run("bug", tmp_path)
    kept = next(logs.iterdir())
    assert f"its output is in {kept}" in str(e.value)
    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division of all things\n")
    assert err.count("Traceback") == 1
    assert any("Connection" in file.read_text() or file.stat().st_size for file in kept.glob("**/1/stderr.log"))


def test_an_exit_without_a_word_is_named(tmp_path: Path, logs: Path) -> None:
    with pytest.raises(RunFailed, match=r"^rank 1 \(host .+\) ended with exit code 7 and no error of its own; "):
        run("exit", tmp_path)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_by_the_one_that_waited(tmp_path: Path, logs: Path) -> None:
    """5 s until the collective operation times out, and 30 that torchrun gives the other to end."""
    with pytest.raises(
        RunFailed, match=r"^rank 0 .+ waited in vain for another process \(.*; rank 1 hung\); launch.coll"
    ):
        run("stall", tmp_path)


def test_a_killed_process_ends_the_run(tmp_path: Path) -> None:
    launcher = start_launcher("train", tmp_path, 2)
    pids = started(tmp_path, 2)
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = end_of(launcher)
    assert code == 1
    assert err.startswith("threefold: rank 1 (host ")
    assert "was killed by SIGKILL, maybe because the machine ran out of memory" in err
    assert "run the same command again" in err
    assert err.count("\n") == 1, err
    assert not any(is_alive(pid) for pid in pids.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_sigterm_reaches_all_processes_which_save_and_the_exit_code_is_143(
    tmp_path: Path, number: signal.Signals
) -> None:
    launcher = start_launcher("train", tmp_path, 2)
    pids = started(tmp_path, 2)
    launcher.send_signal(number)
    assert end_of(launcher) == (143, "", "stopped by SIGTERM, saved\n")
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text()
    assert not any(is_alive(pid) for pid in pids.values())
    assert list((tmp_path / "logs").iterdir()) == []


def test_sigterm_of_one_process_stops_all(tmp_path: Path) -> None:
    launcher = start_launcher("train", tmp_path, 2)
    os.kill(started(tmp_path, 2)[1], signal.SIGTERM)
    assert end_of(launcher) == (143, "", "stopped by SIGTERM, saved\n")


def test_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    launcher = start_launcher("train", tmp_path, 2)
    pids = started(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    code, _, err = end_of(launcher, 15.0)
    assert (code, err) == (130, "\ninterrupted\n")
    assert not any(is_alive(pid) for pid in pids.values())


def test_a_killed_launcher_leaves_no_orphans(tmp_path: Path) -> None:
    launcher = start_launcher("train", tmp_path, 2)
    pids = started(tmp_path, 2)
    launcher.kill()
    end_of(launcher)
    wait_until(lambda: not any(is_alive(pid) for pid in pids.values()), ORPHAN_SECONDS)

"""The three steps in processes of their own: the tiny recipe through the command, killed, stopped, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.processes import DEADLINE_SECONDS, START_SECONDS, is_alive, wait_until
from tests.ranks import free_port
from tests.tiny import MODELS, same_weights, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NODE = ("--launch.deployment=single_node", "--launch.processes_per_node=2")
LONG = ("--sft.epochs=20", "--sft.max_steps=40", "--sft.eval_every=40", "--checkpoint.every_steps=1")


@pytest.fixture
def commands() -> Iterator[list[subprocess.Popen[str]]]:
    """What a test has started; none of it outlives the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for command in started:
        command.kill()
        command.wait()


def train(
    commands: list[subprocess.Popen[str]], recipe: Path, output: Path, *flags: str, prefix: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-m", "threefold", "train", str(recipe), "--output-dir", str(output), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands.append(
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )
    return commands[-1]


def finished(command: subprocess.Popen[str], seconds: float = START_SECONDS) -> tuple[int, str]:
    _, err = command.communicate(timeout=seconds)
    return command.returncode, err


def processes_of(command: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def steps_logged(output: Path) -> int:
    """Lines of metrics of step 1 so far."""
    file = output / "metrics.jsonl"
    if not file.is_file():
        return 0
    return sum('"sft/loss"' in line for line in file.read_text().splitlines())


def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(
    tmp_path: Path, commands: list[subprocess.Popen[str]]
) -> None:
    recipe, output = write_recipe(tmp_path / "tiny.toml", *NODE, *LONG), tmp_path / "run"
    command = train(commands, recipe, output, "--step", "1")
    wait_until(lambda: steps_logged(output) >= 5, START_SECONDS)
    pids = processes_of(command)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    code, err = finished(command, DEADLINE_SECONDS)
    assert (code, err.count("\n")) == (1, 1), err
    assert "threefold: rank 1 (host " in err
    assert "SIGKILL" in err
    assert time.monotonic() - killed < DEADLINE_SECONDS
    assert not any(is_alive(pid) for pid in pids)
    command = train(commands, recipe, output, "--step", "1")
    assert finished(command) == (0, "")
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert any(event.get("event") == "resume" for event in events)
    uninterrupted = tmp_path / "uninterrupted"
    assert finished(train(commands, recipe, uninterrupted, "--step", "1")) == (0, "")
    assert same_weights(output / "sft", uninterrupted / "sft")


def test_sigterm_saves_and_exits_143_in_one_process_and_in_two(
    tmp_path: Path, commands: list[subprocess.Popen[str]]
) -> None:
    for name, flags in (("one", ()), ("two", NODE)):
        recipe, output = write_recipe(tmp_path / f"{name}.toml", *flags, *LONG), tmp_path / name
        command = train(commands, recipe, output, "--step", "1")
        wait_until(lambda output=output: steps_logged(output) >= 5, START_SECONDS)  # type: ignore[misc]
        command.send_signal(signal.SIGTERM)
        code, err = finished(command, DEADLINE_SECONDS)
        assert (code, err.count("\n")) == (143, 1), err
        assert finished(train(commands, recipe, output, "--step", "1")) == (0, "")


def test_a_mistake_is_said_once_by_two_processes(tmp_path: Path, commands: list[subprocess.Popen[str]]) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", *NODE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    code, err = finished(train(commands, recipe, tmp_path / "other"))
    assert (code, err.count("\n")) == (2, 1), err
    assert "is not empty and holds no run" in err


def test_two_machines_train_one_is_killed_and_the_run_goes_on(
    tmp_path: Path, commands: list[subprocess.Popen[str]]
) -> None:
    """All three steps on two launchers with two processes each; one launcher is killed in step 1."""
    recipe, output = write_recipe(tmp_path / "tiny.toml", *LONG, "--parallel.actor.zero_stage=2"), tmp_path / "run"

    def both() -> list[subprocess.Popen[str]]:
        port = free_port()
        where = ("--nnodes", "2", "--nproc-per-node", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
        return [train(commands, recipe, output, *where, "--node-rank", str(node)) for node in range(2)]

    machines = both()
    wait_until(lambda: steps_logged(output) >= 5, START_SECONDS)
    machines[1].kill()
    code, err = finished(machines[0], DEADLINE_SECONDS)
    assert code == 1
    assert "threefold: machine 1 (host " in err, err
    machines = both()
    assert [finished(command, 3 * START_SECONDS)[0] for command in machines] == [0, 0]
    assert all((output / name / "model.safetensors").is_file() for name in MODELS.values())


def test_a_hostfile_starts_both_machines(tmp_path: Path, commands: list[subprocess.Popen[str]]) -> None:
    """The remote shell is one that runs its command here."""
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nexec sh -c "$2"\n')
    shell.chmod(0o755)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=2\n")
    recipe, output = write_recipe(tmp_path / "tiny.toml"), tmp_path / "run"
    flags = ("--hostfile", str(hostfile), f"--launch.remote_shell={shell}", "--step", "1")
    code, err = finished(train(commands, recipe, output, *flags), 3 * START_SECONDS)
    assert (code, err) == (0, ""), err
    assert json.loads((output / "run.json").read_text())["environment"]["processes"] == 3

"""Hostfiles: what is refused, where, and what is run on the other machines."""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import sys
import time
from pathlib import Path

import pytest

from threefold.errors import ConfigError
from threefold.launch.hostfile import Host, Remotes, read_hostfile

HERE = socket.gethostname()


def hostfile(directory: Path, text: str) -> str:
    path = directory / "hosts"
    path.write_text(text)
    return str(path)


def test_machines_in_order_with_their_slots(tmp_path: Path) -> None:
    path = hostfile(tmp_path, f"# the cluster\n{HERE} slots=8\n\nother.example   slots = 4  # half a machine\n")
    assert read_hostfile(path) == [Host(HERE, 8, f"{path}:2"), Host("other.example", 4, f"{path}:4")]


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        (f"{HERE} slots=2\nb slots=0\n", 2, ["'b'", "slots=0", "at least 1"]),
        (f"{HERE} slots=2\nb slots=-3\n", 2, ["'b'", "slots=-3"]),
        (f"{HERE} slots=2\nb slots=two\n", 2, ["'b slots=two'", '"HOST slots=N"']),
        (f"{HERE} slots=2\nb\n", 2, ["'b'", '"HOST slots=N"']),
        (f"{HERE} slots=2\n-oProxyCommand=x slots=1\n", 2, ["-oProxyCommand", '"HOST slots=N"']),
        (f"{HERE} slots=2\nb slots=1\n\nb slots=2\n", 4, ["'b' is there already", "hosts:2"]),
        ("no-such-host.invalid slots=2\n", 1, ["no-such-host.invalid", "is not this machine", repr(HERE)]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, line: int, parts: list[str]) -> None:
    path = hostfile(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no machine"):
        read_hostfile(hostfile(tmp_path, "# nothing\n"))
    with pytest.raises(ConfigError, match=r"launch\.hostfile = .*nowhere.* cannot be read"):
        read_hostfile(str(tmp_path / "nowhere"))


@pytest.fixture
def shell(tmp_path: Path) -> str:
    """A remote shell that runs the command here and writes down for which host: `SHELL HOST COMMAND`, as ssh."""
    path = tmp_path / "shell of the test"
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = gone ]; then echo "no route to host gone" >&2; exit 255; fi\n'
        f'if [ "$1" = slow ]; then exec sleep 60; fi\n'
        f'echo "$1" >> {shlex.quote(str(tmp_path))}/asked\nexec sh -c "$2"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return shlex.quote(str(path))


def remotes(shell: str, names: list[str], arguments: list[str]) -> Remotes:
    hosts = [Host(name, 2, f"hosts:{number}") for number, name in enumerate(names, start=2)]
    return Remotes(hosts, shell, arguments, (HERE, 29500))


def test_each_machine_is_asked_before_anything_starts(shell: str, tmp_path: Path) -> None:
    remotes(shell, ["b", "c"], []).check()
    assert sorted((tmp_path / "asked").read_text().split()) == ["b", "c"]


def test_a_machine_that_cannot_be_reached_is_named(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        remotes(shell, ["b", "gone"], []).check()
    assert str(caught.value).startswith("hosts:3: host 'gone' cannot be used through")
    assert "(no route to host gone)" in str(caught.value)
    assert "is the hostfile up to date?" in str(caught.value)
    monkeypatch.setattr("threefold.launch.hostfile.REACH_SECONDS", 0.5)
    with pytest.raises(
        ConfigError, match=r"hosts:2: host 'slow' gave no answer to .* within 0\.5 s; is the hostfile up"
    ):
        remotes(shell, ["slow"], []).check()
    with pytest.raises(ConfigError, match=r"launch\.remote_shell = 'no-such-shell' cannot be run"):
        remotes("no-such-shell", ["b"], []).check()


def test_the_command_arrives_with_its_quoting_and_no_secrets(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In place of Python a script that shows what it was given."""
    seen = tmp_path / "seen"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.getcwd(), dict(os.environ)], open({str(seen)!r}, 'w'))\n"
        "print('a line of the other machine'); sys.exit(3)\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("NCCL_DEBUG", "two words; 'quoted'")
    monkeypatch.setenv("HF_TOKEN", "secret")
    commands: list[str] = []
    started = remotes(shell, ["b"], ["train", "my recipe.toml", "--run.name=$HOME `x`"])
    run = started._run
    monkeypatch.setattr(started, "_run", lambda host, command: commands.append(command) or run(host, command))
    started.start()
    end = time.monotonic() + 30
    while not started.failure() and time.monotonic() < end:
        time.sleep(0.05)
    arguments, directory, environment = json.loads(seen.read_text())
    assert arguments == [
        "-P", "-m", "threefold", "train", "my recipe.toml", "--run.name=$HOME `x`", "--launch.hostfile=",
        "--launch.nodes=2", "--launch.node_rank=1", f"--launch.rdzv_endpoint={HERE}:29500",
        "--launch.processes_per_node=2",
    ]  # fmt: skip
    assert (directory, environment["NCCL_DEBUG"]) == (os.getcwd(), "two words; 'quoted'")
    assert "secret" not in commands[0]
    started.finish(10.0)
    while "b: a line of the other machine\n" not in capfd.readouterr().err:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert started.failure() == "hosts:2: threefold ended on host 'b': a line of the other machine"

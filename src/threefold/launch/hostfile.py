"""Machines of a run in a file, and starting threefold on them: the first machine starts the others."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from threefold.errors import ConfigError
from threefold.launch.network import is_this_machine

REACH_SECONDS = 30.0
"""How long a machine has to answer the first command."""
_PASSED_ON = ("NCCL_", "GLOO_", "HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "PYTHONPATH", "TOKENIZERS_")
_SECRET = re.compile("TOKEN$|KEY|SECRET|PASSWORD")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a machine, its number of processes, and FILE:LINE."""

    name: str
    slots: int
    where: str


def read_hostfile(path: str) -> list[Host]:
    """The machines of a hostfile, `HOST slots=N` a line, of which the first is this one.

    Raises:
        ConfigError: no such file, no machine in it, a line of another form, a machine twice, or the first is not this.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.hostfile = {path!r} cannot be read ({error}); name a text file") from error
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#")[0].strip()
        if content:
            hosts.append(_host(content, f"{path}:{number}"))
            twice = [host for host in hosts[:-1] if host.name == hosts[-1].name]
            if twice:
                raise ConfigError(
                    f"{hosts[-1].where}: host {hosts[-1].name!r} is there already ({twice[0].where}); give each "
                    "machine one line with all its slots"
                )
    if not hosts:
        raise ConfigError(f'{path}: names no machine; write a line "HOST slots=N" for each')
    if not is_this_machine(hosts[0].name):
        raise ConfigError(
            f"{hosts[0].where}: the first host, {hosts[0].name!r}, is not this machine, {socket.gethostname()!r}: "
            "start the run there, or put this machine first"
        )
    return hosts


def _host(content: str, where: str) -> Host:
    found = re.fullmatch(r"(\S+)\s+slots\s*=\s*(-?\d+)", content)
    if found is None or found[1].startswith("-"):
        raise ConfigError(f'{where}: {content!r} is not "HOST slots=N"')
    if int(found[2]) <= 0:
        raise ConfigError(f"{where}: host {found[1]!r} has slots={found[2]}: give at least 1, or take the line out")
    return Host(found[1], int(found[2]), where)


class Remotes:
    """threefold on the other machines of a hostfile, each behind its remote shell.

    Args:
        hosts: to start it on.
        shell: launch.remote_shell.
        arguments: of `threefold` here; each machine gets them with its own number.
        endpoint: where they meet.
    """

    def __init__(self, hosts: Sequence[Host], shell: str, arguments: Sequence[str], endpoint: tuple[str, int]) -> None:
        self.hosts = hosts
        self.shell = shlex.split(shell)
        self.arguments = arguments
        self.endpoint = endpoint
        self.started: list[subprocess.Popen[str]] = []
        self.last_lines: dict[str, str] = {}

    def check(self) -> None:
        """Ask every machine whether it has this directory and this Python, before anything starts.

        Raises:
            ConfigError: one cannot be reached, or has them not.
        """
        question = f"cd {shlex.quote(os.getcwd())} && test -x {shlex.quote(sys.executable)}"
        asked = [(host, self._run(host, question)) for host in self.hosts]
        end = time.monotonic() + REACH_SECONDS
        try:
            for host, process in asked:
                self._demand_answer(host, process, end)
        finally:
            for _, process in asked:
                process.kill()
                process.communicate()

    def _demand_answer(self, host: Host, process: subprocess.Popen[str], end: float) -> None:
        command = shlex.join([*self.shell, host.name])
        stale = "is the hostfile up to date?"
        try:
            output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"{host.where}: host {host.name!r} gave no answer to `{command}` within {REACH_SECONDS:g} s; {stale}"
            ) from error
        if process.returncode:
            said = " ".join(output.split())[-200:] or f"exit code {process.returncode}"
            raise ConfigError(
                f"{host.where}: host {host.name!r} cannot be used through `{command}` ({said}): it must be reachable "
                f"without a password, with {os.getcwd()} and {sys.executable} as here; {stale}"
            )

    def start(self) -> None:
        """Start threefold on every machine; what it prints appears here behind the machine's name."""
        host, port = self.endpoint
        for number, machine in enumerate(self.hosts, start=1):
            own = {
                "hostfile": "",
                "nodes": len(self.hosts) + 1,
                "node_rank": number,
                "rdzv_endpoint": f"{host}:{port}",
                "processes_per_node": machine.slots,
            }
            flags = [f"--launch.{name}={value}" for name, value in own.items()]
            command = [sys.executable, "-P", "-m", "threefold", *self.arguments, *flags]
            text = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join(_environment())} {shlex.join(command)}"
            process = self._run(machine, text)
            self.started.append(process)
            threading.Thread(target=self._pass_on, args=(machine.name, process), daemon=True).start()

    def _run(self, host: Host, command: str) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                [*self.shell, host.name, command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the first machine, which ends the others in order
            )
        except OSError as error:
            raise ConfigError(f"launch.remote_shell = {shlex.join(self.shell)!r} cannot be run: {error}") from error

    def _pass_on(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.last_lines[name] = line.strip() or self.last_lines.get(name, "")
            sys.stderr.write(f"{name}: {line}")
            sys.stderr.flush()

    def failure(self) -> str:
        """What went wrong on a machine whose threefold has ended before the run began; empty while all are well."""
        for host, process in zip(self.hosts, self.started, strict=True):
            if process.poll():
                said = self.last_lines.get(host.name) or f"exit code {process.returncode}"
                return f"{host.where}: threefold ended on host {host.name!r}: {said}"
        return ""

    def finish(self, seconds: float) -> None:
        """Wait for the machines to leave, and after a time let go of those that do not."""
        end = time.monotonic() + seconds
        for process in self.started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _environment() -> list[str]:
    """Variables that change what the libraries do, for the other machines: no secrets, others can read a command."""
    return [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_PASSED_ON) and not _SECRET.search(name)
    ]

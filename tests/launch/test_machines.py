"""Two machines: a launcher each, which meet at an address, notice each other's failures, and end together.

They are two launchers here, or network namespaces with an address each where the test may make them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.processes import end_of, is_alive, start_launcher, started, wait_until
from tests.ranks import free_port
from threefold.errors import ConfigError
from threefold.launch.layout import Layout
from threefold.launch.neighbours import NeighbourWatch
from threefold.launch.rendezvous import Meeting

ADDRESSES = ("10.213.0.1", "10.213.0.2")
ORPHAN_SECONDS = 10.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a cable; the commands that run something in each."""
    names = [f"threefold-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"tf{os.getpid() % 100000}{end}" for end in "ab"]
    try:
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("netns", "add", name)
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def two_machines(what: str, directory: Path, processes: int = 1) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start_launcher(what, directory, processes, 2, node, "127.0.0.1", port) for node in range(2)]


def test_a_killed_process_is_named_on_both_machines(tmp_path: Path) -> None:
    machines = two_machines("train", tmp_path)
    pids = started(tmp_path, 2)
    os.kill(pids[1], signal.SIGKILL)
    ends = [end_of(machine) for machine in machines]
    for code, _, err in ends:
        assert code == 1
        assert err.startswith("threefold: rank 1 (host "), err
        assert "was killed by SIGKILL" in err
    assert not any(is_alive(pid) for pid in pids.values())


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_launcher_ends_the_other_machine_too(tmp_path: Path, victim: int) -> None:
    machines = two_machines("train", tmp_path)
    pids = started(tmp_path, 2)
    machines[victim].kill()
    code, _, err = end_of(machines[1 - victim])
    assert code == 1
    assert f"threefold: machine {victim} (host {socket.gethostname()}) is not heard of any more" in err, err
    end_of(machines[victim])
    wait_until(lambda: not any(is_alive(pid) for pid in pids.values()), ORPHAN_SECONDS)


@pytest.mark.slow
def test_machines_with_addresses_of_their_own(tmp_path: Path, namespaces: list[list[str]]) -> None:
    """Two processes on each of two machines meet; a machine that is cut off is noticed though no connection is
    closed."""
    port = 29511
    machines = [
        start_launcher("train", tmp_path, 2, 2, node, ADDRESSES[0], port, prefix=prefix)
        for node, prefix in enumerate(namespaces)
    ]
    pids = started(tmp_path, 4)
    assert (tmp_path / "rank-3").read_text().split()[1] == "10"
    ip("-n", namespaces[1][-1], "link", "set", "lo", "down")
    interface = subprocess.run([*namespaces[1], "ls", "/sys/class/net"], capture_output=True, text=True).stdout.split()
    ip("-n", namespaces[1][-1], "link", "set", next(name for name in interface if name.startswith("tf")), "down")
    ends = [end_of(machine) for machine in machines]
    assert "machine 1 (host" in ends[0][2], ends
    assert "machine 0 (host" in ends[1][2], ends
    assert not any(is_alive(pid) for pid in pids.values())


def meetings(*layouts: Layout, digests: tuple[str, ...] = ("a", "a"), seconds: float = 20.0) -> list[str]:
    """What each of several machines that try to meet runs into; empty where it meets the others."""
    said = [""] * len(layouts)

    def meet(number: int) -> None:
        try:
            Meeting(layouts[number], seconds, digests[number]).next_rendezvous()
        except ConfigError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(len(layouts))]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    return said


def machine(node: int, port: int, nodes: int = 2) -> Layout:
    return Layout(1, nodes, node, "127.0.0.1", port)


def test_an_address_that_does_not_answer_is_named() -> None:
    port = free_port()
    (said,) = meetings(machine(1, port), seconds=1.0)
    assert said.startswith(f"launch.rdzv_endpoint = 127.0.0.1:{port} could not be reached within")
    assert "rdzv_timeout_seconds = 1 (" in said
    assert "refused" in said


def test_a_name_that_does_not_resolve_is_named() -> None:
    (said,) = meetings(Layout(1, 2, 1, "no-such-host.invalid", 29500), seconds=1.0)
    assert said.startswith("launch.rdzv_endpoint = no-such-host.invalid:29500 could not be reached")


def test_a_machine_that_does_not_come_is_named() -> None:
    port = free_port()
    (said,) = meetings(machine(0, port, nodes=3), seconds=1.0)
    assert said.startswith(f"launch.nodes = 3, and only 1 met at 127.0.0.1:{port} within")
    assert "missing is --node-rank 1, 2" in said


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (said,) = meetings(machine(0, port))
    assert said.startswith(f"launch.rdzv_endpoint = 127.0.0.1:{port}: this machine cannot listen there (the port is in")


def test_two_machines_with_one_number_and_another_recipe_are_refused() -> None:
    port = free_port()
    assert (
        "launch.node_rank = 1: another machine"
        in meetings(
            machine(0, port, 3), machine(1, port, 3), machine(1, port, 3), digests=("a", "a", "a"), seconds=3.0
        )[2]
    )
    said = meetings(machine(0, port), machine(1, port), digests=("a", "b"))
    assert all("runs another recipe" in text for text in said), said
    said = meetings(machine(0, port), machine(1, port, nodes=3), seconds=3.0)
    assert "launch.nodes = 2 here, and 3 on machine 1" in said[0]


def test_machines_that_are_alike_meet() -> None:
    port = free_port()
    assert meetings(machine(0, port), machine(1, port)) == ["", ""]


def ends_of(port: int, offsets: tuple[float, ...]) -> list[str]:
    """What each of some machines, which meet and finish so many seconds later, says of the others; the first machine's
    store goes as soon as it has left."""
    said = ["?"] * len(offsets)

    def live(number: int) -> None:
        meeting = Meeting(machine(number, port, len(offsets)), 20.0, "a")
        meeting.next_rendezvous()
        watch = NeighbourWatch(meeting, lambda failure: None)
        time.sleep(offsets[number])
        found = watch.finished()
        said[number] = "" if found is None else found.message
        meeting._store = None

    threads = [threading.Thread(target=live, args=(number,)) for number in range(len(offsets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_machines_that_finish_one_after_the_other_miss_nobody() -> None:
    cases = [(a / 10, b / 10) for a in (0, 3, 6) for b in (0, 2, 4)] + [(0.1, 0.7, 0.3)]
    ports: set[int] = set()
    while len(ports) < len(cases):
        ports.add(free_port())
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ends_of, sorted(ports), cases)) == [[""] * len(case) for case in cases]

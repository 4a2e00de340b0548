"""The whole pipeline on two machines, of which one is then lost: does the other notice, and does the run go on?

    python -m benchmarks.two_machines                                   the demo, 2 machines of 2 processes, ZeRO 3
    python -m benchmarks.two_machines --recipe my.toml -- --ppo.iterations 4

The machines are network namespaces of this one, each with an address, joined by a cable; where they may not be made
(they need root on Linux), launchers that meet on the loopback interface. Three runs: one that nobody disturbs; one
whose second launcher is killed (SIGKILL) in step 3; and the same command again, which has to end with the very weights
of the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

ADDRESSES = ("10.214.0.1", "10.214.0.2")
MODELS = ("sft", "reward", "ppo/actor", "ppo/actor_ema", "ppo/critic")
SPREAD = (
    *("--parallel.actor.zero_stage", "3", "--parallel.reward.zero_stage", "2", "--parallel.critic.zero_stage", "1"),
    *("--parallel.reference.zero_stage", "3", "--checkpoint.every_steps", "10"),
)


@dataclass(frozen=True)
class Machines:
    """How to run something on each of two machines, and where they meet."""

    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    address: str
    kind: str


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def machines() -> Iterator[Machines]:
    """Two namespaces, or where there can be none, this machine twice."""
    names = tuple(f"threefold-{os.getpid()}-{number}" for number in range(2))
    cables = tuple(f"tfb{os.getpid() % 100000}{end}" for end in "ab")
    try:
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    except (OSError, subprocess.CalledProcessError):
        yield Machines(((), ()), "127.0.0.1", "two launchers on the loopback interface")
        return
    try:
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            _ip("netns", "add", name)
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        first, second = (("ip", "netns", "exec", name) for name in names)
        yield Machines((first, second), ADDRESSES[0], "two network namespaces")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(where: Machines, recipe: str, output: Path, overrides: Sequence[str]) -> list[subprocess.Popen[str]]:
    """`threefold train` on both machines."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "threefold", "train", recipe, "--output-dir", str(output)]
    meeting = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-endpoint", f"{where.address}:{port}"]
    return [
        subprocess.Popen(
            [*where.prefixes[node], *command, *meeting, "--node-rank", str(node), *SPREAD, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]


def finish(launchers: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    outputs = [launcher.communicate()[0] for launcher in launchers]
    return [(launcher.returncode, output) for launcher, output in zip(launchers, outputs, strict=True)]


def step_of(run: Path) -> int:
    """Iterations of step 3 that are done; -1 before its start."""
    path, step = run / "metrics.jsonl", -1
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line) if line.endswith("}") else {}
        if record.get("stage") == "ppo" and "step" in record:
            step = record["step"]
    return step


def digests(run: Path) -> dict[str, str]:
    """sha256 of each model's weights."""
    return {name: hashlib.sha256((run / name / "model.safetensors").read_bytes()).hexdigest() for name in MODELS}


def _whole_run(where: Machines, recipe: str, output: Path, overrides: Sequence[str]) -> None:
    started = time.perf_counter()
    for node, (code, text) in enumerate(finish(start(where, recipe, output, overrides))):
        if code:
            sys.exit(f"machine {node} ended with exit code {code}:\n{text[-3000:]}")
    print(f"{output.name}: finished in {time.perf_counter() - started:.0f} s")


def _lost_machine(where: Machines, recipe: str, output: Path, overrides: Sequence[str], at: int) -> None:
    launchers = start(where, recipe, output, overrides)
    while step_of(output) < at:
        if any(launcher.poll() is not None for launcher in launchers):
            sys.exit(f"the run ended before iteration {at}:\n{finish(launchers)}")
        time.sleep(0.2)
    os.kill(_launcher_of(launchers[1].pid), signal.SIGKILL)
    killed = time.perf_counter()
    code = launchers[0].wait()
    seconds = time.perf_counter() - killed
    text = launchers[0].communicate()[0]
    print(f"{output.name}: second launcher killed after iteration {step_of(output)} of step 3;")
    print(f"  the first machine ended {seconds:.1f} s later with exit code {code}:")
    print("  " + "\n  ".join(line for line in text.splitlines() if line.startswith("threefold:")))
    if code == 0 or seconds > 60:
        sys.exit("that is not what it must do")


def _launcher_of(pid: int) -> int:
    """`ip netns exec` becomes what it runs, so the process is the launcher itself."""
    return pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/demo.toml")
    parser.add_argument("--kill-at", type=int, default=15, help="iteration of step 3 (default: 15)")
    parser.add_argument("--no-comparison", action="store_true", help="leave out the run that nobody disturbs")
    parser.add_argument("--directory", type=Path, help="of the runs (default: a new one)")
    parser.add_argument("overrides", nargs="*", help="of the recipe, after --")
    options = parser.parse_args()
    directory = options.directory or Path(mkdtemp(prefix="two-machines-"))
    with machines() as where:
        print(f"{where.kind}, 2 processes each; {options.recipe}; runs in {directory}", flush=True)
        if not options.no_comparison:
            _whole_run(where, options.recipe, directory / "undisturbed", options.overrides)
        _lost_machine(where, options.recipe, directory / "disturbed", options.overrides, options.kill_at)
        _whole_run(where, options.recipe, directory / "disturbed", options.overrides)
    if options.no_comparison:
        return
    same = digests(directory / "undisturbed") == digests(directory / "disturbed")
    print(f"weights of all {len(MODELS)} models bit-identical to the undisturbed run's: {'yes' if same else 'NO'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""A launcher under test: `launcher_script.py WHAT DIRECTORY PROCESSES [NODES NODE_RANK HOST PORT]`."""

from __future__ import annotations

import sys
from pathlib import Path

from threefold.cli import run_guarded
from threefold.config.scale import LaunchSection
from threefold.launch.agent import launch
from threefold.launch.layout import Layout

WORKER = Path(__file__).with_name("worker_script.py")


def main(arguments: list[str]) -> None:
    """Start the worker script on this machine's processes."""
    what, directory, processes, *machines = arguments
    layout = Layout(int(processes))
    if machines:
        nodes, node_rank, host, port = machines
        layout = Layout(int(processes), int(nodes), int(node_rank), host, int(port))
    settings = LaunchSection(rdzv_timeout_seconds=30, shutdown_seconds=10, collective_timeout_seconds=60)
    launch([sys.executable, str(WORKER), what, directory], layout, settings, "digest")


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:], "interrupted"))

"""torchrun's flags on `threefold train`: each stands for a field of recipe.launch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from threefold.config.arguments import CommandParser


def add_launch_flags(parser: CommandParser) -> None:
    """Add --nnodes and --nproc-per-node, and `add_machine_flags`; read them with `with_launch_flags`."""
    parser.add_argument("--nnodes", metavar="N", help="machines (launch.nodes)")
    parser.add_argument("--nproc-per-node", metavar="N", help="processes here (launch.processes_per_node)")
    add_machine_flags(parser)


def add_machine_flags(parser: CommandParser) -> None:
    """Add --node-rank, --rdzv-endpoint and --hostfile; read them with `with_machine_flags`."""
    parser.add_argument("--node-rank", metavar="N", help="number of this one, from 0 (launch.node_rank)")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where they meet (launch.rdzv_endpoint)")
    parser.add_argument("--hostfile", metavar="FILE", help='lines "HOST slots=N" instead (launch.hostfile)')


def with_launch_flags(flags: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """Overrides of the recipe that the flags of `add_launch_flags` stand for, and then `overrides`, which win.

    --nnodes and --hostfile stand for launch.deployment too: "multi_node", or with 1 machine "single_node".
    """
    given = {"nodes": flags.nnodes, "processes_per_node": flags.nproc_per_node}
    if flags.nnodes is not None or flags.hostfile is not None:
        given["deployment"] = "single_node" if flags.nnodes == "1" else "multi_node"
    return [*_overrides(given), *with_machine_flags(flags, overrides)]


def with_machine_flags(flags: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The same for the flags of `add_machine_flags`."""
    given = {"node_rank": flags.node_rank, "rdzv_endpoint": flags.rdzv_endpoint, "hostfile": flags.hostfile}
    return [*_overrides(given), *overrides]


def _overrides(given: dict[str, str | None]) -> list[str]:
    return [f"--launch.{name}={value}" for name, value in given.items() if value is not None]

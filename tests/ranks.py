"""Real processes for tests: a function on several ranks, each with its own World over gloo.

They come from a fork server that has imported torch and threefold once, so that starting them takes no time.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from threefold.engine.distributed import World, start_world, stop_world

CPU = torch.device("cpu")
TIMEOUT_SECONDS = 120.0


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on `size` processes; what it returns, by rank.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["threefold.cli"])
    port = free_port()
    results: dict[int, Any] = {}
    failures: list[str] = []
    processes, pipes = [], {}
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_on_rank, args=(theirs, rank, size, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes[ours] = rank
    try:
        while pipes and not failures:
            ready = wait(list(pipes), timeout=TIMEOUT_SECONDS)
            if not ready:
                failures.append(f"ranks {sorted(pipes.values())} gave no answer in {TIMEOUT_SECONDS:g} s")
            for pipe in ready:
                rank = pipes.pop(pipe)  # type: ignore[call-overload]
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    kind, value = "failed", "ended without an answer"
                if kind == "done":
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {size}: {value}")
    finally:
        for process in processes:
            process.join(timeout=0.0 if failures else 10.0)
            if process.is_alive():
                process.kill()
                process.join()
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(size)]


def _on_rank(
    pipe: Connection, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        world: World = start_world(CPU, TIMEOUT_SECONDS)
        value = function(world, *arguments)
        world.barrier()
    except BaseException:  # noqa: BLE001  it is the parent that raises
        pipe.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
        os._exit(1)
    # `send` would leave tensors in shared memory, which ends with this process
    pipe.send_bytes(pickle.dumps(("done", value)))
    stop_world(world)
    pipe.close()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's own exit

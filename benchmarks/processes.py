"""A function on several fresh processes that form a world over gloo, one thread each."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import threefold  # noqa: F401  before torch: it sets how OpenMP waits

# isort: split
import torch

from threefold.engine.distributed import start_world

TIMEOUT_SECONDS = 600.0
_M_ARENA_MAX = -8


def on_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on `size` processes; what it returns, by rank."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(theirs, rank, size, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]  # EOFError if one has failed; its traceback is on standard error
    finally:
        for process in processes:
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()


def _one(
    pipe: Connection, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    if platform.libc_ver()[0] == "glibc":
        # what gloo's threads have freed in heaps of their own, malloc_trim would not give back
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 1)
    torch.set_num_threads(1)
    world = start_world(torch.device("cpu"), TIMEOUT_SECONDS)
    value = function(world, *arguments)
    world.barrier()
    pipe.send(value)
    pipe.close()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's own exit

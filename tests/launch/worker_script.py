"""One process of a launch under test: `worker_script.py WHAT [DIRECTORY]`, where WHAT is what becomes of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from threefold.engine.distributed import World, start_world, stop_world
from threefold.errors import ConfigError, Preempted
from threefold.interrupt import stop_requested
from threefold.launch.worker import work_as_rank

TIMEOUT_SECONDS = 60.0
STEP_SECONDS = 0.05


def main(what: str, directory: Path) -> None:
    """Join the others, say so in a file, and meet what is asked for."""
    world = start_world(torch.device("cpu"), 5.0 if what == "stall" else TIMEOUT_SECONDS)
    total = world.sum([world.rank + 1.0])[0]
    (directory / f"rank-{world.rank}").write_text(f"{os.getpid()} {total:g} {os.environ['OMP_NUM_THREADS']}")
    last = world.rank == world.size - 1
    if what == "mistake":
        raise ConfigError("run.seed = -1 is no seed")
    if what == "own mistake" and last:
        raise ConfigError("only this one cannot read the file")
    if what == "bug" and last:
        raise ZeroDivisionError("division of all things")
    if what == "abort" and last:
        os.kill(os.getpid(), signal.SIGABRT)
    if what == "exit" and last:
        os._exit(7)
    if what == "stall" and last:
        time.sleep(TIMEOUT_SECONDS)
    if what != "well":
        train(world, directory)
    if world.is_first:
        print("all is well", flush=True)
    stop_world(world)


def train(world: World, directory: Path) -> None:
    """Steps without end, until a SIGTERM is heard somewhere."""
    step = 0
    while not world.any(stop_requested()):
        step += 1
        time.sleep(STEP_SECONDS)
    (directory / f"saved-{world.rank}").write_text(str(step))
    world.barrier()
    raise Preempted("stopped by SIGTERM, saved")


if __name__ == "__main__":
    _, how, where, *_ = sys.argv
    work_as_rank(lambda: main(how, Path(where)))

"""The processes of a run: who they are, and what they tell each other. The only place that names a backend.

Tensors on the CPU travel over gloo, those on a GPU over NCCL. With one process there is no process group, and every
function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from threefold.errors import ThreefoldError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of the run, and which of them this one is.

    Attributes:
        rank, size: this process, and how many there are.
        local_rank, local_size: the same on this machine.
        mesh: of all processes, on the device that computes; None for a single process.
        timeout_seconds: of every collective operation.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    mesh: DeviceMesh | None = None
    timeout_seconds: float = 1800.0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        self.max([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each number over all processes, in float64; the same bits on every process."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each number over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation)
        return cast(list[float], numbers.tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.max([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def assemble(self, own: Mapping[int, T], count: int) -> list[T]:
        """A list of `count` items of which every process has made some, whole on every process."""
        found: dict[int, T] = {}
        # a tensor that is a view would be sent with all that it is a view of
        apart = {number: cast(T, item.clone()) if isinstance(item, Tensor) else item for number, item in own.items()}
        for part in self.gather(apart if self.size > 1 else dict(own)):
            found |= part
        return [found[number] for number in range(count)]

    def from_first(self, make: Callable[[], T]) -> T:
        """The value that the first process makes, on every process; so is the user's mistake that it runs into."""
        if self.size == 1:
            return make()
        result: list[Any] = [None, None]
        if self.is_first:
            try:
                result[0] = make()
            except ThreefoldError as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return cast(T, result[0])

    def in_turn(self, make: Callable[[], T]) -> T:
        """`make` on every process, one after the other on each machine: what takes much host memory for a while."""
        made: list[T] = []
        for turn in range(int(self.max([float(self.local_size)])[0])):
            if turn == self.local_rank:
                made.append(make())
            self.barrier()
        return made[0]


ALONE = World()


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def start_world(device: torch.device, timeout_seconds: float) -> World:
    """Join the other processes that torchrun has started; alone where it has started none or one.

    Args:
        device: this process's; on a GPU torch.cuda.set_device has been called.
        timeout_seconds: of every collective operation.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    dist.init_process_group(_backend(device), timeout=timedelta(seconds=timeout_seconds))
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(
        rank=rank,
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        mesh=init_device_mesh(device.type, (size,), mesh_dim_names=("all",)),
        timeout_seconds=timeout_seconds,
    )


def stop_world(world: World) -> None:
    """Leave the other processes in order."""
    if world.size > 1:
        dist.destroy_process_group()


def lone_mesh(device: torch.device) -> DeviceMesh:
    """A mesh of this process alone, for what is written in terms of one (weights that stay in host memory)."""
    if not dist.is_initialized():
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
    return init_device_mesh(device.type, (1,))


def _time_out(world: World) -> timedelta:
    return timedelta(seconds=world.timeout_seconds)


def background_group(world: World) -> Any:
    """A group of all processes for another thread: what it says over the CPU never meets what this thread says.
    Collective; None for a single process."""
    # new groups do not inherit the time-out of the first
    return dist.new_group(backend="gloo", timeout=_time_out(world)) if world.size > 1 else None


def inference_groups(world: World, size: int) -> tuple[int, Any]:
    """Cut the processes into groups of neighbours that generate together; collective.

    Returns:
        the number of this process's group, and its process group (None for groups of one).
    """
    assert world.size % size == 0
    if size == 1:
        return world.rank, None
    groups = [list(range(first, first + size)) for first in range(0, world.size, size)]
    made = [dist.new_group(ranks, timeout=_time_out(world)) for ranks in groups]
    return world.rank // size, made[world.rank // size]

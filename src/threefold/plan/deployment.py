"""On what a plan is for: how many processes, of which kind, and what memory each has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from threefold.config.recipe import Recipe
from threefold.machine.memory import free_bytes

GIB = 2**30
GPUS_OF_A_NODE = 8
"""Where launch.processes_per_node leaves it to the GPUs of a machine, and this one has none."""
GPU_SIZES_GIB = (24, 40, 80, 141)
"""Memory of common GPUs, to compare with where this machine has none."""


@dataclass(frozen=True)
class Deployment:
    """Where a run is to take place.

    Attributes:
        on_gpu: else on CPUs.
        bfloat16: matrix products run in it; else in float32.
        ranks: processes.
        ranks_per_node: of them on one machine.
        device_bytes: memory of one rank's device; 0 where it is not known.
        assumed: what the recipe leaves open and is taken to be so, for the reader.
    """

    on_gpu: bool
    bfloat16: bool
    ranks: int
    ranks_per_node: int
    device_bytes: int
    assumed: tuple[str, ...] = ()


def deployment_of(recipe: Recipe, on_gpu: bool | None = None) -> Deployment:
    """What the recipe asks for, completed from this machine.

    Args:
        on_gpu: plan for GPUs, or for CPUs, whatever run.device says; None leaves it to run.device, whose "auto" is a
            GPU where this machine has one.
    """
    here = torch.cuda.device_count()
    if on_gpu is None:
        on_gpu = recipe.run.device == "cuda" or (recipe.run.device == "auto" and here > 0)
    assumed = []
    launch = recipe.launch
    per_node = 1
    if launch.deployment != "single_gpu":
        per_node = launch.processes_per_node or (here if on_gpu else 1)
        if per_node == 0:
            per_node = GPUS_OF_A_NODE
            assumed.append(f"launch.processes_per_node = 0 taken as {per_node}: this machine has no GPU to count")
    nodes = launch.nodes if launch.deployment == "multi_node" else 1
    if launch.deployment == "multi_node" and launch.hostfile:
        assumed.append(f"launch.nodes = {nodes} taken as the number of machines in {launch.hostfile}")
    if on_gpu and here == 0:
        assumed.append("this machine has no GPU")
    dtype = recipe.run.dtype
    return Deployment(
        on_gpu=on_gpu,
        bfloat16=dtype == "bfloat16" or (dtype == "auto" and on_gpu),
        ranks=per_node * nodes,
        ranks_per_node=per_node,
        device_bytes=_memory_of_a_rank(on_gpu, here, per_node),
        assumed=tuple(assumed),
    )


def _memory_of_a_rank(on_gpu: bool, gpus_here: int, ranks_per_node: int) -> int:
    if on_gpu:
        return int(torch.cuda.get_device_properties(0).total_memory) if gpus_here else 0
    return free_bytes(torch.device("cpu")) // ranks_per_node

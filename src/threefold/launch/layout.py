"""How many processes on how many machines a recipe asks for, checked before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from threefold.config.recipe import Recipe
from threefold.config.scale import LaunchSection
from threefold.engine.device import pick_device
from threefold.errors import ConfigError
from threefold.launch.hostfile import Host, read_hostfile
from threefold.launch.network import free_port

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Layout:
    """The processes of a run, as one machine sees them.

    Attributes:
        processes: on this machine.
        nodes, node_rank: machines, and which of them this is.
        host, port: where they meet; port 0 is any free one (one machine).
        others: the machines that this one starts, from the hostfile; empty without one.
    """

    processes: int
    nodes: int = 1
    node_rank: int = 0
    host: str = LOOPBACK
    port: int = 0
    others: tuple[Host, ...] = ()

    @property
    def total(self) -> int:
        """Processes of the whole run; those of machines that are not in a hostfile are taken to be like here."""
        return self.processes + sum(host.slots for host in self.others) if self.others else self.processes * self.nodes


def layout_of(recipe: Recipe) -> Layout:
    """The processes that `recipe.launch` asks for on this machine.

    Raises:
        ConfigError: fields that contradict each other or the machine, or a number of processes that
            generation.inference_tp_size does not divide.
    """
    launch = recipe.launch
    _check_sections(launch)
    gpus = _gpus(recipe)
    if launch.hostfile:
        layout = _from_hostfile(launch, gpus)
    elif launch.deployment == "multi_node":
        host, port = endpoint(launch.rdzv_endpoint)
        layout = Layout(_processes(launch, gpus), launch.nodes, launch.node_rank, host, port)
    elif launch.deployment == "single_node":
        layout = Layout(_processes(launch, gpus))
    else:
        layout = Layout(1)
    if layout.total > 1 and recipe.run.device == "mps":
        raise ConfigError(
            f'run.device = "mps" is for one process, and launch asks for {layout.total}: set run.device = "cpu", or '
            'launch.deployment = "single_gpu"'
        )
    _check_tensor_parallel(recipe, layout.total)
    return layout


def check_launched(recipe: Recipe, processes: int) -> None:
    """Check a recipe against the processes that torchrun has started.

    Raises:
        ConfigError: the recipe is for one process, or its tensor parallelism does not divide them.
    """
    if processes > 1 and recipe.launch.deployment == "single_gpu":
        raise ConfigError(
            f'launch.deployment = "single_gpu" is one process, and {processes} have been started: '
            'set launch.deployment = "single_node" (or "multi_node")'
        )
    _check_tensor_parallel(recipe, processes)


def threads_per_process(processes: int) -> int:
    """CPU threads for each of the processes of this machine, so that together they have one for each core."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def endpoint(text: str) -> tuple[str, int]:
    """Cut launch.rdzv_endpoint, HOST:PORT.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f'launch.rdzv_endpoint = "{text}": a multi_node run needs the address where its machines meet: HOST:PORT '
            "of the machine with --node-rank 0, the same on all (or give launch.hostfile)"
        )
    return host, int(port)


def _check_sections(launch: LaunchSection) -> None:
    kind = launch.deployment
    if kind == "single_gpu" and launch.processes_per_node > 1:
        raise ConfigError(
            f'launch.processes_per_node = {launch.processes_per_node}, and launch.deployment = "single_gpu" is one '
            'process: set launch.deployment = "single_node" (or --nnodes 1)'
        )
    if kind == "multi_node":
        if launch.hostfile:
            return
        if launch.nodes == 1:
            raise ConfigError(
                'launch.deployment = "multi_node" with launch.nodes = 1: set launch.nodes (--nnodes), give '
                'launch.hostfile, or use launch.deployment = "single_node"'
            )
        if launch.node_rank >= launch.nodes:
            raise ConfigError(
                f"launch.node_rank = {launch.node_rank}: with launch.nodes = {launch.nodes} the machines are numbered "
                f"from 0 to {launch.nodes - 1}"
            )
        return
    for name in ("nodes", "node_rank", "rdzv_endpoint", "hostfile"):
        value = getattr(launch, name)
        if value != LaunchSection.model_fields[name].default:
            raise ConfigError(
                f'launch.{name} = {value!r} is for several machines, and launch.deployment = "{kind}" is one: '
                'set launch.deployment = "multi_node"'
            )


def _gpus(recipe: Recipe) -> int:
    device = pick_device(recipe.run.device)
    return torch.cuda.device_count() if device.type == "cuda" else 0


def _processes(launch: LaunchSection, gpus: int, wanted: int = 0, where: str = "launch.processes_per_node") -> int:
    wanted = wanted or launch.processes_per_node
    if gpus and wanted > gpus:
        raise ConfigError(f'{where} = {wanted}: this machine has {gpus} GPUs; lower it, or set run.device = "cpu"')
    return wanted or max(1, gpus)


def _from_hostfile(launch: LaunchSection, gpus: int) -> Layout:
    for name in ("nodes", "node_rank", "processes_per_node"):
        value = getattr(launch, name)
        if value != LaunchSection.model_fields[name].default:
            raise ConfigError(
                f"launch.{name} = {value}, and launch.hostfile = {launch.hostfile!r} says the same: give one of them"
            )
    first, *others = read_hostfile(launch.hostfile)
    host, port = endpoint(launch.rdzv_endpoint) if launch.rdzv_endpoint else (first.name, free_port())
    processes = _processes(launch, gpus, first.slots, f"{first.where}: slots")
    return Layout(processes, 1 + len(others), 0, host, port, tuple(others))


def _check_tensor_parallel(recipe: Recipe, processes: int) -> None:
    size = recipe.generation.inference_tp_size
    if processes % size:
        raise ConfigError(
            f"generation.inference_tp_size = {size} does not divide the {processes} processes of the run: set it to a "
            "divisor, or start another number of processes"
        )

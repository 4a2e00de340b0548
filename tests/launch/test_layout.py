"""Which processes a recipe asks for, and what contradicts itself or the machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from threefold.config.load import load_recipe
from threefold.config.recipe import Recipe
from threefold.errors import ConfigError
from threefold.launch.hostfile import Host
from threefold.launch.layout import Layout, check_launched, layout_of, threads_per_process


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, [f"--{override}" for override in overrides])


MULTI = ("launch.deployment=multi_node", "launch.nodes=2", "launch.rdzv_endpoint=a.example:29500", "run.device=cpu")
NODE = ("launch.deployment=single_node", "run.device=cpu")


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ((), Layout(1)),
        (NODE, Layout(1)),
        ((*NODE, "launch.processes_per_node=4"), Layout(4)),
        ((*MULTI, "launch.node_rank=1"), Layout(1, 2, 1, "a.example", 29500)),
        ((*MULTI, "launch.rdzv_endpoint=[fd00::1]:80"), Layout(1, 2, 0, "fd00::1", 80)),
    ],
)
def test_layouts(overrides: tuple[str, ...], layout: Layout) -> None:
    assert layout_of(recipe(*overrides)) == layout
    assert layout.total == layout.processes * layout.nodes


def test_without_a_number_there_is_one_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert layout_of(recipe("launch.deployment=single_node")) == Layout(3)
    assert layout_of(recipe("launch.deployment=single_node", "launch.processes_per_node=2")) == Layout(2)
    with pytest.raises(ConfigError, match=r"launch\.processes_per_node = 4: this machine has 3 GPUs; lower it"):
        layout_of(recipe("launch.deployment=single_node", "launch.processes_per_node=4"))


def test_a_hostfile_gives_machines_and_slots(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"{socket.gethostname()} slots=2\nb slots=3\n")
    layout = layout_of(recipe("launch.deployment=multi_node", f"launch.hostfile={path}", "run.device=cpu"))
    assert (layout.processes, layout.nodes, layout.node_rank, layout.total) == (2, 2, 0, 5)
    assert layout.host == socket.gethostname()
    assert layout.port > 0
    assert layout.others == (Host("b", 3, f"{path}:2"),)
    with pytest.raises(ConfigError, match=r"launch\.nodes = 2, and launch\.hostfile"):
        layout_of(recipe("launch.deployment=multi_node", f"launch.hostfile={path}", "launch.nodes=2"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("launch.processes_per_node=2",), ["launch.processes_per_node = 2", "single_gpu", "single_node"]),
        (("launch.nodes=2",), ["launch.nodes = 2", "single_gpu", '"multi_node"']),
        ((*NODE, "launch.nodes=2"), ["launch.nodes = 2", "single_node", '"multi_node"']),
        ((*NODE, "launch.rdzv_endpoint=a:1"), ["launch.rdzv_endpoint = 'a:1'", '"multi_node"']),
        ((*NODE, "launch.hostfile=hosts"), ["launch.hostfile = 'hosts'", '"multi_node"']),
        (("launch.deployment=multi_node",), ["launch.nodes = 1", "--nnodes", "launch.hostfile"]),
        ((*MULTI, "launch.node_rank=2"), ["launch.node_rank = 2", "from 0 to 1"]),
        ((*MULTI, "launch.rdzv_endpoint="), ['launch.rdzv_endpoint = ""', "HOST:PORT", "--node-rank 0"]),
        ((*MULTI, "launch.rdzv_endpoint=a.example"), ['"a.example"', "HOST:PORT"]),
        ((*MULTI, "launch.rdzv_endpoint=a:99999"), ['"a:99999"', "HOST:PORT"]),
        ((*NODE, "launch.processes_per_node=3", "generation.inference_tp_size=2"), ["tp_size = 2", "the 3 processes"]),
        (("generation.inference_tp_size=2", "run.device=cpu"), ["tp_size = 2", "the 1 processes"]),
    ],
)
def test_what_contradicts_itself_is_one_line(overrides: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        layout_of(recipe(*overrides))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_recipe_for_one_process_is_refused_in_several() -> None:
    check_launched(recipe(), 1)
    check_launched(recipe(*NODE), 2)
    with pytest.raises(ConfigError, match=r'"single_gpu" is one process, and 2 have been started'):
        check_launched(recipe(), 2)
    with pytest.raises(ConfigError, match=r"inference_tp_size = 2 does not divide the 3 processes"):
        check_launched(recipe(*NODE, "generation.inference_tp_size=2"), 3)


def test_cores_are_shared_out() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1) == cores
    assert threads_per_process(2 * cores) == 1

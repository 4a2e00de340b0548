"""Measured memory: what is free, and the peak of a block."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from threefold.machine import memory
from threefold.machine.memory import (
    PeakMemory,
    free_bytes,
    keep_freed_memory,
    resident_bytes,
    return_freed_memory,
)

CPU = torch.device("cpu")
BLOCK = 200 * 2**20
SLACK = 40 * 2**20

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def block() -> torch.Tensor:
    return torch.ones(BLOCK // 4)


@linux
def test_the_peak_of_a_block_is_seen_though_it_is_freed_again() -> None:
    return_freed_memory(CPU)
    before = resident_bytes(CPU)
    with PeakMemory(CPU) as peak:
        block()
    assert before + BLOCK - SLACK < peak.bytes < before + BLOCK + SLACK
    return_freed_memory(CPU)
    with PeakMemory(CPU) as quiet:
        torch.ones(10)
    assert quiet.bytes < before + SLACK


def test_free_memory_is_between_nothing_and_all() -> None:
    assert 2**26 < free_bytes(CPU) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@linux
def test_a_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert free_bytes(CPU) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**26


@linux
def test_kept_memory_goes_back_when_asked() -> None:
    if not keep_freed_memory():
        pytest.skip("not glibc")
    return_freed_memory(CPU)
    before = resident_bytes(CPU)
    block()
    kept = resident_bytes(CPU)
    return_freed_memory(CPU)
    assert kept > before + BLOCK - SLACK
    assert resident_bytes(CPU) < before + SLACK

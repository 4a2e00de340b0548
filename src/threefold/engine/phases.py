"""Time and peak memory of the phases of an iteration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from threefold.machine.memory import PeakMemory, return_freed_memory

GIB = 2**30


class PhaseMeter:
    """Measures named phases, one after the other; `metrics` gives what was measured, names as in metrics.jsonl.

    Args:
        exact: give freed memory back before each phase, so that on a CPU too its peak is its own; the phase then takes
            a little longer. Otherwise a CPU's peak contains what earlier phases have freed and the process has kept.

    Attributes:
        seconds: wall time of each phase.
        peak_bytes: peak memory of each phase: of the process on a CPU, of the device on a GPU.
    """

    def __init__(self, device: torch.device, exact: bool = False) -> None:
        self._device, self._exact = device, exact
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block; what it queued on a GPU counts."""
        self._wait()
        if self._exact:
            return_freed_memory(self._device)
        started = time.perf_counter()
        with PeakMemory(self._device) as peak:
            yield
            self._wait()
        self.seconds[name] = time.perf_counter() - started
        self.peak_bytes[name] = peak.bytes

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def metrics(self) -> dict[str, float]:
        """timing_s/NAME in seconds and memory/NAME_peak_gib in GiB."""
        return {
            **{f"timing_s/{name}": seconds for name, seconds in self.seconds.items()},
            **{f"memory/{name}_peak_gib": peak / GIB for name, peak in self.peak_bytes.items()},
        }

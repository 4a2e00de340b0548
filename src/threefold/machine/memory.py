"""Memory of the machine: what is free, the peak of a phase, and what becomes of freed blocks."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Let the C library keep large freed blocks for the next allocation, where it is glibc; return whether it does.

    By default glibc maps every large block anew, and the kernel fills it with zeros page by page: the activations of a
    training step then spend more time in page faults than in arithmetic (benchmarks/matrix_kernels.py). What is kept
    goes back to the system by `return_freed_memory`.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory(device: torch.device) -> None:
    """Give memory that nobody uses back to the system (CPU) or to the other allocators of the device (CUDA)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _meminfo(file: Path, field: str) -> int:
    """A field of a /proc file, bytes (the files say kB)."""
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(f"{file} has no field {field}")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device, as measured now.

    On the CPU: what the kernel calls available, or what a container's limit leaves, whichever is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # blocks that PyTorch holds and does not use can be used again
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if not sys.platform.startswith("linux"):
        return _physical_memory() // 2
    free = _meminfo(Path("/proc/meminfo"), "MemAvailable")
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class PeakMemory:
    """Peak memory of the process (CPU) or of the device (CUDA) in a `with` block: `bytes`, known afterwards.

    On Linux the kernel's high-water mark is reset at the start. Where that cannot be done, the peak is the process's
    own since it started, which is then an upper bound. Do not nest blocks: an inner one resets the outer's mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif os.access(_RESET_PEAK, os.W_OK):
            _RESET_PEAK.write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif _STATUS.is_file():
            self.bytes = _meminfo(_STATUS, "VmHWM")
        else:
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def resident_bytes(device: torch.device) -> int:
    """Memory that the process (CPU, Linux) or PyTorch on the device (CUDA) holds now; elsewhere the process's peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATUS.is_file():
        return _meminfo(_STATUS, "VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT

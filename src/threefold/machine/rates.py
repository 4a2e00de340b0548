"""How fast this machine multiplies matrices and reads memory: measured, because no data sheet knows a virtual machine.

Both are the best that any of a few kernels reaches under good conditions, so a fraction of them is an honest one: what
else runs on the machine at the time lowers them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from threefold.machine.linear import HAS_ONEDNN_LINEAR

MATRIX_SIZES = (256, 512, 1024, 2048, 4096, 8192)
MATRIX_SECONDS = 0.7
"""Time that each kernel may take over all sizes."""
SHORTEST_TIMING_SECONDS = 0.02
BUFFER_BYTES = {"cpu": 256 * 2**20}
LARGE_BUFFER_BYTES = 2**30
"""Far more than any cache of a GPU holds."""
TIMINGS = 4


@dataclass(frozen=True)
class MeasuredRate:
    """A rate of this machine, per second.

    Attributes:
        best: of the fastest kernel.
        by_kernel: each kernel's own best.
    """

    best: float
    by_kernel: Mapping[str, float]

    def or_better(self, other: MeasuredRate) -> MeasuredRate:
        """The better of two measurements of the same kernels: what ran beside one of them may not beside the other."""
        by_kernel = {name: max(rate, other.by_kernel[name]) for name, rate in self.by_kernel.items()}
        return MeasuredRate(max(by_kernel.values()), by_kernel)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> MeasuredRate:
    """FLOP/s of dense matrix products in `dtype`: the best over square shapes, 2 n^3 FLOP each, in about a second.

    Kernels: torch.mm and, for float32 on a processor that has it, oneDNN's linear layer (see machine/linear.py). TF32
    counts where PyTorch is set to use it. Sizes grow until the next one would take too long.
    """
    kernels: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm}
    if HAS_ONEDNN_LINEAR and device.type == "cpu" and dtype == torch.float32:
        kernels["onednn"] = _onednn_product
    with torch.inference_mode():
        rates = {name: _best_matrix_rate(product, device, dtype) for name, product in kernels.items()}
    return MeasuredRate(max(rates.values()), rates)


def bandwidth(device: torch.device) -> MeasuredRate:
    """Bytes/s between memory and processor, over a buffer that no cache holds: the better of reading (a sum) and of
    copying (each byte counts twice, read and written), in well under a second."""
    size = BUFFER_BYTES.get(device.type, LARGE_BUFFER_BYTES)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    source, target = buffer.chunk(2)
    with torch.inference_mode():
        rates = {
            "read": size / _fastest(buffer.sum, device),
            "copy": size / _fastest(partial(target.copy_, source), device),
        }
    return MeasuredRate(max(rates.values()), rates)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _onednn_product(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


def _best_matrix_rate(product: Callable[[Tensor, Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    started = time.perf_counter()
    for size in MATRIX_SIZES:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(partial(product, left, right), device)
        best = max(best, 2 * size**3 / seconds)
        next_seconds = 8 * (TIMINGS + 2) * seconds  # eight times the work, and two calls before it is timed
        if time.perf_counter() - started + next_seconds > MATRIX_SECONDS:
            break
    return best


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the least of some timings, each of as many calls as the clock needs."""
    _seconds(work, 1, device)  # the first call may load a library
    calls = max(1, min(1000, math.ceil(SHORTEST_TIMING_SECONDS / _seconds(work, 1, device))))
    return min(_seconds(work, calls, device) / calls for _ in range(TIMINGS))


def _seconds(work: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return time.perf_counter() - started

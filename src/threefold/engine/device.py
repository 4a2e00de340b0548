"""Where and in which precision to compute, and how to make a run repeatable."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from threefold.config.recipe import RunSection
from threefold.errors import ConfigError
from threefold.machine.memory import keep_freed_memory


def pick_device(name: str) -> torch.device:
    """The device of run.device; "auto" is a GPU if there is one, else the CPU."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if (name == "cuda" and not has_cuda) or (name == "mps" and not has_mps):
        raise ConfigError(f'run.device = "{name}": PyTorch finds no such device here; set run.device = "auto" or "cpu"')
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        _take_own_gpu(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def _take_own_gpu(local_rank: int) -> None:
    """Of the processes of a machine each has a GPU of its own: the one of its number, or the only one that it sees."""
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no GPU: there are {count}; start fewer "
            '(launch.processes_per_node), or set run.device = "cpu"'
        )
    torch.cuda.set_device(local_rank if count > 1 else 0)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that matrix products run in; "auto" is bfloat16 on a GPU that has it, else float32. Weights stay
    float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype`; with float32 nothing is changed."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield


def make_repeatable(run: RunSection, rank: int = 0) -> None:
    """Seed every global generator and fix the number of threads: the same recipe gives the same numbers on one
    machine. Processes draw different numbers, for what they drop out is of different sequences.

    Freed memory is kept for the next phase, and attention on a GPU is left to kernels that take any shape: cuDNN's
    plans each new one for up to seconds, and passes cut by length have a new one each time.
    """
    random.seed(run.seed + rank)
    numpy.random.seed((run.seed + rank) % 2**32)
    torch.manual_seed(run.seed + rank)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    keep_freed_memory()
    torch.backends.cuda.enable_cudnn_sdp(False)

"""Tensors to and from disk through torch.distributed.checkpoint (DCP): each process writes what it holds, and reads
what it needs, whatever the layout they were written in."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.futures import Future

from threefold.checkpoint.manifest import DamagedError
from threefold.engine.distributed import World

# DCP says so of a single process, where it is what is meant
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class HostCopy(DefaultSavePlanner):
    """What this process holds of some tensors at this moment, and the plan to write it.

    Args:
        tensors: plain or DTensor. One that several processes hold whole is written by one of them, so it must be the
            same on all.
        copied: whether to take a copy, so that training may go on while this is written.
    """

    def __init__(self, tensors: Mapping[str, Tensor], world: World, copied: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        # made now: what it says of a tensor's layout must not be asked while training goes on
        self._plan = create_default_local_save_plan(dict(tensors), world.is_first)
        self._local = {name: _local(tensor, copied) for name, tensor in tensors.items()}

    def create_local_plan(self) -> SavePlan:
        self.plan = self._plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._local[index.fqn]


def _local(tensor: Tensor, copied: bool) -> Tensor:
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    return local.to("cpu", copy=True) if copied else local


class _Writer(FileSystemWriter):
    """Raises the OSError of a write that failed, which PyTorch's own complaint that the file is short hides."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        try:
            return super().write_data(plan, planner)
        except (RuntimeError, OSError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise error if cause is None else cause from None


def write_tensors(directory: Path, copy: HostCopy, group: Any) -> None:
    """Write the tensors; collective over `group`, None for a single process.

    Raises:
        OSError: a process could not write, the same on every process.
    """
    try:
        save({}, storage_writer=_Writer(directory), planner=copy, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise next((one for one in failures if isinstance(one, OSError)), failures[0]) from None


def shapes_and_dtypes(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of each tensor.

    Raises:
        DamagedError: if the directory says nothing of the kind.
    """
    try:
        metadata = FileSystemReader(directory).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise DamagedError("its .metadata cannot be read") from error
    return {
        name: (tuple(about.size), about.properties.dtype)
        for name, about in metadata.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }


def read_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place, plain or DTensor; each process reads for itself."""
    into = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        load(cast(dict[str, Any], into), storage_reader=FileSystemReader(directory), no_dist=True)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None

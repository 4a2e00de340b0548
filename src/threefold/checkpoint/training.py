"""Checkpoints inside a stage: all that it takes to go on as if nothing had happened.

A checkpoint is a directory step-00000012 with the tensors (DCP files), state.json, records.safetensors, the random
generators of each process and, last, manifest.json. It is written under a hidden name and then renamed, so it is there
whole or not at all; what was damaged afterwards is found by its checksums.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributed.tensor import DTensor

from threefold.checkpoint.files import recover, write_text
from threefold.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedError,
    Manifest,
    check_files,
    file_entry,
    read_manifest,
    step_name,
    write_manifest,
)
from threefold.checkpoint.random_state import random_state, set_random_state
from threefold.checkpoint.sharded import HostCopy, read_tensors, shapes_and_dtypes, write_tensors
from threefold.config.scale import CheckpointSection
from threefold.engine.distributed import World, background_group
from threefold.errors import CheckpointError, Preempted
from threefold.interrupt import stop_requested

FORMAT = 1
"""Raised when the layout of a checkpoint changes."""

STATE_FILE = "state.json"
RECORDS_FILE = "records.safetensors"
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingState:
    """What a stage goes on from.

    Attributes:
        tensors: live references. Plain ones are the same on every process that has them (under ZeRO 1 not every one
            has), DTensors are in shards.
        values: what JSON can hold, the same on every process; floats come back with the same bits.
        records: plain tensors, the same on every process: pending experience, the state of a sampler.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    records: Mapping[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """A checkpoint found whole on disk.

    Attributes:
        step: that it was written after.
        values, records: as they were given to `Checkpointer.save`.
        names: of its tensors.
    """

    step: int
    values: Mapping[str, Any]
    records: Mapping[str, Tensor]
    names: frozenset[str]
    directory: Path
    world: World

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, in whatever layout they are now; collective.

        Raises:
            CheckpointError: one is not in the checkpoint, or has another shape or dtype there.
        """
        problem = next((found for found in self.world.gather(self._mismatch(tensors)) if found), None)
        if problem:
            raise CheckpointError(
                f"{self.directory}: {problem}: it is a checkpoint of another model; choose another --output-dir, or "
                f"delete {self.directory.parent} to start this step from its beginning"
            )
        read_tensors(self.directory, dict(tensors))

    def _mismatch(self, tensors: Mapping[str, Tensor]) -> str | None:
        there = shapes_and_dtypes(self.directory)
        for name, tensor in tensors.items():
            if name not in there:
                return f"has no tensor {name!r}"
            shape, dtype = there[name]
            if shape != tuple(tensor.shape):
                return f"tensor {name!r} has shape {list(shape)}, and here {list(tensor.shape)}"
            if dtype != tensor.dtype:
                return f"tensor {name!r} is {_plain(dtype)}, and here {_plain(tensor.dtype)}"
        return None

    def restore_random_state(self) -> None:
        """Set this process's random generators as they were when the checkpoint was written; a process of a rank that
        there was not then keeps its own. `Checkpointer.load` does so; again after something else has drawn."""
        path = self.directory / _random_file(self.world.rank)
        if path.is_file():
            set_random_state(load_file(path))


@dataclass(frozen=True)
class _Snapshot:
    """All of a checkpoint, in host memory (or, if nothing goes on meanwhile, still where it is)."""

    step: int
    tensors: HostCopy
    state: str
    records: Mapping[str, Tensor]
    random: Mapping[str, Tensor]


class Checkpointer:
    """Writes and finds the checkpoints of one stage. Every process makes one, and calls what is collective alike.

    Args:
        directory: of the checkpoints; made with the first, and on a file system that all processes share.
        key: of the settings that the stage's result depends on.
        note: prints one line for the user; only the first process's is called.
    """

    def __init__(
        self, directory: Path, key: str, settings: CheckpointSection, world: World, note: Callable[[str], None]
    ) -> None:
        self._directory, self._key, self._settings, self._world, self._note = directory, key, settings, world, note
        # a group of its own, so that what the writing thread tells its peers never meets what training tells them
        self._group = background_group(world)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._last_time = time.monotonic()
        self._stopping = False
        self._refused: set[int] = set()

    def load(self) -> Saved | None:
        """The newest checkpoint that is whole, with the random generators set as they were; collective.

        Damaged ones are named in a line each and passed over; None if there is none.

        Raises:
            CheckpointError: the newest is of other settings or another version.
        """
        steps = self._world.from_first(self._tidied_steps)
        for step in steps:
            path = self._directory / step_name(step)
            problem = next((found for found in self._world.gather(self._damage(path)) if found), None)
            if problem is None:
                return self._opened(path)
            self._refused.add(step)
            before = "the one before is taken" if step != steps[-1] else "and none is left: from the beginning, then"
            self._tell(f"{path}: {problem}: refused, {before}")
        return None

    def due(self, step: int) -> bool:
        """Whether to save after this step: by number of steps, by time, or because a process was sent SIGTERM.

        Collective, and the same on every process.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        every = self._settings.every_minutes * 60
        late = self._world.is_first and every > 0 and time.monotonic() - self._last_time >= every
        failed = self._writing is not None and self._writing.done() and self._writing.exception() is not None
        by_time, stop, failure = self._world.max([float(late), float(stop_requested()), float(failed)])
        if failure:
            self.finish()
        self._stopping = self._stopping or stop > 0
        by_count = self._settings.every_steps > 0 and step % self._settings.every_steps == 0
        return self._stopping or by_time > 0 or by_count

    def save(self, step: int, state: TrainingState) -> None:
        """Write a checkpoint; collective. If settings.asynchronous, it is copied now and written while training goes
        on; the next one waits for it.

        Raises:
            CheckpointError: this one, or the one before, could not be written: the disk is full, say.
        """
        self.finish()
        copied = self._settings.asynchronous
        snapshot = _Snapshot(
            step,
            HostCopy(state.tensors, self._world, copied),
            json.dumps(state.values),
            {name: _whole(tensor) for name, tensor in state.records.items()} if self._world.is_first else {},
            random_state(),
        )
        self._last_time = time.monotonic()
        if copied:
            self._writing = self._executor.submit(self._write, snapshot)
        else:
            self._write(snapshot)

    def stop_if_asked(self) -> None:
        """Leave, if SIGTERM was why `due` said so and the checkpoint is written; collective.

        Raises:
            Preempted: that is so.
        """
        if self._stopping:
            self.finish()
            raise Preempted(
                f"stopped by SIGTERM; the checkpoint is in {self._directory}, run the same command again to go on"
            )

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def clear(self) -> None:
        """Remove all checkpoints, as the stage is complete; collective."""
        try:
            self.finish()
        except CheckpointError as error:  # nobody needs it any more
            self._tell(f"note: {error}")
        self._world.barrier()
        if self._world.is_first and self._directory.exists():
            _remove(self._directory)
        self._executor.shutdown()

    # ------------------------------------------------------------------------------------------------------- finding

    def _tell(self, text: str) -> None:
        if self._world.is_first:
            self._note(text)

    def _tidied_steps(self) -> list[int]:
        """Remove what killed processes left half done; steps on disk, newest first."""
        try:
            shutil.rmtree(_removed_name(self._directory), ignore_errors=True)
            for path in list(self._directory.glob(".step-*.old")):
                recover(self._directory / path.name[1:].removesuffix(".old"))
            for path in list(self._directory.glob(".step-*")):
                shutil.rmtree(path)
            return sorted(self._steps(), reverse=True)
        except OSError as error:
            raise CheckpointError(f"{error.filename or self._directory}: cannot be used ({error.strerror})") from error

    def _steps(self) -> list[int]:
        numbers = [path.name.removeprefix("step-") for path in self._directory.glob("step-*")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, as far as this process's share of its files tells."""
        try:
            check_files(path, read_manifest(path), self._world.rank, self._world.size)
            shapes_and_dtypes(path)
        except DamagedError as error:
            return str(error)
        return None

    def _opened(self, path: Path) -> Saved:
        manifest = read_manifest(path)
        remedy = f"delete {self._directory} to start this step from its beginning, or choose another --output-dir"
        if manifest.format != FORMAT:
            raise CheckpointError(f"{path}: was written by another version of threefold; {remedy}")
        if manifest.key != self._key:
            raise CheckpointError(
                f"{path}: was made with other settings than the recipe has now; go back to them, {remedy}"
            )
        values = json.loads((path / STATE_FILE).read_text("utf-8"))
        records = load_file(path / RECORDS_FILE)
        names = frozenset(shapes_and_dtypes(path))
        saved = Saved(manifest.step, values, records, names, path, self._world)
        saved.restore_random_state()
        return saved

    # ------------------------------------------------------------------------------------------------------- writing

    def _write(self, snapshot: _Snapshot) -> None:
        """Write a snapshot; collective over the group of its own, and the same outcome on every process."""
        final = self._directory / step_name(snapshot.step)
        building = self._directory / f".{final.name}.building"
        try:
            self._together(partial(self._make, building))
            write_tensors(building, snapshot.tensors, self._group)
            entries = self._together(partial(self._write_own, building, snapshot))
            files = {name: entry for found in entries for name, entry in (found or {}).items()}
            self._together(partial(self._complete, building, final, snapshot, files))
        except OSError as error:
            if self._world.is_first:
                shutil.rmtree(building, ignore_errors=True)
            raise self._not_written(snapshot.step, error) from error

    def _together(self, act: Callable[[], T]) -> list[T | None]:
        """`act` on every process; what each returns, by rank, or the same OSError on every process."""
        value, failure = None, None
        try:
            value = act()
        except OSError as error:
            failure = error
        outcomes = [(value, failure)]
        if self._group is not None:
            outcomes = [(None, None)] * self._world.size
            dist.all_gather_object(outcomes, (value, failure), group=self._group)
        for _, found in outcomes:
            if found is not None:
                raise found
        return [value for value, _ in outcomes]

    def _make(self, building: Path) -> None:
        if self._world.is_first:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)

    def _write_own(self, building: Path, snapshot: _Snapshot) -> dict[str, dict[str, Any]]:
        """This process's random generators; entries of all files that it has written."""
        rank = self._world.rank
        _write_tensors_file(building / _random_file(rank), snapshot.random)
        paths = [building / _random_file(rank), *building.glob(f"__{rank}_*")]
        return {path.name: file_entry(path) for path in paths}

    def _complete(self, building: Path, final: Path, snapshot: _Snapshot, files: dict[str, Any]) -> None:
        """What the first process adds: state, records, manifest, the name that makes it count; the oldest go."""
        if not self._world.is_first:
            return
        write_text(building / STATE_FILE, snapshot.state)
        _write_tensors_file(building / RECORDS_FILE, snapshot.records)
        own = [path for path in building.iterdir() if path.name not in files and path.name != MANIFEST_FILE]
        files |= {path.name: file_entry(path) for path in own}
        write_manifest(building, Manifest(FORMAT, self._key, snapshot.step, self._world.size, files))
        _sync(building)
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            os.replace(final, old)
        os.replace(building, final)
        _sync(self._directory)
        shutil.rmtree(old, ignore_errors=True)
        self._prune(snapshot.step)

    def _prune(self, newest: int) -> None:
        """Keep the last; those that were found damaged, and those after which the run took another turn, go."""
        self._refused.discard(newest)
        whole = [step for step in self._steps() if step <= newest and step not in self._refused]
        for step in set(self._steps()) - set(whole[-self._settings.keep_last :]):
            _remove(self._directory / step_name(step))
        self._refused.clear()

    def _not_written(self, step: int, error: OSError) -> CheckpointError:
        whole = [found for found in self._steps() if found not in self._refused]
        kept = f"{step_name(whole[-1])} is whole" if whole else "there is none before it"
        if error.errno in _FULL:
            cause, remedy = f"no room ({error.strerror})", "free space and run the same command again"
        else:
            cause, remedy = str(error.strerror or error), "mend it and run the same command again"
        return CheckpointError(
            f"{self._directory}: the checkpoint after step {step} could not be written: {cause}; {kept}; {remedy}"
        )


def _random_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


def _whole(tensor: Tensor) -> Tensor:
    assert not isinstance(tensor, DTensor), "records are plain tensors"
    return tensor.detach().to("cpu", copy=True).contiguous()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tensors_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with path.open("wb") as file:
        file.write(save(dict(tensors)))
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Have the names in a directory on disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _removed_name(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.removed")


def _remove(directory: Path) -> None:
    """Remove a directory, of which never a part counts."""
    hidden = _removed_name(directory)
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(directory, hidden)
    shutil.rmtree(hidden, ignore_errors=True)

"""Checkpoints inside a stage: written, found and refused. Real files, and several real processes where it says so."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from tests.ranks import run_on_ranks
from threefold import interrupt
from threefold.checkpoint import training
from threefold.checkpoint.manifest import DamagedError, read_manifest
from threefold.checkpoint.training import Checkpointer, Saved, TrainingState
from threefold.config.scale import CheckpointSection
from threefold.engine.distributed import World
from threefold.errors import CheckpointError, Preempted

OFTEN = CheckpointSection(every_steps=1, every_minutes=0)


def checkpointer(directory: Path, notes: list[str] | None = None, key: str = "key", **settings: Any) -> Checkpointer:
    section = CheckpointSection(**({"every_steps": 1, "every_minutes": 0} | settings))
    return Checkpointer(directory, key, section, World(), (notes if notes is not None else []).append)


def state(number: float) -> TrainingState:
    return TrainingState(
        {"model.weight": torch.full((4, 3), float(number)), "optimizer.step": torch.tensor(float(number))},
        {"position": number, "third": 1 / 3},
        {"pending": torch.arange(3), "none": torch.empty(0, 2), "flags": torch.tensor([True, False])},
    )


def saved_at(directory: Path, *steps: int, **settings: Any) -> None:
    writer = checkpointer(directory, **settings)
    for step in steps:
        writer.save(step, state(step))
    writer.finish()


def save_at_once(writer: Checkpointer, step: int, what: TrainingState) -> None:
    writer.save(step, what)
    writer.finish()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def loaded(directory: Path, notes: list[str] | None = None, **settings: Any) -> Saved:
    found = checkpointer(directory, notes, **settings).load()
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_was_saved_comes_back_with_its_bits(tmp_path: Path, asynchronous: bool) -> None:
    values = {"floats": [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, float("inf")], "position": [3, 2**60]}
    tensors = {"model.a": torch.randn(5, 7), "model.half": torch.randn(3).bfloat16(), "optimizer.step": torch.tensor(3)}
    records = {"tokens": torch.randint(0, 9, (2, 3)), "scores": torch.randn(3, 2).T, "none": torch.empty(0)}
    writer = checkpointer(tmp_path / "sft", asynchronous=asynchronous)
    writer.save(7, TrainingState(tensors, values, records))
    writer.finish()
    assert names(tmp_path / "sft") == ["step-00000007"]

    found = loaded(tmp_path / "sft")
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found.read_into(into)
    assert found.step == 7
    assert found.names == tensors.keys()
    assert [value.hex() for value in found.values["floats"]] == [value.hex() for value in values["floats"]]
    assert found.values["position"] == [3, 2**60]
    for name, tensor in tensors.items():
        assert torch.equal(into[name], tensor), name
    for name, tensor in records.items():
        assert torch.equal(found.records[name], tensor), name


def test_parameters_are_filled_in_place_and_may_be_some_of_many(tmp_path: Path) -> None:
    saved_at(tmp_path, 3)
    weight = nn.Parameter(torch.zeros(4, 3))
    loaded(tmp_path).read_into({"model.weight": weight})
    assert weight.requires_grad
    assert torch.equal(weight, torch.full((4, 3), 3.0))


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    weight, position, pending = torch.zeros(300_000), {"at": 1}, torch.zeros(5)
    writer = checkpointer(tmp_path)
    writer.save(1, TrainingState({"weight": weight}, position, {"pending": pending}))
    for thing in (weight, pending):
        thing.fill_(9.0)  # training goes on
    position["at"] = 2
    random.random()
    torch.rand(3)
    writer.finish()
    found = loaded(tmp_path)
    into = torch.ones_like(weight)
    found.read_into({"weight": into})
    assert (into == 0).all()
    assert (found.records["pending"] == 0).all()
    assert found.values == {"at": 1}


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)  # it keeps the second of a pair
    np.random.standard_normal()
    torch.rand(3)
    saved_at(tmp_path, 1)

    def draws() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), *torch.randn(3)]

    expected = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    found = loaded(tmp_path)
    assert draws() == expected
    found.restore_random_state()
    assert draws() == expected


# --------------------------------------------------------------------------------------------------- when, how many


def test_only_the_last_stay(tmp_path: Path) -> None:
    saved_at(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_due_by_number_of_steps_by_time_and_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_steps = checkpointer(tmp_path, every_steps=3)
    assert [by_steps.due(step) for step in range(1, 8)] == [step in (3, 6) for step in range(1, 8)]

    now = 1000.0
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    by_time = checkpointer(tmp_path, every_steps=0, every_minutes=0.5)
    assert not by_time.due(1)
    now += 29
    assert not by_time.due(2)
    now += 2
    assert by_time.due(3)
    by_time.save(3, state(3))
    assert not by_time.due(4)
    by_time.finish()

    never = checkpointer(tmp_path, every_steps=0, every_minutes=0)
    now += 1e6
    assert not never.due(5)


def test_a_request_to_stop_is_due_and_leaves_when_the_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpointer(tmp_path, every_steps=0)
    writer.stop_if_asked()
    monkeypatch.setattr(interrupt, "_requested_at", 0.0)
    writer.stop_if_asked()  # it came after `due`: the next step saves
    assert writer.due(5)
    writer.save(5, state(5))
    with pytest.raises(Preempted, match="run the same command again"):
        writer.stop_if_asked()
    assert loaded(tmp_path).step == 5


def test_a_complete_stage_removes_them(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path / "sft")
    writer.save(1, state(1))
    writer.clear()
    assert names(tmp_path) == []


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpointer(tmp_path / "nowhere").load() is None


# ------------------------------------------------------------------------------------------------------- damaged ones


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["__0_0.distcp", ".metadata", "state.json", "records.safetensors", "rng-0.safetensors", "manifest.json"]


def test_these_are_all_the_files(tmp_path: Path) -> None:
    saved_at(tmp_path, 1)
    assert set(names(tmp_path / "step-00000001")) == set(FILES)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, damage: Any) -> None:
    saved_at(tmp_path, 4, 8)
    damage(tmp_path / "step-00000008" / name)
    notes: list[str] = []
    found = loaded(tmp_path, notes)
    assert found.step == 4
    assert found.values["position"] == 4
    assert len(notes) == 1
    assert "step-00000008" in notes[0]
    assert name in notes[0]
    assert "the one before is taken" in notes[0]
    assert "\n" not in notes[0]


def test_all_damaged_is_from_the_beginning(tmp_path: Path) -> None:
    saved_at(tmp_path, 4, 8)
    for step in names(tmp_path):
        flip(tmp_path / step / "state.json")
    notes: list[str] = []
    assert checkpointer(tmp_path, notes).load() is None
    assert len(notes) == 2
    assert "from the beginning" in notes[1]


def test_a_manifest_made_to_fit_is_no_other_step(tmp_path: Path) -> None:
    saved_at(tmp_path, 4)
    os.rename(tmp_path / "step-00000004", tmp_path / "step-00000009")
    with pytest.raises(DamagedError, match="changed"):
        read_manifest(tmp_path / "step-00000009")


@pytest.mark.parametrize("again", [6, 8, 12])
def test_damaged_ones_do_not_count_among_those_that_are_kept(tmp_path: Path, again: int) -> None:
    saved_at(tmp_path, 4, 8)
    flip(tmp_path / "step-00000008" / "state.json")
    writer = checkpointer(tmp_path, keep_last=2)
    found = writer.load()
    assert found is not None
    assert found.step == 4
    writer.save(again, state(again))
    writer.finish()
    assert names(tmp_path) == ["step-00000004", f"step-{again:08d}"]
    notes: list[str] = []
    assert loaded(tmp_path, notes).step == again
    assert notes == []


def test_what_killed_writes_left_is_removed_and_a_cut_swap_is_undone(tmp_path: Path) -> None:
    saved_at(tmp_path / "sft", 4)
    (tmp_path / "sft" / ".step-00000008.building").mkdir()
    os.rename(tmp_path / "sft" / "step-00000004", tmp_path / "sft" / ".step-00000004.old")
    (tmp_path / ".sft.removed" / "step-00000001").mkdir(parents=True)
    assert loaded(tmp_path / "sft").step == 4
    assert names(tmp_path) == ["sft"]
    assert names(tmp_path / "sft") == ["step-00000004"]


def test_other_settings_or_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_at(tmp_path, 4, key="before")
    with pytest.raises(CheckpointError, match=r"step-00000004: was made with other settings .* delete "):
        checkpointer(tmp_path, key="now").load()
    monkeypatch.setattr(training, "FORMAT", 99)
    with pytest.raises(CheckpointError, match="another version"):
        checkpointer(tmp_path, key="before").load()


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"model.other": torch.zeros(4, 3)}, "has no tensor 'model.other'"),
        ({"model.weight": torch.zeros(3, 4)}, r"'model.weight' has shape \[4, 3\], and here \[3, 4\]"),
        ({"model.weight": torch.zeros(4, 3).half()}, "'model.weight' is float32, and here float16"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tensors: dict[str, Tensor], problem: str) -> None:
    saved_at(tmp_path, 4)
    found = loaded(tmp_path)
    with pytest.raises(CheckpointError, match=problem + ".*another model"):
        found.read_into(tensors)


# ----------------------------------------------------------------------------------------- writes that do not succeed


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """For the time of the block writing more fails, as on a full disk (EFBIG in place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("limit", [100, 1500, 4000])
def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path: Path, limit: int, asynchronous: bool) -> None:
    saved_at(tmp_path, 4)
    writer = checkpointer(tmp_path, asynchronous=asynchronous)
    small = TrainingState({"w": torch.zeros(2)}, {}, {"big": torch.zeros(2000)})
    large = TrainingState({"w": torch.zeros(2000)}, {}, {})
    message = r"after step 8 .* no room .*step-00000004 is whole; free space"
    with files_no_longer_than(limit), pytest.raises(CheckpointError, match=message) as error:
        save_at_once(writer, 8, small if limit == 4000 else large)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000004"]
    writer.save(8, large)  # there is room again
    writer.finish()
    assert loaded(tmp_path).step == 8


def test_a_write_that_failed_in_the_background_is_told_at_the_next_step(tmp_path: Path) -> None:
    writer = checkpointer(tmp_path)
    with files_no_longer_than(100):
        writer.save(1, state(1))
        while not writer._writing.done():  # type: ignore[union-attr]
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match="there is none before it"):
            writer.due(2)
    writer.finish()  # told once


KILLED = """
import sys, time
from pathlib import Path
import torch
from threefold.checkpoint.training import Checkpointer, TrainingState
from threefold.config.scale import CheckpointSection
from threefold.engine.distributed import World

torch.set_num_threads(1)
writer = Checkpointer(
    Path(sys.argv[1]), "key", CheckpointSection(every_steps=1, asynchronous=sys.argv[2] == "1"), World(), print
)
found = writer.load()
step = found.step if found else 0
print("from", step, flush=True)
while True:
    step += 1
    big = torch.full((300_000,), float(step))
    writer.save(step, TrainingState({"a": big, "b": big + 1}, {"step": step}, {"c": big[:1000].clone()}))
    print(step, flush=True)
"""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_killed_at_any_moment_of_a_write_a_whole_one_is_left(tmp_path: Path, asynchronous: bool) -> None:
    moments = random.Random(5)
    reached = 0
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "sft"), str(int(asynchronous))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            assert process.stdout.readline().split() == ["from", str(reached)]  # no word of damage
            assert process.stdout.readline()  # it has begun
            time.sleep(moments.uniform(0.02, 0.3))
        finally:
            process.kill()
            last_begun = [int(line) for line in process.communicate()[0].split()][-1:]
        notes: list[str] = []
        found = checkpointer(tmp_path / "sft", notes).load()
        assert notes == []
        if found is None:
            continue
        assert found.step >= (last_begun[0] if last_begun else reached + 1) - 2
        reached = found.step
        a, b = torch.zeros(300_000), torch.zeros(300_000)
        found.read_into({"a": a, "b": b})
        assert (a == reached).all()
        assert (b == reached + 1).all()
        assert found.values == {"step": reached}
    assert reached > 0


REQUESTED = """
import os, signal, sys, time
from pathlib import Path
from threefold import interrupt

interrupt.heard_as_request()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes it on
print(interrupt.stop_requested(), flush=True)
interrupt.SAME_REQUEST_SECONDS = 0.1
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_sigterm_is_a_request_and_then_an_order() -> None:
    done = subprocess.run([sys.executable, "-c", REQUESTED], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True"
    assert done.returncode == 143
    assert "terminated" in done.stderr


# -------------------------------------------------------------------------------------------------- several processes


def network() -> nn.Sequential:
    """Sizes that do not divide by 2 or 4, and one below 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 1))


class Trained:
    """A network, its optimizer and their tensors by name, spread like a model at one ZeRO stage."""

    def __init__(self, world: World, stage: int) -> None:
        self.world = world
        self.model = network()
        if stage == 3 and world.size > 1:
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=world.mesh)
            fully_shard(self.model, mesh=world.mesh)
        parameters = self.model.parameters()
        self.optimizer: Any
        if stage == 1 and world.size > 1:
            self.outer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.01)
            self.optimizer = self.outer.optim
        else:
            self.outer = self.optimizer = torch.optim.AdamW(parameters, lr=0.01)
        self.sharded = stage == 3 and world.size > 1

    def step(self, number: int) -> float:
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        loss = self.model(data).square().mean()
        self.outer.zero_grad()
        loss.backward()
        self.outer.step()
        return float(loss)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in held:
                continue
            kept = self.optimizer.state[parameter]
            if not kept:
                kept["step"] = torch.tensor(0.0)
                kept["exp_avg"] = torch.zeros_like(parameter.detach())
                kept["exp_avg_sq"] = torch.zeros_like(parameter.detach())
            found |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
        return dict(found)


def train_and_save(world: World, directory: Path, stage: int, asynchronous: bool) -> list[float]:
    """Four steps, a checkpoint after each, four more steps."""
    trained = Trained(world, stage)
    section = CheckpointSection(every_steps=1, every_minutes=0, asynchronous=asynchronous)
    writer = Checkpointer(directory, "key", section, world, print)
    assert writer.load() is None
    torch.manual_seed(100 + world.rank)
    losses = []
    for number in range(8):
        losses.append(trained.step(number))
        if number < 4:
            assert writer.due(number + 1)
            writer.save(
                number + 1,
                TrainingState(trained.tensors(), {"number": number}, {"losses": torch.tensor(losses)}),
            )
        world.sum([1.0])  # what training tells its peers while the writer tells them other things
    writer.finish()
    return losses


def resume(world: World, directory: Path, stage: int) -> tuple[list[float], int]:
    trained = Trained(world, stage)
    found = Checkpointer(directory, "key", OFTEN, world, print).load()
    assert found is not None
    assert found.values == {"number": 3}
    assert len(found.records["losses"]) == 4
    found.read_into(trained.tensors())
    return [trained.step(number) for number in range(4, 8)], int(torch.randint(0, 10**9, ()))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_two_processes_go_on_with_the_same_bits(tmp_path: Path, stage: int, asynchronous: bool) -> None:
    losses = run_on_ranks(train_and_save, 2, tmp_path, stage, asynchronous)[0]
    resumed = run_on_ranks(resume, 2, tmp_path, stage)
    assert resumed[0][0] == resumed[1][0] == losses[4:]
    for rank in range(2):  # each its own random numbers
        torch.manual_seed(100 + rank)
        assert resumed[rank][1] == int(torch.randint(0, 10**9, ()))


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [((2, 3), (1, 0)), ((2, 3), (4, 3)), ((4, 3), (2, 1)), ((2, 1), (3, 3)), ((1, 0), (2, 3))],
)
def test_other_layouts_and_numbers_of_processes_go_on(
    tmp_path: Path, saved_by: tuple[int, int], resumed_by: tuple[int, int]
) -> None:
    losses = run_on_ranks(train_and_save, saved_by[0], tmp_path, saved_by[1], True)[0]
    resumed = run_on_ranks(resume, resumed_by[0], tmp_path, resumed_by[1])
    for found, _ in resumed:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses[4:]), rtol=1e-5, atol=1e-7)


def fail_on_one(world: World, directory: Path) -> list[str]:
    trained = Trained(world, 3)
    writer = Checkpointer(directory, "key", OFTEN, world, print)
    writer.save(1, TrainingState(trained.tensors(), {}, {}))
    writer.finish()
    told = []
    for number in (2, 3):
        limit = 300 if world.rank == 1 and number == 2 else 10**7
        with files_no_longer_than(limit):
            try:
                writer.save(number, TrainingState(trained.tensors(), {}, {}))
                writer.finish()
            except CheckpointError as error:
                told.append(str(error))
    return told


def test_a_process_that_cannot_write_fails_the_checkpoint_on_all_alike(tmp_path: Path) -> None:
    told = run_on_ranks(fail_on_one, 2, tmp_path)
    assert told[0] == told[1]
    assert len(told[0]) == 1
    assert "no room" in told[0][0]
    assert "step-00000001 is whole" in told[0][0]
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def refuse_on_all(world: World, directory: Path) -> tuple[int, list[str], str]:
    notes: list[str] = []
    found = Checkpointer(directory, "key", OFTEN, world, notes.append).load()
    assert found is not None
    wrong = {"model.other": torch.zeros(1)} if world.rank == 1 else {}
    try:
        found.read_into(wrong)
    except CheckpointError as error:
        return found.step, notes, str(error)
    return found.step, notes, ""


def test_all_processes_refuse_the_same(tmp_path: Path) -> None:
    saved_at(tmp_path, 4, 8)
    flip(tmp_path / "step-00000008" / "state.json")
    (first, notes, error), (second, silent, same_error) = run_on_ranks(refuse_on_all, 2, tmp_path)
    assert first == second == 4
    assert len(notes) == 1
    assert silent == []
    assert error == same_error
    assert "has no tensor 'model.other'" in error


def stop_one(world: World, directory: Path) -> str:
    interrupt.heard_as_request()
    writer = Checkpointer(directory, "key", CheckpointSection(every_steps=0, every_minutes=0), world, print)
    for step in range(1, 100):
        if step == 5 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if writer.due(step):
            writer.save(step, TrainingState({}, {"step": step}, {}))
            try:
                writer.stop_if_asked()
            except Preempted as stopped:
                return f"{step} {stopped}"
    return "not stopped"


def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    told = run_on_ranks(stop_one, 2, tmp_path)
    assert told[0] == told[1]
    assert told[0].startswith("5 stopped by SIGTERM")
    assert json.loads((tmp_path / "step-00000005" / "state.json").read_text()) == {"step": 5}


def clear_together(world: World, directory: Path) -> bool:
    writer = Checkpointer(directory, "key", OFTEN, world, print)
    writer.save(1, TrainingState({"w": torch.zeros(3)}, {}, {}))
    writer.clear()
    world.barrier()
    return directory.exists()


def test_two_processes_clear(tmp_path: Path) -> None:
    assert run_on_ranks(clear_together, 2, tmp_path / "sft") == [False, False]
    assert names(tmp_path) == []


def die_while_writing(world: World, directory: Path, asynchronous: bool) -> None:
    section = CheckpointSection(every_steps=1, every_minutes=0, asynchronous=asynchronous)
    writer = Checkpointer(directory, "key", section, world, print)
    for step in range(1, 1000):
        big = torch.full((200_000,), float(step))
        if step == 3 and world.rank == 1:
            threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGKILL)).start()
        writer.save(step, TrainingState({"big": big, f"of rank {world.rank}": big}, {"step": step}, {}))
        writer.due(step)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_death_of_a_process_ends_the_others_and_leaves_a_whole_one(tmp_path: Path, asynchronous: bool) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank \d of 2"):
        run_on_ranks(die_while_writing, 2, tmp_path, asynchronous)
    assert time.monotonic() - started < 60
    found = loaded(tmp_path)
    assert found.step >= 1
    into = {name: torch.zeros(200_000) for name in ("big", "of rank 0", "of rank 1")}
    found.read_into(into)
    assert all((tensor == found.step).all() for tensor in into.values())

"""What the processes of a run tell each other, over real processes; one process alone tells itself the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from threefold.engine.distributed import (
    ALONE,
    World,
    background_group,
    inference_groups,
    launched,
    start_world,
    stop_world,
)
from threefold.errors import ConfigError


def tell(world: World) -> dict[str, Any]:
    rank = world.rank
    told: list[int] = []

    def first_only() -> str:
        told.append(rank)
        return f"made by {rank}"

    own = {number: f"item {number} of {rank}" for number in range(rank, 7, world.size)}
    world.barrier()
    return {
        "launched": launched(),
        "is_first": world.is_first,
        "places": (world.local_rank, world.local_size, None if world.mesh is None else world.mesh.size()),
        # the order in which gloo adds is the same for all
        "sum": world.sum([0.1 * (rank + 1), 1e17 if rank == 0 else 1.0, -3.0]),
        "max": world.max([float(rank), -float(rank), 5.5]),
        "any": (world.any(rank == world.size - 1), world.any(False)),
        "gather": world.gather({"rank": rank}),
        "assemble": world.assemble(own, 7),
        "nothing": (world.assemble({}, 0), world.sum([]), world.max([])),
        "from_first": world.from_first(first_only),
        "told": told,
        "backend": None if world.size == 1 else dist.get_backend(),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_what_they_tell_each_other(size: int) -> None:
    outcomes = run_on_ranks(tell, size)
    shared = ("sum", "max", "any", "gather", "assemble", "nothing", "from_first", "backend", "launched")
    for rank, outcome in enumerate(outcomes):
        assert {name: outcome[name] for name in shared} == {name: outcomes[0][name] for name in shared}
        assert outcome["is_first"] == (rank == 0)
        assert outcome["places"] == (rank, size, size)
        assert outcome["told"] == ([0] if rank == 0 else [])
    first = outcomes[0]
    assert first["sum"] == pytest.approx([0.1 * sum(range(1, size + 1)), 1e17 + size - 1, -3.0 * size])
    assert first["max"] == [size - 1.0, 0.0, 5.5]
    assert first["any"] == (True, False)
    assert first["gather"] == [{"rank": rank} for rank in range(size)]
    assert first["assemble"] == [f"item {number} of {number % size}" for number in range(7)]
    assert first["nothing"] == ([], [], [])
    assert (first["from_first"], first["backend"], first["launched"]) == ("made by 0", "gloo", True)


def test_one_process_alone() -> None:
    outcome = tell(ALONE)
    assert outcome["is_first"]
    assert outcome["places"] == (0, 1, None)
    assert outcome["sum"] == [0.1, 1e17, -3.0]
    assert outcome["any"] == (True, False)
    assert outcome["gather"] == [{"rank": 0}]
    assert outcome["assemble"] == [f"item {number} of 0" for number in range(7)]
    assert outcome["from_first"] == "made by 0"
    assert ALONE.in_turn(lambda: 5) == 5
    assert inference_groups(ALONE, 1) == (0, None)
    assert background_group(ALONE) is None
    stop_world(ALONE)


def meet_a_mistake(world: World) -> list[str]:
    def refuse() -> None:
        raise ConfigError("run.name: of a test")

    def break_down() -> None:
        raise ValueError("of ours")

    found = []
    try:
        world.from_first(refuse)
    except ConfigError as error:
        found.append(str(error))
    if world.is_first:
        try:
            world.from_first(break_down)
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_mistake_of_the_user_is_met_by_all() -> None:
    """A bug of ours by the one that has it only; the others wait, and end with it."""
    assert run_on_ranks(meet_a_mistake, 2) == [["run.name: of a test", "of ours"], ["run.name: of a test"]]


def in_turn_order(world: World) -> list[list[int]]:
    """Who has finished, as each one begins: a counter that all share tells."""
    store = dist.distributed_c10d._get_default_store()

    def make() -> list[int]:
        at_start = int(store.add("finished", 0))
        own = world.rank
        store.add("finished", 1)
        return [own, at_start]

    return world.gather(world.in_turn(make))


def test_turns_follow_each_other() -> None:
    assert run_on_ranks(in_turn_order, 3) == [[[0, 0], [1, 1], [2, 2]]] * 3


def sums_of_groups(world: World) -> list[tuple[int, float | None]]:
    found: list[tuple[int, float | None]] = []
    for size in (1, 2, 4):
        number, group = inference_groups(world, size)
        total = torch.tensor([10.0**world.rank])
        if group is not None:
            dist.all_reduce(total, group=group)
        found.append((number, float(total) if group is not None else None))
    background = torch.ones(1)
    dist.all_reduce(background, group=background_group(world))
    return [*found, (0, float(background))]


def test_neighbours_generate_together() -> None:
    found = run_on_ranks(sums_of_groups, 4)
    for rank, (alone, pair, four, background) in enumerate(found):
        assert alone == (rank, None)
        assert pair == (rank // 2, 11.0 if rank < 2 else 1100.0)
        assert four == (0, 1111.0)
        assert background == (0, 4.0)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    assert start_world(torch.device("cpu"), 5.0) == ALONE
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert launched()
    assert start_world(torch.device("cpu"), 5.0) is ALONE, "one process joins nobody"
    assert not dist.is_initialized()

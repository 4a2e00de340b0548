"""The data of a run among its processes: the same everywhere, or refused everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.tiny import pair_rows, tiny_recipe, write_rows
from threefold.engine.distributed import World
from threefold.errors import DataError
from threefold.stages.context import shared_library


def library_of(world: World, directory: Path, own_rows: bool) -> str:
    """Key of the library, or what is wrong with it; each process has its files, and a cache, where it is."""
    machine = directory / str(world.rank)
    machine.mkdir(exist_ok=True)
    os.chdir(machine)
    rows = write_rows(Path("rows.jsonl"), pair_rows(50 + (world.rank if own_rows else 0)))
    recipe = tiny_recipe(f"--data.sources={rows}", "--data.cache_dir=cache")
    try:
        return shared_library(recipe, world, print).key
    except DataError as error:
        return f"refused: {error}"


def same_directory(world: World, directory: Path) -> int:
    """Rows of a library that all processes open at once, from one cache."""
    recipe = tiny_recipe(f"--data.sources={directory / 'rows.jsonl'}", f"--data.cache_dir={directory / 'cache'}")
    return len(shared_library(recipe, world, print).tables[0])


def test_machines_with_files_of_their_own_need_the_same_rows(tmp_path: Path) -> None:
    same = run_on_ranks(library_of, 2, tmp_path, False)
    assert same[0] == same[1]
    assert not same[0].startswith("refused")
    first, second = run_on_ranks(library_of, 2, tmp_path, True)
    assert first == second
    assert first.startswith("refused: data.sources: process 1 reads other data than process 0")


def test_four_processes_prepare_once_and_read_the_same(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", pair_rows(300))
    assert run_on_ranks(same_directory, 4, tmp_path) == [300] * 4
    built = [path.name for path in (tmp_path / "cache").rglob("examples-*") if path.is_dir()]
    assert len(built) == 1


def test_a_mistake_is_everybodys(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\nno json\n")
    with pytest.raises(AssertionError, match=r"rows\.jsonl.*is not JSON"):
        run_on_ranks(same_directory, 2, tmp_path)

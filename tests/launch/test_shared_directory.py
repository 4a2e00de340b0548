"""Whether all processes see one output directory: real processes, one of which looks elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from threefold.engine.distributed import World
from threefold.errors import ConfigError
from threefold.launch import shared_directory
from threefold.launch.shared_directory import check_shared


def look(world: World, directories: list[str]) -> str:
    shared_directory.APPEAR_SECONDS = 0.5
    try:
        check_shared(Path(directories[world.rank]), world)
    except ConfigError as error:
        return str(error)
    return ""


def test_one_directory_is_found_and_left_as_it_was(tmp_path: Path) -> None:
    assert run_on_ranks(look, 2, [str(tmp_path)] * 2) == ["", ""]
    assert list(tmp_path.iterdir()) == []
    check_shared(tmp_path / "is not even looked at", World())


def test_directories_of_one_name_on_two_machines_are_refused_everywhere(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    said = run_on_ranks(look, 2, [str(place) for place in places])
    assert all("does not see there what" in text and "file system that all machines share" in text for text in said)
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_a_directory_that_cannot_be_written_keeps_its_error() -> None:
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        run_on_ranks(look, 2, ["/nowhere/at/all"] * 2)

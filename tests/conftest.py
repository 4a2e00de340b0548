"""Fixtures that all tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tiny import train, write_recipe

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs of the tests keep prepared data, those of other processes too: not in the user's home."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    return directory


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models, read in place; a test that needs them is skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny_recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of `tiny_run`."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe_file: Path) -> Path:
    """A finished run of all three steps; tests read it, and copy it to change it."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(tiny_recipe_file, output) == 0
    return output

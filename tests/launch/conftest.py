"""No test of a launch leaves a launcher behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.processes import kill_launchers


@pytest.fixture(autouse=True)
def no_launcher_is_left() -> Iterator[None]:
    """End those that a test that failed has left."""
    yield
    kill_launchers()

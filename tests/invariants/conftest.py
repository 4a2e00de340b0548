"""What tests of several processes share: runs that are made once."""

from __future__ import annotations

import pytest

from tests.invariants.many_processes import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Single steps of a tiny recipe, on as many processes as asked for."""
    return Runs(tmp_path_factory.mktemp("processes"))

"""The formulas beside what real processes have resident. The whole table is benchmarks/memory_per_rank.py."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory_per_rank import BAR, PARTS, Case, measure
from benchmarks.processes import on_processes

MODEL = "opt:hidden=384,layers=6,heads=6,ffn=1536,vocab=8000"
"""14 M weights: 56 MiB, so that the library's own allocations, one or two MiB, stay small beside every part."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


@pytest.mark.parametrize(
    "case",
    [
        Case(3),
        pytest.param(Case(0), marks=pytest.mark.slow),
        pytest.param(Case(1), marks=pytest.mark.slow),
        pytest.param(Case(2), marks=pytest.mark.slow),
        pytest.param(Case(0, offload="optimizer"), marks=pytest.mark.slow),
        pytest.param(Case(3, offload="all"), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_memory_of_a_rank_is_what_the_formulas_say(case: Case) -> None:
    ranks = on_processes(2, measure, case, MODEL)
    for part in PARTS:
        measured, formula = max(rank["measured"][part] for rank in ranks), ranks[0]["formula"][part]
        assert measured == pytest.approx(formula, rel=BAR), part
    held = sum(ranks[0]["formula"][part] for part in ("decode weights", "keys and values"))
    for rank in ranks:  # what a rollout took is free again
        assert -rank["measured"]["after the rollout"] == pytest.approx(held, rel=0.05)

"""A run that is stopped by SIGTERM goes on with other processes and other ZeRO stages, and its losses with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny import tiny_recipe
from threefold import pipeline
from threefold.engine.distributed import World
from threefold.errors import Preempted
from threefold.interrupt import heard_as_request
from threefold.metrics import RunLog

RECIPE = (
    "--sft.max_steps=8",
    "--sft.epochs=4",
    "--sft.learning_rate=1e-3",
    "--reward.max_steps=8",
    "--reward.epochs=4",
    "--reward.learning_rate=1e-4",
    "--ppo.iterations=6",
    "--ppo.actor_learning_rate=1e-4",
    "--ppo.critic_learning_rate=1e-4",
    "--checkpoint.every_minutes=0",
)
STOPS = {"sft": 4, "reward": 4, "ppo": 3}
TRAINED, FROZEN = ("actor", "reward", "critic"), ("reference", "scorer")
LOSSES = ("sft/loss", "sft/eval_loss", "reward/loss", "reward/eval_loss", "loss/policy_avg", "loss/value_avg")


def spread(stage: int) -> tuple[str, ...]:
    frozen = 3 if stage == 3 else 0
    return (
        *(f"--parallel.{model}.zero_stage={stage}" for model in TRAINED),
        *(f"--parallel.{model}.zero_stage={frozen}" for model in FROZEN),
    )


class StoppingLog(RunLog):
    """Sends its own process SIGTERM when a stage reaches a step."""

    stop_at: tuple[str, int]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, values)
        if (self._stage, step) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stopping(world: World, stop_at: tuple[str, int] | None) -> Iterator[None]:
    heard_as_request()
    StoppingLog.stop_at = stop_at or ("", -1)
    with patch.object(pipeline, "RunLog", StoppingLog):
        yield


def run_recipe(
    world: World, overrides: tuple[str, ...], directory: Path, stop_at: tuple[str, int] | None = None
) -> str:
    """The three steps, up to where the first process is sent SIGTERM; what they end with."""
    with stopping(world, stop_at):
        try:
            pipeline.run_steps(tiny_recipe(*overrides), (1, 2, 3), directory, torch.device("cpu"), world)
        except Preempted as error:
            return str(error)
    return "finished"


def losses(directory: Path) -> dict[tuple[str, int, str], float]:
    found: dict[tuple[str, int, str], float] = {}
    for line in map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines()):
        found |= {(line["stage"], line["step"], name): line[name] for name in LOSSES if name in line}
    return found


def events(directory: Path) -> list[tuple[Any, Any]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(line["stage"], line["event"]) for line in lines if "event" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert run_on_ranks(run_recipe, 2, (*RECIPE, *spread(3)), directory) == ["finished"] * 2
    return directory


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_losses_go_on_at_another_number_of_processes_and_another_stage(
    uninterrupted: Path, tmp_path: Path, stage: str
) -> None:
    stopped = tmp_path / "stopped"
    ends = run_on_ranks(run_recipe, 2, (*RECIPE, *spread(3)), stopped, (stage, STOPS[stage]))
    assert all("stopped by SIGTERM" in end for end in ends), "both stop, though one was asked"
    expected = losses(uninterrupted)
    for size, zero_stage in ((1, 0), (4, 2)):
        resumed = tmp_path / f"resumed on {size}"
        shutil.copytree(stopped, resumed)
        assert set(run_on_ranks(run_recipe, size, (*RECIPE, *spread(zero_stage)), resumed)) == {"finished"}
        assert (stage, "resume") in events(resumed)
        found = losses(resumed)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-4)

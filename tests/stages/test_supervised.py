"""Steps 1 and 2 go on from any step as if they had not stopped: metrics and weights bit for bit, the best ones too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny import finished, read_metrics, same_weights, tiny_recipe, weights, without_times
from threefold.checkpoint.training import Checkpointer, TrainingState
from threefold.config.recipe import Recipe
from threefold.config.scale import CheckpointSection
from threefold.engine.device import make_repeatable
from threefold.engine.distributed import ALONE, World
from threefold.metrics import RunLog, SilentLog
from threefold.stages import reward, sft
from threefold.stages.context import StageContext

STAGES = {"sft": sft.run, "reward": reward.run}
TOO_FAST = {
    "sft": {"learning_rate": 5.0, "scheduler": "constant", "warmup_steps": 5},
    "reward": {"learning_rate": 0.5},
}
"""The last step is then not the best, so what is saved in the end comes out of a checkpoint."""


class StoppedError(Exception):
    """The run was interrupted."""


class StoppingAfter(Checkpointer):
    """Is due after every step; writes a checkpoint after that one, and stops. 0: never."""

    def __init__(self, directory: Path, step: int, world: World) -> None:
        settings = CheckpointSection(every_steps=1, every_minutes=0, asynchronous=False)
        super().__init__(directory, "key", settings, world, lambda _: None)
        self._step = step

    def save(self, step: int, state: TrainingState) -> None:
        if step == self._step:
            super().save(step, state)
            raise StoppedError


def recipe_of(stage: str, *overrides: str) -> Recipe:
    fields = {**TOO_FAST[stage], "eval_every": 1, "max_steps": 5, "batch_size": 8}
    return tiny_recipe(*(f"--{stage}.{name}={value}" for name, value in fields.items()), "--run.seed=8", *overrides)


def run_until(world: World, stage: str, recipe: Recipe, run: Path, output: Path, step: int) -> dict[str, Any]:
    """A stage until after that step, on from the checkpoint beside `output` if there is one; what it returns."""
    make_repeatable(recipe.run, world.rank)
    log = RunLog(output) if world.is_first else SilentLog(output)
    (output / stage).mkdir(parents=True, exist_ok=True)
    checkpoints = StoppingAfter(output.parent / "checkpoints", step, world)
    context = StageContext(recipe, output / stage, finished(run), log, torch.device("cpu"), torch.float32, world)
    context = replace(context, checkpoints=checkpoints, saved=checkpoints.load())
    summary: dict[str, Any] = {}
    try:
        with log.stage(stage, "0" * 8):
            summary = dict(STAGES[stage](context))
    except StoppedError:
        assert step
    finally:
        log.close()
    return summary


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [("sft", ()), ("sft", ("--sft.dropout=0.3",)), ("reward", ()), ("reward", ("--reward.lora.rank=2",))],
)
def test_a_step_goes_on_from_each_of_its_steps(
    tiny_run: Path, tmp_path: Path, stage: str, overrides: tuple[str, ...]
) -> None:
    recipe = recipe_of(stage, *overrides)
    whole = run_until(ALONE, stage, recipe, tiny_run, tmp_path / "straight" / "run", 0)
    assert whole["best_step"] < 5
    records = without_times(read_metrics(tmp_path / "straight" / "run"))
    for step in (1, 4):
        directory = tmp_path / str(step)
        run_until(ALONE, stage, recipe, tiny_run, directory / "first", step)
        summary = run_until(ALONE, stage, recipe, tiny_run, directory / "second", 0)
        assert summary == whole
        later = without_times(read_metrics(directory / "second"))
        assert later == records[-len(later) :]
        assert len(later) == 2 * (5 - step)
        assert same_weights(directory / "second" / stage, tmp_path / "straight" / "run" / stage)


def on_two(world: World, run: Path, directory: Path) -> list[dict[str, Any]]:
    """In shards: the whole; up to the third step, and on from there."""
    recipe = recipe_of("reward", "--parallel.reward.zero_stage=3")
    places = ((directory / "straight" / "run", 0), (directory / "2" / "first", 3), (directory / "2" / "second", 0))
    return [run_until(world, "reward", recipe, run, output, step) for output, step in places]


def test_the_best_weights_of_shards_are_kept_too(tiny_run: Path, tmp_path: Path) -> None:
    """And may be read by one process, which saves the same to 1e-5."""
    for whole, _, summary in run_on_ranks(on_two, 2, tiny_run, tmp_path):
        assert summary == whole
    assert same_weights(tmp_path / "2" / "second" / "reward", tmp_path / "straight" / "run" / "reward")
    alone = run_until(ALONE, "reward", recipe_of("reward"), tiny_run, tmp_path / "2" / "alone", 0)
    assert alone == pytest.approx(whole, abs=1e-4, rel=1e-4)
    assert alone["best_step"] <= 3, "of a step that this process has not made"
    expected = weights(tmp_path / "straight" / "run" / "reward")
    for name, tensor in weights(tmp_path / "2" / "alone" / "reward").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)

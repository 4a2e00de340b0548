"""Step 3 goes on from any of its safe points as if it had not stopped: metrics and weights bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny import finished, read_metrics, same_weights, stage_context, tiny_recipe, without_times
from threefold.checkpoint.training import Checkpointer, TrainingState
from threefold.config.recipe import Recipe
from threefold.config.scale import CheckpointSection
from threefold.engine.device import make_repeatable
from threefold.engine.distributed import ALONE, World
from threefold.metrics import RunLog, SilentLog
from threefold.stages import ppo
from threefold.stages.context import StageContext
from threefold.stages.pending import pack_batch
from threefold.stages.ppo_progress import Progress, points_per_iteration
from threefold.stages.ppo_setup import set_up
from threefold.stages.ppo_update import UpdateProgress, UpdateStatistics

MODELS = ("actor", "actor_ema", "critic")
SHORT = ("--ppo.iterations=2", "--ppo.eval_every=1", "--ppo.kl_controller=adaptive", "--ppo.kl_horizon=24")


class StoppedError(Exception):
    """The run was interrupted."""


def checkpointer(directory: Path, world: World = ALONE) -> Checkpointer:
    return Checkpointer(directory, "key", CheckpointSection(every_steps=1, asynchronous=False), world, lambda _: None)


class StoppingAfter(Checkpointer):
    """Is due at every safe point; writes the one of that number, and stops."""

    def __init__(self, directory: Path, number: int, seen: list[int], world: World = ALONE) -> None:
        settings = CheckpointSection(every_steps=1, every_minutes=0, asynchronous=False)
        super().__init__(directory, "key", settings, world, lambda _: None)
        self._number, self._seen = number, seen

    def save(self, step: int, state: TrainingState) -> None:
        self._seen.append(step)
        if len(self._seen) == self._number:
            super().save(step, state)
            raise StoppedError


def run_until(
    recipe: Recipe,
    run: Path,
    output: Path,
    number: int = 0,
    checkpoints: Path | None = None,
    world: World = ALONE,
    seen: list[int] | None = None,
) -> list[dict[str, Any]]:
    """Step 3 until its safe point of that number (0: to its end), on from a checkpoint if there is one; its metrics."""
    make_repeatable(recipe.run, world.rank)
    log = RunLog(output) if world.is_first else SilentLog(output)
    (output / "ppo").mkdir(parents=True, exist_ok=True)
    context = StageContext(recipe, output / "ppo", finished(run), log, torch.device("cpu"), torch.float32, world)
    if checkpoints is not None:
        saved = checkpointer(checkpoints, world).load()
        stopping = StoppingAfter(checkpoints, number, seen if seen is not None else [], world)
        context = replace(context, checkpoints=stopping, saved=saved)
    try:
        with log.stage("ppo", "0" * 8):
            ppo.run(context)
    except StoppedError:
        assert number
    finally:
        log.close()
    return without_times(read_metrics(output)) if world.is_first else []


# -------------------------------------------------------------------------------------------------------------- points


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 2), (1, 3)])
def test_safe_points_count_up(tiny_run: Path, tmp_path: Path, epochs: int, minibatches: int) -> None:
    """After sampling, after scoring, after each optimizer step but the last, after the iteration; none after the
    whole. Where an iteration has one optimizer step, scoring leaves a gradient behind, and is no safe point."""
    recipe = tiny_recipe(*SHORT, f"--ppo.ppo_epochs={epochs}", f"--ppo.minibatches={minibatches}")
    seen: list[int] = []
    run_until(recipe, tiny_run, tmp_path, 0, tmp_path / "checkpoints", seen=seen)
    steps, per_iteration = epochs * minibatches, points_per_iteration(recipe.ppo)
    inside = [1] if steps == 1 else [1, 2, *range(3, 2 + steps)]
    assert per_iteration == 2 + steps
    assert seen == [*inside, per_iteration, *(per_iteration + point for point in inside)]


def test_points_of_a_progress() -> None:
    settings = tiny_recipe("--ppo.ppo_epochs=2", "--ppo.minibatches=3").ppo
    progress: Any = Progress(0.1)
    points = []
    for _ in range(2):
        points.append(progress.point(settings))
        progress.rollouts = []
        points.append(progress.point(settings))
        progress.batch = object()
        for progress.update.done in range(6):
            points.append(progress.point(settings))
        progress.next_iteration()
    assert points == list(range(16))
    assert (progress.iteration, progress.rollouts, progress.batch) == (2, None, None)
    assert progress.update.done == 0


def test_statistics_of_an_update_go_on() -> None:
    whole, first = UpdateStatistics(), UpdateStatistics()
    for statistics in (whole, first):
        statistics.add(3, policy_loss=torch.tensor(0.1), entropy=torch.tensor(1 / 3))
        statistics.add_first(1e-5, float("nan"))
        statistics.end_minibatch(ALONE)
        statistics.steps["val/grad_norm"].append(0.7)
    second = UpdateStatistics.of(first.state())
    for statistics in (whole, second):
        statistics.add(5, policy_loss=torch.tensor(0.3), entropy=torch.tensor(2.0))
        statistics.end_minibatch(ALONE)
        statistics.steps["val/grad_norm"].append(0.1)
        statistics.steps["loss/mixture"].append(0.2)
    assert second.metrics() == whole.metrics()
    assert first.steps["val/grad_norm"] == [0.7], "a copy"
    assert whole.metrics()["loss/policy_avg"] == pytest.approx(0.4 / 8)


# ------------------------------------------------------------------------------------------------------------ and back


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(f"Once there were {n} birds, and {n * 7} more came." for n in range(30)))
    return path


@pytest.fixture(scope="module")
def recipe(stories: Path) -> Recipe:
    """Two minibatches, mixture text, adaptive KL, evaluations between: all that has a state."""
    return tiny_recipe(
        *SHORT, "--ppo.ppo_epochs=1", f"--ppo.mixture.source={stories}", "--ppo.mixture.chunk_length=16",
        "--ppo.mixture.batch_size=3", "--ppo.mixture.eval_documents=4", "--ppo.mixture.coef=0.5",
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(recipe: Recipe, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    run_until(recipe, tiny_run, output)
    return output


def unlike_the_end(records: list[dict[str, Any]], straight: Path) -> list[str]:
    """Names of metrics that differ from the end of the uninterrupted run's (all of them, if there are more)."""
    expected = without_times(read_metrics(straight))[-len(records) :]
    pairs = itertools.chain.from_iterable(
        ((name, one[name], other.get(name)) for name in one) for one, other in zip(records, expected, strict=True)
    )
    return [f"{name}: {mine} {theirs}" for name, mine, theirs in pairs if mine != theirs]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7])
def test_a_run_goes_on_from_each_safe_point(
    recipe: Recipe, tiny_run: Path, straight: Path, tmp_path: Path, number: int
) -> None:
    """Seven: three in each of two iterations, one between them."""
    run_until(recipe, tiny_run, tmp_path / "first", number, tmp_path / "checkpoints")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    seen: list[int] = []
    records = run_until(recipe, tiny_run, tmp_path / "second", 0, tmp_path / "checkpoints", seen=seen)
    assert len(seen) == 7 - number
    assert unlike_the_end(records, straight) == []
    assert len(records) == 4 if number < 4 else 2, "each iteration's, and the evaluation after it"
    for model in MODELS:
        assert same_weights(tmp_path / "second" / "ppo" / model, straight / "ppo" / model), model


@pytest.mark.parametrize("overrides", [("--ppo.minibatches=1",), ("--ppo.actor_lora.rank=2", "--ppo.target_kl=1e-9")])
def test_a_run_goes_on_whatever_the_update_is_like(tiny_run: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """With the critic's gradient out of the scoring pass; with adapters, and updates that end early."""
    recipe = tiny_recipe(*SHORT, "--ppo.ppo_epochs=1", *overrides)
    seen: list[int] = []
    run_until(recipe, tiny_run, tmp_path / "straight", 0, tmp_path / "none", seen=seen)
    for number in {1, len(seen) // 2 + 1, len(seen)}:
        run_until(recipe, tiny_run, tmp_path / f"first {number}", number, tmp_path / str(number))
        records = run_until(recipe, tiny_run, tmp_path / f"second {number}", 0, tmp_path / str(number))
        assert unlike_the_end(records, tmp_path / "straight") == []
        for model in MODELS:
            directories = (tmp_path / directory / "ppo" / model for directory in (f"second {number}", "straight"))
            assert same_weights(*directories), (number, model)


def first_iteration(context: StageContext, parts: int) -> tuple[Any, Progress]:
    """Step 3 in its second iteration, with some parts of it done: sampled, scored, one optimizer step."""
    setup, settings = set_up(context), context.recipe.ppo
    progress = Progress(0.07, before={"x": 0.1}, after={"y": 1 / 3})
    batches = ppo.prompt_batches(setup.prompts, setup.blend, settings)
    ppo._iteration(context, setup, progress, next(batches))
    progress.next_iteration()
    prompts = next(batches)
    if parts >= 1:
        progress.rollouts = ppo.sample(context, setup, prompts, settings.answers_per_prompt)
    if parts >= 2:
        progress.batch = ppo.make_experience(prompts, progress.rollouts or [], setup.scorers, settings, 0.07)
    if parts >= 3:

        def stop(update: UpdateProgress) -> None:
            assert update.done == 1
            raise StoppedError

        with pytest.raises(StoppedError):
            ppo._update(context, setup, progress, None, stop)
    return setup, progress


@pytest.mark.parametrize("parts", [0, 1, 2, 3])
def test_what_is_read_is_what_was_saved(recipe: Recipe, tiny_run: Path, tmp_path: Path, parts: int) -> None:
    """Every tensor, value and record of the state, and where the progress stands."""
    context = stage_context("ppo", recipe, tmp_path / "first", finished(tiny_run))
    setup, progress = first_iteration(context, parts)
    state = progress.state(setup)
    writer = checkpointer(tmp_path / "checkpoints")
    writer.save(progress.point(recipe.ppo), state)
    following = torch.rand(3)
    torch.manual_seed(0)

    again = stage_context("ppo", recipe, tmp_path / "second", finished(tiny_run))
    other = set_up(again)
    saved = checkpointer(tmp_path / "checkpoints").load()
    assert saved is not None
    assert saved.step == points_per_iteration(recipe.ppo) + parts
    found = Progress.read(other, saved)
    assert torch.equal(torch.rand(3), following), "random numbers go on"
    assert found.kl_coef == progress.kl_coef != recipe.ppo.kl_coef
    assert (found.iteration, found.before, found.after) == (1, {"x": 0.1}, {"y": 1 / 3})
    assert (found.rollouts is None, found.batch is None) == (parts < 1, parts < 2)
    assert found.update.done == (1 if parts == 3 else 0)
    restored = found.state(other)
    assert restored.values == state.values
    for one, expected in ((restored.tensors, state.tensors), (restored.records, state.records)):
        assert one.keys() == expected.keys()
        assert all(torch.equal(one[name], tensor) for name, tensor in expected.items())
    assert setup.text is not None
    assert other.text is not None
    assert other.text.num_batches == setup.text.num_batches > 0
    if found.batch is not None and progress.batch is not None:
        packed, before = pack_batch(found.batch), pack_batch(progress.batch)
        assert all(torch.equal(packed[name], before[name]) for name in before)
        rollouts = [experience.rollout for experience in found.batch.experiences]
        assert all(one is other for one, other in zip(found.rollouts or [], rollouts, strict=True))
    for each in (context, again):
        each.log.close()


# ------------------------------------------------------------------------------------------------------- two processes

SPREAD = ("--parallel.actor.zero_stage=3", "--parallel.critic.zero_stage=1", "--parallel.reference.zero_stage=3")


def stop_and_go_on(world: World, recipe: Recipe, run: Path, directory: Path) -> list[list[int]]:
    """The whole, and for two safe points, up to there and on from there; which were seen."""
    passed: list[list[int]] = []
    for name, number in (("straight", 0), ("rollouts", 1), ("update", 6)):
        for part, stop in ((name, number), (f"{name} again", 0)):
            passed.append([])
            run_until(recipe, run, directory / part, stop, directory / f"{name} checkpoints", world, passed[-1])
            if not number:
                break
    return passed


def test_two_processes_go_on_too(recipe: Recipe, tiny_run: Path, tmp_path: Path) -> None:
    """Actor and reference in shards, the critic's optimizer on either process."""
    spread = recipe.model_copy(update={"parallel": tiny_recipe(*SPREAD).parallel})
    for passed in run_on_ranks(stop_and_go_on, 2, spread, tiny_run, tmp_path):
        assert list(map(len, passed)) == [7, 1, 6, 6, 1]
    for name in ("rollouts again", "update again"):
        records = without_times(read_metrics(tmp_path / name))
        assert unlike_the_end(records, tmp_path / "straight") == []
        for model in MODELS:
            assert same_weights(tmp_path / name / "ppo" / model, tmp_path / "straight" / "ppo" / model), model

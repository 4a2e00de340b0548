"""Scoring while others are decoded: what it finds is what scoring afterwards finds. On the CPU, without a stream;
tests/gpu has it with one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import finished, run_stage, stage_context, tiny_recipe, without_times
from threefold.engine.distributed import World
from threefold.stages import ppo
from threefold.stages.context import StageContext
from threefold.stages.overlap import ScoringBeside
from threefold.stages.ppo_setup import Setup, _scoring_stream, set_up
from threefold.stages.rollout import Judgement, judge
from threefold.types import PreparedPrompt, Rollout

TEMPERATURE = 0.7


@pytest.fixture
def context(tiny_run: Path, tmp_path: Path) -> Iterator[StageContext]:
    recipe = tiny_recipe("--ppo.micro_batch_tokens=150", f"--ppo.sampling.temperature={TEMPERATURE}")
    context = stage_context("ppo", recipe, tmp_path, finished(tiny_run))
    yield context
    context.log.close()


def first_prompts(setup: Setup, context: StageContext) -> list[PreparedPrompt]:
    return next(ppo.prompt_batches(setup.prompts, setup.blend, context.recipe.ppo))


def assert_same(found: Judgement, expected: Judgement) -> None:
    """To rounding: passes of other widths add up in another order."""
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)
    assert len(found.ref_logprobs) == len(expected.ref_logprobs)
    for one, other in zip(found.ref_logprobs, expected.ref_logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_scores_are_those_of_scoring_afterwards(context: StageContext) -> None:
    setup = set_up(context)
    prompts = first_prompts(setup, context)
    beside = ScoringBeside(setup.scorers, prompts, TEMPERATURE, stream=None)
    told: list[int] = []

    def on_finished(number: int, rollout: Rollout) -> None:
        told.append(number)
        beside.add(number, rollout)

    rollouts = ppo.sample(context, setup, prompts, context.recipe.ppo.answers_per_prompt, on_finished=on_finished)
    early = [number for done in beside._passes for number in done.numbers]
    assert sorted(told) == list(range(len(prompts)))
    assert 0 < len(set(early)) == len(early) < len(prompts), "some early, the others at the end"
    assert_same(beside.finish(rollouts), judge(prompts, rollouts, setup.scorers, TEMPERATURE))


@pytest.mark.parametrize("order", [range(12), range(11, -1, -1), [5, 11, 0, 7, 1, 10, 2, 9, 3, 8, 4, 6]])
def test_answers_may_finish_in_any_order(context: StageContext, order: list[int]) -> None:
    setup = set_up(context)
    prompts = first_prompts(setup, context)
    rollouts = ppo.sample(context, setup, prompts, context.recipe.ppo.answers_per_prompt)
    beside = ScoringBeside(setup.scorers, prompts, TEMPERATURE, stream=None)
    for number in order:
        beside.add(number, rollouts[number])
    assert_same(beside.finish(rollouts), judge(prompts, rollouts, setup.scorers, TEMPERATURE))


def test_what_does_not_fill_a_pass_is_scored_at_the_end(context: StageContext) -> None:
    setup = set_up(context)
    prompts = first_prompts(setup, context)
    scorers = replace(setup.scorers, passes=type(setup.scorers.passes)(max_tokens=100_000))
    rollouts = ppo.sample(context, setup, prompts, context.recipe.ppo.answers_per_prompt)
    beside = ScoringBeside(scorers, prompts, TEMPERATURE, stream=None)
    for number, rollout in enumerate(rollouts):
        beside.add(number, rollout)
    assert beside._passes == []
    found, expected = beside.finish(rollouts), judge(prompts, rollouts, scorers, TEMPERATURE)
    assert torch.equal(found.scores, expected.scores)


def test_one_pass_at_a_time(context: StageContext) -> None:
    class Busy:
        def query(self) -> bool:
            return False

    setup = set_up(context)
    prompts = first_prompts(setup, context)
    rollouts = ppo.sample(context, setup, prompts, context.recipe.ppo.answers_per_prompt)
    busy: Any = Busy()
    beside = ScoringBeside(setup.scorers, prompts, TEMPERATURE, busy)
    for number, rollout in enumerate(rollouts):
        beside.add(number, rollout)
    assert (len(beside._passes), len(beside._waiting)) == (0, len(rollouts))


def test_a_run_with_it_is_a_run_without(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("--ppo.micro_batch_tokens=150")
    without = run_stage("ppo", recipe, tmp_path / "without", finished(tiny_run))
    made: list[ScoringBeside] = []

    def scoring_beside(setup: Setup, prompts: list[PreparedPrompt], settings: Any) -> ScoringBeside:
        made.append(ScoringBeside(setup.scorers, prompts, settings.sampling.temperature, None))
        return made[-1]

    monkeypatch.setattr(ppo, "_scoring_beside", scoring_beside)
    beside = run_stage("ppo", recipe, tmp_path / "beside", finished(tiny_run))
    assert len(made) == recipe.ppo.iterations
    assert all(scoring._passes for scoring in made)
    for one, other in zip(without_times(without.metrics), without_times(beside.metrics), strict=True):
        assert one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, abs=1e-3, rel=1e-3)


def test_where_it_is_used(context: StageContext) -> None:
    setup = set_up(context)
    assert setup.scoring_stream is None, "not on a CPU"
    assert ppo._scoring_beside(setup, [], context.recipe.ppo) is None
    reference = setup.scorers.reference
    gpu = replace(context, device=torch.device("cuda"))
    adapters = replace(reference, is_actor=True)
    assert _scoring_stream(gpu, adapters) is None, "not where the reference is the actor with adapters off"
    never = replace(gpu, recipe=tiny_recipe("--generation.overlap_scoring=never"))
    assert _scoring_stream(never, reference) is None
    for section in ("reference", "scorer"):
        offloaded = replace(gpu, recipe=tiny_recipe(f"--parallel.{section}.offload=true"))
        assert _scoring_stream(offloaded, reference) is None, "not where weights wait in host memory"
    several = replace(gpu, world=World(size=2))
    assert _scoring_stream(several, reference) is None
    with pytest.raises(AssertionError, match="adapters"):
        ScoringBeside(replace(setup.scorers, reference=adapters), [], TEMPERATURE, None)

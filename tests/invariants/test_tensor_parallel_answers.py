"""Tensor-parallel inference over whole and sharded weights, as step 3 answers: the tokens of one process, and its
log-probabilities; and the training that comes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.invariants.many_processes import BOUND, CPU, SMALL, Runs, beyond_bounds, spread
from tests.ranks import run_on_ranks
from tests.tiny import tiny_recipe
from threefold.config.recipe import SamplingSection
from threefold.data.collate import collate_rollouts
from threefold.engine.distributed import ALONE, World
from threefold.metrics import SilentLog
from threefold.models.loading import load_causal_lm
from threefold.stages.answering import Answering
from threefold.stages.context import StageContext

NUM_PROMPTS = 7
GREEDY = SamplingSection(max_new_tokens=24, temperature=0)
SAMPLED = SamplingSection(max_new_tokens=24)
Answers = list[tuple[list[int], Tensor, Tensor]]
"""Of each prompt: the answer's tokens, their log-probabilities while decoding and in a training forward pass."""


def answers(world: World, models: Path, stage: int, tp_size: int) -> dict[str, Answers]:
    """Greedy and sampled answers to some prompts."""
    recipe = tiny_recipe(*SMALL, *spread(stage), f"--generation.inference_tp_size={tp_size}")
    context = StageContext(recipe, models, {}, SilentLog(models), CPU, torch.float32, world)
    chat, _ = context.chat_format(str(models / "sft"))
    model, forward = context.parallel_causal(lambda: load_causal_lm(str(models / "sft")), recipe.parallel.actor)
    answering = Answering(context, model, forward)
    prompts = context.items("ppo", chat).train[:NUM_PROMPTS]
    found = {}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        rollouts = answering(prompts, sampling, chat.stop_ids, torch.Generator().manual_seed(5))
        batch = collate_rollouts(rollouts, chat.pad_id)
        with torch.no_grad():
            trained, _ = forward.target_logprobs(batch.input_ids, batch.target_mask)
        pieces = trained.split([len(rollout.response_ids) for rollout in rollouts])
        found[name] = [(r.response_ids.tolist(), r.logprobs, piece) for r, piece in zip(rollouts, pieces, strict=True)]
    return found


@pytest.fixture(scope="module")
def of_one_process(runs: Runs) -> dict[str, dict[str, Answers]]:
    """By family."""
    return {family: answers(ALONE, runs.models(family), 0, 1) for family in ("opt", "llama")}


CASES = [
    pytest.param(size, stage, tp, marks=[] if size == tp or (size, stage) == (2, 3) else pytest.mark.slow)
    for size, tp in ((2, 1), (2, 2), (4, 2))
    for stage in (0, 3)
]


@pytest.mark.parametrize(("size", "stage", "tp_size"), CASES)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_answers_of_one_process(
    runs: Runs, of_one_process: dict[str, dict[str, Answers]], family: str, size: int, stage: int, tp_size: int
) -> None:
    """The same tokens on every process; log-probabilities within 1e-5 of one process's and of the training forward's.
    A greedy answer's are those of the untempered distribution."""
    expected = of_one_process[family]
    for found in run_on_ranks(answers, size, runs.models(family), stage, tp_size):
        for name in ("greedy", "sampled"):
            for (ids, logprobs, trained), (own_ids, own_logprobs, _) in zip(found[name], expected[name], strict=True):
                assert ids == own_ids
                torch.testing.assert_close(logprobs, own_logprobs, atol=BOUND, rtol=0)
                torch.testing.assert_close(logprobs, trained, atol=BOUND, rtol=0)
    assert len({tuple(ids) for ids, _, _ in expected["greedy"]}) > 1, "answers that are all alike say little"


CURVES = [
    pytest.param(family, size, stage, marks=[] if (family, size, stage) == ("llama", 2, 3) else pytest.mark.slow)
    for family in ("opt", "llama")
    for size in (2, 4)
    for stage in (0, 3)
]


@pytest.mark.parametrize(("family", "size", "stage"), CURVES)
def test_the_curves_of_one_process(runs: Runs, family: str, size: int, stage: int) -> None:
    """Ten iterations of step 3 in tensor-parallel groups of two."""
    spread_out = runs(family, "ppo", size, (*spread(stage), "--generation.inference_tp_size=2"))
    assert beyond_bounds(runs(family, "ppo"), spread_out) == {}

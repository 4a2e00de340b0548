"""Training on a GPU: the fused optimizer, its state in host memory and back, sampling, scoring beside decoding."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.inference.test_sampling import LOGITS, RESTRICTIONS, chi_square_p, naive_distribution
from tests.models.families_under_test import tiny_causal_lm
from tests.tiny import finished, stage_context, tiny_recipe
from threefold.config.recipe import OptimizerSection, SamplingSection
from threefold.engine.train import TrainEngine
from threefold.inference.sampling import draw_tokens, draw_uniforms
from threefold.models.loading import use_fast_kernels
from threefold.stages import ppo
from threefold.stages.context import StageContext
from threefold.stages.overlap import ScoringBeside
from threefold.stages.ppo_setup import set_up
from threefold.stages.rollout import judge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
NUM_DRAWS = 200_000


def trainer_of(model: PreTrainedModel) -> TrainEngine:
    return TrainEngine(model, OptimizerSection(learning_rate=0.01), 20, CUDA, torch.float32, "a test")


def train_step(trainer: TrainEngine) -> None:
    ids = torch.tensor([[5, 6, 7, 8]], device=CUDA)
    trainer.backward(lambda: trainer.model(ids).logits.square().mean())
    trainer.step()


def state_of(trainer: TrainEngine) -> list[Tensor]:
    torch.cuda.synchronize()
    return [value for state in trainer._optimizer.state.values() for value in state.values()]


def test_the_optimizer_is_one_fused_kernel() -> None:
    trainer = trainer_of(tiny_causal_lm("opt").cuda())
    train_step(trainer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(trainer)
    operations = {event.key for event in profile.key_averages()}
    assert "aten::_fused_adamw_" in operations
    assert not any("_foreach_addcdiv" in operation for operation in operations)


def test_optimizer_state_goes_to_the_host_and_comes_back_bit_for_bit() -> None:
    model = use_fast_kernels(tiny_causal_lm("llama", hidden_size=512, intermediate_size=2048)).cuda()
    twin = use_fast_kernels(tiny_causal_lm("llama", hidden_size=512, intermediate_size=2048)).cuda()
    trainers = trainer_of(model), trainer_of(twin)
    for trainer in trainers:
        train_step(trainer)
    before = [value.clone() for value in state_of(trainers[0])]
    size = sum(value.nbytes for value in before if value.ndim)
    assert size > 2**22
    gc.collect()
    with_state = torch.cuda.memory_allocated()
    with trainers[0].optimizer_in_host_memory():
        away = state_of(trainers[0])
        assert {value.device.type for value in away if value.ndim} == {"cpu"}
        assert all(value.is_pinned() for value in away if value.ndim)
        assert torch.cuda.memory_allocated() <= with_state - size
        assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(away, before, strict=True))
        del away
    for one, other in zip(state_of(trainers[0]), before, strict=True):
        assert one.device == other.device
        assert torch.equal(one, other)
    for trainer in trainers:
        train_step(trainer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), RESTRICTIONS)
def test_drawn_frequencies_are_those_of_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Chi-square at p > 0.001, and the test can tell: another temperature is refused at p < 1e-9."""
    sampling = SamplingSection(temperature=temperature, top_k=top_k, top_p=top_p)
    uniforms = draw_uniforms(1, NUM_DRAWS, torch.Generator(CUDA).manual_seed(0))[0]
    assert uniforms.device.type == "cuda"
    logits = LOGITS.cuda().expand(NUM_DRAWS, -1)
    tokens, logprobs, sampled = draw_tokens(logits, sampling, uniforms, torch.tensor([], dtype=torch.int64).cuda())
    expected = naive_distribution(LOGITS.tolist(), temperature, top_k, top_p)
    assert chi_square_p(tokens.cpu(), expected) > 0.001
    assert chi_square_p(tokens.cpu(), naive_distribution(LOGITS.tolist(), temperature * 1.2, top_k, top_p)) < 1e-9
    whole = naive_distribution(LOGITS.tolist(), temperature, 0, 1.0)
    torch.testing.assert_close(logprobs.cpu(), torch.tensor(whole).log()[tokens.cpu()], atol=1e-5, rtol=0)
    torch.testing.assert_close(sampled.cpu(), torch.tensor(expected).log()[tokens.cpu()], atol=1e-5, rtol=0)


@pytest.fixture
def context(tiny_run: Path, tmp_path: Path) -> Iterator[StageContext]:
    recipe = tiny_recipe("--ppo.micro_batch_tokens=150", "--ppo.sampling.temperature=0.7")
    context = stage_context("ppo", recipe, tmp_path, finished(tiny_run))
    yield replace(context, device=CUDA, dtype=torch.float32)
    context.log.close()


def test_scoring_beside_decoding_is_scoring_afterwards(context: StageContext) -> None:
    setup = set_up(context)
    assert setup.scoring_stream is not None
    prompts = next(ppo.prompt_batches(setup.prompts, setup.blend, context.recipe.ppo))
    for _ in range(3):
        beside = ppo._scoring_beside(setup, prompts, context.recipe.ppo)
        assert beside is not None
        rollouts = ppo.sample(context, setup, prompts, 2, on_finished=beside.add)
        found, expected = beside.finish(rollouts), judge(prompts, rollouts, setup.scorers, 0.7)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
        for one, other in zip(found.ref_logprobs, expected.ref_logprobs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_launching_a_pass_does_not_make_the_host_wait(context: StageContext) -> None:
    """Beyond what a model's own forward may ask at its beginning (some versions look whether a mask is full)."""
    setup = set_up(context)
    prompts = next(ppo.prompt_batches(setup.prompts, setup.blend, context.recipe.ppo))
    rollouts = ppo.sample(context, setup, prompts, 2)
    beside = ScoringBeside(setup.scorers, prompts, 0.7, setup.scoring_stream)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for number, rollout in enumerate(rollouts):
                beside.add(number, rollout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert [wait.filename for wait in waits if "transformers" not in wait.filename] == []
    assert beside._passes
    expected = judge(prompts, rollouts, setup.scorers, 0.7)
    torch.testing.assert_close(beside.finish(rollouts).scores, expected.scores, atol=1e-4, rtol=0)

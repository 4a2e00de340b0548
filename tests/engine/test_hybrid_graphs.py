"""The switch between training and generating where decode steps are recorded, with a recorder for the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.inference.recorded_operations import RecordedOperations
from tests.models.families_under_test import ragged_ids, tiny_causal_lm
from threefold.config.recipe import GenerationSection, OptimizerSection, SamplingSection
from threefold.engine import hybrid
from threefold.engine.hybrid import HybridEngine
from threefold.engine.train import TrainEngine
from threefold.inference.cuda_graphs import GraphedDecoder
from threefold.inference.decoder import Decoder
from threefold.machine.linear import PackedLinear
from threefold.models.forward import CausalForward
from threefold.models.loading import use_fast_kernels
from threefold.types import Rollout

CPU, FLOAT32 = torch.device("cpu"), torch.float32
PROMPTS = ragged_ids(3, [4, 9, 2])
SAMPLING = SamplingSection(max_new_tokens=6)

Engines = Callable[..., HybridEngine]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> RecordedOperations:
    """As on a GPU: steps are recorded, packed weights are rewritten in place."""
    recorder = RecordedOperations()
    monkeypatch.setattr(hybrid, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(PackedLinear, "suits", staticmethod(lambda weight: False))
    return recorder


def engine_of(model: PreTrainedModel, **settings: object) -> HybridEngine:
    section = GenerationSection.model_validate(settings)
    return HybridEngine(CausalForward(model), section, CPU, FLOAT32, lambda _: None)


def sample(engine: HybridEngine, seed: int = 0) -> list[Rollout]:
    return engine.generate(PROMPTS, SAMPLING, frozenset(), torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
    logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, rollout.response_ids[:, None])[:, 0]


@pytest.mark.parametrize("packed", ["auto", "never"])
@pytest.mark.parametrize("family", ["opt", "llama", "mistral", "bloom"])
def test_recorded_answers_come_from_the_weights_of_the_last_update(
    recorder: RecordedOperations, family: str, packed: str
) -> None:
    model = use_fast_kernels(tiny_causal_lm(family))
    trainer = TrainEngine(model, OptimizerSection(learning_rate=0.05, grad_clip=0), 9, CPU, FLOAT32, "a test")
    engine = engine_of(model, packed_weights=packed)
    assert isinstance(engine.decoder, GraphedDecoder)
    stale, places = sample(engine), 1
    (kept,) = engine.decoder._kept
    place = kept.made_for
    for _ in range(3):
        assert kept.cache.nbytes == 0, "the memory of keys and values is the update's"
        trainer.backward(lambda: model(torch.tensor([[5, 6, 7, 8]])).logits.square().mean())
        trainer.step()
        for rollout in sample(engine):
            torch.testing.assert_close(rollout.logprobs, plain_logprobs(model, rollout), atol=1e-5, rtol=0)
        places += kept.made_for != place
        place = kept.made_for
    assert recorder.recorded == places, "recorded anew only where keys and values have come to lie elsewhere"
    moved = max(float((plain_logprobs(model, rollout) - rollout.logprobs).abs().max()) for rollout in stale)
    assert moved > 0.01, "and the updates did move the policy"


def test_a_setting_turns_it_off(recorder: RecordedOperations) -> None:
    engine = engine_of(tiny_causal_lm("opt"), cuda_graphs="never")
    assert isinstance(engine.decoder, Decoder)
    sample(engine)
    assert recorder.recorded == 0
    assert engine.decoder._images is None, "and the packed weights do not stay"


def test_a_family_without_a_decoder_is_not_recorded(recorder: RecordedOperations) -> None:
    engine = engine_of(tiny_causal_lm("gemma2"))
    assert not isinstance(engine.decoder, Decoder | GraphedDecoder)
    sample(engine)
    assert recorder.recorded == 0


def test_memory_is_given_back_after_an_answer_that_failed(recorder: RecordedOperations) -> None:
    model = tiny_causal_lm("llama")
    engine = engine_of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(Exception, match="not finite"):
        sample(engine)
    assert isinstance(engine.decoder, GraphedDecoder)
    assert [kept.cache.nbytes for kept in engine.decoder._kept] == [0]


def test_finished_answers_are_told_as_they_come() -> None:
    told: dict[int, Rollout] = {}
    engine = engine_of(tiny_causal_lm("opt"))
    rollouts = engine.generate(
        PROMPTS,
        SAMPLING,
        frozenset(range(3, 20)),
        torch.Generator().manual_seed(0),
        answers_per_prompt=2,
        on_finished=told.__setitem__,
    )
    assert sorted(told) == list(range(6)) != list(told), "some stop before others"
    assert all(told[number] is rollout for number, rollout in enumerate(rollouts))

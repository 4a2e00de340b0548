"""Rollouts of a model whose matrices are packed in 4 bits: those of the plain model that they stand for."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import PreTrainedModel

from tests.models.families_under_test import EOS, PAD, ragged_ids, tiny_causal_lm
from threefold.config.recipe import GenerationSection, LoRASection, SamplingSection
from threefold.engine.hybrid import HybridEngine
from threefold.inference.decoder import Decoder, make_decoder
from threefold.models.adapters import add_lora, merged_state_dict
from threefold.models.forward import CausalForward
from threefold.models.loading import use_fast_kernels
from threefold.types import Rollout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra qlora)"
)

GREEDY = SamplingSection(temperature=0.0, max_new_tokens=12)


def engine_of(model: PreTrainedModel, settings: GenerationSection, notes: list[str]) -> HybridEngine:
    return HybridEngine(CausalForward(model), settings, torch.device("cpu"), torch.float32, notes.append)


def answers(engine: HybridEngine) -> list[Rollout]:
    prompts = [[t if t != PAD else 7 for t in row] for row in ragged_ids(3, [4, 9, 6])]
    return engine.generate(prompts, GREEDY, frozenset({EOS}), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("packed_weights", ["auto", "never"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "bloom", "gemma2"])
def test_they_are_those_of_the_plain_model_that_it_stands_for(family: str, packed_weights: str) -> None:
    """The same greedy answers, log-probs to 1e-5; before and after the adapters have changed. (gemma2 has no decoder of
    its own.)"""
    settings = GenerationSection.model_validate({"packed_weights": packed_weights})
    model, notes = use_fast_kernels(tiny_causal_lm(family)), list[str]()
    add_lora(model, LoRASection(rank=2, quantise_base="nf4"), 7, "ppo.actor_lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_of(model, settings, notes)
    found = []
    for change in (0.0, 0.1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(change)
        plain = use_fast_kernels(tiny_causal_lm(family))
        plain.load_state_dict(merged_state_dict(model))
        ours, theirs = answers(engine), answers(engine_of(plain, settings, []))
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.response_ids, other.response_ids)
            torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-5, rtol=0)
        found.append(torch.cat([rollout.logprobs for rollout in ours]))
    assert found[0].shape != found[1].shape or not torch.allclose(*found, atol=1e-2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if ".lora_" not in name)
    assert len(notes) == (family == "gemma2")


def test_nothing_decodes_packed_matrices_without_an_arena() -> None:
    model = tiny_causal_lm("llama")
    assert isinstance(make_decoder(model), Decoder)
    add_lora(model, LoRASection(rank=2, quantise_base="nf4"), 7, "ppo.actor_lora")
    assert make_decoder(model) is None

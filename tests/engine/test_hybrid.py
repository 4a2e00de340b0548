"""The switch between training and generating: nothing is changed by it, nothing is left behind, nothing is stale."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.models.families_under_test import ragged_ids, tiny_causal_lm
from threefold.config.recipe import GenerationSection, LoRASection, OptimizerSection, SamplingSection
from threefold.engine.hybrid import HybridEngine
from threefold.engine.phases import PhaseMeter
from threefold.engine.train import TrainEngine
from threefold.errors import ConfigError
from threefold.inference.decoder import Decoder
from threefold.machine.memory import keep_freed_memory, resident_bytes, return_freed_memory
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.loading import set_dropout, use_fast_kernels
from threefold.types import Rollout

CPU, FLOAT32 = torch.device("cpu"), torch.float32
PROMPTS = ragged_ids(3, [4, 9, 2])
SAMPLING = SamplingSection(max_new_tokens=6)
NO_STOP = frozenset[int]()
PACKED, PLAIN = GenerationSection(), GenerationSection(packed_weights="never")


def engine_of(model: PreTrainedModel, settings: GenerationSection = PACKED, **arguments: object) -> HybridEngine:
    return HybridEngine(CausalForward(model), settings, CPU, FLOAT32, lambda _: None, **arguments)  # type: ignore[arg-type]


def sample(engine: HybridEngine, seed: int = 0) -> list[Rollout]:
    return engine.generate(PROMPTS, SAMPLING, NO_STOP, torch.Generator().manual_seed(seed))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
    logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, rollout.response_ids[:, None])[:, 0]


def train_step(engine: TrainEngine) -> None:
    engine.backward(lambda: engine.model(torch.tensor([[5, 6, 7, 8]])).logits.square().mean())
    engine.step()


@pytest.mark.parametrize("settings", [PACKED, PLAIN], ids=["packed", "plain"])
@pytest.mark.parametrize(("family", "rank"), [("opt", 0), ("llama", 0), ("gpt2", 0), ("gemma2", 0), ("llama", 4)])
def test_parameters_are_bit_identical_after_a_thousand_switches(
    family: str, rank: int, settings: GenerationSection
) -> None:
    """With adapters, too, and where the model's own forward decodes (gemma2)."""
    model = tiny_causal_lm(family)
    add_lora(model, LoRASection(rank=rank), 0, "a test")
    before, addresses = weights(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    engine = engine_of(model, settings)
    for switch in range(1000):
        with engine.generating(3):
            pass
        if switch % 250 == 0:
            sample(engine)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == addresses[name]
        assert parameter.requires_grad == trained[name]


@pytest.mark.parametrize("settings", [PACKED, PLAIN], ids=["packed", "plain"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gemma2"])
def test_answers_come_from_the_weights_of_the_last_update(family: str, settings: GenerationSection) -> None:
    model = use_fast_kernels(tiny_causal_lm(family))
    trainer = TrainEngine(model, OptimizerSection(learning_rate=0.05, grad_clip=0), 9, CPU, FLOAT32, "a test")
    engine = engine_of(model, settings)
    stale = sample(engine)
    for _ in range(2):
        train_step(trainer)
        rollouts = sample(engine)
        for rollout in rollouts:
            torch.testing.assert_close(rollout.logprobs, plain_logprobs(model, rollout), atol=1e-5, rtol=0)
    moved = max(float((plain_logprobs(model, rollout) - rollout.logprobs).abs().max()) for rollout in stale)
    assert moved > 0.01, "and the updates did move the policy"


def test_generating_and_training_interleaved_train_as_training_alone() -> None:
    models = [use_fast_kernels(tiny_causal_lm("opt")) for _ in range(2)]
    trainers = [TrainEngine(m, OptimizerSection(learning_rate=0.01), 9, CPU, FLOAT32, "a test") for m in models]
    engine = engine_of(models[0], offloaded=(trainers[0],))
    for _ in range(3):
        sample(engine)
        for trainer in trainers:
            train_step(trainer)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_back_at_its_baseline_after_a_switch() -> None:
    """Some 170 MB of keys, values and packed weights, of which nothing stays; tolerance 15 MB."""
    keep_freed_memory()
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    model = use_fast_kernels(LlamaForCausalLM(config))
    engine = engine_of(model)
    prompts = torch.randint(512, (16, 128), generator=torch.Generator().manual_seed(0)).tolist()

    def rollout() -> None:
        engine.generate(prompts, SamplingSection(max_new_tokens=8), NO_STOP, torch.Generator().manual_seed(0))

    rollout()
    return_freed_memory(CPU)
    baseline = resident_bytes(CPU)
    meter = PhaseMeter(CPU)
    with meter.phase("generate"):
        rollout()
    assert meter.peak_bytes["generate"] > baseline + 60 * 2**20, "generation does take memory"
    return_freed_memory(CPU)
    assert resident_bytes(CPU) < baseline + 15 * 2**20


def test_a_family_without_a_decoder_says_so_once() -> None:
    notes: list[str] = []
    engine = HybridEngine(CausalForward(tiny_causal_lm("gemma2")), PACKED, CPU, FLOAT32, notes.append)
    sample(engine)
    sample(engine)
    assert len(notes) == 1
    assert "gemma2" in notes[0]
    assert not isinstance(engine.decoder, Decoder)
    notes.clear()
    HybridEngine(CausalForward(tiny_causal_lm("opt")), PACKED, CPU, FLOAT32, notes.append)
    assert notes == []


def test_answers_do_not_depend_on_how_they_are_decoded() -> None:
    """Places, packed weights, several answers a prompt: the same tokens, and log-probs within 1e-5."""
    model = tiny_causal_lm("llama")
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    whole = engine_of(model).generate(prompts, SAMPLING, NO_STOP, torch.Generator().manual_seed(1))
    for settings in (PLAIN, GenerationSection(max_rows=1), GenerationSection(max_rows=4)):
        shared = engine_of(model, settings).generate(
            PROMPTS, SAMPLING, NO_STOP, torch.Generator().manual_seed(1), answers_per_prompt=2
        )
        for one, other in zip(whole, shared, strict=True):
            assert torch.equal(one.response_ids, other.response_ids)
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_too_little_memory_for_one_sequence_is_one_line() -> None:
    engine = engine_of(tiny_causal_lm("opt"), GenerationSection(kv_memory_gib=1e-7))
    with pytest.raises(ConfigError, match=r"generation\.kv_memory_gib = .*; raise it, or lower"):
        sample(engine)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(family: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    calls: list[int] = []
    for checkpointing in (False, True):
        model = use_fast_kernels(tiny_causal_lm(family))
        set_dropout(model, 0.0)
        engine = TrainEngine(model, OptimizerSection(), 1, CPU, FLOAT32, "a test", gradient_checkpointing=checkpointing)
        loss_of = _loss_of(model)
        calls.append(0)
        layer = next(module for name, module in model.named_modules() if name.endswith((".0.fc1", ".0.mlp")))
        layer.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        engine.backward(loss_of)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert not model.training
    assert calls == [1, 2], "the block was computed again"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


def _loss_of(model: PreTrainedModel) -> Callable[[], Tensor]:
    forward = CausalForward(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    targets = torch.tensor([[False, False, True, True, True, True]])
    return lambda: -forward.target_logprobs(ids, targets)[0].sum()

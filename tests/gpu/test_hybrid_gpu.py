"""Generation from the weights that train, on a GPU: parity with the training forward, memory, what an update leaves."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.models.families_under_test import ragged_ids, randomise, tiny_causal_lm
from threefold.config.recipe import GenerationSection, LoRASection, OptimizerSection, SamplingSection
from threefold.engine.device import precision
from threefold.engine.hybrid import HybridEngine
from threefold.engine.phases import PhaseMeter
from threefold.engine.train import TrainEngine
from threefold.inference.cuda_graphs import GraphedDecoder
from threefold.inference.decoder import Decoder
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.loading import use_fast_kernels
from threefold.types import Rollout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
FAMILIES = ["opt", "opt-350m", "gpt2", "llama", "mistral", "bloom", "qwen3", "gpt-neox", "gpt-j"]
MIB = 2**20


def model_of(family: str) -> PreTrainedModel:
    return use_fast_kernels(randomise(tiny_causal_lm(family), 0, 0.2)).cuda()


def larger_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8
    )
    return use_fast_kernels(LlamaForCausalLM(config)).cuda()


def large_rollout(engine: HybridEngine) -> None:
    """270 MB of keys and values."""
    prompts = torch.randint(512, (64, 500), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingSection(max_new_tokens=12)
    engine.generate(prompts, sampling, frozenset(), torch.Generator(CUDA).manual_seed(0))


def engine_of(model: PreTrainedModel, dtype: torch.dtype, offloaded: Any = (), **settings: str) -> HybridEngine:
    section = GenerationSection.model_validate(settings)
    return HybridEngine(CausalForward(model), section, CUDA, dtype, lambda _: None, offloaded)


def sample(engine: HybridEngine, max_new_tokens: int = 24, stop_ids: frozenset[int] = frozenset()) -> list[Rollout]:
    return engine.generate(
        ragged_ids(3, [4, 30, 2, 9, 17, 5]),
        SamplingSection(max_new_tokens=max_new_tokens, temperature=0.9),
        stop_ids,
        torch.Generator(CUDA).manual_seed(0),
        answers_per_prompt=2,
    )


def differences(model: PreTrainedModel, rollouts: list[Rollout], dtype: torch.dtype) -> Tensor:
    """Between the rollouts' log-probs and those of the training forward on each whole sequence, every token."""
    forward, found = CausalForward(model), []
    with torch.no_grad(), precision(CUDA, dtype):
        for rollout in rollouts:
            ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None].cuda()
            targets = torch.arange(ids.shape[1], device=CUDA)[None] >= len(rollout.prompt_ids)
            logprobs, _ = forward.target_logprobs(ids, targets, 0.9)
            found.append((logprobs.cpu() - rollout.logprobs).abs())
    return torch.cat(found)


def assert_parity(
    model: PreTrainedModel, rollouts: list[Rollout], dtype: torch.dtype, bfloat16_bound: float = 0.15
) -> None:
    """float32: 1e-4 nats. bfloat16: 0.15 at most and 0.02 on average (the same models on a CPU: 0.05 and 0.01):
    logits are rounded to 8 bits before the softmax, here and in the training forward."""
    found = differences(model, rollouts, dtype)
    largest, average = (1e-4, 1e-4) if dtype == FLOAT32 else (bfloat16_bound, 0.02)
    assert float(found.max()) < largest
    assert float(found.mean()) < average


def train_step(trainer: TrainEngine) -> None:
    trainer.backward(lambda: trainer.model(torch.tensor([[5, 6, 7, 8]], device=CUDA)).logits.square().mean())
    trainer.step()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_decoding_are_those_of_the_training_forward(family: str, dtype: torch.dtype) -> None:
    model = model_of(family)
    engine = engine_of(model, dtype)
    assert isinstance(engine.decoder, GraphedDecoder)
    assert_parity(model, sample(engine, stop_ids=frozenset({3, 4, 7})), dtype)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cuda_graphs", ["auto", "never"])
@pytest.mark.parametrize("packed_weights", ["auto", "never"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_answers_come_from_the_weights_of_the_last_update(
    family: str, packed_weights: str, cuda_graphs: str, dtype: torch.dtype
) -> None:
    model = model_of(family)
    engine = engine_of(model, dtype, packed_weights=packed_weights, cuda_graphs=cuda_graphs)
    trainer = TrainEngine(model, OptimizerSection(learning_rate=0.02, grad_clip=0), 9, CUDA, dtype, "a test")
    stale = sample(engine)
    for _ in range(3):
        train_step(trainer)
        assert_parity(model, sample(engine), dtype)
    assert float(differences(model, stale, dtype).max()) > 0.2, "and the updates did move the policy"


def test_adapters_count_and_are_merged_into_no_parameter() -> None:
    model = model_of("llama")
    add_lora(model, LoRASection(rank=4), 0, "a test")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_of(model, BFLOAT16)
    trainer = TrainEngine(model, OptimizerSection(learning_rate=0.02, grad_clip=0), 9, CUDA, BFLOAT16, "a test")
    sample(engine)
    for _ in range(3):
        train_step(trainer)
        # the packed matrix is rounded once, as a sum; in training its two summands are, and what they give
        assert_parity(model, sample(engine), BFLOAT16, 0.3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_parameters_are_bit_identical_after_many_switches() -> None:
    model = model_of("opt")
    before = {name: (p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}
    engine = engine_of(model, BFLOAT16)
    for switch in range(300):
        with engine.generating(3):
            pass
        if switch % 100 == 0:
            sample(engine)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.data_ptr() == before[name][1]


@pytest.mark.parametrize("cuda_graphs", ["auto", "never"])
def test_memory_is_back_at_its_baseline_after_a_rollout(cuda_graphs: str) -> None:
    """Of keys and values nothing stays; packed weights, graphs and the logits of one step do (tolerance: 1 MiB, for
    blocks that a recording anew would shift)."""
    engine = engine_of(larger_model(), BFLOAT16, cuda_graphs=cuda_graphs)
    large_rollout(engine)
    baseline = allocated()
    meter = PhaseMeter(CUDA)
    with meter.phase("generate"):
        large_rollout(engine)
    assert meter.peak_bytes["generate"] > baseline + 200 * MIB, "generation does take memory"
    assert abs(allocated() - baseline) < MIB


def test_graphs_mostly_outlive_a_rollout() -> None:
    """The caching allocator gives keys and values the same place again, once Adam's moments have theirs."""
    model = larger_model()
    engine = engine_of(model, BFLOAT16)
    trainer = TrainEngine(model, OptimizerSection(), 9, CUDA, BFLOAT16, "a test")
    assert isinstance(engine.decoder, GraphedDecoder)
    outlived = []
    graphs: dict[tuple[int, int], object] = {}
    ids = torch.randint(512, (16, 400), device=CUDA)
    for _ in range(6):
        large_rollout(engine)
        (kept,) = engine.decoder._kept
        outlived.append(kept.graphs == graphs)
        graphs = dict(kept.graphs)
        trainer.backward(lambda: model(ids).logits.square().mean())
        trainer.step()
    assert sum(outlived) >= 3, outlived


def test_a_family_without_a_decoder_and_a_setting_go_without_graphs() -> None:
    model = model_of("gemma2")
    engine = engine_of(model, FLOAT32)
    assert not isinstance(engine.decoder, Decoder | GraphedDecoder)
    assert_parity(model, sample(engine), FLOAT32)
    assert isinstance(engine_of(model_of("opt"), FLOAT32, cuda_graphs="never").decoder, Decoder)

"""Families without a decoder: their own forward, row by row the same as transformers on each row alone.

Tolerance 2e-5 nats; the tests of generate.py and of invariants/test_parity.py run on the fallback too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    Lfm2Config,
    MambaConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from tests.models.families_under_test import COMMON, CONTEXT, ragged_ids, tiny_causal_lm
from threefold.config.recipe import SamplingSection
from threefold.inference.fallback import FallbackDecoder, PaddedCache, Past, SeparateCache
from threefold.inference.generate import GenerationLimits, generate
from threefold.models.forward import CausalForward

GATED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
RARE: dict[str, tuple[Callable[[], Any], Past]] = {
    # one layer of a window, one without
    "gemma3": (
        lambda: Gemma3TextConfig(
            **COMMON, **GATED, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        ),
        Past.COLUMNS,
    ),
    # convolution and attention; state space and attention in one layer
    "lfm2": (lambda: Lfm2Config(**COMMON, **GATED, layer_types=["conv", "full_attention"]), Past.STATE),
    "falcon-h1": (lambda: FalconH1Config(**COMMON, **GATED, **MAMBA), Past.STATE),
    # caches of other kinds than past_key_values
    "mamba": (lambda: MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2, state_size=4), Past.NONE),
    "rwkv": (lambda: RwkvConfig(**COMMON, hidden_size=32, num_hidden_layers=2, context_length=CONTEXT), Past.NONE),
    # takes past_key_values, and keeps its state in its modules all the same
    "recurrent-gemma": (
        lambda: RecurrentGemmaConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            attention_window_size=6,
            lru_width=32,
        ),
        Past.NONE,
    ),
}


def rare_model(name: str) -> PreTrainedModel:
    """Matrices are drawn anew, wide; what else it has keeps its own initialisation, without which states diverge."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(RARE[name][0]()).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def logits_alone(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[V], what follows, by transformers."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    return logits


@pytest.mark.parametrize("name", RARE)
def test_rare_families_answer_as_transformers_has_them(name: str) -> None:
    model = rare_model(name)
    decoder = FallbackDecoder(CausalForward(model))
    assert decoder.past is RARE[name][1]
    prompts = ragged_ids(1, [3, 17, 1, 9])
    sampling = SamplingSection(max_new_tokens=10)
    for answers_per_prompt, max_rows in ((1, 0), (3, 2)):
        rollouts = generate(
            decoder,
            prompts,
            sampling,
            frozenset(range(3, 8)),
            torch.Generator().manual_seed(0),
            answers_per_prompt=answers_per_prompt,
            limits=GenerationLimits(max_rows=max_rows),
        )
        assert len({len(rollout.response_ids) for rollout in rollouts}) > 1
        for number, rollout in enumerate(rollouts):
            ids = prompts[number // answers_per_prompt] + rollout.response_ids.tolist()
            start = len(rollout.prompt_ids)
            expected = [logits_alone(model, ids[:end]).log_softmax(-1)[ids[end]] for end in range(start, len(ids))]
            torch.testing.assert_close(rollout.logprobs, torch.stack(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["opt", "bloom", "falcon", "mistral", "gemma2"])
def test_families_of_keys_and_values_take_all_rows_at_once(family: str) -> None:
    decoder = FallbackDecoder(CausalForward(tiny_causal_lm(family)))
    assert decoder.past is Past.COLUMNS
    assert isinstance(decoder.new_cache(2, 5), PaddedCache)


def test_a_family_that_overlooks_its_mask_is_called_row_by_row() -> None:
    """What padding would spoil shows in the probe."""
    model = tiny_causal_lm("llama")
    forward = model.base_model.forward

    def without_mask(*arguments: Any, attention_mask: Tensor | None = None, **others: Any) -> Any:
        return forward(*arguments, **others)

    without_mask.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.base_model.forward = without_mask
    decoder = FallbackDecoder(CausalForward(model))
    assert decoder.past is Past.STATE
    prompts = ragged_ids(1, [3, 9])
    rollouts = generate(decoder, prompts, SamplingSection(max_new_tokens=6), frozenset(), torch.Generator())
    plain = tiny_causal_lm("llama")
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = prompt + rollout.response_ids.tolist()
        expected = [logits_alone(plain, ids[:end]).log_softmax(-1)[ids[end]] for end in range(len(prompt), len(ids))]
        torch.testing.assert_close(rollout.logprobs, torch.stack(expected), atol=2e-5, rtol=0)


def padded(prompts: list[list[int]]) -> Tensor:
    width = max(map(len, prompts))
    return torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "gemma3", "lfm2", "mamba"])
def test_rows_are_moved_copied_cut_and_refilled(name: str) -> None:
    """Each change is followed by a step, whose logits are those of every row's own history."""
    model = rare_model(name) if name in RARE else tiny_causal_lm(name)
    decoder = FallbackDecoder(CausalForward(model))
    cache = decoder.new_cache(6, 40)
    assert isinstance(cache, PaddedCache if name in ("opt", "gemma3") else SeparateCache)
    histories = ragged_ids(2, [4, 11, 2])
    token = iter(range(5, 40))

    def read(prompts: list[list[int]], first_row: int) -> None:
        logits = decoder.prefill(padded(prompts), [len(prompt) for prompt in prompts], cache, first_row)
        histories[first_row : first_row + len(prompts)] = [list(prompt) for prompt in prompts]
        cache.num_rows = len(histories)
        for row, prompt in zip(logits, prompts, strict=True):
            torch.testing.assert_close(row, logits_alone(model, prompt), atol=5e-5, rtol=1e-5)

    def step() -> None:
        assert cache.lengths[: len(histories)] == [len(history) for history in histories]
        ids = [next(token) for _ in histories]
        for history, one in zip(histories, ids, strict=True):
            history.append(one)
        logits = decoder.step(torch.tensor(ids), cache)
        for row, history in zip(logits, histories, strict=True):
            torch.testing.assert_close(row, logits_alone(model, history), atol=5e-5, rtol=1e-5)

    read(histories, 0)
    step()
    cache.copy(1, [3, 4])  # two more answers to the longest prompt, from its start
    for row in (3, 4):
        cache.set_length(row, 11)
        histories.append(histories[1][:11])
    cache.num_rows = 5
    step()
    cache.move(4, 1)  # the longest leaves, the last takes its place
    histories[1] = histories.pop()
    cache.num_rows = 4
    step()
    read(ragged_ids(3, [20]), 2)  # a longer prompt than any takes a slot between the others
    step()
    cache.set_length(2, 20)  # and begins again
    histories[2] = histories[2][:20]
    step()
    read(ragged_ids(4, [1, 3]), 4)
    step()
    del histories[1:]
    cache.num_rows = 1
    step()
    read(ragged_ids(5, [2]), 1)
    step()


def test_the_memory_of_a_row_is_measured() -> None:
    opt = FallbackDecoder(CausalForward(tiny_causal_lm("opt")))
    assert opt.bytes_per_row(100) == 100 * 2 * 2 * 32 * 4  # keys and values, two layers, width 32, float32
    llama = FallbackDecoder(CausalForward(tiny_causal_lm("llama")))
    assert llama.bytes_per_row(100) == 100 * 2 * 2 * 16 * 4  # two of four heads
    lfm2 = FallbackDecoder(CausalForward(rare_model("lfm2")))
    per_token = 2 * 16 * 4  # its one layer of attention
    assert lfm2.bytes_per_row(100) - lfm2.bytes_per_row(40) == 60 * per_token
    assert lfm2.bytes_per_row(100) > 100 * per_token
    assert FallbackDecoder(CausalForward(rare_model("mamba"))).bytes_per_row(100) == 0

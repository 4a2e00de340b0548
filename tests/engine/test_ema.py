"""The moving average against the plain formula in float64, to 1e-6, and what applying it may not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.models.families_under_test import EOS, PAD, tiny_causal_lm, tiny_tokenizer
from threefold.config.recipe import LoRASection
from threefold.engine.ema import ExponentialMovingAverage
from threefold.models.adapters import adapters_off, add_lora, merged_state_dict
from threefold.models.loading import save_model

DECAY = 0.9


def walk(model: nn.Module, seed: int, size: float = 0.1) -> None:
    """A random change of every weight, as an optimizer step would make."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def copies(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: p.detach().to(dtype or p.dtype, copy=True) for name, p in model.named_parameters()}


def averaged(average: ExponentialMovingAverage, model: nn.Module) -> dict[str, torch.Tensor]:
    with average.applied_to(model):
        return copies(model)


@pytest.mark.parametrize("family", ["opt", "llama"])  # tied and untied embeddings
def test_the_average_is_the_formula(family: str) -> None:
    model = tiny_causal_lm(family)
    average = ExponentialMovingAverage(model, DECAY)
    naive = copies(model, torch.float64)
    for step in range(20):
        walk(model, seed=step)
        average.update(model)
        for name, parameter in model.named_parameters():
            naive[name] = DECAY * naive[name] + (1 - DECAY) * parameter.detach().double()
    found = averaged(average, model)
    assert found.keys() == naive.keys()
    for name, expected in naive.items():
        torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=0)


def test_it_starts_at_the_weights_and_does_not_follow_them_unasked() -> None:
    model = tiny_causal_lm("llama")
    start = copies(model)
    average = ExponentialMovingAverage(model, 0.992)
    walk(model, seed=0)
    found = averaged(average, model)
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_decay_zero_is_the_last_weights() -> None:
    model = tiny_causal_lm("llama")
    average = ExponentialMovingAverage(model, 0.0)
    walk(model, seed=0)
    average.update(model)
    found = averaged(average, model)
    assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())


def test_of_a_half_precision_model_the_average_moves_where_bf16_would_stand_still() -> None:
    """From 1 towards 1.0078 (the next bf16 number): each step is 0.008 of that, far below bf16's rounding step."""
    model = nn.Linear(4, 3, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(model, 0.992)
    naive_bf16 = model.weight.detach().clone()
    target = 1.0078125
    with torch.no_grad():
        model.weight.fill_(target)
    for _ in range(200):
        average.update(model)
        naive_bf16 = 0.992 * naive_bf16 + (1 - 0.992) * model.weight.detach()
    assert torch.equal(naive_bf16, torch.ones_like(naive_bf16))  # the trap
    expected = target + (1 - target) * 0.992**200
    (kept,) = average._weights.values()
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, torch.full((3, 4), expected), atol=1e-6, rtol=0)
    with average.applied_to(model):
        assert model.weight.dtype == torch.bfloat16
        assert torch.equal(model.weight, torch.full((3, 4), target, dtype=torch.bfloat16))  # expected, rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applying_it_gives_the_weights_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_causal_lm("opt").to(dtype)
    with torch.no_grad():
        next(model.parameters())[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30])
    average = ExponentialMovingAverage(model, DECAY)
    walk(model, seed=0)
    own = copies(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    integers = torch.int32 if dtype == torch.float32 else torch.int16

    def unchanged() -> bool:
        return all(torch.equal(p.view(integers), own[name].view(integers)) for name, p in model.named_parameters())

    with average.applied_to(model):
        assert not unchanged()
    assert unchanged()
    with pytest.raises(KeyboardInterrupt), average.applied_to(model):
        raise KeyboardInterrupt
    assert unchanged()
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses  # the optimizer's own tensors


def test_tied_weights_stay_tied() -> None:
    model = tiny_causal_lm("opt")
    average = ExponentialMovingAverage(model, DECAY)
    walk(model, seed=0)
    average.update(model)
    with average.applied_to(model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_it_holds_no_gradients() -> None:
    model = tiny_causal_lm("llama")
    average = ExponentialMovingAverage(model, DECAY)
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    average.update(model)
    assert not any(weight.requires_grad for weight in average._weights.values())
    with average.applied_to(model):
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_frozen_is_not_averaged() -> None:
    model = tiny_causal_lm("llama")
    model.base_model.requires_grad_(False)
    average = ExponentialMovingAverage(model, DECAY)
    assert average._weights.keys() == {"lm_head.weight"}
    start = copies(model)
    walk(model, seed=0)
    average.update(model)
    found, own = averaged(average, model), copies(model)
    frozen = found.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], own[name]) for name in frozen)
    expected = DECAY * start["lm_head.weight"] + (1 - DECAY) * own["lm_head.weight"]
    torch.testing.assert_close(found["lm_head.weight"], expected, atol=1e-6, rtol=0)


def test_of_adapters_the_factors_are_averaged_and_saved_merged(tmp_path: Path) -> None:
    """W + scaling * mean(B) mean(A), the means by the plain formula in float64; tolerance 1e-5."""
    model = tiny_causal_lm("opt")
    add_lora(model, LoRASection(rank=2), 0, "ppo.actor_lora")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    average = ExponentialMovingAverage(model, DECAY)
    assert average._weights.keys() == trainable
    naive = copies(model, torch.float64)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trainable:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                    naive[name] = DECAY * naive[name] + (1 - DECAY) * (parameter.double())
        with adapters_off(model):  # its switch of requires_grad is not the average's business
            average.update(model)
    own = merged_state_dict(model)
    with average.applied_to(model):
        save_model(model, tiny_tokenizer(), tmp_path, frozenset({EOS}), PAD)
    saved = load_file(tmp_path / "model.safetensors")
    layer = "model.decoder.layers.1.fc1"
    a, b = (naive[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    expected = naive[f"{layer}.base_layer.weight"] + 2 * b @ a
    torch.testing.assert_close(saved[f"{layer}.weight"].double(), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(saved[f"{layer}.weight"], own[f"{layer}.weight"], atol=1e-3)
    assert all(torch.equal(tensor, own[name]) for name, tensor in merged_state_dict(model).items())

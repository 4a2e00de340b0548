"""Random models: what is in their weights, what they need of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from threefold.bench.random_models import (
    MemoryNeed,
    activation_bytes,
    check_memory,
    gib,
    memory_need,
    plan_models,
    random_causal_lm,
    random_scalar_model,
)
from threefold.config.recipe import LoRASection
from threefold.errors import ConfigError
from threefold.models.shapes import Shape, find_shape

CPU = torch.device("cpu")


def shape(text: str) -> Shape:
    return find_shape(text, "--actor")


OPT = shape("opt:hidden=64,layers=3,heads=4,ffn=128,vocab=300,positions=64")
QWEN = shape("qwen3:hidden=64,layers=2,heads=4,kv_heads=2,head_dim=16,ffn=96,vocab=300")


@pytest.mark.parametrize("which", [OPT, QWEN])
def test_matrices_are_normal_norms_one_and_biases_zero(which: Shape) -> None:
    model = random_causal_lm(which, CPU, seed=5)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
            assert abs(float(parameter.detach().mean())) < 0.002, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(not name.endswith("bias")))), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.training


def test_the_seed_decides_and_the_logits_are_finite() -> None:
    ids = torch.arange(20).view(2, 10)
    same, other = random_causal_lm(QWEN, CPU, 5), random_causal_lm(QWEN, CPU, 6)
    logits = random_causal_lm(QWEN, CPU, 5)(ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, same(ids).logits)
    assert not torch.equal(logits, other(ids).logits)


def test_a_scalar_model_has_one_score() -> None:
    assert random_scalar_model(OPT, CPU, seed=5).score.weight.shape == (1, 64)


def test_memory_of_a_whole_model_by_hand() -> None:
    """Each trained weight: 4 bytes of its own, 4 of gradient, 8 of moments; then the two frozen copies."""
    actor, critic = plan_models(OPT, QWEN, LoRASection())
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (actor, critic)]
    need = memory_need(actor, critic, activations=1000)
    assert need.total == 20 * sizes[0] + 20 * sizes[1] + 1000
    assert all(parameter.is_meta for parameter in actor.parameters())


def test_adapters_need_no_reference_and_no_moments_of_frozen_weights() -> None:
    """Rank 2: a layer has four matrices of 64 + 64 and two of 64 + 128."""
    whole, _ = plan_models(OPT, OPT, LoRASection())
    actor, critic = plan_models(OPT, OPT, LoRASection(rank=2))
    adapters = 3 * 2 * (4 * 128 + 2 * 192)
    size = sum(parameter.numel() for parameter in whole.parameters())
    critic_size = sum(parameter.numel() for parameter in critic.parameters())
    assert memory_need(actor, critic, 0).total == 4 * size + 16 * adapters + 20 * critic_size


@pytest.mark.parametrize("which", [OPT, QWEN])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_no_more_than_what_autograd_keeps(which: Shape, checkpointing: bool) -> None:
    model = random_causal_lm(which, CPU, seed=5)
    if checkpointing:
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(torch.arange(64).view(2, 32), use_cache=False).last_hidden_state
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    bound = activation_bytes(which, 64, torch.float32, checkpointing)
    assert hidden.requires_grad
    assert bound <= measured
    if not checkpointing:
        assert measured < 3 * bound


def test_check_memory_names_what_is_needed_and_what_is_free() -> None:
    need = MemoryNeed({"weights": 3 * 2**30, "reference": 0, "activations": 2**30})
    check_memory(need, 4 * 2**30, CPU, "models")
    with pytest.raises(ConfigError) as refused:
        check_memory(need, 2**31, CPU, "actor a and critic b")
    message = str(refused.value)
    assert "actor a and critic b need at least 4.0 GiB (weights 3.0 GiB, activations 1.0 GiB)" in message
    assert "cpu has 2.0 GiB free" in message
    assert "--lora-rank" in message


def test_gib() -> None:
    assert (gib(2**30), gib(3 * 2**20)) == ("1.0 GiB", "3.0 MiB")

"""Attention in blocks against the plain definition in double precision, and inside models."""

from __future__ import annotations

import pytest
import torch

from tests.models.families_under_test import CONFIGS, ragged_ids, tiny_causal_lm
from threefold.machine.attention import NAME, blocked_causal_attention, route_attention

LENGTH = 210


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_values_and_gradients_are_those_of_the_definition(length: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(length)
    single = [torch.randn(2, 3, length, 16, generator=generator, requires_grad=True) for _ in range(3)]
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    ours, exact = blocked_causal_attention(*single, scale), plain_attention(*double, scale)
    upstream = torch.randn(ours.shape, generator=generator)
    ours.backward(upstream)
    exact.backward(upstream.double())
    torch.testing.assert_close(ours, exact.float(), atol=2e-5, rtol=1e-5)
    for mine, reference in zip(single, double, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad.float(), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(blocked_causal_attention(*single, scale), ours)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_computes_the_same_with_and_without_blocks(family: str) -> None:
    plain, blocked = (tiny_causal_lm(family, max_position_embeddings=256, n_positions=256) for _ in range(2))
    own = plain.config._attn_implementation
    route_attention(blocked)
    assert blocked.config._attn_implementation == (NAME if own == "sdpa" and family != "falcon" else own)
    ids = torch.tensor(ragged_ids(0, [LENGTH, LENGTH]))
    losses = [model(ids).logits.square().mean() for model in (plain, blocked)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    for mine, reference in zip(blocked.parameters(), plain.parameters(), strict=True):
        if reference.grad is not None:
            assert float((mine.grad - reference.grad).norm() / norm) < 1e-5


def test_under_autocast_a_model_trains_as_without_blocks() -> None:
    """Rotary positions leave queries and keys float32, and autocast would make the products bfloat16."""
    model = tiny_causal_lm("llama", max_position_embeddings=256)
    route_attention(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.tensor(ragged_ids(0, [LENGTH]))).logits.float().square().mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

"""Causal attention in blocks of queries, for training on a CPU.

PyTorch's CPU kernel computes about the whole square of scores even where half of it is masked. Cut into blocks of
queries, each against the keys that it may see, the same sum takes about two thirds of the time, forward and backward
(benchmarks/matrix_kernels.py). The probabilities are kept for the backward pass, so the longest sequence is bounded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "threefold_causal"
BLOCK = 128
SHORTEST, LONGEST = 192, 1024
"""Tokens between which blocks win: below, there is little to leave out; above, what is kept weighs too much."""


def _bounds(length: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, length, BLOCK), length]))


class _BlockedCausalAttention(torch.autograd.Function):
    """softmax(scale * Q K^T + causal mask) V over [rows, T, Dh]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        output = torch.empty_like(queries)
        kept = []
        future = torch.full((BLOCK, BLOCK), -torch.inf).triu(1)
        for start, end in _bounds(queries.shape[1]):
            scores = torch.bmm(queries[:, start:end] * scale, keys[:, :end].transpose(1, 2))
            scores[:, :, start:end].add_(future[: end - start, : end - start])
            probabilities = torch.softmax(scores, dim=-1)
            output[:, start:end] = torch.bmm(probabilities, values[:, :end])
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.scale = scale
        ctx.save_for_backward(queries, keys, values, output, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        grad_queries = torch.empty_like(queries)
        # of softmax: dS = P * (dP - sum(dP * P)), and that sum is dO . O
        correction = (grad * output).sum(dim=-1, keepdim=True)
        blocks = list(zip(_bounds(queries.shape[1]), kept, strict=True))
        for (start, end), probabilities in reversed(blocks):
            upstream = grad[:, start:end]
            grad_scores = torch.bmm(upstream, values[:, :end].transpose(1, 2))
            grad_scores.sub_(correction[:, start:end]).mul_(probabilities).mul_(ctx.scale)
            grad_queries[:, start:end] = torch.bmm(grad_scores, keys[:, :end])
            of_values = torch.bmm(probabilities.transpose(1, 2), upstream)
            of_keys = torch.bmm(grad_scores.transpose(1, 2), queries[:, start:end])
            if end == queries.shape[1]:  # the last block sees every key: the others add their shares to its
                grad_keys, grad_values = of_keys, of_values
            else:
                grad_keys[:, :end].add_(of_keys)
                grad_values[:, :end].add_(of_values)
        return grad_queries, grad_keys, grad_values, None


def blocked_causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal self-attention, [B, H, T, Dh] each; differentiable once."""
    flat = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (queries, keys, values))
    output = cast(Tensor, _BlockedCausalAttention.apply(*flat, scale))
    return output.view_as(queries)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, Dh] in, [B, T, H, Dh] out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    blocked = (
        causal
        and attention_mask is None
        and dropout == 0.0
        and query.dtype == torch.float32
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2]
        and SHORTEST <= query.shape[2] <= LONGEST
    )
    if not blocked:
        return cast(
            tuple[Tensor, None],
            sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **arguments
            ),
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return blocked_causal_attention(query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def route_attention(model: PreTrainedModel) -> None:
    """Let a model that uses scaled_dot_product_attention use blocks where they are faster; its files stay the same.

    Families whose attention transformers cannot exchange stay as they are.
    """
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)

"""Causal attention in blocks of queries, for training on a CPU.

PyTorch's CPU kernel computes about the whole square of scores even where half of it is masked. Cut into blocks of
queries, each against the keys that it may see, the same sum takes 0.7 to 0.85 of the time, forward and backward
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
    """softmax(scale * Q K^T + causal mask) V over [B, H, T, Dh] of any strides.

    One sequence at a time: then the products read queries, keys and values where the projections have left them
    ([B, T, H, Dh]), and write output and gradients where the next product expects them.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        batch, heads, length, width = queries.shape
        output = queries.new_empty(batch, length, heads, width)
        future = torch.full((BLOCK, BLOCK), -torch.inf).triu(1)
        scaled = queries if scale == 1.0 else queries * scale
        kept = []
        for row in range(batch):
            for start, end in _bounds(length):
                scores = torch.bmm(scaled[row, :, start:end], keys[row, :, :end].transpose(1, 2))
                scores[:, :, start:end].add_(future[: end - start, : end - start])
                probabilities = torch.softmax(scores, dim=-1)
                output[row, start:end].transpose(0, 1).copy_(torch.bmm(probabilities, values[row, :, :end]))
                if any(ctx.needs_input_grad):
                    kept.append(probabilities)
        ctx.scale = scale
        ctx.save_for_backward(queries, keys, values, output, *kept)
        return output.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, *kept = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        grad_queries, grad_keys, grad_values = (torch.empty_like(output) for _ in range(3))
        # of softmax: dS = P * (dP - sum(dP * P)), and that sum is dO . O
        correction = (grad * output).sum(dim=-1, keepdim=True)
        bounds = _bounds(output.shape[1])
        for row in range(len(output)):
            blocks = zip(bounds, kept[row * len(bounds) : (row + 1) * len(bounds)], strict=True)
            for (start, end), probabilities in reversed(list(blocks)):
                upstream = grad[row, start:end].transpose(0, 1)
                grad_scores = torch.bmm(upstream, values[row, :, :end].transpose(1, 2))
                grad_scores.sub_(correction[row, start:end].transpose(0, 1)).mul_(probabilities).mul_(ctx.scale)
                grad_queries[row, start:end].transpose(0, 1).copy_(torch.bmm(grad_scores, keys[row, :, :end]))
                of_values = torch.bmm(probabilities.transpose(1, 2), upstream)
                of_keys = torch.bmm(grad_scores.transpose(1, 2), queries[row, :, start:end])
                if end == output.shape[1]:  # the last block sees every key: the others add their shares to its
                    grad_keys[row].transpose(0, 1).copy_(of_keys)
                    grad_values[row].transpose(0, 1).copy_(of_values)
                else:
                    grad_keys[row, :end].transpose(0, 1).add_(of_keys)
                    grad_values[row, :end].transpose(0, 1).add_(of_values)
        return grad_queries.transpose(1, 2), grad_keys.transpose(1, 2), grad_values.transpose(1, 2), None


def blocked_causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal self-attention, [B, H, T, Dh] each; differentiable once."""
    return cast(Tensor, _BlockedCausalAttention.apply(queries, keys, values, scale))


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
        and not torch.is_autocast_enabled("cpu")  # it would change types inside the forward pass, not in the backward
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

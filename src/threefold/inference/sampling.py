"""How one token is drawn from logits: the only place that does it."""

from __future__ import annotations

import torch
from torch import Tensor

from threefold.config.recipe import SamplingSection


def restrict_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf all logits outside the k likeliest tokens, then outside the smallest set that reaches probability p.

    The likeliest token always stays. Ties at the k-th place are kept, all of them; top-p is applied to what top-k left,
    renormalised (the order that transformers uses).

    Args:
        logits: [B, V] float32, already divided by the temperature.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped_in_order = before >= top_p
        dropped_in_order[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped_in_order).scatter(1, order, dropped_in_order), -torch.inf)
    return logits


def draw_tokens(
    logits: Tensor, sampling: SamplingSection, num_generated: int, stop_ids: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [B, V] float32, as the model gave them.
        sampling: temperature 0 takes the likeliest token.
        num_generated: tokens that each row has generated before this one; stop ids are banned below min_new_tokens.
        stop_ids: int64, any number of them.
        generator: on the device of the logits.

    Returns:
        tokens [B] int64; their log-probability under softmax(logits / temperature); the same under the distribution
        that was really drawn from. With temperature 0 the first is at temperature 1 and the second is 0.
    """
    scaled = logits / sampling.temperature if sampling.temperature > 0 else logits
    allowed = scaled
    if num_generated < sampling.min_new_tokens and len(stop_ids):
        allowed = allowed.index_fill(1, stop_ids, -torch.inf)
    full = scaled.log_softmax(dim=-1)
    if sampling.temperature == 0:
        tokens = allowed.argmax(dim=-1)
        return tokens, full.gather(1, tokens.unsqueeze(1)).squeeze(1), torch.zeros(len(tokens), device=logits.device)
    allowed = restrict_logits(allowed, sampling.top_k, sampling.top_p)
    drawn_from = full if allowed is scaled else allowed.log_softmax(dim=-1)
    tokens = torch.multinomial(drawn_from.exp(), num_samples=1, generator=generator).squeeze(1)
    index = tokens.unsqueeze(1)
    return tokens, full.gather(1, index).squeeze(1), drawn_from.gather(1, index).squeeze(1)

"""Log-probabilities of given tokens, without ever holding [tokens, V] float32 tensors of more than one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Entropy = Literal["none", "measured", "trained"]


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `token_ids`, in float32.

    Args:
        logits: [..., V], any float type.
        token_ids: [...], int64.
        temperature: > 0.

    Returns:
        [...], float32, nats, <= 0.
    """
    log_probabilities = F.log_softmax(_scaled(logits, temperature), dim=-1)
    return log_probabilities.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), [...], float32, nats: - sum p log p."""
    scaled = _scaled(logits, temperature)
    log_probabilities = F.log_softmax(scaled, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def _logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, temperature: float, entropy: Entropy
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `token_entropy` from one log softmax."""
    log_probabilities = F.log_softmax(_scaled(logits, temperature), dim=-1)
    logprobs = log_probabilities.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    if entropy == "none":
        return logprobs, torch.zeros_like(logprobs)
    if entropy == "trained":
        return logprobs, -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    every = log_probabilities.detach()
    return logprobs, -every.exp().mul_(every).sum(dim=-1)


def chunked_logprobs(
    hidden: Tensor,
    token_ids: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    entropy: Entropy = "measured",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, the output head applied chunk by chunk.

    With gradients on, each chunk's logits are recomputed in the backward pass instead of kept, so peak memory is that
    of a few [chunk_tokens, V] float32 tensors (logits, log softmax, their gradients), whatever the batch. A single
    chunk is kept: computing it again would save nothing.

    Args:
        hidden: [M, D], the hidden state from which each token is predicted.
        token_ids: [M], int64.
        head: maps [m, D] to logits [m, V].
        temperature: > 0.
        chunk_tokens: tokens per chunk.
        entropy: "trained" with a gradient, "measured" without, "none" gives zeros and costs nothing.

    Returns:
        log-probabilities [M] and entropies [M], float32, nats.
    """

    def one_chunk(hidden_chunk: Tensor, ids_chunk: Tensor) -> tuple[Tensor, Tensor]:
        return _logprobs_and_entropy(head(hidden_chunk), ids_chunk, temperature, entropy)

    if len(token_ids) <= chunk_tokens:
        return one_chunk(hidden, token_ids)
    recompute = torch.is_grad_enabled()
    pieces = []
    for start in range(0, len(token_ids), chunk_tokens):
        chunk = (hidden[start : start + chunk_tokens], token_ids[start : start + chunk_tokens])
        pieces.append(checkpoint(one_chunk, *chunk, use_reentrant=False) if recompute else one_chunk(*chunk))
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)

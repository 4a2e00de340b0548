"""Batched decoding with the Hugging Face forward and a key-value cache.

Prompts are left-padded, with a mask and per-row positions from the lengths. Rows that have stopped leave the batch as
soon as they are half of it; the batch ends with its last row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from threefold.config.recipe import SamplingSection
from threefold.data.collate import left_pad_prompts
from threefold.errors import DataError, TrainingError
from threefold.inference.sampling import draw_tokens
from threefold.models.forward import CausalForward
from threefold.models.loading import context_length
from threefold.types import Rollout


def _check_room(forward: CausalForward, prompts: Sequence[Sequence[int]], sampling: SamplingSection) -> None:
    limit = context_length(forward.model)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index + 1} of the batch is empty; a model needs at least one token to go on from")
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            raise DataError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer of {sampling.max_new_tokens} "
                f"in a context of {limit}; lower the prompt's limit or sampling.max_new_tokens"
            )


def decode_steps(
    forward: CausalForward,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSection,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> Iterator[tuple[list[int], list[int], list[float], list[float]]]:
    """Decode step by step: each step yields, for the rows still going, (rows, tokens, logprobs, sampled_logprobs)."""
    _check_room(forward, prompts, sampling)
    device = forward.model.device
    input_ids, mask = (tensor.to(device) for tensor in left_pad_prompts(prompts, pad_id=0))
    positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    cache = DynamicCache(config=forward.model.config)
    rows = torch.arange(len(prompts), device=device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(sampling.max_new_tokens):
        logits = forward.next_logits(input_ids, mask, positions, cache)
        if not bool(torch.isfinite(logits.sum())):
            raise TrainingError(
                f"the model's logits are not finite at token {step + 1} of an answer: its weights are damaged"
            )
        tokens, logprobs, sampled = draw_tokens(logits, sampling, step, stops, generator)
        live = going.nonzero().squeeze(1)
        yield rows[live].tolist(), tokens[live].tolist(), logprobs[live].tolist(), sampled[live].tolist()
        going = going & ~torch.isin(tokens, stops)
        if not bool(going.any()):
            return
        input_ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if int(going.sum()) * 2 <= len(going):
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, going, input_ids, positions, mask = (t[keep] for t in (rows, going, input_ids, positions, mask))


@torch.no_grad()
def generate(
    forward: CausalForward,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSection,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    policy_version: int = 0,
    batch_size: int = 0,
) -> list[Rollout]:
    """Sample one answer to each prompt (repeat a prompt for several).

    Args:
        prompts: token ids, ragged.
        stop_ids: an answer ends with the first of these, which is part of it.
        generator: source of randomness, on the model's device.
        policy_version: recorded in the rollouts.
        batch_size: rows decoded together; 0 means all.

    Raises:
        DataError: if a prompt and the longest answer do not fit the model's context.
        TrainingError: if the logits are not finite.
    """
    _check_room(forward, prompts, sampling)
    rollouts: list[Rollout] = []
    size = batch_size or max(len(prompts), 1)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        collected: list[list[tuple[int, float, float]]] = [[] for _ in batch]
        for step in decode_steps(forward, batch, sampling, stop_ids, generator):
            for row, token, logprob, sampled in zip(*step, strict=True):
                collected[row].append((token, logprob, sampled))
        rollouts.extend(
            _rollout(p, answer, stop_ids, policy_version) for p, answer in zip(batch, collected, strict=True)
        )
    return rollouts


def _rollout(
    prompt: Sequence[int], answer: list[tuple[int, float, float]], stop_ids: frozenset[int], policy_version: int
) -> Rollout:
    tokens, logprobs, sampled = zip(*answer, strict=True)
    return Rollout(
        prompt_ids=torch.tensor(list(prompt), dtype=torch.int64),
        response_ids=torch.tensor(tokens, dtype=torch.int64),
        logprobs=_floats(logprobs),
        sampled_logprobs=_floats(sampled),
        finish_reason="stop" if tokens[-1] in stop_ids else "length",
        policy_version=policy_version,
    )


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@torch.no_grad()
def stream_tokens(
    forward: CausalForward,
    prompt: Sequence[int],
    sampling: SamplingSection,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """Decode one answer token by token; the stop token ends the stream and is not yielded."""
    for _, tokens, _, _ in decode_steps(forward, [prompt], sampling, stop_ids, generator):
        if tokens[0] in stop_ids:
            return
        yield tokens[0]

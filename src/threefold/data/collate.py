"""From ragged records to padded [B, T] batches: the only place that pads.

Training batches are padded on the right, prompts for generation on the left. Every batch carries explicit masks that
come from the lengths of the records; no mask is ever derived from the ids, because a checkpoint's pad id may be a real
token (its stop token, or unk). Shapes: see the legend in `types`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

from threefold.types import Experience, Rollout, TokenSequence


class Batch:
    """Base of the padded batches: frozen dataclasses of tensors."""

    def to(self: Self, device: torch.device) -> Self:
        """The same batch, made on the CPU, on another device; the host does not wait for a GPU."""
        instance: Any = self
        tensors = {field.name: getattr(instance, field.name) for field in fields(instance)}
        if device.type == "cuda":  # from memory that is not page-locked, the copy would wait for the stream
            moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
        else:
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        return replace(instance, **moved)


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Rendered conversations, padded on the right.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, True at the sequence's own tokens.
        target_mask: [B, T] bool, True where the token is a target of the loss.
        lengths: [B] int64, tokens of each sequence.
        prompt_lengths: [B] int64, leading tokens that come before the last answer.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    target_mask: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """Sampled answers after their prompts, padded on the right; responses also on their own, as the losses take them.

    Attributes:
        input_ids: [B, T] int64, prompt then response then padding.
        attention_mask: [B, T] bool.
        prompt_lengths: [B] int64.
        response_lengths: [B] int64, the stop token included.
        response_ids: [B, R] int64.
        response_mask: [B, R] bool, True at the response's own tokens.
        target_mask: [B, T] bool, True at the same tokens' places in input_ids; both masks list them in the same order.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_lengths: torch.Tensor
    response_lengths: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    target_mask: torch.Tensor


@dataclass(frozen=True)
class ExperienceBatch(RolloutBatch):
    """A minibatch of the PPO update: a RolloutBatch with what `Experience` records, 0 where padded.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool.
        prompt_lengths: [B] int64.
        response_lengths: [B] int64.
        response_ids: [B, R] int64.
        response_mask: [B, R] bool.
        target_mask: [B, T] bool.
        old_logprobs: [B, R] float32, nats, of the sampling policy.
        ref_logprobs: [B, R] float32, nats, of the reference.
        values: [B, R] float32.
        rewards: [B, R] float32.
        advantages: [B, R] float32.
        returns: [B, R] float32.
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def pad_ragged(tensors: Sequence[torch.Tensor], value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks 1-D tensors of one dtype on the right-padded rows of a matrix.

    Returns:
        [B, R] of the tensors' dtype, filled with `value`, and the [B, R] bool mask of the real entries.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device)[None, :] < lengths[:, None]


def collate_sequences(sequences: Sequence[TokenSequence], pad_id: int) -> TokenBatch:
    """Pads rendered conversations on the right; a padded position is never a target, nor is a first token: see
    `num_targets`."""
    input_ids, attention_mask = pad_ragged([torch.tensor(sequence.ids) for sequence in sequences], pad_id)
    target_mask, _ = pad_ragged([torch.tensor(sequence.trained) for sequence in sequences], False)
    target_mask[:, 0] = False
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        target_mask=target_mask,
        lengths=attention_mask.sum(dim=1),
        prompt_lengths=torch.tensor([sequence.prompt_length for sequence in sequences]),
    )


def num_targets(sequences: Sequence[TokenSequence]) -> int:
    """Tokens that the loss of these sequences counts: the trained ones, but for each first token, which nothing
    predicts."""
    return sum(sum(sequence.trained[1:]) for sequence in sequences)


def left_pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads prompts on the left, so that every row's next token is sampled in the same column.

    Returns:
        input_ids [B, P] int64 and attention_mask [B, P] bool.
    """
    reversed_ids, reversed_mask = pad_ragged([torch.tensor(list(prompt)[::-1]) for prompt in prompts], pad_id)
    return reversed_ids.flip(1), reversed_mask.flip(1)


def collate_rollouts(rollouts: Sequence[Rollout], pad_id: int) -> RolloutBatch:
    """Joins each prompt with its response and pads on the right."""
    whole = [torch.cat([rollout.prompt_ids, rollout.response_ids]) for rollout in rollouts]
    input_ids, attention_mask = pad_ragged(whole, pad_id)
    response_ids, response_mask = pad_ragged([rollout.response_ids for rollout in rollouts], pad_id)
    prompt_lengths = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
    positions = torch.arange(input_ids.shape[1])
    return RolloutBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        prompt_lengths=prompt_lengths,
        response_lengths=response_mask.sum(dim=1),
        response_ids=response_ids,
        response_mask=response_mask,
        target_mask=attention_mask & (positions >= prompt_lengths[:, None]),
    )


def collate_experience(experiences: Sequence[Experience], pad_id: int) -> ExperienceBatch:
    """Pads complete experience; every [B, R] field is 0 outside `response_mask`."""
    batch = collate_rollouts([experience.rollout for experience in experiences], pad_id)
    return ExperienceBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        prompt_lengths=batch.prompt_lengths,
        response_lengths=batch.response_lengths,
        response_ids=batch.response_ids,
        response_mask=batch.response_mask,
        target_mask=batch.target_mask,
        old_logprobs=pad_ragged([experience.rollout.logprobs for experience in experiences])[0],
        ref_logprobs=pad_ragged([experience.ref_logprobs for experience in experiences])[0],
        values=pad_ragged([experience.values for experience in experiences])[0],
        rewards=pad_ragged([experience.rewards for experience in experiences])[0],
        advantages=pad_ragged([experience.advantages for experience in experiences])[0],
        returns=pad_ragged([experience.returns for experience in experiences])[0],
    )


def epoch_order(num_items: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(num_items) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_items, generator=generator).tolist()

"""Rollouts and experience as plain tensors, for a checkpoint in the middle of an iteration, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from threefold.stages.rollout import ScoredBatch
from threefold.types import Experience, Rollout

_PER_TOKEN = ("ref_logprobs", "values", "rewards", "advantages", "returns")
_PER_ANSWER = ("kl", "rlhf_reward", "shaped_scores")


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Rollouts, one after the other."""
    return {
        "prompt_ids": torch.cat([rollout.prompt_ids for rollout in rollouts]),
        "prompt_lengths": torch.tensor([len(rollout.prompt_ids) for rollout in rollouts]),
        "response_ids": torch.cat([rollout.response_ids for rollout in rollouts]),
        "response_lengths": torch.tensor([len(rollout.response_ids) for rollout in rollouts]),
        "logprobs": torch.cat([rollout.logprobs for rollout in rollouts]),
        "sampled_logprobs": torch.cat([rollout.sampled_logprobs for rollout in rollouts]),
        "stopped": torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts]),
        "policy_versions": torch.tensor([rollout.policy_version for rollout in rollouts]),
    }


def unpack_rollouts(tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """What `pack_rollouts` packed."""
    prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
    lengths = tensors["response_lengths"].tolist()
    pieces = (tensors[name].split(lengths) for name in ("response_ids", "logprobs", "sampled_logprobs"))
    rest = (tensors["stopped"].tolist(), tensors["policy_versions"].tolist())
    return [
        Rollout(prompt, ids, logprobs, sampled, "stop" if stopped else "length", version)
        for prompt, ids, logprobs, sampled, stopped, version in zip(prompts, *pieces, *rest, strict=True)
    ]


def pack_batch(batch: ScoredBatch) -> dict[str, Tensor]:
    """A batch of experience, its rollouts included."""
    experiences = batch.experiences
    return {
        **pack_rollouts([experience.rollout for experience in experiences]),
        "scores": torch.tensor([experience.score for experience in experiences], dtype=torch.float64),
        **{name: torch.cat([getattr(experience, name) for experience in experiences]) for name in _PER_TOKEN},
        **{name: getattr(batch, name) for name in _PER_ANSWER},
    }


def unpack_batch(tensors: Mapping[str, Tensor]) -> ScoredBatch:
    """What `pack_batch` packed."""
    rollouts = unpack_rollouts(tensors)
    lengths = tensors["response_lengths"].tolist()
    pieces = [tensors[name].split(lengths) for name in _PER_TOKEN]
    experiences = [
        Experience(rollout, score, *parts)
        for rollout, score, *parts in zip(rollouts, tensors["scores"].tolist(), *pieces, strict=True)
    ]
    return ScoredBatch(experiences, *(tensors[name] for name in _PER_ANSWER))

"""From a reward model's score to a reward per token (InstructGPT, Ouyang et al. 2022, equation 2, first two terms)."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    mean: float,
    scale: float,
    clip: float,
    missing_stop_penalty: float,
    coef: float = 1.0,
) -> Tensor:
    """Normalise, clip, weigh and penalise the scores of whole answers.

    Args:
        scores: [B], the reward model's units.
        finished: [B] bool, False where the answer was cut at its longest length instead of stopping.
        mean, scale: of the reward model's scores on held-out data; 0 and 1 leave the scores as they are.
        clip: largest absolute normalised score; 0 does not clip.
        missing_stop_penalty: taken off unfinished answers, after clipping and weighing so that it always counts.
        coef: weight of the normalised, clipped scores.

    Returns:
        [B], normalised reward units.
    """
    shaped = (scores - mean) / scale
    if clip > 0:
        shaped = shaped.clamp(-clip, clip)
    return coef * shaped - missing_stop_penalty * (~finished)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each response token: -kl_coef * kl everywhere, plus the score at the last real token of the answer.

    Args:
        scores: [B], shaped scores.
        kl: [B, R], per-token KL estimate, nats.
        mask: [B, R] bool, True on response tokens, the stop token included; every row has at least one.
        kl_coef: weight of the penalty.

    Returns:
        [B, R], 0 outside the mask.
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError("every answer needs at least one real token to carry its score")
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, torch.full_like(positions, -1)).amax(dim=1)
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))

"""Generalised advantage estimation (Schulman et al. 2016, equation 16) over masked responses."""

from __future__ import annotations

import torch
from torch import Tensor


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each response token.

    delta_t = r_t + gamma * V_next - V_t and A_t = delta_t + gamma * lambda * A_next, where "next" is the next *real*
    token: a masked position in between is skipped, its value and advantage carried over it, rather than zeroed. After
    the
    last real token the episode is over: V_next = A_next = 0, for answers cut by length as well.

    Args:
        rewards: [B, R].
        values: [B, R], the critic's value before each token.
        mask: [B, R] bool.
        gamma: discount per token.
        gae_lambda: GAE's lambda.

    Returns:
        advantages [B, R] and returns (advantages + values) [B, R], both 0 outside the mask.
    """
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for position in range(values.shape[1] - 1, -1, -1):
        real = mask[:, position]
        delta = rewards[:, position] + gamma * next_value - values[:, position]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, position] = torch.where(real, advantage, torch.zeros_like(advantage))
        next_value = torch.where(real, values[:, position], next_value)
        next_advantage = torch.where(real, advantage, next_advantage)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns

"""The losses of the three steps.

Each returns a *sum* over real tokens (or pairs); the caller divides by the global count of the optimizer step, so that
micro-batching and the number of processes cannot change the gradient. Statistics that come with a loss are sums as
well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from threefold.algo.masked import masked_sum


def lm_loss_sum(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the trained tokens, summed; nats.

    Args:
        logprobs: log-probability of each target token, any shape.
        mask: same shape, True on the tokens that are trained.
    """
    return -masked_sum(logprobs, mask)


def pairwise_reward_loss_sum(better: Tensor, worse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Bradley-Terry negative log-likelihood, sum of -log sigmoid(better - worse) (Ouyang et al. 2022, equation 1).

    Args:
        better, worse: [B], scores of the preferred and of the other answer of each pair.
        weights: [B], of the pairs; 1 / (number of the prompt's pairs) makes the sum one of means per prompt. None is 1
            each.
    """
    losses = -F.logsigmoid(better.float() - worse.float())
    return losses.sum() if weights is None else (losses * weights).sum()


def plackett_luce_loss_sum(chosen: Tensor, left: Tensor, left_mask: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood of rankings as successive choices of the best of those left (Luce 1959, Plackett 1975).

    The chance of a choice is the softmax of the scores of all that were left, the chosen one included. Answers of one
    tier are each chosen among all of their own and of the lower tiers (Breslow 1974's way with ties); those of the last
    tier are chosen among none. A ranking of two is a pair of `pairwise_reward_loss_sum`.

    Args:
        chosen: [C], score of the answer that each choice took.
        left: [C, N], scores of those it was taken from.
        left_mask: [C, N] bool, True at real entries, of which each row has one at least.
        weights: [C], of the choices.
    """
    among = torch.where(left_mask, left.float(), torch.full_like(left, -torch.inf, dtype=torch.float32))
    return ((torch.logsumexp(among, dim=1) - chosen.float()) * weights).sum()


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over real response tokens; divide by their count.

    Attributes:
        loss: clipped surrogate, to be minimised; carries the gradient.
        clipped: number of tokens where the clipped term was the larger (pessimistic) one.
        approx_kl: KL(old || new) by k3, nats.
        ratio: sum of ratios; ratio_squared: of their squares; largest_ratio_error: max |ratio - 1| over the tokens
            (not a sum).
    """

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio: Tensor
    ratio_squared: Tensor
    largest_ratio_error: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), negated to be minimised.

    Args:
        logprobs: [B, R], under the policy being trained.
        old_logprobs: [B, R], under the policy that sampled.
        advantages: [B, R].
        mask: [B, R] bool.
        clip_range: epsilon of the paper.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    with torch.no_grad():
        # old || new, sampled from old: k3 with r = new / old.
        approx_kl = masked_sum(torch.expm1(log_ratio) - log_ratio, mask)
        num_clipped = masked_sum((clipped > unclipped).to(ratio.dtype), mask)
        largest = torch.where(mask, (ratio - 1.0).abs(), torch.zeros_like(ratio)).max()
    return PolicyLoss(
        loss=masked_sum(torch.maximum(unclipped, clipped), mask),
        clipped=num_clipped,
        approx_kl=approx_kl,
        ratio=masked_sum(ratio.detach(), mask),
        ratio_squared=masked_sum(ratio.detach() ** 2, mask),
        largest_ratio_error=largest,
    )


@dataclass(frozen=True)
class ValueLoss:
    """Sums over real response tokens; divide by their count. `clipped` counts tokens where the clipped error was the
    larger."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> ValueLoss:
    """Clipped squared error of the critic, 1/2 max((V - R)^2, (clip(V, V_old +- range) - R)^2).

    Args:
        values: [B, R], the critic being trained.
        old_values: [B, R], the critic at the time of the rollout.
        returns: [B, R], targets.
        mask: [B, R] bool.
        clip_range: how far a value may move per iteration before its gradient ends, value units.
    """
    # Bounds as tensors: a value within the range stays what it is to the last bit, so it is never counted as clipped.
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    zero = torch.zeros_like(values)
    # Masked before the square, whose gradient at a NaN would be NaN even when multiplied by 0.
    plain_error = torch.where(mask, values - returns, zero) ** 2
    near_error = torch.where(mask, near - returns, zero) ** 2
    with torch.no_grad():
        num_clipped = masked_sum((near_error > plain_error).to(values.dtype), mask)
    return ValueLoss(loss=0.5 * masked_sum(torch.maximum(plain_error, near_error), mask), clipped=num_clipped)

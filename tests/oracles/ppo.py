"""PPO's two losses token by token, from TRL's published formulas, with their gradients worked by hand.

    policy   pg_losses = -A ratio, pg_losses2 = -A clamp(ratio, 1 - eps, 1 + eps), the larger of the two
    value    vf_losses1 = (V - R)^2, vf_losses2 = (clamp(V, V_old - eps, V_old + eps) - R)^2, half the larger of the two

Each function takes the real tokens only and returns sums (TRL divides them by the number of tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def clamp(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


@dataclass(frozen=True)
class Policy:
    loss: float
    clipped: int
    approx_kl: float
    ratio: float
    ratio_squared: float
    largest_ratio_error: float
    gradient: list[float]  # with respect to each new log-probability


def policy(new: list[float], old: list[float], advantages: list[float], epsilon: float) -> Policy:
    losses, gradients, ratios, divergences = [], [], [], []
    clipped = 0
    for logprob, old_logprob, advantage in zip(new, old, advantages, strict=True):
        ratio = math.exp(logprob) / math.exp(old_logprob)
        first = -advantage * ratio
        second = -advantage * clamp(ratio, 1 - epsilon, 1 + epsilon)
        losses.append(max(first, second))
        # Where the clipped term is the larger one it does not depend on the ratio any more.
        gradients.append(0.0 if second > first else -advantage * ratio)
        clipped += second > first
        ratios.append(ratio)
        # KL(old || new) from a sample of old: r = new / old.
        divergences.append((ratio - 1) - math.log(ratio))
    return Policy(
        loss=math.fsum(losses),
        clipped=clipped,
        approx_kl=math.fsum(divergences),
        ratio=math.fsum(ratios),
        ratio_squared=math.fsum(ratio * ratio for ratio in ratios),
        largest_ratio_error=max(abs(ratio - 1) for ratio in ratios),
        gradient=gradients,
    )


@dataclass(frozen=True)
class Value:
    loss: float
    clipped: int
    gradient: list[float]  # with respect to each new value


def value(new: list[float], old: list[float], returns: list[float], epsilon: float) -> Value:
    losses, gradients = [], []
    clipped = 0
    for predicted, before, target in zip(new, old, returns, strict=True):
        first = (predicted - target) ** 2
        second = (clamp(predicted, before - epsilon, before + epsilon) - target) ** 2
        losses.append(0.5 * max(first, second))
        gradients.append(0.0 if second > first else predicted - target)
        clipped += second > first
    return Value(loss=math.fsum(losses), clipped=clipped, gradient=gradients)


def next_kl_coef(kl_coef: float, observed: float, target: float, answers: int, horizon: float) -> float:
    """Ziegler et al. 2019, section 2.2: e = clip((KL - target) / target, -0.2, 0.2), beta <- beta (1 + K e)."""
    error = clamp((observed - target) / target, -0.2, 0.2)
    return kl_coef + kl_coef * error * answers / horizon

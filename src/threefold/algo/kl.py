"""Kullback-Leibler divergence of the policy from the reference: per-token estimators and the coefficient's controller.

Estimators: Schulman, "Approximating KL Divergence" (2020). With x ~ policy and r = reference(x) / policy(x):
k1 = -log r (unbiased, can be negative), k2 = (log r)^2 / 2 (biased, low variance), k3 = r - 1 - log r (unbiased, >= 0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate KL(policy || reference) at each sampled token.

    Args:
        logprobs: log-probability under the policy that sampled the token, any shape, nats.
        ref_logprobs: the same token's log-probability under the reference, same shape.

    Returns:
        same shape, nats.
    """
    log_ratio = ref_logprobs - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")


def adapt_kl_coef(kl_coef: float, observed_kl: float, target_kl: float, num_answers: int, horizon: float) -> float:
    """Next KL coefficient of the proportional controller of Ziegler et al. 2019 (section 2.2).

    error = clip(observed / target - 1, -0.2, 0.2); the coefficient is multiplied by 1 + error * num_answers / horizon.

    Args:
        observed_kl: mean KL per answer of the last batch, nats.
        target_kl: KL per answer to steer to, nats, > 0.
        num_answers: answers in that batch.
        horizon: answers over which the coefficient may change by about e^0.2.
    """
    error = min(max(observed_kl / target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_answers / horizon)

"""Categorical distributions by hand: softmax, entropy, exact KL divergence, and the per-sample estimators of it."""

from __future__ import annotations

import math


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    """exp(x / t) over its sum; the largest logit is taken off first, which changes nothing but the range."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def entropy(probabilities: list[float]) -> float:
    """-sum p log p, nats, with 0 log 0 = 0."""
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def kl_divergence(p: list[float], q: list[float]) -> float:
    """sum p log(p / q), nats."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def kl_estimate(p_of_sample: float, q_of_sample: float, estimator: str) -> float:
    """Schulman's k1, k2, k3 of KL(p || q) at one sample x ~ p, from the probabilities themselves: r = q(x) / p(x)."""
    r = q_of_sample / p_of_sample
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


def logprob_gradient(logits: list[float], token: int, temperature: float = 1.0) -> list[float]:
    """d log softmax(x / t)[token] / dx = (onehot - softmax) / t."""
    return [
        ((1.0 if index == token else 0.0) - p) / temperature for index, p in enumerate(softmax(logits, temperature))
    ]

"""Rewards, returns and advantages of one answer at a time: lists of its real tokens only, no padding anywhere.

`compact` and `spread` take a padded row apart and put it together again, so an oracle never sees what stands between.
"""

from __future__ import annotations


def compact(row: list[float], flags: list[bool]) -> list[float]:
    return [value for value, flag in zip(row, flags, strict=True) if flag]


def spread(entries: list[float], flags: list[bool]) -> list[float]:
    """Entries back at the places whose flag is True, 0 elsewhere."""
    waiting = list(entries)
    return [waiting.pop(0) if flag else 0.0 for flag in flags]


def token_rewards(score: float, kl: list[float], kl_coef: float) -> list[float]:
    """InstructGPT, equation 2, token by token: the penalty at each, the score at the last (which is the stop token)."""
    rewards = [-kl_coef * estimate for estimate in kl]
    rewards[-1] += score
    return rewards


def temporal_differences(rewards: list[float], values: list[float], gamma: float) -> list[float]:
    """delta_t = r_t + gamma V(s_t+1) - V(s_t), with V = 0 after the last token."""
    deltas = []
    for t, reward in enumerate(rewards):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        deltas.append(reward + gamma * after - values[t])
    return deltas


def advantages_as_sum(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """Schulman et al. 2016, equation 16, as written: A_t = sum over l of (gamma lambda)^l delta_t+l. No recursion."""
    deltas = temporal_differences(rewards, values, gamma)
    return [
        sum((gamma * gae_lambda) ** step * deltas[t + step] for step in range(len(deltas) - t))
        for t in range(len(deltas))
    ]


def advantages_by_trl(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """TRL's loop: lastgaelam = delta + gamma * lam * lastgaelam, from the last token to the first."""
    last = 0.0
    found = []
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t < len(rewards) - 1 else 0.0
        last = rewards[t] + gamma * next_value - values[t] + gamma * lam * last
        found.append(last)
    return found[::-1]


def lambda_returns(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """The lambda-return (Sutton and Barto, equation 12.3): n-step returns weighted by (1 - lambda) lambda^(n-1), the
    complete return taking all the weight that is left. Equals advantage + value by algebra, not by construction."""
    length = len(rewards)
    returns = []
    for t in range(length):
        left = length - t
        total = 0.0
        for n in range(1, left + 1):
            n_step = sum(gamma**step * rewards[t + step] for step in range(n))
            if n < left:
                total += (1 - gae_lambda) * gae_lambda ** (n - 1) * (n_step + gamma**n * values[t + n])
            else:
                total += gae_lambda ** (n - 1) * n_step
        returns.append(total)
    return returns


def discounted_rewards_to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma**step * rewards[t + step] for step in range(len(rewards) - t)) for t in range(len(rewards))]

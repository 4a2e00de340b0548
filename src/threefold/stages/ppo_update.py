"""One iteration's PPO update of actor and critic over a batch of experience (Schulman et al. 2017; Ouyang et al.
2022, eq. 2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.losses import policy_loss, value_loss
from threefold.algo.masked import masked_mean, masked_var
from threefold.config.recipe import PPOSection
from threefold.data.collate import ExperienceBatch, collate_experience, epoch_order
from threefold.engine.train import TrainEngine, micro_batches
from threefold.errors import TrainingError
from threefold.models.forward import CausalForward, target_values
from threefold.types import Experience

MixtureLoss = Callable[[], tuple[Callable[[], Tensor], ...]]


@dataclass(frozen=True)
class Learners:
    """The two models that learn."""

    actor: TrainEngine
    actor_forward: CausalForward
    critic: TrainEngine
    critic_model: PreTrainedModel
    pad_id: int
    device: torch.device


class UpdateStatistics:
    """Sums over the real tokens that an update saw, reduced to means at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._num_tokens = 0
        self.max_logprob_difference = 0.0
        self.max_ratio_error = 0.0
        self.steps: dict[str, list[float]] = defaultdict(list)

    def add(self, num_tokens: int, **sums: Tensor) -> None:
        self._num_tokens += num_tokens
        for name, value in sums.items():
            self._sums[name] += float(value)

    def mean(self, name: str) -> float:
        return self._sums[name] / max(self._num_tokens, 1)

    def metrics(self) -> dict[str, float]:
        """Metric names as in section 6 of the architecture page (TRL's, where TRL has one)."""
        ratio = self.mean("ratio")
        return {
            "loss/policy_avg": self.mean("policy_loss"),
            "loss/value_avg": self.mean("value_loss"),
            "policy/approxkl_avg": self.mean("approx_kl"),
            "policy/clipfrac_avg": self.mean("clipped"),
            "policy/entropy_avg": self.mean("entropy"),
            "val/clipfrac_avg": self.mean("value_clipped"),
            "val/ratio": ratio,
            "val/ratio_var": max(self.mean("ratio_squared") - ratio**2, 0.0),
            "val/first_ratio_error": self.max_ratio_error,
            "parity/max_abs_logprob_diff": self.max_logprob_difference,
            **{name: math.fsum(values) / len(values) for name, values in self.steps.items()},
        }


def update(
    experiences: Sequence[Experience],
    learners: Learners,
    settings: PPOSection,
    seed: int,
    iteration: int,
    train_actor: bool,
    parity_bound: float,
    mixture: MixtureLoss | None,
) -> dict[str, float]:
    """Run the PPO epochs and minibatches of one iteration.

    Args:
        train_actor: False in the critic's warm-up iterations: the actor's loss is measured, not descended.
        parity_bound: largest allowed difference between rollout and training log-probs before the first step.
        mixture: where mixture training is on, gives the closures of the next pretraining batch, each returning its
            share of coef * mean LM loss; their gradients enter the actor's same optimizer step.

    Raises:
        TrainingError: if the rollout's log-probs are not those of the training forward.
    """
    statistics = UpdateStatistics()
    stopped_early = False
    for epoch in range(settings.ppo_epochs):
        order = epoch_order(len(experiences), seed, iteration * settings.ppo_epochs + epoch)
        for index, rows in enumerate(_split(order, settings.minibatches)):
            first = epoch == 0 and index == 0
            minibatch = [experiences[row] for row in rows]
            approx_kl = _accumulate(minibatch, learners, settings, train_actor, first, statistics)
            if first and statistics.max_logprob_difference > parity_bound:
                raise TrainingError(
                    f"step 3, ppo, iteration {iteration + 1}: the rollout's log-probs differ from the training "
                    f"forward's by {statistics.max_logprob_difference:.2g}, beyond ppo.parity_bound {parity_bound:g}: "
                    "generation does not run the model that trains"
                )
            if settings.target_kl and approx_kl > settings.target_kl:
                stopped_early = True
                break
            if train_actor:
                if mixture is not None:
                    statistics.steps["loss/mixture"].append(math.fsum(map(learners.actor.backward, mixture())))
                actor_step = learners.actor.step()
                statistics.steps["policy/grad_norm"].append(actor_step.grad_norm)
                statistics.steps["policy/learning_rate"].append(actor_step.learning_rate)
            statistics.steps["val/grad_norm"].append(learners.critic.step().grad_norm)
        if stopped_early:
            learners.actor.discard()
            learners.critic.discard()
            break
    return {
        **statistics.metrics(),
        "policy/stopped_early": float(stopped_early),
        "val/explained_variance": explained_variance(experiences),
    }


def _split(order: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Cut into `parts` pieces whose sizes differ by at most one."""
    bounds = [round(len(order) * part / parts) for part in range(parts + 1)]
    return [order[low:high] for low, high in pairwise(bounds) if high > low]


def _accumulate(
    minibatch: Sequence[Experience],
    learners: Learners,
    settings: PPOSection,
    train_actor: bool,
    first: bool,
    statistics: UpdateStatistics,
) -> float:
    """Accumulate both models' gradients of one minibatch; return its mean KL(rollout policy || present policy) per
    token."""
    num_tokens = sum(len(experience.rollout.response_ids) for experience in minibatch)
    approx_kl = 0.0
    for part in micro_batches(minibatch, settings.micro_batch_size):
        batch = collate_experience(part, learners.pad_id).to(learners.device)

        def actor_loss(batch: ExperienceBatch = batch) -> Tensor:
            nonlocal approx_kl
            logprobs, entropy = learners.actor_forward.target_logprobs(
                batch.input_ids, batch.attention_mask, batch.target_mask, settings.sampling.temperature
            )
            old, real = batch.old_logprobs[batch.response_mask], torch.ones_like(logprobs, dtype=torch.bool)
            result = policy_loss(logprobs, old, batch.advantages[batch.response_mask], real, settings.clip_range)
            if first:
                difference = float((logprobs.detach() - old).abs().max())
                statistics.max_logprob_difference = max(statistics.max_logprob_difference, difference)
                statistics.max_ratio_error = max(statistics.max_ratio_error, float(result.largest_ratio_error))
            approx_kl += float(result.approx_kl) / num_tokens
            statistics.add(
                len(old),
                policy_loss=result.loss.detach(),
                clipped=result.clipped,
                approx_kl=result.approx_kl,
                ratio=result.ratio,
                ratio_squared=result.ratio_squared,
                entropy=entropy.detach().sum(),
            )
            return (result.loss - settings.entropy_coef * entropy.sum()) / num_tokens

        def critic_loss(batch: ExperienceBatch = batch) -> Tensor:
            values = target_values(learners.critic_model, batch.input_ids, batch.attention_mask, batch.target_mask)
            old, returns = batch.values[batch.response_mask], batch.returns[batch.response_mask]
            result = value_loss(
                values, old, returns, torch.ones_like(values, dtype=torch.bool), settings.value_clip_range
            )
            statistics.add(0, value_loss=result.loss.detach(), value_clipped=result.clipped)
            return result.loss / num_tokens

        if train_actor:
            learners.actor.backward(actor_loss)
        else:
            learners.actor.measure(actor_loss)
        learners.critic.backward(critic_loss)
    return approx_kl


def explained_variance(experiences: Sequence[Experience]) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens: 1 is a perfect critic, 0 a constant one; 0 if returns
    are all alike."""
    returns = torch.cat([experience.returns for experience in experiences])
    values = torch.cat([experience.values for experience in experiences])
    real = torch.ones_like(returns, dtype=torch.bool)
    spread = float(masked_var(returns, real))
    if spread == 0.0:
        return 0.0
    errors = returns - values
    return 1.0 - float(masked_mean((errors - errors.mean()) ** 2, real)) / spread

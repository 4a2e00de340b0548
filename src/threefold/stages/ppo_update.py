"""One iteration's PPO update of actor and critic over a batch of experience (Schulman et al. 2017; Ouyang et al.
2022, eq. 2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.advantages import estimate_advantages
from threefold.algo.losses import ValueLoss, policy_loss, value_loss
from threefold.algo.masked import masked_mean, masked_var
from threefold.config.recipe import PPOSection
from threefold.data.collate import ExperienceBatch, collate_experience, collate_rollouts, epoch_order, pad_ragged
from threefold.engine.distributed import World
from threefold.engine.sharing import MicroBatching, Pass
from threefold.engine.train import TrainEngine
from threefold.errors import ParityError
from threefold.models.forward import CausalForward, target_values
from threefold.types import Experience, Rollout

MixtureLoss = Callable[[], tuple[tuple[Callable[[], Tensor], bool], ...]]


@dataclass(frozen=True)
class Learners:
    """The two models that learn."""

    actor: TrainEngine
    actor_forward: CausalForward
    critic: TrainEngine
    critic_model: PreTrainedModel
    pad_id: int
    device: torch.device
    passes: MicroBatching

    def values(self, input_ids: Tensor, target_mask: Tensor) -> Tensor:
        """The critic's value before each target token, [M]."""
        return self.critic.parallel.run(lambda: target_values(self.critic_model, input_ids, target_mask))


SUMS = (
    "policy_loss",
    "clipped",
    "approx_kl",
    "ratio",
    "ratio_squared",
    "entropy",
    "value_loss",
    "value_clipped",
)


class UpdateStatistics:
    """Sums over the real tokens that an update saw, reduced to means at the end.

    `add` and `add_first` take what this process sees; `end_minibatch` adds up what all processes have seen.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._num_tokens = 0.0
        self.max_logprob_difference = 0.0
        self.max_ratio_error = 0.0
        self.steps: dict[str, list[float]] = defaultdict(list)
        self._own, self._own_tokens = dict.fromkeys(SUMS, 0.0), 0.0

    def add(self, num_tokens: int, **sums: Tensor) -> None:
        self._own_tokens += num_tokens
        for name, value in sums.items():
            self._own[name] += float(value)

    def add_first(self, logprob_difference: float, ratio_error: float) -> None:
        """Of a pass before the first update; NaN counts as infinite, since max() would pass it over."""
        worst = [math.inf if math.isnan(value) else value for value in (logprob_difference, ratio_error)]
        self.max_logprob_difference = max(self.max_logprob_difference, worst[0])
        self.max_ratio_error = max(self.max_ratio_error, worst[1])

    def end_minibatch(self, world: World) -> dict[str, float]:
        """The sums of the minibatch over all processes, which are added to those of the update. Collective."""
        *sums, tokens = world.sum([*self._own.values(), self._own_tokens])
        worst = world.max([self.max_logprob_difference, self.max_ratio_error])
        self.max_logprob_difference, self.max_ratio_error = worst
        found = dict(zip(SUMS, sums, strict=True))
        for name, value in found.items():
            self._sums[name] += value
        self._num_tokens += tokens
        self._own, self._own_tokens = dict.fromkeys(SUMS, 0.0), 0.0
        return found

    def state(self) -> dict[str, Any]:
        """Everything, between two minibatches; the same on every process."""
        worst = [self.max_logprob_difference, self.max_ratio_error]
        return {"sums": self._sums, "num_tokens": self._num_tokens, "worst": worst, "steps": dict(self.steps)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> UpdateStatistics:
        """Go on from what `state` gave."""
        statistics = cls()
        statistics._sums, statistics._num_tokens = dict(state["sums"]), state["num_tokens"]
        statistics.max_logprob_difference, statistics.max_ratio_error = state["worst"]
        statistics.steps |= {name: list(values) for name, values in state["steps"].items()}
        return statistics

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


@dataclass
class UpdateProgress:
    """How far the update of one iteration has come: minibatches that are done, and what they have shown."""

    done: int = 0
    statistics: UpdateStatistics = field(default_factory=UpdateStatistics)


class CriticPass:
    """The critic's values and its gradient from one forward pass, where an iteration has one optimizer step.

    Then the values that the advantages need and those that the loss differentiates are of the same weights. The returns
    of a sequence depend on its own values and rewards alone (whitening concerns the advantages), so the loss of each
    pass is complete as soon as its values are there: the critic runs forward once instead of twice.

    Attributes:
        loss: this process's share of what `update` reports, summed over tokens.
        num_tokens: of all processes.
    """

    def __init__(self, learners: Learners, settings: PPOSection) -> None:
        self._learners, self._settings = learners, settings
        self.loss, self.num_tokens = 0.0, 0

    def __call__(self, rollouts: Sequence[Rollout], rewards: Tensor) -> list[Tensor]:
        """Values before each response token of every rollout; the gradient is accumulated in the critic's engine.
        Collective: each process computes its share."""
        self.num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        pieces: dict[int, Tensor] = {}
        learners = self._learners
        for part in learners.passes.of(rollouts, len):
            lengths = [len(rollout.response_ids) for rollout in part.items]

            def loss(part: Pass[Rollout] = part, lengths: list[int] = lengths) -> Tensor:
                batch = collate_rollouts(part.items, learners.pad_id).to(learners.device)
                values = learners.values(batch.input_ids, batch.target_mask)
                old = values.detach().cpu()
                returns = self._returns(old, lengths, rewards[part.rows]).to(values.device)
                result = self._value_loss(values, returns)
                if part.counts:
                    pieces.update(zip(part.rows, old.split(lengths), strict=True))
                    self.loss += float(result.loss.detach())
                return result.loss / self.num_tokens

            learners.critic.backward(loss, part.counts)
        return learners.passes.world.assemble(pieces, len(rollouts))

    def _returns(self, values: Tensor, lengths: Sequence[int], rewards: Tensor) -> Tensor:
        padded, mask = pad_ragged(values.split(list(lengths)))
        settings = self._settings
        _, returns = estimate_advantages(
            rewards[:, : padded.shape[1]], padded, mask, settings.gamma, settings.gae_lambda
        )
        return returns[mask]

    def _value_loss(self, values: Tensor, returns: Tensor) -> ValueLoss:
        real = torch.ones_like(values, dtype=torch.bool)
        return value_loss(values, values.detach(), returns, real, self._settings.value_clip_range)


def critic_pass_of(learners: Learners, settings: PPOSection) -> CriticPass | None:
    """A new iteration's critic pass, where there is one optimizer step an iteration; None where there are more."""
    return CriticPass(learners, settings) if settings.ppo_epochs * settings.minibatches == 1 else None


def update(
    experiences: Sequence[Experience],
    learners: Learners,
    settings: PPOSection,
    seed: int,
    iteration: int,
    train_actor: bool,
    parity_bound: float,
    mixture: MixtureLoss | None,
    critic_pass: CriticPass | None = None,
    progress: UpdateProgress | None = None,
    safe_point: Callable[[UpdateProgress], None] = lambda _: None,
) -> dict[str, float]:
    """Run the PPO epochs and minibatches of one iteration.

    Args:
        experiences: the whole batch, on every process.
        train_actor: False in the critic's warm-up iterations: the actor's loss is measured, not descended.
        parity_bound: largest allowed difference between rollout and training log-probs before the first step.
        mixture: where mixture training is on, gives the closures of the next pretraining batch, each returning its
            share of coef * mean LM loss, and whether they count; their gradients enter the actor's same optimizer step.
        critic_pass: what has accumulated the critic's gradient already, where the iteration has one optimizer step.
        progress: where an update that was interrupted goes on; None begins one.
        safe_point: told of each moment between two optimizer steps.

    Raises:
        ParityError: if the rollout's log-probs are not those of the training forward.
    """
    assert critic_pass is None or settings.ppo_epochs * settings.minibatches == 1
    progress = progress or UpdateProgress()
    statistics = progress.statistics
    if critic_pass is not None:
        statistics.add(0, value_loss=torch.tensor(critic_pass.loss, dtype=torch.float64))
    stopped_early = False
    minibatches = list(_minibatches(len(experiences), settings, seed, iteration))
    for number in range(progress.done, len(minibatches)):
        first = number == 0
        minibatch = [experiences[row] for row in minibatches[number]]
        _accumulate(minibatch, learners, settings, train_actor, first, statistics, train_critic=critic_pass is None)
        num_tokens = sum(len(experience.rollout.response_ids) for experience in minibatch)
        approx_kl = statistics.end_minibatch(learners.passes.world)["approx_kl"] / num_tokens
        if first:
            _check_parity(statistics.max_logprob_difference, parity_bound, iteration)
        if settings.target_kl and not approx_kl <= settings.target_kl:
            stopped_early = True
            learners.actor.discard()
            learners.critic.discard()
            break
        _step(learners, train_actor, mixture, statistics)
        progress.done = number + 1
        if progress.done < len(minibatches):
            safe_point(progress)
    return {
        **statistics.metrics(),
        "policy/stopped_early": float(stopped_early),
        "val/explained_variance": explained_variance(experiences),
    }


def _check_parity(difference: float, bound: float, iteration: int) -> None:
    """The parity probe: it costs nothing, for an iteration's first minibatch goes through the training forward anyway,
    before the first update."""
    if not difference <= bound:
        raise ParityError(
            f"step 3, ppo, iteration {iteration + 1}: the rollout's log-probs differ from the training forward's by "
            f"{difference:.2g} nats, beyond ppo.parity_bound {bound:g}: generation does not run the model that trains"
        )


def _step(learners: Learners, train_actor: bool, mixture: MixtureLoss | None, statistics: UpdateStatistics) -> None:
    """Both optimizer steps on the gradients that a minibatch has accumulated."""
    if train_actor:
        if mixture is not None:
            own = math.fsum(learners.actor.backward(loss, counts) for loss, counts in mixture())
            statistics.steps["loss/mixture"].append(learners.passes.world.sum([own])[0])
        actor_step = learners.actor.step()
        statistics.steps["policy/grad_norm"].append(actor_step.grad_norm)
        statistics.steps["policy/learning_rate"].append(actor_step.learning_rate)
    statistics.steps["val/grad_norm"].append(learners.critic.step().grad_norm)


def _minibatches(num_items: int, settings: PPOSection, seed: int, iteration: int) -> Iterator[Sequence[int]]:
    """The rows of each minibatch of all epochs; the sizes of an epoch's minibatches differ by at most one."""
    for epoch in range(settings.ppo_epochs):
        order = epoch_order(num_items, seed, iteration * settings.ppo_epochs + epoch)
        bounds = [round(len(order) * part / settings.minibatches) for part in range(settings.minibatches + 1)]
        yield from (order[low:high] for low, high in pairwise(bounds) if high > low)


def _accumulate(
    minibatch: Sequence[Experience],
    learners: Learners,
    settings: PPOSection,
    train_actor: bool,
    first: bool,
    statistics: UpdateStatistics,
    train_critic: bool,
) -> None:
    """Accumulate both models' gradients of this process's share of a minibatch, and its statistics."""
    num_tokens = sum(len(experience.rollout.response_ids) for experience in minibatch)
    for part in learners.passes.of(minibatch, lambda experience: len(experience.rollout)):
        batch = collate_experience(part.items, learners.pad_id).to(learners.device)
        seen = statistics if part.counts else UpdateStatistics()

        def actor_loss(batch: ExperienceBatch = batch, seen: UpdateStatistics = seen) -> Tensor:
            logprobs, entropy = learners.actor_forward.target_logprobs(
                batch.input_ids,
                batch.target_mask,
                settings.sampling.temperature,
                entropy="trained" if settings.entropy_coef else "measured",
            )
            old, real = batch.old_logprobs[batch.response_mask], torch.ones_like(logprobs, dtype=torch.bool)
            result = policy_loss(logprobs, old, batch.advantages[batch.response_mask], real, settings.clip_range)
            if first:
                seen.add_first(float((logprobs.detach() - old).abs().max()), float(result.largest_ratio_error))
            seen.add(
                len(old),
                policy_loss=result.loss.detach(),
                clipped=result.clipped,
                approx_kl=result.approx_kl,
                ratio=result.ratio,
                ratio_squared=result.ratio_squared,
                entropy=entropy.detach().sum(),
            )
            bonus = settings.entropy_coef * entropy.sum() if settings.entropy_coef else 0.0
            return (result.loss - bonus) / num_tokens

        def critic_loss(batch: ExperienceBatch = batch, seen: UpdateStatistics = seen) -> Tensor:
            values = learners.values(batch.input_ids, batch.target_mask)
            old, returns = batch.values[batch.response_mask], batch.returns[batch.response_mask]
            result = value_loss(
                values, old, returns, torch.ones_like(values, dtype=torch.bool), settings.value_clip_range
            )
            seen.add(0, value_loss=result.loss.detach(), value_clipped=result.clipped)
            return result.loss / num_tokens

        if train_actor:
            learners.actor.backward(actor_loss, part.counts)
        else:
            learners.actor.measure(actor_loss)
        if train_critic:
            learners.critic.backward(critic_loss, part.counts)


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

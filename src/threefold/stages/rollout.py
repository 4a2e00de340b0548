"""From prompts to experience: sample answers, score them under reference, critic and reward model, estimate
advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.advantages import estimate_advantages
from threefold.algo.kl import kl_per_token
from threefold.algo.masked import whiten
from threefold.algo.rewards import shape_scores, token_rewards
from threefold.config.recipe import PPOSection
from threefold.data.chat import ChatFormat
from threefold.data.collate import RolloutBatch, collate_rollouts, collate_sequences, pad_ragged
from threefold.data.reasoning import final_answer, same_answer
from threefold.engine.device import precision
from threefold.engine.distributed import ALONE
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import MicroBatching
from threefold.errors import ConfigError, DataError
from threefold.models.adapters import adapters_off
from threefold.models.forward import CausalForward, Runner, answer_scores, directly, target_values
from threefold.models.loading import context_length, score_statistics
from threefold.types import Experience, Message, PreparedPrompt, Rollout, TokenSequence


def same_tokens(first: ChatFormat, second: ChatFormat) -> bool:
    """Whether ids rendered by one format mean the same under the other: equal vocabulary, equal template."""
    return (
        first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
        and first.tokenizer.chat_template == second.tokenizer.chat_template
    )


def check_same_tokens(reward_chat: ChatFormat, actor_chat: ChatFormat, allow_retokenise: bool) -> bool:
    """Whether the reward model can read the actor's tokens; refused if not, unless the recipe allows the way through
    text."""
    same = same_tokens(reward_chat, actor_chat)
    if not same and not allow_retokenise:
        raise ConfigError(
            f"model.reward: its vocabulary ({len(reward_chat.tokenizer)} tokens) or chat template is not the actor's "
            f"({len(actor_chat.tokenizer)} tokens); set --model.retokenise_for_reward true to pass answers through text"
        )
    return same


class RewardScorer:
    """Scores whole answers with a reward model, in the reward model's own units.

    With the actor's vocabulary and template the very tokens that were sampled are scored. Otherwise, and only if the
    recipe allows it, prompt and answer go through text and are rendered anew; an answer that was cut stays without
    its stop token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        actor_chat: ChatFormat,
        allow_retokenise: bool,
        device: torch.device,
        dtype: torch.dtype,
        passes: MicroBatching,
        parallel: ParallelModel | None = None,
    ) -> None:
        self.model, self.mean_and_scale = model, score_statistics(model)
        self._parallel = parallel or ParallelModel(model, ALONE, device)
        self.actor_chat = actor_chat
        self._chat, self._device, self._dtype = chat, device, dtype
        self._passes = passes
        self.same_tokens = check_same_tokens(chat, actor_chat, allow_retokenise)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[tuple[Message, ...]], rollouts: Sequence[Rollout]) -> Tensor:
        """Scores [B] float32 on the CPU of `rollouts`, answers to the conversations `prompts`. Collective."""
        return self.scores(self.sequences(prompts, rollouts))

    @torch.no_grad()
    def scores(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Scores [B] float32 on the CPU of whole sequences. Collective."""
        scores: dict[int, float] = {}
        with self._parallel.in_use():
            for part in self._passes.of(sequences, len):
                found = self.one_pass(part.items).tolist()
                scores |= dict(zip(part.rows, found, strict=True)) if part.counts else {}
        return torch.tensor(self._passes.world.assemble(scores, len(sequences)))

    def sequences(self, prompts: Sequence[tuple[Message, ...]], rollouts: Sequence[Rollout]) -> list[TokenSequence]:
        """What the reward model reads of each answer."""
        return [self._sequence(messages, rollout) for messages, rollout in zip(prompts, rollouts, strict=True)]

    @torch.no_grad()
    def one_pass(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Scores [B] float32 of `sequences` by one forward pass, on the device."""
        self.model.eval()
        batch = collate_sequences(sequences, self._chat.pad_id).to(self._device)
        with precision(self._device, self._dtype):
            return self._parallel.run(lambda: answer_scores(self.model, batch.input_ids, batch.lengths))

    def _sequence(self, messages: tuple[Message, ...], rollout: Rollout) -> TokenSequence:
        prompt: tuple[int, ...] = tuple(rollout.prompt_ids.tolist())
        answer: tuple[int, ...] = tuple(rollout.response_ids.tolist())
        if not self.same_tokens:
            text = self.actor_chat.decode(answer)
            prompt = self._chat.prompt_ids(messages)
            render = self._chat.answer_ids if rollout.finish_reason == "stop" else self._chat.unfinished_answer_ids
            answer = render(messages, text)
            limit, length = context_length(self.model), len(prompt) + len(answer)
            if limit is not None and length > limit:
                raise DataError(
                    f"a prompt with its answer has {length} tokens in the reward model's vocabulary, more than its "
                    f"context of {limit}: lower data.max_prompt_length or ppo.sampling.max_new_tokens"
                )
        return TokenSequence(prompt + answer, (False,) * len(prompt) + (True,) * len(answer), len(prompt))


@dataclass(frozen=True)
class Reference:
    """The step-1 model: a model of its own or, where the actor trains adapters only, the actor with them off.

    Attributes:
        parallel: how a model of its own is spread; None: it is whole, on its device.
    """

    forward: CausalForward
    is_actor: bool = False
    parallel: ParallelModel | None = None

    def in_use(self) -> AbstractContextManager[None]:
        """For the time of the block its weights are where they are needed."""
        return nullcontext() if self.parallel is None else self.parallel.in_use()

    def logprobs(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """Log-probability of every response token, flat: [M], row by row."""
        with adapters_off(self.forward.model) if self.is_actor else nullcontext():
            return self.forward.target_logprobs(batch.input_ids, batch.target_mask, temperature, entropy="none")[0]


@dataclass(frozen=True)
class Scorers:
    """What judges rollouts: the frozen reference, the critic as it is now (run by `run_critic`), the frozen reward
    model."""

    reference: Reference
    critic: PreTrainedModel
    reward: RewardScorer
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    passes: MicroBatching
    run_critic: Runner = directly


@torch.no_grad()
def per_rollout(
    rollouts: Sequence[Rollout], scorers: Scorers, compute: Callable[[RolloutBatch], Tensor]
) -> list[Tensor]:
    """Apply `compute` (padded batch -> flat [M]) pass by pass and cut the result into one [R] tensor per rollout, on
    the CPU. Collective: each process computes its share."""
    pieces: dict[int, Tensor] = {}
    for part in scorers.passes.of(rollouts, len):
        batch = collate_rollouts(part.items, scorers.pad_id).to(scorers.device)
        with precision(scorers.device, scorers.dtype):
            flat = compute(batch).cpu()
        if part.counts:
            lengths = [len(rollout.response_ids) for rollout in part.items]
            pieces |= dict(zip(part.rows, flat.split(lengths), strict=True))
    return scorers.passes.world.assemble(pieces, len(rollouts))


@dataclass(frozen=True)
class Judgement:
    """What the frozen models say of rollouts, on the CPU.

    Attributes:
        ref_logprobs: per rollout [R] float32, nats, under the reference.
        scores: [B] float32, the reward model's own units.
    """

    ref_logprobs: list[Tensor]
    scores: Tensor


def judge(
    prompts: Sequence[PreparedPrompt], rollouts: Sequence[Rollout], scorers: Scorers, temperature: float
) -> Judgement:
    """Pass rollouts, answers to `prompts`, through reference and reward model."""
    with scorers.reference.in_use():
        ref_logprobs = per_rollout(rollouts, scorers, lambda b: scorers.reference.logprobs(b, temperature))
    return Judgement(ref_logprobs, scorers.reward([prompt.prompt.messages for prompt in prompts], rollouts))


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of experience with the numbers that are reported about it.

    Attributes:
        experiences: one per rollout.
        kl: [B], KL(policy || reference) per answer, nats: the sum over its tokens of logprob - ref_logprob.
        rlhf_reward: [B], sum of the per-token rewards.
        shaped_scores: [B], normalised, clipped, weighed, penalised scores, plus what right final answers give.
    """

    experiences: list[Experience]
    kl: Tensor
    rlhf_reward: Tensor
    shaped_scores: Tensor


def right_answers(
    prompts: Sequence[PreparedPrompt], rollouts: Sequence[Rollout], chat: ChatFormat
) -> list[float | None]:
    """1 where an answer gives its prompt's final answer, 0 where not, None where the prompt has none to compare with.

    An answer that was cut off is wrong: the last number of what there is of it would be one of its steps.
    """
    return [
        float(
            rollout.finish_reason == "stop"
            and same_answer(final_answer(chat.decode_exactly(rollout.response_ids.tolist())), prompt.reference)
        )
        if prompt.reference
        else None
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]


def final_answer_accuracy(
    prompts: Sequence[PreparedPrompt], rollouts: Sequence[Rollout], chat: ChatFormat
) -> float | None:
    """Share of right final answers, of those that can be checked; None where none can."""
    checked = [one for one in right_answers(prompts, rollouts, chat) if one is not None]
    return sum(checked) / len(checked) if checked else None


def check_references(prompts: Iterable[PreparedPrompt], settings: PPOSection) -> None:
    """Refuse a reward on final answers where the data have none.

    Raises:
        ConfigError: `ppo.final_answer_coef` is above 0 and no prompt has a reference.
    """
    if settings.final_answer_coef > 0 and not any(prompt.reference for prompt in prompts):
        raise ConfigError(
            f"ppo.final_answer_coef = {settings.final_answer_coef:g}, and no prompt of step 3 has a final answer to "
            "compare with: data.sources needs rows of format question_answer (gsm8k), or set it to 0"
        )


ValuePass = Callable[[Sequence[Rollout], Tensor], list[Tensor]]
"""From rollouts and their per-token rewards [B, R] to the critic's value before each response token."""


def _values(rollouts: Sequence[Rollout], scorers: Scorers) -> list[Tensor]:
    scorers.critic.eval()

    def values(batch: RolloutBatch) -> Tensor:
        return scorers.run_critic(lambda: target_values(scorers.critic, batch.input_ids, batch.target_mask))

    return per_rollout(rollouts, scorers, values)


def make_experience(
    prompts: Sequence[PreparedPrompt],
    rollouts: Sequence[Rollout],
    scorers: Scorers,
    settings: PPOSection,
    kl_coef: float,
    value_pass: ValuePass | None = None,
    judgement: Judgement | None = None,
) -> ScoredBatch:
    """Score rollouts and estimate advantages: everything that the update needs, computed once.

    Args:
        value_pass: gives the critic's values, and does with its forward pass whatever else there is to do; None only
            reads the values.
        judgement: of these rollouts, where it is known already.
    """
    judgement = judgement or judge(prompts, rollouts, scorers, settings.sampling.temperature)
    ref_logprobs, scores = judgement.ref_logprobs, judgement.scores

    padded_logprobs, mask = pad_ragged([rollout.logprobs for rollout in rollouts])
    padded_ref, _ = pad_ragged(ref_logprobs)
    finished = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])
    mean, scale = scorers.reward.mean_and_scale if settings.normalise_reward else (0.0, 1.0)
    shaped = shape_scores(
        scores,
        finished,
        mean,
        scale,
        settings.reward_clip,
        settings.missing_stop_penalty,
        settings.reward_model_coef,
    )
    if settings.final_answer_coef > 0:
        right = right_answers(prompts, rollouts, scorers.reward.actor_chat)
        shaped = shaped + settings.final_answer_coef * torch.tensor([one or 0.0 for one in right])
    kl = kl_per_token(padded_logprobs, padded_ref, settings.kl_estimator)
    rewards = token_rewards(shaped, kl, mask, kl_coef)
    values = _values(rollouts, scorers) if value_pass is None else value_pass(rollouts, rewards)
    padded_values, _ = pad_ragged(values)
    advantages, returns = estimate_advantages(rewards, padded_values, mask, settings.gamma, settings.gae_lambda)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)

    experiences = []
    for row, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        experiences.append(
            Experience(
                rollout=rollout,
                score=float(scores[row]),
                ref_logprobs=ref_logprobs[row],
                values=values[row],
                rewards=rewards[row, :length],
                advantages=advantages[row, :length],
                returns=returns[row, :length],
            )
        )
    log_ratio = torch.where(mask, padded_logprobs - padded_ref, torch.zeros_like(padded_ref))
    return ScoredBatch(experiences, log_ratio.sum(dim=1), rewards.sum(dim=1), shaped)

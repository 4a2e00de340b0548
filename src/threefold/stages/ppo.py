"""Step 3, PPO: sample answers, score them, improve the policy (Ouyang et al. 2022, section 3.5; Ziegler et al.
2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.kl import adapt_kl_coef
from threefold.algo.statistics import standard_error
from threefold.config.recipe import PPOSection
from threefold.data.chat import ChatFormat
from threefold.data.collate import epoch_order
from threefold.data.prepare import PreparedPrompt, ppo_prompts
from threefold.engine.hybrid import HybridEngine
from threefold.engine.phases import PhaseMeter
from threefold.engine.train import MicroBatching, TrainEngine, micro_batching
from threefold.errors import ConfigError
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.loading import (
    context_length,
    load_causal_lm,
    load_scalar_model,
    save_model,
    set_dropout,
    set_score_statistics,
)
from threefold.stages.context import StageContext
from threefold.stages.diagnosis import state_kept_if_broken, unused
from threefold.stages.mixture import PretrainingText
from threefold.stages.overlap import ScoringBeside
from threefold.stages.ppo_update import CriticPass, Learners, critic_pass_of, update
from threefold.stages.rollout import Reference, RewardScorer, ScoredBatch, Scorers, make_experience
from threefold.types import Rollout

AUTO_PARITY_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Setup:
    """Everything that lives through the stage."""

    chat: ChatFormat
    learners: Learners
    hybrid: HybridEngine
    scorers: Scorers
    prompts: list[PreparedPrompt]
    eval_prompts: list[PreparedPrompt]
    text: PretrainingText | None
    num_iterations: int
    sampler: torch.Generator
    scoring_stream: torch.cuda.Stream | None


def run(context: StageContext) -> dict[str, float]:
    """Fill `context.output` with actor/, actor_ema/ and critic/; return what changed on held-out prompts."""
    setup = _set_up(context)
    learners = setup.learners
    with state_kept_if_broken(
        lambda: f"step 3, ppo, after {learners.actor.num_steps} optimizer steps of the actor",
        learners.actor_forward.model,
        lambda: unused(context.output.parent / "failed" / f"ppo-{learners.actor.num_steps}-steps"),
        lambda directory: _save(setup, directory),
    ):
        result = _train(context, setup)
    _save(setup, context.output)
    return result


def _train(context: StageContext, setup: Setup) -> dict[str, float]:
    """All iterations; each phase is a line."""
    settings = context.recipe.ppo
    batches = prompt_batches(setup.prompts, settings, context.recipe.run.seed)
    kl_coef = settings.kl_coef
    before = evaluate(context, setup)
    context.log.log(0, before)
    after = before
    with context.log.progress("ppo   ", setup.num_iterations) as bar:
        for iteration in range(setup.num_iterations):
            meter = PhaseMeter(context.device, exact=iteration == 0)
            prompts = next(batches)
            beside = _scoring_beside(setup, prompts, settings)
            with meter.phase("generate"):
                finished = beside.add if beside else None
                rollouts = sample(context, setup, prompts, settings.answers_per_prompt, on_finished=finished)
            with meter.phase("score"):
                critic_pass = critic_pass_of(setup.learners, settings)
                judgement = beside.finish(rollouts) if beside else None
                batch = make_experience(prompts, rollouts, setup.scorers, settings, kl_coef, critic_pass, judgement)
            with meter.phase("update"):
                losses = _update(context, setup, batch, iteration, critic_pass)
            metrics = _metrics(batch, rollouts, kl_coef) | losses | _speed(meter, rollouts)
            context.log.log(iteration + 1, metrics)
            bar.advance(score=metrics["objective/scores"], kl=metrics["objective/kl"])
            if settings.kl_controller == "adaptive" and iteration >= settings.critic_warmup_iterations:
                kl_coef = adapt_kl_coef(
                    kl_coef, metrics["objective/kl"], settings.kl_target, len(rollouts), settings.kl_horizon
                )
            last = iteration + 1 == setup.num_iterations
            if last or (settings.eval_every and (iteration + 1) % settings.eval_every == 0):
                after = evaluate(context, setup)
                context.log.log(iteration + 1, after)
    return {
        **after,
        **{f"initial/{name}": value for name, value in before.items()},
        "num_iterations": setup.num_iterations,
    }


def prompt_batches(prompts: list[PreparedPrompt], settings: PPOSection, seed: int) -> Iterator[list[PreparedPrompt]]:
    """Batches of prompts without end, each prompt repeated answers_per_prompt times; every pass has its own order."""
    queue: list[PreparedPrompt] = []
    epoch = 0
    while True:
        while len(queue) < settings.prompts_per_iteration:
            queue.extend(prompts[index] for index in epoch_order(len(prompts), seed, epoch))
            epoch += 1
        batch, queue = queue[: settings.prompts_per_iteration], queue[settings.prompts_per_iteration :]
        yield [prompt for prompt in batch for _ in range(settings.answers_per_prompt)]


def sample(
    context: StageContext,
    setup: Setup,
    prompts: list[PreparedPrompt],
    answers_per_prompt: int = 1,
    sampler: torch.Generator | None = None,
    on_finished: Callable[[int, Rollout], None] | None = None,
) -> list[Rollout]:
    """One answer to each prompt, from the weights as they are now; `prompts` has each one answers_per_prompt times.

    `on_finished` is told of each answer, with its place, as soon as it is finished.
    """
    return setup.hybrid.generate(
        [prompt.ids for prompt in prompts[::answers_per_prompt]],
        context.recipe.ppo.sampling,
        setup.chat.stop_ids,
        sampler or setup.sampler,
        policy_version=setup.learners.actor.num_steps,
        answers_per_prompt=answers_per_prompt,
        on_finished=on_finished,
    )


def _scoring_beside(setup: Setup, prompts: list[PreparedPrompt], settings: PPOSection) -> ScoringBeside | None:
    if setup.scoring_stream is None:
        return None
    return ScoringBeside(setup.scorers, prompts, settings.sampling.temperature, setup.scoring_stream)


def evaluate(context: StageContext, setup: Setup) -> dict[str, float]:
    """Score and KL of fresh answers to held-out prompts (always from the same random numbers), and the text's
    perplexity."""
    settings = context.recipe.ppo
    sampler = torch.Generator(context.device).manual_seed(context.recipe.run.seed + 1)
    rollouts = sample(context, setup, setup.eval_prompts, sampler=sampler)
    batch = make_experience(setup.eval_prompts, rollouts, setup.scorers, settings, 0.0)
    scores = [experience.score for experience in batch.experiences]
    kl = batch.kl.tolist()
    metrics = {
        "ppo/eval_score": math.fsum(scores) / len(scores),
        "ppo/eval_score_standard_error": standard_error(scores),
        "ppo/eval_kl": math.fsum(kl) / len(kl),
    }
    if setup.text is not None:
        metrics["ppo/eval_text_perplexity"] = setup.text.perplexity(
            setup.learners.actor_forward, context.device, context.dtype
        )
    return metrics


def _load_critic(context: StageContext, scorer: RewardScorer) -> PreTrainedModel:
    """The reward model as it is now or, where it cannot read the actor's tokens, the step-1 model with a new head."""
    if scorer.same_tokens:
        critic = load_scalar_model(str(context.inputs["reward"]))
    else:
        critic = load_scalar_model(str(context.inputs["sft"]), new_head_seed=context.recipe.run.seed)
    if not scorer.same_tokens or not context.recipe.ppo.normalise_reward:
        set_score_statistics(critic, 0.0, 1.0)  # values are in the units of the shaped reward, whatever those are
    return critic


def _set_up(context: StageContext) -> Setup:
    recipe, settings = context.recipe, context.recipe.ppo
    sft, reward = str(context.inputs["sft"]), str(context.inputs["reward"])
    chat, _ = context.chat_format(sft)
    reward_chat, _ = context.chat_format(reward)
    passes = micro_batching(settings.micro_batch_size, settings.micro_batch_tokens, context.device)
    where = (context.device, context.dtype)
    actor = load_causal_lm(sft).to(context.device)
    reward_model = load_scalar_model(reward).to(context.device).requires_grad_(False)
    scorer = RewardScorer(reward_model, reward_chat, chat, recipe.model.retokenise_for_reward, *where, passes)
    critic = _load_critic(context, scorer).to(context.device)
    for model in (actor, critic):
        set_dropout(model, 0.0)  # the ratio compares two passes of one policy: nothing random may differ between them
    add_lora(actor, settings.actor_lora, recipe.run.seed, "ppo.actor_lora")
    add_lora(critic, settings.critic_lora, recipe.run.seed + 1, "ppo.critic_lora")
    actor_forward = CausalForward(actor)
    if settings.actor_lora.rank:
        reference = Reference(actor_forward, is_actor=True)
    else:
        reference = Reference(CausalForward(load_causal_lm(sft).to(context.device).requires_grad_(False)))
    longest = recipe.data.max_prompt_length + settings.sampling.max_new_tokens
    for which, model in (("model", actor), ("critic", critic)):
        context.check_length("data.max_prompt_length + ppo.sampling.max_new_tokens", longest, model, which)
    prompts, eval_prompts = _prompts(context, chat)
    num_iterations = _num_iterations(settings, len(prompts))
    context.log.note(
        f"step 3, ppo: {len(prompts)} prompts to answer in {num_iterations} iterations, {len(eval_prompts)} held out"
    )
    text = None
    if settings.mixture.source:
        limit = context_length(actor) or settings.mixture.chunk_length
        context.check_length("ppo.mixture.chunk_length", settings.mixture.chunk_length, actor)
        text = PretrainingText(settings.mixture, chat, limit, recipe.run.seed)
    learners = _learners(context, actor_forward, critic, chat.pad_id, passes, num_iterations)
    offloaded = (learners.actor, learners.critic) if settings.offload_optimizer else ()
    hybrid = HybridEngine(actor_forward, recipe.generation, *where, context.log.note, offloaded)
    scorers = Scorers(reference, critic, scorer, chat.pad_id, *where, passes)
    sampler = torch.Generator(context.device).manual_seed(recipe.run.seed)
    stream = _scoring_stream(context, reference)
    return Setup(chat, learners, hybrid, scorers, prompts, eval_prompts, text, num_iterations, sampler, stream)


def _scoring_stream(context: StageContext, reference: Reference) -> torch.cuda.Stream | None:
    """Where finished answers are scored while others are decoded; None where they are not."""
    wanted = context.recipe.generation.overlap_scoring == "auto"
    if not wanted or context.device.type != "cuda" or reference.is_actor:
        return None
    return torch.cuda.Stream(context.device)


def _prompts(context: StageContext, chat: ChatFormat) -> tuple[list[PreparedPrompt], list[PreparedPrompt]]:
    """Prompts to train on, and held-out ones."""
    data = context.recipe.data
    share = context.shares()["ppo"]
    limits = (data.max_prompt_length, data.long_rows, context.log.note)
    train, held_out = ppo_prompts(share.train, chat, *limits), ppo_prompts(share.eval, chat, *limits)
    return train, held_out[: context.recipe.ppo.num_eval_prompts]


def _num_iterations(settings: PPOSection, num_prompts: int) -> int:
    num_iterations = settings.iterations or max(settings.epochs * num_prompts // settings.prompts_per_iteration, 1)
    if num_iterations <= settings.critic_warmup_iterations:
        raise ConfigError(
            f"ppo.critic_warmup_iterations = {settings.critic_warmup_iterations} leaves the actor none of the "
            f"{num_iterations} iterations; lower it, or raise ppo.iterations"
        )
    return num_iterations


def _learners(
    context: StageContext,
    actor_forward: CausalForward,
    critic: PreTrainedModel,
    pad_id: int,
    passes: MicroBatching,
    num_iterations: int,
) -> Learners:
    settings = context.recipe.ppo
    steps_per_iteration = settings.ppo_epochs * settings.minibatches
    actor_steps = (num_iterations - settings.critic_warmup_iterations) * steps_per_iteration
    context.log.note_long_warmup("ppo.warmup_steps", settings.warmup_steps, actor_steps)

    def engine(model: PreTrainedModel, which: Literal["actor", "critic"], steps: int) -> TrainEngine:
        return TrainEngine(
            model,
            settings.optimizer(which),
            steps,
            context.device,
            context.dtype,
            f"step 3, ppo, {which}",
            settings.ema.decay if which == "actor" and settings.ema.enabled else None,
            settings.gradient_checkpointing,
        )

    return Learners(
        actor=engine(actor_forward.model, "actor", actor_steps),
        actor_forward=actor_forward,
        critic=engine(critic, "critic", num_iterations * steps_per_iteration),
        critic_model=critic,
        pad_id=pad_id,
        device=context.device,
        passes=passes,
    )


def _update(
    context: StageContext, setup: Setup, batch: ScoredBatch, iteration: int, critic_pass: CriticPass | None = None
) -> dict[str, float]:
    settings, text = context.recipe.ppo, setup.text
    mixture = None
    if text is not None and settings.mixture.coef > 0:

        def mixture() -> tuple[Callable[[], Tensor], ...]:
            return text.losses(setup.learners.actor_forward, setup.learners.passes, context.device)

    return update(
        batch.experiences,
        setup.learners,
        settings,
        seed=context.recipe.run.seed,
        iteration=iteration,
        train_actor=iteration >= settings.critic_warmup_iterations,
        parity_bound=settings.parity_bound or AUTO_PARITY_BOUND[context.dtype],
        mixture=mixture,
        critic_pass=critic_pass,
    )


def _metrics(batch: ScoredBatch, rollouts: list[Rollout], kl_coef: float) -> dict[str, float]:
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    stopped = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    surprisal = math.fsum(-float(rollout.logprobs.sum()) for rollout in rollouts)
    restricted = [float((r.sampled_logprobs - r.logprobs).mean()) for r in rollouts]
    return {
        "objective/scores": math.fsum(experience.score for experience in batch.experiences) / len(rollouts),
        "objective/shaped_scores": float(batch.shaped_scores.mean()),
        "objective/kl": float(batch.kl.mean()),
        "objective/rlhf_reward": float(batch.rlhf_reward.mean()),
        "objective/entropy": surprisal / len(rollouts),
        "objective/kl_coef": kl_coef,
        "sampling/restriction_logprob": math.fsum(restricted) / len(restricted),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": max(lengths),
        "response_length/stopped": stopped / len(rollouts),
    }


def _speed(meter: PhaseMeter, rollouts: list[Rollout]) -> dict[str, float]:
    tokens = sum(len(rollout) for rollout in rollouts)
    return {**meter.metrics(), "perf/tokens_per_s": tokens / sum(meter.seconds.values())}


def _save(setup: Setup, directory: Path) -> None:
    chat, learners = setup.chat, setup.learners
    actor, ema = learners.actor_forward.model, learners.actor.ema

    def save(name: str, model: PreTrainedModel) -> None:
        save_model(model, chat.tokenizer, directory / name, chat.stop_ids, chat.pad_id)

    save("actor", actor)
    save("critic", learners.critic_model)
    if ema is not None:
        with ema.applied_to(actor):
            save("actor_ema", actor)

"""What step 3 works with: four models, spread as the recipe says, prompts, mixture text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from threefold.config.recipe import PPOSection
from threefold.data.blend import Blend
from threefold.data.chat import ChatFormat
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import MicroBatching, micro_batching
from threefold.engine.train import TrainEngine
from threefold.errors import ConfigError
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.loading import (
    context_length,
    load_causal_lm,
    load_scalar_model,
    set_dropout,
    set_score_statistics,
)
from threefold.stages.answering import Answering
from threefold.stages.context import StageContext
from threefold.stages.mixture import PretrainingText
from threefold.stages.ppo_update import Learners
from threefold.stages.rollout import Reference, RewardScorer, Scorers, check_same_tokens
from threefold.types import PreparedPrompt


@dataclass(frozen=True)
class Setup:
    """Everything that lives through the stage."""

    chat: ChatFormat
    learners: Learners
    answering: Answering
    scorers: Scorers
    prompts: Sequence[PreparedPrompt]
    blend: Blend
    eval_prompts: list[PreparedPrompt]
    text: PretrainingText | None
    num_iterations: int
    sampler: torch.Generator
    scoring_stream: torch.cuda.Stream | None


def set_up(context: StageContext) -> Setup:
    """Load, spread and check everything. Collective."""
    recipe, settings, world = context.recipe, context.recipe.ppo, context.world
    sft, reward = str(context.inputs["sft"]), str(context.inputs["reward"])
    chat, _ = context.chat_format(sft)
    reward_chat, _ = context.chat_format(reward)
    where = (context.device, context.dtype)
    actor, actor_forward = context.parallel_causal(lambda: _actor(context), recipe.parallel.actor)
    judge = context.parallel(lambda: load_scalar_model(reward).requires_grad_(False), recipe.parallel.scorer)
    reference = Reference(actor_forward, is_actor=True)
    if not settings.actor_lora.rank:
        own, forward = context.parallel_causal(
            lambda: load_causal_lm(sft).requires_grad_(False), recipe.parallel.reference
        )
        reference = Reference(forward, parallel=own)
    same_tokens = check_same_tokens(reward_chat, chat, recipe.model.retokenise_for_reward)
    critic = context.parallel(lambda: _critic(context, same_tokens), recipe.parallel.critic)
    spread = [model for model in (actor, judge, reference.parallel, critic) if model is not None]
    together = any(model.sharded for model in spread)
    limits_of_pass = (settings.micro_batch_size, settings.micro_batch_tokens)
    passes = micro_batching(*limits_of_pass, context.device, world, together)
    scorer = RewardScorer(judge.model, reward_chat, chat, recipe.model.retokenise_for_reward, *where, passes, judge)
    _check_lengths(context, actor.model, critic.model)
    items = context.items("ppo", chat)
    context.record_items(items)
    eval_prompts = list(items.eval[: settings.num_eval_prompts])
    num_iterations = _num_iterations(settings, len(items.blend))
    context.log.note(
        f"step 3, ppo: {len(items.train)} prompts to answer in {num_iterations} iterations, {len(eval_prompts)} held "
        f"out{items.note()}"
    )
    learners = _learners(context, actor, actor_forward, critic, chat.pad_id, passes, num_iterations)
    offloaded = (learners.actor, learners.critic) if settings.offload_optimizer else ()
    return Setup(
        chat=chat,
        learners=learners,
        answering=Answering(context, actor, actor_forward, offloaded, context.log.note),
        scorers=Scorers(reference, critic.model, scorer, chat.pad_id, *where, passes, critic.run),
        prompts=items.train,
        blend=items.blend,
        eval_prompts=eval_prompts,
        text=_text(context, chat, actor.model),
        num_iterations=num_iterations,
        sampler=torch.Generator(context.device).manual_seed(recipe.run.seed),
        scoring_stream=_scoring_stream(context, reference),
    )


def _actor(context: StageContext) -> PreTrainedModel:
    model = load_causal_lm(str(context.inputs["sft"]))
    set_dropout(model, 0.0)  # the ratio compares two passes of one policy: nothing random may differ between them
    add_lora(model, context.recipe.ppo.actor_lora, context.recipe.run.seed, "ppo.actor_lora")
    return model


def _critic(context: StageContext, same_tokens: bool) -> PreTrainedModel:
    """The reward model as it is now or, where it cannot read the actor's tokens, the step-1 model with a new head."""
    settings, seed = context.recipe.ppo, context.recipe.run.seed
    if same_tokens:
        critic = load_scalar_model(str(context.inputs["reward"]))
    else:
        critic = load_scalar_model(str(context.inputs["sft"]), new_head_seed=seed)
    if not same_tokens or not settings.normalise_reward:
        set_score_statistics(critic, 0.0, 1.0)  # values are in the units of the shaped reward, whatever those are
    set_dropout(critic, 0.0)
    add_lora(critic, settings.critic_lora, seed + 1, "ppo.critic_lora")
    return critic


def _check_lengths(context: StageContext, actor: PreTrainedModel, critic: PreTrainedModel) -> None:
    recipe = context.recipe
    longest = recipe.data.max_prompt_length + recipe.ppo.sampling.max_new_tokens
    for which, model in (("model", actor), ("critic", critic)):
        context.check_length("data.max_prompt_length + ppo.sampling.max_new_tokens", longest, model, which)


def _text(context: StageContext, chat: ChatFormat, actor: PreTrainedModel) -> PretrainingText | None:
    settings = context.recipe.ppo.mixture
    if not settings.source:
        return None
    context.check_length("ppo.mixture.chunk_length", settings.chunk_length, actor)
    limit = context_length(actor) or settings.chunk_length
    return PretrainingText(settings, chat, limit, context.recipe.run.seed)


def _scoring_stream(context: StageContext, reference: Reference) -> torch.cuda.Stream | None:
    """Where finished answers are scored while others are decoded; None where they are not: so where weights of a scorer
    wait in host memory, which are fetched for whole batches."""
    scales = context.recipe.parallel
    wanted = context.recipe.generation.overlap_scoring == "auto"
    in_place = not (scales.reference.offload or scales.scorer.offload)
    alone = context.device.type == "cuda" and context.world.size == 1
    if not (wanted and alone and in_place) or reference.is_actor:
        return None
    return torch.cuda.Stream(context.device)


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
    actor: ParallelModel,
    actor_forward: CausalForward,
    critic: ParallelModel,
    pad_id: int,
    passes: MicroBatching,
    num_iterations: int,
) -> Learners:
    settings, sections = context.recipe.ppo, context.recipe.parallel
    steps_per_iteration = settings.ppo_epochs * settings.minibatches
    actor_steps = (num_iterations - settings.critic_warmup_iterations) * steps_per_iteration
    if context.saved is None:
        context.log.note_long_warmup("ppo.warmup_steps", settings.warmup_steps, actor_steps)

    def engine(model: ParallelModel, which: Literal["actor", "critic"], steps: int) -> TrainEngine:
        return TrainEngine(
            model,
            settings.optimizer(which),
            steps,
            context.device,
            context.dtype,
            f"step 3, ppo, {which}",
            settings.ema.decay if which == "actor" and settings.ema.enabled else None,
            settings.gradient_checkpointing,
            offload=getattr(sections, which).offload,
            ema_on_host=settings.ema.offload,
        )

    return Learners(
        actor=engine(actor, "actor", actor_steps),
        actor_forward=actor_forward,
        critic=engine(critic, "critic", num_iterations * steps_per_iteration),
        critic_model=critic.model,
        pad_id=pad_id,
        device=context.device,
        passes=passes,
    )


def save(context: StageContext, setup: Setup, directory: Path) -> None:
    """Write actor, critic and the actor's average below `directory`. Collective."""
    actor, critic = setup.learners.actor, setup.learners.critic
    context.save_model(actor.parallel, setup.chat, directory / "actor")
    context.save_model(critic.parallel, setup.chat, directory / "critic")
    if actor.ema is not None:
        with actor.ema.applied_to(actor.model):
            context.save_model(actor.parallel, setup.chat, directory / "actor_ema")

"""What can be found wrong before the first step is run, so that hours of step 1 are not lost to a mistake in step 3.

Everything here is checked again by the step that it concerns; this only brings the refusal forward.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from threefold.data.chat import ChatFormat
from threefold.data.prepare import load_examples, ppo_prompts, reward_pairs, sft_sequences
from threefold.data.split import STEPS
from threefold.data.text import read_documents, split_documents
from threefold.engine.train import check_checkpointing
from threefold.errors import ConfigError
from threefold.inference.tensor_parallel import check_tensor_parallel
from threefold.models.adapters import check_lora
from threefold.models.loading import config_context_length, load_config
from threefold.models.quantised import check_quantisation
from threefold.models.tiny import embedded_config
from threefold.stages.answering import check_group_size
from threefold.stages.context import EMBEDDED, StageContext
from threefold.stages.rollout import check_same_tokens


def check(context: StageContext, steps: Collection[str]) -> None:
    """Refuse a recipe whose `steps` (those that are not finished) cannot all be run.

    The embedded model's tokenizer is made in step 1, so its renderings are checked there; all else is checked here:
    sources and split, tokenizers and templates, equal vocabularies, lengths against the contexts and the recipe's
    limits, mixture text.

    Raises:
        ConfigError, DataError, CheckpointError: as the step itself would.
    """
    recipe = context.recipe
    loaded = load_examples(recipe)
    for note in loaded.notes:
        context.log.note(note)
    for step, share in zip(STEPS, recipe.data.split, strict=True):
        if step in steps and share == 0:
            raise ConfigError(
                f"data.split = {recipe.data.split} gives step {STEPS.index(step) + 1}, {step}, no data; "
                "give it a share, or choose steps with --step"
            )
    shares = context.split(loaded.examples)
    actor = reward = None
    if recipe.model.actor != EMBEDDED:
        actor, _ = context.chat_format(recipe.model.actor)
    if recipe.model.reward:
        reward, _ = context.chat_format(recipe.model.reward)
    if actor is not None and reward is not None and "ppo" in steps:
        check_same_tokens(reward, actor, recipe.model.retokenise_for_reward)
    _check_lengths(context, steps)
    _check_training_options(context, steps)
    if "ppo" in steps:
        _check_generation(context)
    data = recipe.data
    if actor is not None and "sft" in steps:
        for part in (shares["sft"].train, shares["sft"].eval):
            sft_sequences(part, actor, data.max_length, recipe.sft.loss_on, data.long_rows)
    judge: ChatFormat | None = reward or (None if recipe.model.reward else actor)
    if judge is not None and "reward" in steps:
        for part in (shares["reward"].train, shares["reward"].eval):
            reward_pairs(part, judge, data.max_length, data.long_rows)
    if actor is not None and "ppo" in steps:
        for part in (shares["ppo"].train, shares["ppo"].eval):
            ppo_prompts(part, actor, data.max_prompt_length, data.long_rows)
    if recipe.ppo.mixture.source and "ppo" in steps:
        split_documents(read_documents(recipe.ppo.mixture.source), recipe.ppo.mixture.eval_documents)


def _check_training_options(context: StageContext, steps: Collection[str]) -> None:
    """Adapters and gradient checkpointing against the models' classes, built without weights."""
    recipe = context.recipe
    judge = recipe.model.reward or recipe.model.actor
    sections = (
        ("sft", recipe.model.actor, AutoModelForCausalLM, "sft.lora", recipe.sft.lora),
        ("reward", judge, AutoModelForSequenceClassification, "reward.lora", recipe.reward.lora),
        ("ppo", recipe.model.actor, AutoModelForCausalLM, "ppo.actor_lora", recipe.ppo.actor_lora),
        ("ppo", judge, AutoModelForSequenceClassification, "ppo.critic_lora", recipe.ppo.critic_lora),
    )
    for step, source, auto_class, field, section in sections:
        if step in steps and section.quantise_base == "nf4":
            check_quantisation(field)
        checkpointing = getattr(recipe, step).gradient_checkpointing
        if source == EMBEDDED or step not in steps or not (section.rank or checkpointing):
            continue
        with torch.device("meta"):
            model = auto_class.from_config(load_config(source))
        check_lora(model, section, field)
        if checkpointing:
            check_checkpointing(model)


def _check_generation(context: StageContext) -> None:
    """The tensor-parallel size against the processes and the actor."""
    recipe = context.recipe
    size = recipe.generation.inference_tp_size
    check_group_size(context.world, size)
    if recipe.model.actor == EMBEDDED:
        check_tensor_parallel(embedded_config(recipe.model.embedded), size)
    else:
        check_tensor_parallel(load_config(recipe.model.actor), size)


def _check_lengths(context: StageContext, steps: Collection[str]) -> None:
    recipe = context.recipe
    limits = {}
    if recipe.model.actor == EMBEDDED:
        limits["actor"] = recipe.model.embedded.max_positions
    for which, source in (("actor", recipe.model.actor), ("reward model", recipe.model.reward)):
        if source and source != EMBEDDED:
            limit = config_context_length(load_config(source))
            if limit is not None:
                limits[which] = limit
    supervised = [name for name, step in (("actor", "sft"), ("reward model", "reward")) if step in steps]
    for which in supervised:
        if which in limits:
            context.check_limit("data.max_length", recipe.data.max_length, limits[which], which)
    if "ppo" in steps and "actor" in limits:
        longest = recipe.data.max_prompt_length + recipe.ppo.sampling.max_new_tokens
        context.check_limit("data.max_prompt_length + ppo.sampling.max_new_tokens", longest, limits["actor"], "actor")

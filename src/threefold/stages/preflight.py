"""What can be found wrong before the first step is run, so that hours of step 1 are not lost to a mistake in step 3.

Everything here is checked again by the step that it concerns; this only brings the refusal forward.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from threefold.config.recipe import Recipe
from threefold.data.chat import ChatFormat
from threefold.data.doctor import fast_report
from threefold.data.split import STEPS, Step
from threefold.data.text import read_documents, split_documents
from threefold.engine.train import check_checkpointing
from threefold.errors import ConfigError, DataError
from threefold.inference.tensor_parallel import check_tensor_parallel
from threefold.models.adapters import check_lora
from threefold.models.loading import config_context_length, load_config
from threefold.models.quantised import check_quantisation
from threefold.models.tiny import embedded_config
from threefold.stages.answering import check_group_size
from threefold.stages.context import EMBEDDED, StageContext
from threefold.stages.rollout import check_references, check_same_tokens


def check(context: StageContext, steps: Collection[str]) -> None:
    """Refuse a recipe whose `steps` (those that are not finished) cannot all be run.

    The embedded model's tokenizer is made in step 1, so its renderings are checked there; all else is checked here:
    sources and split, tokenizers and templates, equal vocabularies, lengths against the contexts and the recipe's
    limits, mixture text.

    Raises:
        ConfigError, DataError, CheckpointError: as the step itself would.
    """
    recipe = context.recipe
    library = context.library
    for note in library.notes:
        context.log.note(note)
    _check_split(recipe, steps)
    library.check_enough()
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
    judge: ChatFormat | None = reward or (None if recipe.model.reward else actor)
    formats: dict[Step, ChatFormat | None] = {"sft": actor, "reward": judge, "ppo": actor}
    chats = {step: chat for step, chat in formats.items() if chat is not None and step in steps}
    _examine(context, chats, [step for step in STEPS if step in steps])
    if "sft" in chats:
        context.items("sft", chats["sft"])
    if "reward" in chats:
        context.items("reward", chats["reward"])
    if "ppo" in chats:
        check_references(context.items("ppo", chats["ppo"]).train, recipe.ppo)
    if recipe.ppo.mixture.source and "ppo" in steps:
        split_documents(read_documents(recipe.ppo.mixture.source), recipe.ppo.mixture.eval_documents)


def _check_split(recipe: Recipe, steps: Collection[str]) -> None:
    """Refuse steps that no source gives a share to."""
    for index, step in enumerate(STEPS):
        if step in steps and not any(source.shares(recipe.data.split)[index] for source in recipe.data.sources):
            raise ConfigError(
                f"data.split = {recipe.data.split} gives step {index + 1}, {step}, no data (nor do the sources' own "
                "splits); give it a share, or choose steps with --step"
            )


def _examine(context: StageContext, chats: Mapping[Step, ChatFormat], steps: Sequence[Step]) -> None:
    """The doctor's look at some rows, by the first process: an error stops the run, warnings are shown."""
    if context.recipe.data.doctor == "off":
        return

    def examine() -> None:
        report = fast_report(context.library, chats, context.recipe, steps)
        for finding in report.warnings:
            context.log.note(f"doctor: {finding.message}")
        if report.errors:
            raise DataError(f'{report.errors[0].message} (data.doctor = "off" trains on it all the same)')

    context.world.from_first(examine)


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

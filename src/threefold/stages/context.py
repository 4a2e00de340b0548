"""What every stage is given, and how it gets its conversations, tokenizer and models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from threefold.checkpoint.files import write_json
from threefold.checkpoint.training import Checkpointer, Saved, TrainingState
from threefold.config.recipe import ModelSection, Recipe
from threefold.config.scale import FrozenModelSection, TrainedModelSection
from threefold.data.chat import BUILT_IN_TEMPLATES, ChatFormat, build_chat_format, ensure_pad_token
from threefold.data.demo import train_tokenizer
from threefold.data.items import StepItems
from threefold.data.library import Library, open_library
from threefold.data.prepare import ppo_items, reward_items, sft_items
from threefold.data.split import Step
from threefold.engine.distributed import ALONE, World
from threefold.engine.parallel import ParallelModel, free_everywhere
from threefold.errors import ConfigError, DataError, Preempted
from threefold.interrupt import stop_requested
from threefold.metrics import RunLog
from threefold.models.forward import CausalForward
from threefold.models.loading import (
    context_length,
    generation_stop_ids,
    grow_embeddings,
    load_causal_lm,
    load_tokenizer,
    save_model,
)
from threefold.models.tiny import make_embedded_model
from threefold.types import Example, PreparedPrompt, RankedAnswers, TokenSequence

EMBEDDED = "embedded"
ITEMS_FILE = "data.json"
HEAD_START_SECONDS = 0.05


@dataclass(frozen=True)
class StageContext:
    """One stage's surroundings.

    Attributes:
        recipe: the whole recipe.
        output: an empty directory to fill.
        inputs: directories of the finished stages that this one starts from, by stage name.
        log: metrics and console; those of the first process reach the user.
        device, dtype: where, and in which precision, to compute.
        world: the processes of the run.
        checkpoints: of this stage; None where none are kept.
        saved: the checkpoint that the stage goes on from.
        known_library: the data, where they have been opened for the whole run.
        seconds: how long the stage has run, earlier attempts included.
    """

    recipe: Recipe
    output: Path
    inputs: Mapping[str, Path]
    log: RunLog
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE
    checkpoints: Checkpointer | None = None
    saved: Saved | None = None
    known_library: Library | None = None
    seconds: Callable[[], float] = lambda: 0.0

    def safe_point(self, step: int, state: Callable[[], TrainingState]) -> None:
        """A moment from which the stage can go on as if it had not stopped: write a checkpoint if one is due, and stop
        if that was asked for. Collective; `step` counts such moments.

        Raises:
            Preempted: after a checkpoint, if a process was asked to stop.
        """
        if self.checkpoints is None or not self.checkpoints.due(step):
            return
        now = state()
        surroundings = {"log_position": self.log.position(), "seconds": self.seconds()}
        self.checkpoints.save(step, replace(now, values={**now.values, "stage": surroundings}))
        self.checkpoints.stop_if_asked()

    def parallel(
        self, load: Callable[[], PreTrainedModel], section: TrainedModelSection | FrozenModelSection
    ) -> ParallelModel:
        """A model, loaded by one process of a machine at a time, on its device as the section says. Collective."""
        offload = section.offload is True or section.offload == "all"
        frozen_base = self.recipe.parallel.frozen_base
        free = free_everywhere(self.world, self.device)  # before any process takes its part of it

        def make() -> ParallelModel:
            return ParallelModel(load(), self.world, self.device, section.zero_stage, offload, frozen_base, free)

        model = self.world.in_turn(make) if section.zero_stage >= 2 else make()
        model.check_agreement()
        return model

    def parallel_causal(
        self, load: Callable[[], PreTrainedModel], section: TrainedModelSection | FrozenModelSection
    ) -> tuple[ParallelModel, CausalForward]:
        """`parallel` of a causal model, and its forward passes."""
        made: list[CausalForward] = []

        def probed() -> PreTrainedModel:
            made.append(CausalForward(load()))
            return made[0].model

        parallel = self.parallel(probed, section)
        return parallel, made[0].run_by(parallel.run)

    def save_model(self, parallel: ParallelModel, chat: ChatFormat, directory: Path) -> None:
        """Write a complete Hugging Face checkpoint of a model, whole, however it is spread. Collective."""
        state = parallel.full_state()
        if self.world.is_first:
            save_model(parallel.model, chat.tokenizer, directory, chat.stop_ids, chat.pad_id, state)

    @cached_property
    def library(self) -> Library:
        """All sources, read and split over the three steps. Collective when first asked for."""
        return self.known_library or shared_library(self.recipe, self.world, self.log.note)

    @overload
    def items(self, step: Literal["sft"], chat: ChatFormat) -> StepItems[TokenSequence]: ...
    @overload
    def items(self, step: Literal["reward"], chat: ChatFormat) -> StepItems[RankedAnswers]: ...
    @overload
    def items(self, step: Literal["ppo"], chat: ChatFormat) -> StepItems[PreparedPrompt]: ...
    def items(self, step: Step, chat: ChatFormat) -> StepItems[Any]:
        """What a step trains on, rendered by this format."""
        library, recipe = self.library, self.recipe
        makers: dict[Step, Callable[..., StepItems[Any]]] = {"sft": sft_items, "reward": reward_items, "ppo": ppo_items}
        make = makers[step]
        _give_way(self.world)
        return make(library, chat, recipe, self.log.note)

    def record_items(self, items: StepItems[Any]) -> None:
        """Write down beside the step's result what it was trained on."""
        if self.world.is_first:
            write_json(self.output / ITEMS_FILE, items.description())

    def chat_format(self, source: str) -> tuple[ChatFormat, bool]:
        """The chat format of a checkpoint, and whether its embeddings must grow by a new pad token."""
        settings = self.recipe.model
        tokenizer = load_tokenizer(source)
        return _with_template(tokenizer, settings, generation_stop_ids(source), source)

    def actor(self, examples: Sequence[Example]) -> tuple[PreTrainedModel, ChatFormat]:
        """The pretrained model that step 1 starts from; `examples` train the tokenizer of the embedded one."""
        settings = self.recipe.model
        if settings.actor == EMBEDDED:
            tokenizer = train_tokenizer(examples, settings.embedded.vocab_size)
            tokenizer.chat_template = BUILT_IN_TEMPLATES["tags"]
            chat, _ = _with_template(tokenizer, settings, (), EMBEDDED)
            model = make_embedded_model(settings.embedded, tokenizer, self.recipe.run.seed)
        else:
            chat, added = self.chat_format(settings.actor)
            model = load_causal_lm(settings.actor)
            if added:
                grow_embeddings(model, chat.tokenizer)
        self.check_length("data.max_length", self.recipe.data.max_length, model)
        return model, chat

    def check_length(self, field: str, length: int, model: PreTrainedModel, which: str = "model") -> None:
        """Refuse a length, of one field or of a sum "a + b" of fields, that the model has no positions for."""
        limit = context_length(model)
        if limit is not None:
            self.check_limit(field, length, limit, which)

    def check_limit(self, field: str, length: int, limit: int, which: str) -> None:
        """Refuse a length above the context `limit` of `which` model."""
        if length > limit:
            fix = f"lower one of them to make it {limit} or less" if "+" in field else f"set --{field} {limit} or less"
            raise ConfigError(f"{field} = {length} is longer than the {which}'s context of {limit} tokens; {fix}")


def shared_library(recipe: Recipe, world: World, tell: Callable[[str], None]) -> Library:
    """The data of a run, the same on every process. Collective.

    Who builds what is not in the cache is whoever has its lock; the others wait for that, and not in a collective
    operation, which has a time limit.

    Raises:
        DataError: also where processes find different data.
    """
    _give_way(world)
    library = open_library(recipe, tell)
    keys = world.gather(library.key)
    if len(set(keys)) > 1:
        odd = next(rank for rank, key in enumerate(keys) if key != keys[0])
        raise DataError(
            f"data.sources: process {odd} reads other data than process 0: give every machine the same files"
        )
    return library


def _give_way(world: World) -> None:
    """Let the first process, whose notes reach the user, be the one that prepares data."""
    if not world.is_first:
        time.sleep(HEAD_START_SECONDS)


def stop_if_asked(world: World) -> None:
    """Leave where nothing needs to be saved, if a process was sent SIGTERM. Collective.

    Raises:
        Preempted: on every process.
    """
    if world.any(stop_requested()):
        raise Preempted("stopped by SIGTERM; what is finished is kept, run the same command again to go on")


def _with_template(
    tokenizer: PreTrainedTokenizerBase, settings: ModelSection, stop_ids: tuple[int, ...], source: str
) -> tuple[ChatFormat, bool]:
    template, system_prompt = settings.chat_template, settings.system_prompt
    added = ensure_pad_token(tokenizer, settings.pad_token, template, source, system_prompt)
    return build_chat_format(tokenizer, template, stop_ids, source, system_prompt), added

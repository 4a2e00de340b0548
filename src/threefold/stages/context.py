"""What every stage is given, and how it gets its conversations, tokenizer and models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from threefold.config.recipe import Recipe
from threefold.data.chat import BUILT_IN_TEMPLATES, ChatFormat, build_chat_format, ensure_pad_token
from threefold.data.demo import train_tokenizer
from threefold.data.prepare import load_examples
from threefold.data.split import Share, Step, split_examples
from threefold.errors import ConfigError
from threefold.metrics import RunLog
from threefold.models.loading import (
    context_length,
    generation_stop_ids,
    grow_embeddings,
    load_causal_lm,
    load_tokenizer,
)
from threefold.models.tiny import make_embedded_model
from threefold.types import Example

EMBEDDED = "embedded"


@dataclass(frozen=True)
class StageContext:
    """One stage's surroundings.

    Attributes:
        recipe: the whole recipe.
        output: an empty directory to fill.
        inputs: directories of the finished stages that this one starts from, by stage name.
        log: metrics and console.
        device, dtype: where, and in which precision, to compute.
    """

    recipe: Recipe
    output: Path
    inputs: Mapping[str, Path]
    log: RunLog
    device: torch.device
    dtype: torch.dtype

    def shares(self) -> dict[Step, Share]:
        """All sources, read and split over the three steps; the same in every stage of a run."""
        return self.split(load_examples(self.recipe).examples)

    def split(self, examples: list[Example]) -> dict[Step, Share]:
        """These examples as the recipe splits them over the three steps."""
        data = self.recipe.data
        return split_examples(examples, data.split, data.eval_fraction, self.recipe.run.seed)

    def chat_format(self, source: str) -> tuple[ChatFormat, bool]:
        """The chat format of a checkpoint, and whether its embeddings must grow by a new pad token."""
        settings = self.recipe.model
        tokenizer = load_tokenizer(source)
        return _with_template(
            tokenizer, settings.chat_template, settings.pad_token, generation_stop_ids(source), source
        )

    def actor(self, examples: list[Example]) -> tuple[PreTrainedModel, ChatFormat]:
        """The pretrained model that step 1 starts from; `examples` train the tokenizer of the embedded one."""
        settings = self.recipe.model
        if settings.actor == EMBEDDED:
            tokenizer = train_tokenizer(examples, settings.embedded.vocab_size)
            tokenizer.chat_template = BUILT_IN_TEMPLATES["tags"]
            chat, _ = _with_template(tokenizer, settings.chat_template, settings.pad_token, (), EMBEDDED)
            model = make_embedded_model(settings.embedded, tokenizer, self.recipe.run.seed)
        else:
            chat, added = self.chat_format(settings.actor)
            model = load_causal_lm(settings.actor)
            if added:
                grow_embeddings(model, chat.tokenizer)
        self.check_length("data.max_length", self.recipe.data.max_length, model)
        return model.to(self.device), chat

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


def _with_template(
    tokenizer: PreTrainedTokenizerBase, template: str, pad_token: str, stop_ids: tuple[int, ...], source: str
) -> tuple[ChatFormat, bool]:
    added = ensure_pad_token(tokenizer, pad_token, template, source)
    return build_chat_format(tokenizer, template, stop_ids, source), added

"""One conversation with one model: the history, what of it fits, and the answer as it is being drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from threefold.checkpoint.files import RUN_FILE
from threefold.config.recipe import SamplingSection
from threefold.data.chat import ChatFormat, build_chat_format, ensure_pad_token
from threefold.data.lengths import truncate_history
from threefold.engine.device import pick_device
from threefold.errors import CheckpointError, DataError
from threefold.inference.generate import decoder_for, stream_tokens
from threefold.inference.scheduler import TokenDecoder
from threefold.models.loading import (
    check_source,
    generation_stop_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from threefold.serve.options import ChatOptions
from threefold.types import Message

RUN_ORDER = ("ppo/actor", "sft")
"""Where in a run directory the model to talk with is, the most finished first."""
UNTEMPLATED = "dialogue"
"""Template of a checkpoint that has none of its own."""
CHAT_PAD_TOKEN = "<|pad|>"
"""A chat is a batch of one and pads nothing; this only satisfies the format where the checkpoint has no pad token."""
BROKEN_CHARACTER = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""


def find_model(path: str) -> str:
    """The checkpoint to talk with: `path` itself, or the most finished actor of a run directory."""
    directory = Path(path)
    if (directory / RUN_FILE).is_file():
        for name in RUN_ORDER:
            if (directory / name / "config.json").is_file():
                return str(directory / name)
        raise CheckpointError(f"{path}: this run has no finished model yet; run step 1 first")
    if (directory / "actor" / "config.json").is_file():
        return str(directory / "actor")
    return check_source(path)


def _refuse_scalar_model(source: str) -> None:
    """Where output and input embeddings are tied, a reward model's weights would load as a language model's."""
    for architecture in getattr(load_config(source), "architectures", None) or ():
        if architecture.endswith("ForSequenceClassification"):
            raise CheckpointError(
                f"{source}: is a reward model or critic ({architecture}), which scores answers but gives none; "
                "name the directory of an actor"
            )


@dataclass
class ChatSession:
    """A model, its chat format and a conversation so far; `reply` is the only way on.

    Attributes:
        notes: lines for the user about choices made while loading.
    """

    source: str
    decoder: TokenDecoder
    chat: ChatFormat
    options: ChatOptions
    generator: torch.Generator
    notes: tuple[str, ...]
    history: list[Message]

    @classmethod
    def load(cls, options: ChatOptions) -> ChatSession:
        """Load the model of `options.path`."""
        source = find_model(str(options.path))
        _refuse_scalar_model(source)
        tokenizer = load_tokenizer(source)
        template, notes = options.template or "tokenizer", []
        if template == "tokenizer" and not tokenizer.chat_template:
            template = UNTEMPLATED
            notes.append(
                f'{source}: its tokenizer has no chat template; using "{UNTEMPLATED}" (--template chooses another)'
            )
        stop_ids = generation_stop_ids(source)
        ensure_pad_token(tokenizer, CHAT_PAD_TOKEN, template, source)
        chat = build_chat_format(tokenizer, template, stop_ids, source)
        device = pick_device(options.device)
        model = load_causal_lm(source).to(device)
        decoder = decoder_for(model, notes.append)
        session = cls(
            source,
            decoder,
            chat,
            options,
            torch.Generator(device).manual_seed(options.seed),
            tuple(notes),
            [],
        )
        session.clear()
        return session

    def clear(self) -> None:
        """Forget the conversation; a system message stays."""
        self.history = [Message("system", self.options.system)] if self.options.system else []

    def reply(self, text: str) -> Iterator[str]:
        """Answer `text`, piece by piece as it is drawn; the finished answer enters the history.

        The pieces joined are the answer, without stop tokens; no piece ends inside a character. The oldest turns are
        left out of the prompt, whole, where the model's context has no room for them.

        Raises:
            DataError: `text` alone is too long for the context; the history is then as before.
        """
        messages = [*self.history, Message("user", text)]
        limit = self.decoder.context_length
        room = self.options.max_new_tokens
        if limit is not None:
            room = min(room, limit // 2)
            messages = list(truncate_history(self.chat, messages, limit - room))
        prompt = self.chat.prompt_ids(messages)
        if limit is not None:
            room = min(self.options.max_new_tokens, limit - len(prompt))
        sampling = SamplingSection(
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            max_new_tokens=room,
        )
        ids: list[int] = []
        sent = ""
        for token_id in stream_tokens(self.decoder, prompt, sampling, self.chat.stop_ids, self.generator):
            ids.append(token_id)
            decoded = self.chat.decode(ids)
            if decoded.startswith(sent) and not decoded.endswith(BROKEN_CHARACTER):
                yield decoded[len(sent) :]
                sent = decoded
        whole = self.chat.decode(ids)
        yield whole[len(sent) :]
        self.history = [*messages, Message("assistant", whole)]

    def check_message(self, text: str) -> str | None:
        """Why `text` cannot be answered, or None."""
        if not text.strip():
            return "say something, or `quit`"
        limit = self.decoder.context_length
        if limit is None:
            return None
        try:
            truncate_history(
                self.chat, [*self.history, Message("user", text)], limit - min(self.options.max_new_tokens, limit // 2)
            )
        except DataError as error:
            return str(error)
        return None

"""What is trained on, for each template with each kind of tokenizer: the assistant's text and its stop token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.data.formats_under_test import (
    STOPS,
    byte_level_tokenizer,
    template_named,
    trained_unigram_tokenizer,
    with_stop_tokens,
    word_piece_tokenizer,
)
from threefold.data.chat import ChatFormat, build_chat_format
from threefold.types import Message, TokenSequence

SYSTEM_PROMPT = 'You are the dog\'s "little" tree.\nSee C:\\park, {{ it }} {% ends %}!'
ANSWER_FORMS = {"dialogue": " {}", "mistral": " {}", "llama2": " {} "}
"""What a template writes around an answer; where nothing is said, nothing."""
TRAINED: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level BPE": lambda: byte_level_tokenizer(eos_token="</s>", bos_token="<s>"),
    "Unigram": trained_unigram_tokenizer,
    "WordPiece": word_piece_tokenizer,
}
REAL = ["stories260K", "babyllama-char-1M"]
WORDS = ["The", "little", "girl", "and", "the", "dog", "went", "to", "see", "a", "big", "tree", "It", "is", "good"]
ODD_WORDS = ["Human:", "[/INST]", "12", *STOPS.values()]


@cache
def format_of(tokenizer: str, template: str, system_prompt: str, models: Path | None = None) -> ChatFormat:
    made = AutoTokenizer.from_pretrained(models / tokenizer) if models else TRAINED[tokenizer]()
    made = with_stop_tokens(made)
    return build_chat_format(made, template_named(template), system_prompt=system_prompt)


def conversation(
    dice: random.Random, odd_words: Sequence[str], num_turns: int, system: bool = False
) -> tuple[Message, ...]:
    """So many questions, each with an answer; some texts spell control tokens or what the templates write."""

    def text() -> str:
        words = dice.choices(WORDS, k=dice.randint(1, 9))
        if dice.random() < 0.3:
            words.insert(dice.randrange(len(words) + 1), dice.choice(odd_words))
        return " ".join(words) + dice.choice(["", ".", "?", "!"])

    opening = [Message("system", text())] if system else []
    turns = [Message("assistant" if number % 2 else "user", text()) for number in range(2 * num_turns)]
    return (*opening, *turns)


def conversations_for(chat: ChatFormat, dice: random.Random) -> list[tuple[Message, ...]]:
    """Of words that the tokenizer knows all letters of, so that they come back from their ids."""
    unknown = chat.tokenizer.unk_token_id

    def is_known(word: str) -> bool:
        return unknown not in chat.tokenizer.encode(word, add_special_tokens=False, split_special_tokens=True)

    odd_words = list(filter(is_known, ODD_WORDS))
    assert "</s>" in odd_words
    return [conversation(dice, odd_words, dice.randint(1, 4), dice.random() < 0.3) for _ in range(40)]


def trained_runs(sequence: TokenSequence) -> list[list[int]]:
    """The stretches of trained tokens."""
    marked = groupby(zip(sequence.ids, sequence.trained, strict=True), key=lambda pair: pair[1])
    return [[token_id for token_id, _ in run] for trained, run in marked if trained]


def shown(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as far as the tokenizer can give it back: all of it by bytes; other kinds add or lose spaces where a
    control token or a cut is."""
    by_bytes = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    return text if by_bytes else "".join(text.split())


def check_masks(chat: ChatFormat, template: str, conversations: Sequence[tuple[Message, ...]]) -> None:
    for messages, sequence in zip(conversations, chat.demonstrations(conversations), strict=True):
        assert isinstance(sequence, TokenSequence)
        answers = [message.content for message in messages if message.role == "assistant"]
        runs = trained_runs(sequence)
        form = ANSWER_FORMS.get(template, "{}") + STOPS[template]
        assert [shown(chat.tokenizer.decode(run), chat.tokenizer) for run in runs] == [
            shown(form.format(answer), chat.tokenizer) for answer in answers
        ]
        stop_id = chat.tokenizer.convert_tokens_to_ids(STOPS[template])
        for run in runs:
            assert run.index(stop_id) == len(run) - 1  # the stop token, once, at the end: not where the text spells it
        assert sequence.ids[sequence.prompt_length :] == tuple(runs[-1])
        assert sequence.ids[: sequence.prompt_length] == chat.prompt_ids(messages[:-1])


@pytest.mark.parametrize("system_prompt", ["", SYSTEM_PROMPT], ids=["plain", "system prompt"])
@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("tokenizer", TRAINED)
def test_the_assistant_is_trained_and_nothing_else(tokenizer: str, template: str, system_prompt: str) -> None:
    dice = random.Random(f"{tokenizer} {template}")
    chat = format_of(tokenizer, template, system_prompt)
    check_masks(chat, template, conversations_for(chat, dice))


@pytest.mark.real
@pytest.mark.parametrize("system_prompt", ["", SYSTEM_PROMPT], ids=["plain", "system prompt"])
@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("tokenizer", REAL)
def test_the_same_with_real_tokenizers(shared: Path, tokenizer: str, template: str, system_prompt: str) -> None:
    dice = random.Random(f"{tokenizer} {template}")
    chat = format_of(tokenizer, template, system_prompt, shared / "models")
    check_masks(chat, template, conversations_for(chat, dice))


@pytest.mark.parametrize("template", STOPS)
def test_the_system_prompt_is_a_system_message(template: str) -> None:
    """Baked into the template it gives the ids that the message itself gives, and gives way to one of the data."""
    plain = format_of("byte-level BPE", template, "")
    baked = format_of("byte-level BPE", template, SYSTEM_PROMPT)
    messages = conversation(random.Random(1), ODD_WORDS, 2)
    as_message = (Message("system", SYSTEM_PROMPT), *messages)
    assert baked.demonstration(messages) == plain.demonstration(as_message)
    assert baked.demonstration(messages) != plain.demonstration(messages)
    other = (Message("system", "It ends."), *messages)
    assert baked.demonstration(other) == plain.demonstration(other)
    assert (plain.system_prompt, baked.system_prompt) == ("", SYSTEM_PROMPT)

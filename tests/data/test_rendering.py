"""Many texts at once, against the tokenizer text by text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.data.formats_under_test import (
    CHATML,
    byte_level_tokenizer,
    trained_unigram_tokenizer,
    unigram_tokenizer,
    with_stop_tokens,
    word_piece_tokenizer,
)
from threefold.data.rendering import TextEncoder, control_ids_of, render
from threefold.errors import DataError
from threefold.types import Message


def gpt2_like() -> PreTrainedTokenizerBase:
    """One token for bos, eos and unknown, which bytes never need."""
    tokenizer = byte_level_tokenizer(eos_token="</s>", bos_token="</s>")
    tokenizer.unk_token = "</s>"
    return tokenizer


def unknown_is_eos() -> PreTrainedTokenizerBase:
    """One token for eos and unknown, and any letter may be unknown."""
    pieces = {"</s>": 0, "a": 1, "b": 2, "<pad>": 3}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="</s>", bos_token="</s>"
    )


def lower_case() -> PreTrainedTokenizerBase:
    """Control tokens that are found after normalisation, one of them spelled otherwise in the text."""
    tokenizer = byte_level_tokenizer(eos_token="</s>").backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_special_tokens([AddedToken("<|STOP|>", normalized=True, special=True)])
    tokenizer.add_tokens([AddedToken("tool", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="</s>")


def odd_control_tokens() -> PreTrainedTokenizerBase:
    """A control token without a letter of ASCII, and one with a space, both pieces of the model."""
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("␜", -1.0), ("<end▁of>", -1.0)]
    pieces += [(letter, -3.0) for letter in "▁<>abcdefno"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end▁of>", bos_token="␜", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": lambda: byte_level_tokenizer(eos_token="</s>"),
    "characters": unigram_tokenizer,
    "unigram": lambda: with_stop_tokens(trained_unigram_tokenizer()),
    "word pieces": word_piece_tokenizer,
    "gpt2": gpt2_like,
    "unknown is eos": unknown_is_eos,
    "lower case": lower_case,
    "odd control tokens": odd_control_tokens,
}
FRAGMENTS = ["</s>", "<s>", "<|end|>", "<|STOP|>", "<|stop|>", "＜|ＳＴＯＰ|>", "tool", "[PAD]", "<unk>", "<0x0A>", "␜"]
FRAGMENTS += ["<end of>", "<end▁of>", "s>", "</", "<", "|", " ", "\n", "a", "b", "word", "né", "请", "\ue000", "💡"]
TEXTS = st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), max_size=6)


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerBase:
    return TOKENIZERS[name]()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=TEXTS)
@settings(max_examples=150, deadline=None)
def test_a_batch_has_the_ids_of_its_texts(name: str, texts: list[str]) -> None:
    tokenizer = tokenizer_named(name)
    ids = TextEncoder(tokenizer)(texts)
    assert ids.keys() - {""} == set(texts) - {""}
    for text, found in ids.items():
        assert found == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=TEXTS)
@settings(max_examples=150, deadline=None)
def test_texts_that_spell_control_tokens_are_found(name: str, texts: list[str]) -> None:
    """What a cheap search leaves aside has none: the same as encoding every text."""
    tokenizer = tokenizer_named(name)
    control = control_ids_of(tokenizer)
    naive = {text for text in texts if control & set(tokenizer.encode(text, add_special_tokens=False))}
    assert TextEncoder(tokenizer).spelling_control_tokens(texts) == naive


def test_most_texts_are_not_looked_at_twice() -> None:
    """The cheap search is in use where the tokenizer allows it."""
    searched = {name for name in TOKENIZERS if TextEncoder(tokenizer_named(name))._suspicion is not None}
    assert searched == set(TOKENIZERS) - {"unknown is eos", "odd control tokens"}


def test_what_a_tokenizer_file_cuts_and_pads_does_not_matter(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    plain = TextEncoder(tokenizer)(["word " * 9, "a"])
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=20)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.backend_tokenizer.truncation is not None
    assert TextEncoder(reloaded)(["word " * 9, "a"]) == plain


def test_one_refused_conversation_leaves_the_others() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    )
    conversations = [[Message("user", content)] for content in ("yes", "no", "perhaps", "no", "well")]
    texts = render(tokenizer, conversations, True)
    for (message,), text in zip(conversations, texts, strict=True):
        if message.content == "no":
            assert isinstance(text, DataError)
            assert str(text) == "the chat template refuses the conversation: not that"
        else:
            plain = [{"role": "user", "content": message.content}]
            assert text == tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, [], True) == []

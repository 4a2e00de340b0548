"""The renderer with rows and checkpoints that are out of the ordinary: one conversation that a template cannot render,
whitespace around contents, stop tokens that are words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.data.formats_under_test import CHATML, byte_level_tokenizer
from threefold.data.chat import ChatFormat, build_chat_format
from threefold.errors import DataError
from threefold.types import Message, Prompt


def conversation(contents: Sequence[str]) -> tuple[Message, ...]:
    """Turns of user and assistant in alternation."""
    return tuple(Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents))


def as_qwen() -> ChatFormat:
    """Writes no thought in the answers before the last question, as Qwen3's template: an answer that another one
    follows is re-written, and one that begins with "open" is not ended."""
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% set last = namespace(user=0) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.last and loop.index0 > last.user %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] }}{% if not m['content'].startswith('open') %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if messages[-1]['role'] == 'assistant' %}{{ '<think>' }}{% endif %}{% endif %}"
    )
    return build_chat_format(tokenizer, "tokenizer")


def test_a_fault_of_one_conversation_is_said_of_that_one() -> None:
    """The template passes the check of a format, and cannot render every conversation."""
    chat_format = as_qwen()
    good = conversation(["one", "two", "three", "four"])
    twice = (*good, Message("assistant", "again"), Message("assistant", "and again"))
    endless = conversation(["one", "open end"])
    alone = chat_format.demonstration(good)
    rewritten, unended = "re-writes earlier turns", "writes no stop token after one of the answers"
    found = chat_format.demonstrations([good, twice, endless, good])
    assert (found[0], found[3]) == (alone, alone)
    for error, message in zip(found[1:3], (rewritten, unended), strict=True):
        assert isinstance(error, DataError)
        assert message in str(error)
    prompts = chat_format.prompts([good[:1], twice[:-1]])
    assert prompts[0] == chat_format.prompt_ids(good[:1])
    assert isinstance(prompts[1], DataError)
    assert rewritten in str(prompts[1])
    answers = [["two", "too"], ["two", "open end"], ["two"]]
    compared = chat_format.comparisons([Prompt(good[:1]), Prompt(good[:1]), Prompt(twice[:-1])], answers)
    assert compared[0] == chat_format.comparison(Prompt(good[:1]), answers[0])
    assert [str(error).partition("the template ")[2][:10] for error in compared[1:]] == ["writes no ", "re-writes "]
    with pytest.raises(DataError, match=rewritten):
        chat_format.demonstration(twice)
    with pytest.raises(DataError, match=unended):
        chat_format.answer_ids(good[:1], "open end")


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("content", [" </s>\n\n", "\n\t a <|im_end|> b ", "</s>", "  plain  "])
def test_whitespace_around_a_content_is_what_the_template_makes_of_it(content: str, trims: bool) -> None:
    """Whether or not the content spells a control token."""
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML.replace("message['content'] +", "message['content'] | trim +") if trims else CHATML
    chat_format = build_chat_format(tokenizer, "tokenizer")
    messages = conversation([content, content])
    written = content.strip() if trims else content
    prompt = f"<|im_start|>user\n{written}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chat_format.prompt_ids(messages[:1])) == prompt
    assert tokenizer.decode(chat_format.demonstration(messages).ids) == f"{prompt}{written}<|im_end|>"


@pytest.mark.parametrize("content", ["\n", "\n a </s> b \n", "\n</s>"])
def test_whitespace_that_is_a_control_token_itself(content: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["\n"]})
    chat_format = build_chat_format(tokenizer, "tags")
    ids = chat_format.prompt_ids(conversation([content]))
    assert tokenizer.convert_tokens_to_ids("\n") not in ids
    assert tokenizer.decode(ids) == f"<|user|>{content}<|assistant|>"


def test_an_ordinary_token_that_stops_sampling_does_not_end_an_answer_that_is_trained() -> None:
    """A checkpoint may stop at a word; the template ends an answer with its control token all the same."""
    tokenizer = byte_level_tokenizer()
    word_id = tokenizer.convert_tokens_to_ids("!")
    chat_format = build_chat_format(tokenizer, "tags", [word_id])
    assert chat_format.stop_ids == {word_id, tokenizer.eos_token_id}
    ids = chat_format.answer_ids(conversation(["What?"]), "Oh! It ends.")
    assert word_id in ids[:-1]
    assert tokenizer.decode(ids) == "Oh! It ends.<|end|>"
    sequence = chat_format.demonstration(conversation(["What?", "Oh! It ends.", "Then?", "Oh! Yes."]))
    trained = [token_id for token_id, flag in zip(sequence.ids, sequence.trained, strict=True) if flag]
    assert tokenizer.decode(trained) == "Oh! It ends.<|end|>Oh! Yes.<|end|>"

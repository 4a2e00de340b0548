"""The system prompt as a part of the template."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.data.formats_under_test import CHATML, byte_level_tokenizer
from threefold.data.chat import build_chat_format, ensure_pad_token
from threefold.data.templates import BUILT_IN_TEMPLATES, system_prompt_of, with_system_prompt
from threefold.errors import ConfigError
from threefold.types import Message

ASKED = (Message("user", "What is a good answer?"),)
TEMPLATES = [
    *BUILT_IN_TEMPLATES.values(),
    CHATML,
    "\n\n  {% for m in messages %}\n  {{ m['content'] }}\n{% endfor %}\n",
]
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.lists(
        st.sampled_from(['"', "'", "\\", "\n", "\r\n", "{{ x }}", "{% endif %}", "{#", "💡", "é"]), min_size=1
    ).map("".join),
)


@given(text=TEXTS, template=st.sampled_from(TEMPLATES))
def test_it_is_rendered_as_the_message_that_it_stands_for(text: str, template: str) -> None:
    """By plain transformers, character by character; a template's leading whitespace stays."""
    tokenizer = byte_level_tokenizer()
    asked = [{"role": "user", "content": "Hi"}]
    for conversation in (asked, [*asked, {"role": "assistant", "content": "Hello"}, *asked]):
        as_message = [{"role": "system", "content": text}, *conversation]
        expected = tokenizer.apply_chat_template(as_message, chat_template=template, tokenize=False)
        baked = with_system_prompt(template, text)
        assert tokenizer.apply_chat_template(conversation, chat_template=baked, tokenize=False) == expected
        assert tokenizer.apply_chat_template(as_message, chat_template=baked, tokenize=False) == expected
    assert system_prompt_of(baked) == text


@given(first=TEXTS, second=TEXTS, template=st.sampled_from(TEMPLATES))
def test_a_later_one_takes_the_place_of_the_first(first: str, second: str, template: str) -> None:
    baked = with_system_prompt(template, first)
    assert with_system_prompt(baked, first) == baked
    assert with_system_prompt(baked, second) == with_system_prompt(template, second)
    assert with_system_prompt(baked, "") == baked
    assert with_system_prompt(template, "") == template
    assert system_prompt_of(template) == ""


def test_it_is_saved_with_the_checkpoint(tmp_path: Path) -> None:
    """Plain transformers sees it, and the next stage, which has it in its recipe too, gets the same template."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
    ensure_pad_token(tokenizer, "", "tokenizer", system_prompt="Be kind.")
    chat = build_chat_format(tokenizer, "tokenizer", system_prompt="Be kind.")
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = reloaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>system\nBe kind.<|end|>\n<|im_start|>user\nHi<|end|>\n"
    for system_prompt in ("Be kind.", ""):
        again = build_chat_format(reloaded, "tokenizer", system_prompt=system_prompt)
        assert again.tokenizer.chat_template == tokenizer.chat_template
        assert again.prompt_ids(ASKED) == chat.prompt_ids(ASKED)
    assert build_chat_format(reloaded, "tokenizer", system_prompt="Be brief.").system_prompt == "Be brief."


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
            r"^model\.system_prompt: the chat template refuses the conversation: System role not supported \(model\.ch",
        ),
        ("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}", "leaves the system message"),
    ],
)  # fmt: skip
def test_a_template_without_a_place_for_it(before: str, message: str) -> None:
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = before + CHATML
    with pytest.raises(ConfigError, match=message) as caught:
        build_chat_format(tokenizer, "tokenizer", system_prompt="Be kind.")
    assert "--model.chat_template dialogue" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_may_not_spell_a_control_token() -> None:
    with pytest.raises(ConfigError, match=r"^model\.system_prompt spells a control token"):
        build_chat_format(byte_level_tokenizer(), "dialogue", system_prompt="Be kind.<|end|>")


def test_a_template_that_is_at_fault_itself_is_named() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no chat here') }}"
    with pytest.raises(ConfigError, match=r"^model\.chat_template 'tokenizer': .*no chat here"):
        build_chat_format(tokenizer, "tokenizer", system_prompt="Be kind.")

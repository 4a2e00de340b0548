"""Chat templates as text: the built-in ones, where the recipe's comes from, and the system prompt in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from threefold.errors import CheckpointError, ConfigError

BUILT_IN_TEMPLATES: dict[str, str] = {
    "dialogue": (
        "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}{{ eos_token }}"
        "{% else %}{{ '\\n\\nSystem: ' + message['content'] }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
    "tags": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
}
"""Jinja sources of the templates that `model.chat_template` can name."""

_BEFORE_SYSTEM_PROMPT = (
    "{% if not messages or messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
)
_AFTER_SYSTEM_PROMPT = "}] + messages %}{% endif %}\n"
"""The newline is part of the last tag (transformers sets trim_blocks), and lets what follows begin a line as before."""
_SYSTEM_PROMPT = re.compile(re.escape(_BEFORE_SYSTEM_PROMPT) + r'("(?:[^"\\]|\\.)*")' + re.escape(_AFTER_SYSTEM_PROMPT))


def template_source(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> str:
    """The jinja source that `model.chat_template` names; see `build_chat_format`."""
    if template == "tokenizer":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise CheckpointError(
                f"{source or 'the checkpoint'}: its tokenizer has no chat template; choose one, for example "
                "--model.chat_template dialogue"
            )
        return str(own)
    if template in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[template]
    path = Path(template)
    if not path.is_file():
        raise ConfigError(
            f"model.chat_template {template!r} is no file and none of tokenizer, {', '.join(BUILT_IN_TEMPLATES)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template {template!r} cannot be read: {error}") from error


def with_system_prompt(template: str, system_prompt: str) -> str:
    """The template, made to put a system message before a conversation that has none.

    It takes the place of a system prompt that was put there earlier, so that a checkpoint can be trained on.

    Args:
        template: jinja source.
        system_prompt: "" leaves the template as it is.
    """
    if not system_prompt:
        return template
    own = _SYSTEM_PROMPT.match(template)
    literal = json.dumps(system_prompt, ensure_ascii=False)
    return _BEFORE_SYSTEM_PROMPT + literal + _AFTER_SYSTEM_PROMPT + (template[own.end() :] if own else template)


def system_prompt_of(template: str) -> str:
    """The system prompt that `with_system_prompt` put into a template; "" if none."""
    found = _SYSTEM_PROMPT.match(template)
    return str(json.loads(found.group(1))) if found else ""

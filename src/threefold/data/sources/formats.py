"""The row formats that are known: one small function each, chosen by the columns of the dataset.

To add one, write a function from a row to an `Example` and put it in `ROW_FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from threefold.data.sources.files import Row
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt, Role

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
DIALOGUE_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant", "System": "system"}
DIALOGUE_TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant|System):")
LAST_ANSWER = "\n\nAssistant:"


class BadRowError(Exception):
    """A row that cannot be used.

    Attributes:
        reason: what to count it under, the same for all rows with this fault.
        message: what is wrong with this one; names the field.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one format are recognised and read.

    Attributes:
        columns: a dataset that has all of these is taken to be of this format.
        description: for messages to the user.
        read: (row, origin) to an example; raises BadRowError.
    """

    columns: tuple[str, ...]
    description: str
    read: Callable[[Row, str], Example]


def recognise_format(spec: str, columns: Sequence[str]) -> RowFormat:
    """The first format of `ROW_FORMATS` whose columns the dataset has.

    Raises:
        DataError: none fits; the message lists the known ones.
    """
    for row_format in ROW_FORMATS.values():
        if set(row_format.columns) <= set(columns):
            return row_format
    known = "; ".join(row_format.description for row_format in ROW_FORMATS.values())
    raise DataError(f"{spec}: its columns ({', '.join(columns)}) are of no known format; known are: {known}")


def read_preference(row: Row, origin: str) -> Example:
    """`prompt` with `chosen` and `rejected`: each a text, or a list of messages."""
    prompt = _prompt_messages(_field(row, "prompt"))
    answers = tuple(_answer_after(prompt, _field(row, name), name) for name in ("chosen", "rejected"))
    return _preference(prompt, answers, origin)


def read_implicit_preference(row: Row, origin: str) -> Example:
    """`chosen` and `rejected` are whole conversations; the prompt is what they share, all before their last answer."""
    prompt, chosen = _conversation(_field(row, "chosen"), "chosen")
    other_prompt, rejected = _conversation(_field(row, "rejected"), "rejected")
    if prompt != other_prompt:
        raise BadRowError(
            "with dialogues that differ before the last answer",
            "fields 'chosen' and 'rejected' differ before their last answer, so they do not answer the same prompt",
        )
    return _preference(_checked_prompt(prompt, "chosen"), (chosen, rejected), origin)


def read_messages(row: Row, origin: str) -> Example:
    """`messages`, the last of them the assistant's: a demonstration without a comparison."""
    prompt, answer = _cut_answer(_messages(_field(row, "messages"), "messages"), "messages")
    return Example(Prompt(_checked_prompt(prompt, "messages")), _not_empty(answer, "messages"), (), origin)


ROW_FORMATS: dict[str, RowFormat] = {
    "preference": RowFormat(
        ("prompt", "chosen", "rejected"),
        "prompt + chosen + rejected (texts or lists of messages)",
        read_preference,
    ),
    "implicit_preference": RowFormat(
        ("chosen", "rejected"),
        "chosen + rejected (whole dialogues)",
        read_implicit_preference,
    ),
    "messages": RowFormat(
        ("messages",),
        "messages (a conversation, steps 1 and 3 only)",
        read_messages,
    ),
}


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """Turns of a text in the form "\\n\\nHuman: …\\n\\nAssistant: …".

    Raises:
        ValueError: it does not begin with a turn.
    """
    opening, *parts = DIALOGUE_TURN.split(text)
    if opening.strip():
        raise ValueError(f"begins with {opening.strip()[:40]!r} instead of a turn such as 'Human:'")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(DIALOGUE_ROLES[speaker], content.strip()) for speaker, content in pairs)


def _preference(prompt: tuple[Message, ...], answers: tuple[str, ...], origin: str) -> Example:
    chosen, rejected = (_not_empty(answer, name) for answer, name in zip(answers, ("chosen", "rejected"), strict=True))
    if chosen == rejected:
        raise BadRowError(
            "with chosen equal to rejected",
            "fields 'chosen' and 'rejected' are the same answer, which compares nothing",
        )
    return Example(Prompt(prompt), chosen, (chosen, rejected), origin)


def _field(row: Row, name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise BadRowError(f"without {name!r}", f"field {name!r} is missing")
    return value


def _not_empty(answer: str, name: str) -> str:
    if not answer:
        raise BadRowError("with an empty answer", f"field {name!r} has an empty answer")
    return answer


def _wrong_type(value: Any, name: str, wanted: str) -> BadRowError:
    return BadRowError(f"with a wrong type of {name!r}", f"field {name!r} is {_type_name(value)}, and must be {wanted}")


def _type_name(value: Any) -> str:
    names = {
        type(None): "nothing",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    """A list of {role, content} objects."""
    if not isinstance(value, list):
        raise _wrong_type(value, name, "a list of messages")
    messages = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise BadRowError(
                f"with a wrong type of {name!r}", f"field '{place}' is {_type_name(item)}, and must be a message"
            )
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise BadRowError(
                "with an unknown role", f"field '{place}.role' is {role!r}, and must be one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise BadRowError(
                f"with a wrong type of {name!r}", f"field '{place}.content' is {_type_name(content)}, not a text"
            )
        messages.append(Message(role, content))
    return tuple(messages)


def _cut_answer(messages: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], str]:
    """What stands before the answer, and the answer without whitespace around it."""
    if not messages or messages[-1].role != "assistant":
        raise BadRowError("without an answer", f"field {name!r} does not end with a message of the assistant")
    return messages[:-1], messages[-1].content.strip()


def _checked_prompt(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """A conversation that the assistant can answer: it begins with system or user, ends with user, none is empty."""
    if not messages or messages[-1].role != "user":
        raise BadRowError("without a question", f"field {name!r} has no message of the user right before the answer")
    if messages[0].role == "assistant":
        raise BadRowError("that begin with the assistant", f"field {name!r} begins with a message of the assistant")
    for index, message in enumerate(messages):
        if not message.content.strip():
            raise BadRowError("with an empty message", f"field '{name}[{index}].content' is empty")
    return messages


def _prompt_messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRowError("with an empty prompt", "field 'prompt' is empty")
        text = value.strip()
        if not (text.startswith("Human:") and text.endswith(LAST_ANSWER)):
            return (Message("user", text),)
        return _checked_prompt(parse_dialogue(text.removesuffix(LAST_ANSWER)), "prompt")
    if not isinstance(value, list):
        raise _wrong_type(value, "prompt", "a text or a list of messages")
    return _checked_prompt(_messages(value, "prompt"), "prompt")


def _answer_after(prompt: tuple[Message, ...], value: Any, name: str) -> str:
    """An answer given as text, as the assistant's message, or as the whole conversation that begins with the prompt."""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, list):
        raise _wrong_type(value, name, "a text or a list of messages")
    before, answer = _cut_answer(_messages(value, name), name)
    if before and _stripped(before) != _stripped(prompt):
        raise BadRowError("with another prompt", f"field {name!r} is a conversation that does not begin with 'prompt'")
    return answer


def _stripped(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in messages]


def _conversation(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """What stands before the answer, and the answer, of a whole conversation: a dialogue text or a list of messages."""
    if not isinstance(value, str):
        if not isinstance(value, list):
            raise _wrong_type(value, name, "a dialogue text or a list of messages")
        return _cut_answer(_messages(value, name), name)
    before, marker, answer = value.rpartition(LAST_ANSWER)
    if not marker:
        raise BadRowError(
            "without a dialogue", f"field {name!r} has no turn 'Assistant:', and there is no field 'prompt'"
        )
    try:
        prompt = parse_dialogue(before)
    except ValueError as error:
        raise BadRowError("without a dialogue", f"field {name!r} {error}") from error
    return prompt, answer.strip()

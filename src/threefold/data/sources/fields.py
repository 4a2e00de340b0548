"""What the readers of all row formats share: fields of a row, messages, dialogues, rankings, and their faults."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from threefold.data.sources.tables import Row
from threefold.types import Example, Message, Prompt, Role

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
ROLE_OF_NAME: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "prompter": "user",
}
DIALOGUE_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant", "System": "system"}
DIALOGUE_TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant|System):")
ONE_LINE_TURN = re.compile(r"(?:^|\s)(Human|Assistant):")
LAST_ANSWER = "\n\nAssistant:"
GOOD_LABELS = ("true", "good", "desirable", "positive", "chosen", "thumbs_up")
BAD_LABELS = ("false", "bad", "undesirable", "negative", "rejected", "thumbs_down")

Messages = tuple[Message, ...]


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


class UnansweredRowError(BadRowError):
    """A row that its publisher knows to have no answer: it is left out and counted, whatever data.bad_rows says."""


# ------------------------------------------------------------------------------------------------ fields and types


def field(row: Row, name: str) -> Any:
    """A value that must be there."""
    value = row.get(name)
    if value is None:
        raise BadRowError(f"without {name!r}", f"field {name!r} is missing")
    return value


def text_field(row: Row, name: str) -> str:
    """A text that must be there and hold something, without whitespace around it."""
    value = field(row, name)
    if not isinstance(value, str):
        raise wrong_type(value, name, "a text")
    if not (text := value.strip()):
        raise BadRowError(f"with an empty {name!r}", f"field {name!r} is empty")
    return text


def optional_text(row: Row, name: str) -> str:
    """A text that need not be there: then ""."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong_type(value, name, "a text")
    return value.strip()


def not_empty(answer: str, name: str) -> str:
    """The answer, if it holds something."""
    if not answer:
        raise BadRowError("with an empty answer", f"field {name!r} has an empty answer")
    return answer


def wrong_type(value: Any, name: str, wanted: str) -> BadRowError:
    """The error for a value of a type that the field cannot have."""
    return BadRowError(f"with a wrong type of {name!r}", f"field {name!r} is {type_name(value)}, and must be {wanted}")


def type_name(value: Any) -> str:
    """What a user would call it."""
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


def number(value: Any, name: str) -> float:
    """A number, also one written as text (as csv has it)."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            converted = float(value)
        except ValueError:
            converted = math.nan
        if math.isfinite(converted):
            return converted
    raise BadRowError(f"with a wrong {name!r}", f"field {name!r} is {str(value)[:40]!r}, and must be a number")


def goodness(label: Any) -> bool | None:
    """Whether a label says good or bad: true and false, 1 and 0, the words for it, or one of these as a text."""
    if isinstance(label, str):
        word = label.strip().lower()
        if word in GOOD_LABELS or word in BAD_LABELS:
            return word in GOOD_LABELS
        try:
            label = float(word)
        except ValueError:
            return None
    return bool(label) if label in (0, 1) else None


# ----------------------------------------------------------------------------------------- messages and dialogues


def messages_of(value: Any, name: str) -> Messages:
    """A list of {role, content} or of {from, value} objects."""
    if not isinstance(value, list):
        raise wrong_type(value, name, "a list of messages")
    return tuple([_message(item, name, index) for index, item in enumerate(value)])


def _message(item: Any, name: str, index: int) -> Message:
    if not isinstance(item, dict):
        raise BadRowError(
            f"with a wrong type of {name!r}", f"field '{name}[{index}]' is {type_name(item)}, and must be a message"
        )
    if item.get("weight") not in (None, 1):
        raise BadRowError(
            "with weights of messages",
            f"field '{name}[{index}].weight' is {str(item['weight'])[:40]!r}, and weights are not supported: all "
            "answers of a conversation are trained on",
        )
    named = "from" if "from" in item else "role"
    role, content = item.get(named), item.get("value" if named == "from" else "content")
    known = ROLE_OF_NAME.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRowError(
            "with an unknown role",
            f"field '{name}[{index}].{named}' is {role!r}, and must be one of {', '.join(ROLE_OF_NAME)}",
        )
    if not isinstance(content, str):
        place = f"{name}[{index}].{'value' if named == 'from' else 'content'}"
        raise BadRowError(f"with a wrong type of {name!r}", f"field '{place}' is {type_name(content)}, not a text")
    return Message(known, content)


def cut_answer(messages: Messages, name: str) -> tuple[Messages, str]:
    """What stands before the answer, and the answer without whitespace around it."""
    if not messages or messages[-1].role != "assistant":
        raise BadRowError("without an answer", f"field {name!r} does not end with a message of the assistant")
    return messages[:-1], messages[-1].content.strip()


def checked_prompt(messages: Messages, name: str) -> Messages:
    """A conversation that the assistant can answer: it begins with system or user, ends with user, none is empty."""
    if not messages or messages[-1].role != "user":
        raise BadRowError("without a question", f"field {name!r} has no message of the user right before the answer")
    if messages[0].role == "assistant":
        raise BadRowError("that begin with the assistant", f"field {name!r} begins with a message of the assistant")
    for index, message in enumerate(messages):
        if not message.content or message.content.isspace():
            raise BadRowError("with an empty message", f"field '{name}[{index}].content' is empty")
    return messages


def prompt_of(value: Any, name: str = "prompt") -> Messages:
    """The messages of a prompt: a list of them, or a text, which may be a dialogue that ends with "Assistant:"."""
    if isinstance(value, str):
        if not (text := value.strip()):
            raise BadRowError("with an empty prompt", f"field {name!r} is empty")
        if not (text.startswith("Human:") and text.endswith("Assistant:")):
            return (Message("user", text),)
        return checked_prompt(prompt_dialogue(text), name)
    if not isinstance(value, list):
        raise wrong_type(value, name, "a text or a list of messages")
    return checked_prompt(messages_of(value, name), name)


def prompt_dialogue(text: str) -> Messages:
    """Turns of a text that begins with "Human:" and ends with "Assistant:", with blank lines between them or not."""
    before = text.removesuffix("Assistant:").rstrip()
    if text.endswith(LAST_ANSWER) or DIALOGUE_TURN.search(before, 1):
        return parse_dialogue(before)
    return one_line_turns(text, ONE_LINE_TURN, DIALOGUE_ROLES, "Assistant")[1]


def parse_dialogue(text: str) -> Messages:
    """Turns of a text in the form "\\n\\nHuman: …\\n\\nAssistant: …".

    Raises:
        ValueError: it does not begin with a turn.
    """
    opening, messages = _turns_at(text, list(DIALOGUE_TURN.finditer(text)), DIALOGUE_ROLES)
    if opening:
        raise ValueError(f"begins with {opening[:40]!r} instead of a turn such as 'Human:'")
    return messages


def one_line_turns(text: str, turn: re.Pattern[str], roles: dict[str, Role], answerer: str) -> tuple[str, Messages]:
    """What stands before the first turn, and the turns, of a text without blank lines between them, where a speaker's
    mark may also be ordinary words ("I am an Executive Assistant: …"): one counts only where another speaker's came
    before it, and the first only if it is the user's or begins the text.

    Args:
        text: without whitespace around it; it may end with the mark that the answer follows.
        turn: matches a mark, its group 1 the speaker's name.
        roles: of the speakers.
        answerer: name of the speaker whose answer follows.
    """
    before = text.removesuffix(f"{answerer}:")
    marks: list[re.Match[str]] = []
    for mark in turn.finditer(before):
        speaker = mark[1]
        if (speaker != marks[-1][1]) if marks else (roles[speaker] == "user" or not mark.start()):
            marks.append(mark)
    if before != text and len(marks) > 1 and marks[-1][1] == answerer:
        marks.pop()  # the mark at the end is the answerer's own
    return _turns_at(before, marks, roles)


def _turns_at(text: str, marks: Sequence[re.Match[str]], roles: dict[str, Role]) -> tuple[str, Messages]:
    """What stands before the first of the marks, and the turns that they begin."""
    ends = [*(mark.start() for mark in marks), len(text)]
    turns = [Message(roles[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends[1:], strict=True)]
    return text[: ends[0]].strip(), tuple(turns)


def conversation(value: Any, name: str) -> tuple[Messages, str]:
    """What stands before the answer, and the answer, of a whole conversation: a dialogue text or a list of messages."""
    if not isinstance(value, str):
        if not isinstance(value, list):
            raise wrong_type(value, name, "a dialogue text or a list of messages")
        return cut_answer(messages_of(value, name), name)
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


def plain_answer(value: Any, name: str) -> str:
    """An answer given as text, as one message, or as a list of one."""
    if isinstance(value, str):
        return not_empty(value.strip(), name)
    if not isinstance(value, list | dict):
        raise wrong_type(value, name, "a text or a message")
    before, answer = cut_answer(messages_of([value] if isinstance(value, dict) else value, name), name)
    if before:
        raise BadRowError(f"with a wrong type of {name!r}", f"field {name!r} has several messages, and must have one")
    return not_empty(answer, name)


def stripped(messages: Messages) -> list[tuple[str, str]]:
    """Roles and contents, to compare conversations by."""
    return [(message.role, message.content.strip()) for message in messages]


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages, after that of the field `system` where the row has one and they have none."""
    system = optional_text(row, "system")
    if system and not (messages and messages[0].role == "system"):
        return (Message("system", system), *messages)
    return messages


# ------------------------------------------------------------------------------------------------------- rankings


def pair(prompt: Messages, chosen: str, rejected: str, origin: str) -> Example:
    """Two answers, the better first."""
    not_empty(chosen, "chosen")
    not_empty(rejected, "rejected")
    if chosen == rejected:
        raise BadRowError(
            "with chosen equal to rejected",
            "fields 'chosen' and 'rejected' are the same answer, which compares nothing",
        )
    return Example(Prompt(prompt), chosen, (chosen, rejected), origin)


def ranking(prompt: Messages, answers: Sequence[str], places: Sequence[float], origin: str) -> Example:
    """Answers ranked by their places, the lowest the best; equal places are ties.

    Of an answer that occurs twice the better place counts. Where fewer than two places are left there is no comparison,
    and the first of the best is a demonstration.
    """
    ordered = sorted(range(len(answers)), key=lambda index: places[index])
    best_place: dict[str, float] = {}
    for index in ordered:
        best_place.setdefault(answers[index], places[index])
    tiers = sorted(set(best_place.values()))
    demonstration = next(iter(best_place))
    if len(tiers) < 2:
        return Example(Prompt(prompt), demonstration, (), origin)
    ranks = () if len(tiers) == len(best_place) else tuple(tiers.index(place) for place in best_place.values())
    return Example(Prompt(prompt), demonstration, tuple(best_place), origin, ranks)

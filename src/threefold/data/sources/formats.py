"""The row formats that are known: one small function each, chosen by the columns of the dataset.

To add one, write a function from a row to `Example`s and put it in `FORMATS`, before those that have fewer columns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from threefold.data.sources.fields import (
    BadRowError,
    Messages,
    checked_prompt,
    conversation,
    cut_answer,
    field,
    goodness,
    messages_of,
    not_empty,
    number,
    optional_text,
    pair,
    plain_answer,
    prompt_of,
    ranking,
    stripped,
    text_field,
    type_name,
    with_system,
    wrong_type,
)
from threefold.data.sources.tables import LocatedRow, Row
from threefold.data.sources.trees import gather_trees, read_tree
from threefold.types import Example, Message, Prompt

TEXT_NAMES = ("answer", "text", "content", "completion", "response")
FINAL_ANSWER = re.compile(r"####(?!#)\s*(\S.*)")
OTHER_NAMES = {
    "prompt": ("query", "question", "inquiry", "instruction", "input", "context"),
    "completion": ("response", "answer", "output", "reply", "target"),
    "chosen": ("good", "better", "positive", "pos", "winner", "preferred"),
    "rejected": ("bad", "worse", "negative", "neg", "loser", "dispreferred"),
    "instruction": ("input", "question", "task"),
    "output": ("response", "answer", "reply"),
    "question": ("query",),
    "answer": ("reply", "response"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("content", "document", "sentence", "story"),
}
"""What data of others often call a column, to guess what to map."""
USUAL_FORMATS = {1: "text", 2: "question_answer"}
"""By the number of columns, where nothing else speaks for one."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one format are recognised and read.

    Attributes:
        name: in recipes and messages.
        columns: sets of columns, any of which a dataset of this format has.
        description: what the rows hold, for messages to the user.
        read: (row, origin) to the examples of the row; raises BadRowError.
        optional: columns that are used where they are there.
        fits: whether the values of a row that has the columns are of this format's types.
        gather: makes one row of several, where a file spreads what belongs together.
        alone: whether a dataset that has further columns is not taken to be of this format.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    description: str
    read: Callable[[Row, str], list[Example]]
    optional: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True
    gather: Callable[[Iterator[LocatedRow]], Iterator[LocatedRow]] | None = None
    alone: bool = False

    def known_columns(self) -> tuple[str, ...]:
        """All columns that it uses, `reference` included, which any format may have."""
        names = [name for names in self.columns for name in names]
        return tuple(dict.fromkeys([*names, *self.optional, "reference"]))

    def missing(self, found: Iterable[str]) -> tuple[str, ...]:
        """The columns that are not among those found, of the set of which fewest are missing."""
        found = set(found)
        return min((tuple(name for name in names if name not in found) for names in self.columns), key=len)

    def matches(self, row: Row) -> bool:
        """Whether one row has the columns, and values of the right types."""
        return self.has_columns({name for name, value in row.items() if value is not None}) and self.fits(row)

    def has_columns(self, found: set[str]) -> bool:
        """Whether a dataset with these columns may be of this format."""
        return not self.missing(found) and not (self.alone and found - set(self.known_columns()))

    def signature(self) -> str:
        """Name and columns, for messages."""
        return f"{self.name} ({' or '.join(', '.join(names) for names in self.columns)})"


# ---------------------------------------------------------------------------------------------------------- readers


def read_preference(row: Row, origin: str) -> list[Example]:
    """`prompt` with `chosen` and `rejected`: each a text, or a list of messages."""
    given = field(row, "prompt")
    prompt = prompt_of(given)
    prompt, chosen = _answer_after(prompt, given, field(row, "chosen"), "chosen")
    _, rejected = _answer_after(prompt, given, field(row, "rejected"), "rejected")
    return [pair(with_system(row, prompt), chosen, rejected, origin)]


def read_implicit_preference(row: Row, origin: str) -> list[Example]:
    """`chosen` and `rejected` are whole conversations; the prompt is what they share, all before their last answer."""
    prompt, chosen = conversation(field(row, "chosen"), "chosen")
    other_prompt, rejected = conversation(field(row, "rejected"), "rejected")
    if prompt != other_prompt:
        raise BadRowError(
            "with dialogues that differ before the last answer",
            "fields 'chosen' and 'rejected' differ before their last answer, so they do not answer the same prompt",
        )
    return [pair(with_system(row, checked_prompt(prompt, "chosen")), chosen, rejected, origin)]


def read_sharegpt_preference(row: Row, origin: str) -> list[Example]:
    """`conversations` up to the last question, with a `chosen` and a `rejected` message."""
    prompt = with_system(row, messages_of(field(row, "conversations"), "conversations"))
    answers = [plain_answer(field(row, name), name) for name in ("chosen", "rejected")]
    return [pair(checked_prompt(prompt, "conversations"), answers[0], answers[1], origin)]


def read_alpaca_preference(row: Row, origin: str) -> list[Example]:
    """`instruction` (and `input`) with a `chosen` and a `rejected` text."""
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    return [pair(_instruction(row), chosen, rejected, origin)]


def read_messages(row: Row, origin: str) -> list[Example]:
    """`messages`, the last of them the assistant's: a demonstration without a comparison."""
    return [_demonstration(*_answered(row, "messages"), origin)]


def read_sharegpt(row: Row, origin: str) -> list[Example]:
    """`conversations` of {from, value}, the last of them from the assistant."""
    return [_demonstration(*_answered(row, "conversations"), origin)]


def read_alpaca(row: Row, origin: str) -> list[Example]:
    """`instruction` (and `input`, `history`, `system`) with one `output`."""
    return [_demonstration(_instruction(row), text_field(row, "output"), origin)]


def read_prompt_completion(row: Row, origin: str) -> list[Example]:
    """`prompt` with a `completion`: each a text, or a list of messages."""
    return [_demonstration(*_prompt_and_completion(row), origin)]


def read_ranked(row: Row, origin: str) -> list[Example]:
    """`instruction` with a list of answers in `output`, the best first."""
    answers = field(row, "output")
    if not isinstance(answers, list):
        raise wrong_type(answers, "output", "a list of answers, the best first")
    texts = [plain_answer(answer, f"output[{index}]") for index, answer in enumerate(answers)]
    if not texts:
        raise BadRowError("with an empty answer", "field 'output' is an empty list")
    return [ranking(_instruction(row), texts, range(len(texts)), origin)]


def read_scored(row: Row, origin: str) -> list[Example]:
    """`prompt` with `answers` and their `scores`, or with `answers` that are objects with a score or a rank."""
    prompt = with_system(row, prompt_of(field(row, "prompt")))
    answers, scores = field(row, "answers"), row.get("scores")
    if not isinstance(answers, list) or not answers:
        raise wrong_type(answers, "answers", "a list of answers")
    if scores is None:
        texts, places = _scored_objects(answers)
    else:
        if not isinstance(scores, list) or len(scores) != len(answers):
            raise BadRowError(
                "with a wrong 'scores'", f"field 'scores' must be a list of {len(answers)} numbers, one for each answer"
            )
        texts = [plain_answer(answer, f"answers[{index}]") for index, answer in enumerate(answers)]
        places = [-number(score, f"scores[{index}]") for index, score in enumerate(scores)]
    return [ranking(prompt, texts, places, origin)]


def read_kto(row: Row, origin: str) -> list[Example]:
    """One answer with a `label`: true for a good one, which is a demonstration, false for a bad one, which is not."""
    label = field(row, "label")
    is_good = goodness(label)
    if is_good is None:
        raise BadRowError("with a wrong 'label'", f"field 'label' is {str(label)[:40]!r}, and must be true or false")
    if row.get("messages") is not None or row.get("conversations") is not None:
        prompt, answer = _answered(row, "messages" if row.get("messages") is not None else "conversations")
    elif row.get("instruction") is not None:
        prompt, answer = _instruction(row), text_field(row, "output")
    else:
        prompt, answer = _prompt_and_completion(row)
    return [Example(Prompt(prompt), answer if is_good else "", (answer,), origin)]


def read_question_answer(row: Row, origin: str) -> list[Example]:
    """`question` with an `answer`; if its last line begins with ####, what follows is the reference."""
    answer = text_field(row, "answer")
    final = FINAL_ANSWER.fullmatch(answer.splitlines()[-1])
    prompt = with_system(row, (Message("user", text_field(row, "question")),))
    return [Example(Prompt(prompt), answer, (), origin, reference=final[1] if final else "")]


def read_text(row: Row, origin: str) -> list[Example]:
    """`text`: a document, all of it trained in step 1."""
    return [Example(Prompt(()), text_field(row, "text"), (), origin)]


def read_prompt_only(row: Row, origin: str) -> list[Example]:
    """`prompt` without an answer: for step 3."""
    return [Example(Prompt(with_system(row, prompt_of(field(row, "prompt")))), "", (), origin)]


# ------------------------------------------------------------------------------------------------- parts of readers


def _demonstration(prompt: Messages, answer: str, origin: str) -> Example:
    return Example(Prompt(prompt), answer, (), origin)


def _answered(row: Row, name: str) -> tuple[Messages, str]:
    """Prompt and answer of a whole conversation."""
    prompt, answer = cut_answer(messages_of(field(row, name), name), name)
    return checked_prompt(with_system(row, prompt), name), not_empty(answer, name)


def _prompt_and_completion(row: Row) -> tuple[Messages, str]:
    given = field(row, "prompt")
    prompt, answer = _answer_after(prompt_of(given), given, field(row, "completion"), "completion")
    return with_system(row, prompt), not_empty(answer, "completion")


def _answer_after(prompt: Messages, given: Any, value: Any, name: str) -> tuple[Messages, str]:
    """Prompt and answer, which is a text, the assistant's message, or the whole conversation that begins with the
    prompt; that may have a system message before the prompt.

    Args:
        given: the prompt as the row has it: a text that looks like a dialogue may also be one message.
    """
    if isinstance(value, str):
        return prompt, value.strip()
    if not isinstance(value, list):
        raise wrong_type(value, name, "a text or a list of messages")
    before, answer = cut_answer(messages_of(value, name), name)
    if not before:
        return prompt, answer
    turns = stripped(before)
    candidates = [stripped(prompt), [("user", given.strip())] if isinstance(given, str) else []]
    if turns not in candidates and turns[1:] not in candidates:
        raise BadRowError("with another prompt", f"field {name!r} is a conversation that does not begin with 'prompt'")
    return (prompt, answer) if turns == candidates[0] else (checked_prompt(before, name), answer)


def _instruction(row: Row) -> Messages:
    """The earlier turns of `history`, then `instruction` and, a line below, `input`; `system` before all."""
    question, more = text_field(row, "instruction"), optional_text(row, "input")
    last = Message("user", f"{question}\n{more}" if more else question)
    history = row.get("history")
    if not history:
        return with_system(row, (last,))
    if not isinstance(history, list):
        raise wrong_type(history, "history", "a list of [question, answer] pairs")
    turns = []
    for index, item in enumerate(history):
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)):
            raise BadRowError(
                "with a wrong type of 'history'", f"field 'history[{index}]' must be a pair [question, answer]"
            )
        turns += [Message("user", item[0]), Message("assistant", item[1])]
    return checked_prompt(with_system(row, (*turns, last)), "history")


def _scored_objects(answers: Sequence[Any]) -> tuple[list[str], list[float]]:
    """Texts, and places of which the lowest is the best, of objects with a text and all a `score` or all a `rank`."""
    texts = []
    for index, item in enumerate(answers):
        place = f"answers[{index}]"
        if not isinstance(item, dict):
            raise BadRowError("without 'scores'", f"field '{place}' is {type_name(item)} without a score")
        named = next((name for name in TEXT_NAMES if item.get(name) is not None), TEXT_NAMES[0])
        texts.append(plain_answer(field(item, named), f"{place}.{named}"))
    kinds = {"score": -1, "rank": 1}
    kind = next((name for name in kinds if all(item.get(name) is not None for item in answers)), None)
    if kind is None:
        raise BadRowError(
            "without a score of every answer",
            "field 'answers' must have a 'score' in each of its objects, or a 'rank' in each",
        )
    return texts, [kinds[kind] * number(item[kind], f"answers[{i}].{kind}") for i, item in enumerate(answers)]


def _list_in(name: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.get(name), list)


def _no_list_in(name: str) -> Callable[[Row], bool]:
    return lambda row: not isinstance(row.get(name), list)


def unknown_label(rows: Sequence[Row], row_format: RowFormat) -> Any:
    """The first label of rows that have all columns of `kto`, and are of another format as no label says good or bad;
    None where there is none."""
    names, kto = list(FORMATS), FORMATS["kto"]
    found = {name for row in rows for name, value in row.items() if value is not None}
    if names.index(row_format.name) <= names.index(kto.name) or not kto.has_columns(found):
        return None
    return next((label for row in rows if (label := row.get("label")) is not None and str(label).strip()), None)


# ----------------------------------------------------------------------------------------------------- the formats

_ALPACA_MORE = ("input", "history", "system")

FORMATS: dict[str, RowFormat] = {
    row_format.name: row_format
    for row_format in (
        RowFormat(
            "oasst_tree",
            (("message_tree_id", "prompt"),),
            "a tree of messages with replies, which may have ranks",
            read_tree,
            fits=lambda row: isinstance(row.get("prompt"), dict),
        ),
        RowFormat(
            "oasst_messages",
            (("message_tree_id", "message_id", "role", "text"),),
            "messages of such trees, one a row, those of a tree one after the other",
            read_tree,
            optional=("parent_id", "rank", "deleted", "review_result"),
            gather=gather_trees,
        ),
        RowFormat(
            "sharegpt_preference",
            (("conversations", "chosen", "rejected"),),
            "a ShareGPT conversation up to the question, and two answers",
            read_sharegpt_preference,
            optional=("system",),
        ),
        RowFormat(
            "alpaca_preference",
            (("instruction", "chosen", "rejected"),),
            "an instruction and two answers",
            read_alpaca_preference,
            optional=_ALPACA_MORE,
        ),
        RowFormat(
            "preference",
            (("prompt", "chosen", "rejected"),),
            "a prompt and two answers (texts or messages)",
            read_preference,
            optional=("system",),
        ),
        RowFormat(
            "implicit_preference",
            (("chosen", "rejected"),),
            "two whole dialogues that differ in the last answer",
            read_implicit_preference,
            optional=("system",),
        ),
        RowFormat(
            "kto",
            (
                ("messages", "label"),
                ("conversations", "label"),
                ("instruction", "output", "label"),
                ("prompt", "completion", "label"),
            ),
            "one answer that is labelled good (true) or bad (false)",
            read_kto,
            optional=_ALPACA_MORE,
            fits=lambda row: goodness(row.get("label")) is not None,
        ),
        RowFormat(
            "ranked",
            (("instruction", "output"),),
            "an instruction and a list of answers, the best first",
            read_ranked,
            optional=_ALPACA_MORE,
            fits=_list_in("output"),
        ),
        RowFormat(
            "scored",
            (("prompt", "answers", "scores"), ("prompt", "answers")),
            "a prompt, answers and a score of each",
            read_scored,
            optional=("system",),
            fits=_list_in("answers"),
        ),
        RowFormat("messages", (("messages",),), "a conversation", read_messages, optional=("system",)),
        RowFormat("sharegpt", (("conversations",),), "a ShareGPT conversation", read_sharegpt, optional=("system",)),
        RowFormat(
            "alpaca",
            (("instruction", "output"),),
            "an instruction and one answer",
            read_alpaca,
            optional=_ALPACA_MORE,
            fits=_no_list_in("output"),
        ),
        RowFormat(
            "prompt_completion",
            (("prompt", "completion"),),
            "a prompt and one answer (texts or messages)",
            read_prompt_completion,
            optional=("system",),
        ),
        RowFormat(
            "question_answer",
            (("question", "answer"),),
            "a question and its answer",
            read_question_answer,
            optional=("system",),
        ),
        RowFormat("text", (("text",),), "plain text", read_text),
        RowFormat(
            "prompt_only",
            (("prompt",),),
            "a prompt alone",
            read_prompt_only,
            optional=("system",),
            alone=True,
        ),
    )
}


def detect(rows: Sequence[Row]) -> RowFormat | None:
    """The first format of `FORMATS` whose columns are among those of the rows, and of whose types one of them is.

    A column without any value counts as absent (parquet and csv give every row all columns).
    """
    found = {name for row in rows for name, value in row.items() if value is not None}
    for row_format in FORMATS.values():
        if row_format.has_columns(found) and any(row_format.fits(row) for row in rows):
            return row_format
    return None


def other_format(row: Row, own: RowFormat) -> RowFormat | None:
    """The format that a row of a dataset of format `own` clearly has instead, or None: it may also be a bad row.

    A row that has the columns of `own` has another format only if that one needs more columns, or the same with values
    of other types.
    """
    is_past_own = False
    for row_format in FORMATS.values():
        if row_format is own:
            if own.matches(row):
                return None
            is_past_own = True
        elif row_format.matches(row) and (
            not is_past_own or own.missing(row) or set(row_format.columns) & set(own.columns)
        ):
            if row_format.gather is None:
                try:
                    row_format.read(row, "")
                except BadRowError:
                    continue
            return row_format
    return None


def nearest_format(columns: Sequence[str]) -> tuple[RowFormat, dict[str, str]]:
    """The format of which fewest columns are missing, and for each of these what may be it under another name ("").

    Of equally near ones it is the plainest, and where no column is like any of a format's, a usual one of so many
    columns.
    """
    plain = {name.strip().lower(): name for name in columns}

    def guess(name: str) -> str:
        usual = [plain[other] for other in OTHER_NAMES.get(name, ()) if other in plain]
        near = [plain[name]] if name in plain else difflib.get_close_matches(name, columns, n=1)
        return next(iter([*near, *usual]), "")

    def distance(row_format: RowFormat) -> tuple[float, int]:
        missing = row_format.missing(columns)
        wanted = min(row_format.columns, key=lambda names: len(set(names) - set(columns)))
        likely = sum(1.0 if name in plain else 0.6 * bool(guess(name)) for name in missing)
        return round((len(missing) - likely) / len(wanted), 6), -len(wanted)

    nearest = min((row_format for row_format in reversed(FORMATS.values()) if not row_format.alone), key=distance)
    if distance(nearest)[0] >= 1:
        nearest = FORMATS[USUAL_FORMATS.get(len(columns), "preference")]
    return nearest, {name: guess(name) for name in nearest.missing(columns)}

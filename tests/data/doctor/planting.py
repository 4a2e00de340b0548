"""A seeded set of clean conversations, and one small function for each kind of fault that can be planted in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NUM_ROWS = 500

_BEGINNINGS = "bar bel cor dan del fen gar hol kim lan lor mar men nor pal ran rel sal sen tam tor van vel wen yor zan"
_MIDDLES, _ENDS = "a e i o u ai ea", "ck d ft g l lt m nd n p r rn s st t x"
_PARTS = tuple(tuple(part.split()) for part in (_BEGINNINGS, _MIDDLES, _ENDS))


class Words:
    """Sentences of made-up words: no two of them are alike, and none looks like anything that a rule looks for."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def word(self) -> str:
        """One of some three thousand."""
        return "".join(self.random.choice(part) for part in _PARTS)

    def sentence(self, low: int = 9, high: int = 22, end: str = ".") -> str:
        """As many words, a capital letter, a full stop."""
        words = " ".join(self.word() for _ in range(self.random.randint(low, high)))
        return words.capitalize() + end

    def pair(self) -> Row:
        """A row of the format "preference"; of each pair either answer may be the longer one."""
        return {
            "prompt": self.sentence(9, 16, "?"),
            "chosen": self.sentence(),
            "rejected": self.sentence(),
        }

    def clean(self, num_rows: int = NUM_ROWS) -> list[Row]:
        """Rows without a fault."""
        return [self.pair() for _ in range(num_rows)]


@dataclass(frozen=True)
class Plant:
    """A kind of fault.

    Attributes:
        check: what the doctor calls it.
        rows: how many rows to plant.
        fault: what becomes of a row.
        severity: of the finding.
        brings: other checks that may rightly speak of such rows too.
        says: part of the message, where several kinds share a check.
    """

    check: str
    rows: int
    fault: Callable[[Row, Words], Row]
    severity: str = "warning"
    brings: tuple[str, ...] = ()
    says: str = ""

    @property
    def name(self) -> str:
        """Of the kind, in test names."""
        return self.check + (f": {self.says}" if self.says else "")


def _with(name: str, change: Callable[[str, Words], str]) -> Callable[[Row, Words], Row]:
    return lambda row, words: {**row, name: change(row[name], words)}


def _inside(what: str) -> Callable[[str, Words], str]:
    """Put between two words."""
    return lambda text, _: text.replace(" ", f" {what} ", 1)


def _key(prefix: str, length: int) -> Callable[[str, Words], str]:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

    def change(text: str, words: Words) -> str:
        key = prefix + "".join(words.random.choice(letters) for _ in range(length))
        return text.replace(" ", f" {key} ", 1)

    return change


def _unordered(row: Row, words: Words) -> Row:
    prompt = [{"role": "user", "content": row["prompt"]}, {"role": "user", "content": words.sentence()}]
    return {**row, "prompt": prompt}


CHOSEN = "chosen"

ROW_PLANTS: tuple[Plant, ...] = (
    Plant("bad_rows", 3, lambda row, _: {k: v for k, v in row.items() if k != "rejected"} | {"rejected": None}, "error",
          says="without"),
    Plant("bad_rows", 3, _with(CHOSEN, lambda *_: "  "), "error", says="empty"),
    Plant("bad_rows", 3, lambda row, _: {**row, "rejected": row[CHOSEN]}, "error", says="equal"),
    Plant("bad_rows", 3, lambda row, _: {**row, CHOSEN: 7}, "error", says="type"),
    Plant("invisible_answer", 2, _with(CHOSEN, lambda *_: "\u200b\u200b"), "error"),
    Plant("mojibake", 8, _with(CHOSEN, _inside("caf\u00e9".encode().decode("latin-1")))),
    Plant("mojibake", 8, _with("prompt", _inside("don\u2019t".encode().decode("cp1252"))), says="don"),
    Plant("replacement_characters", 8, _with(CHOSEN, _inside("caf\ufffd"))),
    Plant("control_characters", 8, _with(CHOSEN, _inside("\x1b[0m"))),
    Plant("invisible_characters", 14, _with("prompt", _inside("so\u200bft"))),
    Plant("secrets", 1, _with("prompt", _key("AKIA", 16)), says="AWS"),
    Plant("secrets", 1, _with(CHOSEN, _key("ghp_", 36)), says="GitHub"),
    Plant("secrets", 1, _with(CHOSEN, _inside("-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq98xYzKlmN")),
          says="private key"),
    Plant("email_addresses", 20, _with("prompt", lambda text, words: f"{text} {words.word()}@{words.word()}.org")),
    Plant("control_token_text", 8, _with(CHOSEN, lambda text, _: text + "</s>")),
    Plant("turns_in_answers", 8, _with(CHOSEN, lambda text, words: f"{text}\n\nHuman: {words.sentence()}")),
    Plant("html", 14, _with(CHOSEN, lambda text, _: f"<p>{text}</p>")),
    Plant("only_a_link", 8, _with(CHOSEN, lambda text, words: f"https://{words.word()}.org/{words.word()}")),
    Plant("written_objects", 14, _with(CHOSEN, lambda text, _: repr([text]))),
    Plant("written_messages", 8, _with(CHOSEN, lambda text, _: repr([{"role": "assistant", "content": text}]))),
    Plant("escaped_line_breaks", 8, _with(CHOSEN, lambda text, words: f"{text}\\n\\n{words.sentence()}")),
    Plant("placeholder_answers", 5, _with(CHOSEN, lambda *_: "nan")),
    Plant("unfilled_templates", 8, _with("prompt", _inside("{question}"))),
    Plant("repetition", 5, _with(CHOSEN, lambda _, words: f"{words.word()} {words.word()} " * 60)),
    Plant("equal_answers", 8, lambda row, _: {**row, "rejected": row[CHOSEN].upper()}),
    Plant("answer_is_prompt", 12, lambda row, _: {**row, "rejected": row["prompt"]}),
    Plant("answer_begins_with_prompt", 14, lambda row, _: {**row, CHOSEN: f"{row['prompt']} {row[CHOSEN]}"}),
    Plant("turn_order", 8, _unordered),
    Plant("short_prompts", 8, _with("prompt", lambda _, words: words.random.choice("abcdefgh")),
          brings=("contradictions",)),
)  # fmt: skip
"""Faults of single rows."""


@dataclass(frozen=True)
class Planted:
    """A set of rows, and which of them have which fault.

    Attributes:
        rows: all of them.
        where: kind of fault -> numbers of rows (counted from 1).
    """

    rows: list[Row]
    where: dict[str, list[int]] = field(default_factory=dict)


def plant(plants: tuple[Plant, ...], seed: int, num_rows: int = NUM_ROWS) -> Planted:
    """Clean rows, some of which are given the faults, each row one at most."""
    words = Words(seed)
    rows = words.clean(num_rows)
    free = list(range(num_rows))
    words.random.shuffle(free)
    where = {}
    for kind in plants:
        chosen, free = sorted(free[: kind.rows]), free[kind.rows :]
        for number in chosen:
            rows[number] = kind.fault(rows[number], words)
        where[kind.name] = [number + 1 for number in chosen]
    return Planted(rows, where)


# ------------------------------------------------------------------------------ faults that many rows have together


def equal_rows(words: Words) -> list[Row]:
    """One row in ten twice."""
    rows = words.clean()
    return rows + [dict(row) for row in rows[::10]]


def near_duplicates(words: Words) -> list[Row]:
    """One row in ten once more with a word added to the answer."""
    rows = words.clean()
    return rows + [{**row, "chosen": f"{row['chosen']} {words.word()}"} for row in rows[::10]]


def near_leakage(words: Words) -> list[Row]:
    """Every prompt once more with a word added; the prompt of each is long."""
    rows = [{**words.pair(), "prompt": words.sentence(40, 50, "?")} for _ in range(250)]
    again = [{**words.pair(), "prompt": f"{row['prompt']} {words.word()}"} for row in rows]
    return rows + again


def leakage_but_for_punctuation(words: Words) -> list[Row]:
    """One prompt in five once more, with other punctuation."""
    rows = words.clean()
    return rows + [{**words.pair(), "prompt": row["prompt"].replace("?", " !")} for row in rows[::5]]


def contradictions(words: Words) -> list[Row]:
    """A few rows once more with chosen and rejected swapped."""
    rows = words.clean()
    return rows + [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[::50]]


def length_bias(words: Words) -> list[Row]:
    """The longer answer is the better one, nine times in ten."""
    rows = []
    for number, row in enumerate(words.clean()):
        short, long = sorted((row["chosen"], row["rejected"]), key=len)
        rows.append({**row, "chosen": long, "rejected": short} if number % 10 else row)
    return rows


def form_bias(words: Words) -> list[Row]:
    """Every rejected answer has an exclamation mark."""
    return [{**row, "rejected": row["rejected"].rstrip(".") + "!"} for row in words.clean()]


def label_imbalance(words: Words) -> list[Row]:
    """One bad answer in twenty-five."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 25 != 0}
        for number, row in enumerate(words.clean())
    ]


def one_prompt(words: Words) -> list[Row]:
    """One prompt in ten is the same."""
    rows = words.clean()
    return [{**row, "prompt": rows[0]["prompt"]} if number % 10 == 0 else row for number, row in enumerate(rows)]


def one_opening(words: Words) -> list[Row]:
    """Three conversations in five begin with the same question."""
    opening = words.sentence(9, 16, "?")
    rows = []
    for number, row in enumerate(words.clean()):
        texts = [opening if number % 5 < 3 else words.sentence(9, 16, "?"), words.sentence(), row["prompt"]]
        turns = zip(("user", "assistant", "user"), texts, strict=True)
        rows.append({**row, "prompt": [{"role": role, "content": text} for role, text in turns]})
    return rows


def one_answer(words: Words) -> list[Row]:
    """One good answer in eight is the same."""
    rows = words.clean()
    return [{**row, "chosen": rows[0]["chosen"]} if number % 8 == 0 else row for number, row in enumerate(rows)]


def cut_answers(words: Words) -> list[Row]:
    """Answers end at 150 characters, wherever that is."""
    return [
        {"prompt": row["prompt"], "completion": " ".join([row["chosen"], row["rejected"], words.sentence()])[:150]}
        for row in words.clean()
    ]


def refusals(words: Words) -> list[Row]:
    """Every second answer declines."""
    return [
        {"prompt": row["prompt"], "completion": ("I'm sorry, but no. " if number % 2 else "") + row["chosen"]}
        for number, row in enumerate(words.clean())
    ]


def unfinished_answers(words: Words) -> list[Row]:
    """Every third answer stops within a sentence, at no length in particular."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"] + (" " + words.sentence(12)[:-3]) * (number % 3 == 0)}
        for number, row in enumerate(words.clean())
    ]


def answer_language(words: Words) -> list[Row]:
    """Every fifth answer is Chinese, and no question is."""
    chinese = "这个问题的答案取决于很多不同的因素，需要仔细考虑。"
    return [
        {"prompt": row["prompt"], "completion": f"{chinese}{number}。" if number % 5 == 0 else row["chosen"]}
        for number, row in enumerate(words.clean())
    ]


def ties(words: Words) -> list[Row]:
    """Two answers in three rows of four have the same score."""
    return [
        {"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"]], "scores": [1, 1 - (n % 4 == 0)]}
        for n, row in enumerate(words.clean())
    ]


SET_PLANTS: dict[str, Callable[[Words], list[Row]]] = {
    plant.__name__: plant
    for plant in (
        equal_rows,
        near_duplicates,
        near_leakage,
        leakage_but_for_punctuation,
        contradictions,
        length_bias,
        form_bias,
        label_imbalance,
        one_prompt,
        one_opening,
        one_answer,
        cut_answers,
        refusals,
        unfinished_answers,
        answer_language,
        ties,
    )
}
"""Faults that only many rows together have; each is called what the doctor calls it."""

BROUGHT: dict[str, set[str]] = {
    "contradictions": {"near_duplicates"},
    "near_duplicates": {"near_leakage"},
    "cut_answers": {"unfinished_answers"},
}
"""What else may rightly be said of such a set."""


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    """One row a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path

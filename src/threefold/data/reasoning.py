"""Chain-of-thought prompting as a data option, and final answers: how they are asked for, found and compared.

A prompt asks for the steps and, on the last line, the answer alone, after worked examples if the recipe wants some
(Wei et al. 2022, "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models"). What a model then answers
can be checked against the data's final answer without a reward model (gsm8k: Cobbe et al. 2021).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from threefold.config.data import SourceSection
from threefold.errors import ConfigError, DataError
from threefold.types import Example, Message, Prompt

Language = Literal["english", "chinese"]


@dataclass(frozen=True)
class WorkedExample:
    """A question with the steps to its final answer."""

    question: str
    steps: str
    final_answer: str


@dataclass(frozen=True)
class _Wording:
    """How a language asks for reasoning."""

    instruction: str
    question: str
    answer: str
    final_answer: str
    worked: tuple[WorkedExample, ...]


_ENGLISH = _Wording(
    instruction=(
        "Work out the answer to the question step by step. Then write one last line that begins with "
        '"Final answer:" and has nothing after it but the answer.'
    ),
    question="Question: ",
    answer="Answer:\n",
    final_answer="Final answer: ",
    worked=(
        WorkedExample(
            "A baker fills 6 trays with 8 rolls each and sells 35 rolls in the morning. How many rolls are left?",
            "6 trays with 8 rolls each are 6 * 8 = 48 rolls.\nAfter the morning 48 - 35 = 13 rolls are left.",
            "13",
        ),
        WorkedExample(
            "A train ticket costs $24, and children pay half. What do two adults and three children pay?",
            "Two adults pay 2 * 24 = 48 dollars.\nA child pays 24 / 2 = 12 dollars, three pay 3 * 12 = 36 dollars.\n"
            "Together they pay 48 + 36 = 84 dollars.",
            "84",
        ),
        WorkedExample(
            "Nora reads 15 pages on each of 4 evenings. Her book has 200 pages. What percentage has she read?",
            "In 4 evenings she reads 4 * 15 = 60 pages.\nOf 200 pages that is 60 / 200 = 0.3, which is 30 percent.",
            "30",
        ),
        WorkedExample(
            "A tank holds 90 litres. It loses 2 litres an hour and gets 5 litres an hour. It is empty now. After how "
            "many hours is it full?",
            "Each hour it gains 5 - 2 = 3 litres.\n90 litres take 90 / 3 = 30 hours.",
            "30",
        ),
    ),
)
_CHINESE = _Wording(
    instruction="请一步一步地推导下面问题的答案。最后另起一行，以“最终答案：”开头，后面只写答案。",
    question="问题：",
    answer="解答：\n",
    final_answer="最终答案：",
    worked=(
        WorkedExample(
            "果园里有 7 排苹果树，每排 9 棵，其中 14 棵今年没有结果。结果的苹果树有多少棵？",
            "一共有 7 × 9 = 63 棵苹果树。\n结果的有 63 - 14 = 49 棵。",
            "49",
        ),
        WorkedExample(
            "一支钢笔 18 元，一个笔记本的价钱是钢笔的三分之一。买 2 支钢笔和 4 个笔记本要多少元？",
            "一个笔记本 18 ÷ 3 = 6 元。\n2 支钢笔 2 × 18 = 36 元，4 个笔记本 4 × 6 = 24 元。\n一共 36 + 24 = 60 元。",
            "60",
        ),
        WorkedExample(
            "小林每分钟走 70 米，走了 12 分钟后离学校还有 160 米。他家离学校多少米？",
            "12 分钟走了 70 × 12 = 840 米。\n他家离学校 840 + 160 = 1000 米。",
            "1000",
        ),
        WorkedExample(
            "图书馆有 250 本书，借出了百分之四十，又还回来 15 本。现在馆里有多少本书？",
            "借出了 250 × 0.4 = 100 本，剩下 250 - 100 = 150 本。\n还回 15 本后有 150 + 15 = 165 本。",
            "165",
        ),
    ),
)
WORDINGS: dict[Language, _Wording] = {"english": _ENGLISH, "chinese": _CHINESE}

_CALCULATOR = re.compile(r"<<[-+*/().,%$ \d]*=[-+*/().,%$= \d]*>>")
"""gsm8k's notes for a calculator, as in 48/2 = <<48/2=24>>24; not the shifts of a program."""
_OPENING = r"^[^\w\n]*(?:(?:so|thus|hence|therefore|所以|因此)[,，]?\s*)?(?:(?:the|my|our)\s+)?"
_ANSWER = r"[:：\s*_]*(?P<answer>[^\s:：*_][^\n]*)"
_STATEMENTS = (
    re.compile(rf"(?:final\s+answer|最终答案)[\s*_]*(?:(?:is|是|为)[\s*_]*)?[:：]{_ANSWER}", re.IGNORECASE),
    re.compile(rf"{_OPENING}(?:final\s+answer|最终答案)[\s*_]*(?:is\b|是|为){_ANSWER}", re.IGNORECASE | re.MULTILINE),
    re.compile(r"####[ \t]*(?P<answer>[^\s#][^\n]*)"),
)
_BOXED_OR_BRACE = re.compile(r"\\boxed\s*\{|[{}]")

_DASHES = "‐‑‒–—―−-"
_LETTER = r"[^\W\d_\u3000-\u9fff\uac00-\ud7a3]"
"""A letter of a word; Chinese, Japanese and Korean stand beside a number as a space does."""
_MARKS = {
    char: {"<super>": "^", "<sub>": "_"}.get(unicodedata.decomposition(char).split()[0], " ")
    for char in map(chr, (*range(0x80, 0x3400), *range(0x1F100, 0x1F10B)))
    if not char.isdecimal() and re.search(r"\d", unicodedata.normalize("NFKC", char))
}
"""What has to stand before a character (², ½, ①, ㎡) that NFKC makes digits of, if they are not to join what it is
after."""
_JOINING = re.compile(rf"(?<=\w)[{''.join(_MARKS)}]")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_TYPESETTING = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\{?\\circ\b\}?")
_CURRENCY = re.compile(r"\b(?:[A-Z]{1,2}(?=\$)|(?:USD|RMB|CNY|EUR|GBP|Rs\.?) ?(?=\.?\d))")
"""The letters of one: US$5, RMB 5."""
_MINUS = re.compile(
    rf"(?:[{_DASHES}]|(?:(?<=[=≈:(])|(?<=[=≈:(]\ )|(?<=\bis\ ))[{_DASHES}]\ |"
    r"(?<!\d\ )\b(?:minus|negative)\s+|(?<!正)[负負]\s*|零下\s*)[$€£¥*_\\]{0,4}(?=\.?\d)",
    re.IGNORECASE | re.VERBOSE,
)
"""A sign: a dash that touches its number, or has nothing to be taken from; or a word."""
_UNIT_POWER = re.compile(
    rf"(?<!{_LETTER})([cdkm]?m|in|inch(?:es)?|ft|foot|feet|yds?|yards?|mi|miles?|units?|米)\^?[23](?!\d)"
)
_SYMBOLS = re.compile(r"\\[,;! ()\[\]]|(?<!\d)[$€£¥%\\{}*_`]+|[$€£¥%\\{}*_`]++(?!\d)")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?:(?<!{_LETTER})(?<![\d)])[-+])?(?:\d+ (?=\d+ ?/ ?\d))?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?: ?/ ?\d+(?:\.\d+)?)?"
)
_WHOLE_NUMBER = re.compile(
    rf"(?P<sign>[+{_DASHES}]?)\s*(?:(?P<whole>{_DIGITS})\s+(?=\d+\s*/))?"
    rf"(?P<top>{_DIGITS}(?:\.\d*)?|\.\d+)(?:\s*/\s*(?P<bottom>\d+(?:\.\d+)?))?"
)
_MAGNITUDE = (
    r"(?:hundred|thousand|million|billion|trillion|lakh|crore|dozen|half|halves|quarter|(?:bn|mn|tn)\b|"
    r"(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth)s\b|百(?!分)|千(?![克米瓦卡])|[万萬亿億兆])"
)
_TAIL = re.compile(
    rf"{_LETTER}+|[\s*_$\\)-]{{0,6}}(?:and a )?{_MAGNITUDE}\w*| (?-i:[kKMBT])\b|[十半打]|\^\S{{1,9}}", re.IGNORECASE
)
_CHANGED = re.compile(rf"{_MAGNITUDE}|(?<!{_LETTER})pi\b|(?<!百)分之|\bbelow zero\b", re.IGNORECASE)
"""What makes another number of the number in a text, wherever it stands."""
_CHANGED_BEFORE = re.compile(
    rf"(?:{_LETTER}|[十百]|(?:[+±<>≤≥≠^/×÷√{_DASHES}]|\b(?:not|than|minus|negative)|n['’]t|不是|[负負]|零下) ?)\Z",
    re.IGNORECASE,
)
_CHANGED_AFTER = re.compile(
    rf" ?(?:[!^/×÷+±‰√]|[{_DASHES}]? ?(?![aAcCdFghJLlmNstVW])[a-zA-Zπ](?!{_LETTER})|[^\W\d]?半|[十打])"
)
"""Among it a letter alone that is no unit: 5K, 5x."""
_NEAR = 20
"""Characters before a number that are looked at."""
_LONGEST_NUMBER = 100
"""Characters: longer digits are no answer, and turning them into a number takes long."""


def with_reasoning(example: Example, section: SourceSection, worked: tuple[WorkedExample, ...] = ()) -> Example:
    """The example with a prompt that asks for steps and a final answer, and answers that give it in the asked form.

    The last message of the user becomes the instruction, `section.few_shot` worked examples, and what it was. An
    answer's final answer (`#### 72` in gsm8k) moves to a last line `Final answer: 72` or `最终答案：72`; a
    demonstration that states none gets the reference there.

    Args:
        example: of a source with `reasoning`.
        section: its source.
        worked: the examples to show, from `section.few_shot_file` by `read_worked_examples`; without them the built-in
            ones of the language.

    Raises:
        DataError: the prompt does not end with a user's message, or a demonstration has no final answer; without the
            row's origin.
        ConfigError: more examples are asked for than there are.
    """
    assert section.reasoning != "none"
    assert worked or not (section.few_shot and section.few_shot_file), (
        "few_shot_file is read by the caller: read_worked_examples"
    )
    messages = example.prompt.messages
    if not messages or messages[-1].role != "user":
        raise DataError(
            f'reasoning = "{section.reasoning}" is for questions, and this row has no message of a user to answer: set '
            'reasoning = "none"'
        )
    question = messages[-1].content.strip()
    question = _preface(section.reasoning, section.few_shot, worked, question) + question
    demonstration = example.demonstration
    if demonstration:
        demonstration = _in_form(demonstration, section.reasoning, example.reference)
        if not demonstration:
            raise DataError(
                f'reasoning = "{section.reasoning}" needs answers with a final answer ("#### 72" as in gsm8k, '
                '"\\boxed{72}" or "Final answer: 72"), and this row has none: set reasoning = "none"'
            )
    answers = tuple(_in_form(answer, section.reasoning) or answer for answer in example.answers)
    prompt = Prompt((*messages[:-1], Message("user", question)))
    return replace(example, prompt=prompt, demonstration=demonstration, answers=answers, original=example.prompt)


def read_worked_examples(section: SourceSection, rows: Iterable[Mapping[str, Any]]) -> tuple[WorkedExample, ...]:
    """The first `section.few_shot` rows of `section.few_shot_file`, which have `question` and `answer` as gsm8k has.

    Raises:
        DataError: a row lacks one of them, or its answer states no final answer; or there are too few rows.
    """
    worked: list[WorkedExample] = []
    for number, row in enumerate(rows, start=1):
        if len(worked) == section.few_shot:
            break
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise DataError(
                f"{section.few_shot_file} row {number}: a worked example needs the texts `question` and `answer`"
            )
        steps, final = _steps_and_answer(answer)
        if not final:
            raise DataError(
                f'{section.few_shot_file} row {number}: its answer states no final answer: end it with "#### 72" or '
                '"Final answer: 72"'
            )
        worked.append(WorkedExample(question.strip(), steps, final))
    if len(worked) < section.few_shot:
        raise DataError(
            f"{section.few_shot_file}: has {len(worked)} worked examples, and few_shot = {section.few_shot}: lower it"
        )
    return tuple(worked)


@lru_cache(maxsize=64)
def _preface(language: Language, count: int, worked: tuple[WorkedExample, ...], question: str) -> str:
    """What stands before the question; a worked example that is the question itself is not shown."""
    wording = WORDINGS[language]
    known = worked or wording.worked
    if count > len(known):
        raise ConfigError(
            f"data.sources.few_shot = {count}: there are {len(known)} built-in worked examples in {language}; lower "
            "it, or give more in few_shot_file"
        )
    shown = "".join(
        f"{wording.question}{one.question}\n{wording.answer}{one.steps}\n{wording.final_answer}{one.final_answer}\n\n"
        for one in known[:count]
        if one.question.split() != question.split()
    )
    return f"{wording.instruction}\n\n{shown}{wording.question}"


def _in_form(answer: str, language: Language, reference: str = "") -> str:
    """The answer with its final answer on a last line, as the prompt asks for it; "" where it states none."""
    steps, final = _steps_and_answer(answer)
    final = final or reference
    return f"{steps}\n{WORDINGS[language].final_answer}{final}".lstrip() if final else ""


def _steps_and_answer(text: str) -> tuple[str, str]:
    """A worked answer without and with only its final answer; the latter "" where it states none."""
    text = _CALCULATOR.sub("", text).strip()
    found = _last_statement(text)
    if found is None:
        return text, ""
    start, end, final = found
    is_last_line = not text[end:].strip() and not text[start:].startswith("\\boxed")
    return (text[:start].rstrip(" \t\n*_#") if is_last_line else text), final


def final_answer(text: str) -> str:
    """The final answer that a text gives; "" if none.

    The last statement of one counts: "Final answer: 72", "最终答案：72", "#### 72", "\\boxed{72}", or a line that
    begins with "The final answer is 72" or "最终答案是 72". A text without gives its last number, with its sign and
    with what makes another number of it ("-5", "3 million", "x2").
    """
    found = _last_statement(text)
    if found is not None:
        return found[2]
    text = _UNIT_POWER.sub(r"\1", _normal(text))
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if last is None:
        return ""
    joined = re.search(rf"(?:{_LETTER}|[\d^√])*\Z", text[max(0, last.start() - _NEAR) : last.start()])
    tail = _TAIL.match(text, last.end())
    return (joined[0] if joined else "") + last[0] + (tail[0].rstrip() if tail else "")


def _last_statement(text: str) -> tuple[int, int, str] | None:
    """Where the last explicit final answer of a text begins and ends, and what it is."""
    found = [
        (match.start("answer"), -match.start(), match.end("answer"), match.end())
        for pattern in _STATEMENTS
        for match in pattern.finditer(text)
    ]
    for answer_start, negative_start, answer_end, end in sorted([*found, *_boxes(text)], reverse=True):
        start = -negative_start
        final = _bare(text[answer_start:answer_end], is_prose=not text.startswith("\\boxed", start))
        if final:
            return start, end, final
    return None


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """For each \\boxed{72} where its content begins, minus where it begins itself, and where the two end."""
    found, is_open = list[tuple[int, int, int, int]](), list[re.Match[str]]()
    for brace in _BOXED_OR_BRACE.finditer(text):
        if brace[0] != "}":
            is_open.append(brace)
        elif is_open and (opened := is_open.pop())[0] != "{":
            found.append((opened.end(), -opened.start(), brace.start(), brace.end()))
    return found


def _bare(answer: str, is_prose: bool) -> str:
    """An answer without the marks around it; 7! is an exclamation in prose, and a factorial in a box."""
    return answer.strip().lstrip('*_`"“ ').rstrip('*_`"” .。;；,，' + "!！" * is_prose).strip()


def same_answer(first: str, second: str) -> bool:
    """Whether two final answers are the same.

    Numbers are compared by value, exactly: "1,000.0", "$1000" and "1000" are one, as are "1/2" and "0.5", or "-5",
    "–5", "minus 5" and "负5"; "%" is left out like a currency ("50%" is "50", not "0.5"). A text with one number in it,
    such as "72 clips" or "5 m²", stands for that number where the other is a number, unless something in it may make
    another number of it: a magnitude ("3 million", "5K", "1.2万"), an operation ("7!", "10²", "5x"), a word that it is
    part of ("B2"). Such texts, and numbers in words ("seventy-two", "七十二"), never equal a number. Texts neither of
    which is a number are compared without case, width, outer punctuation and the spaces beside digits. "" equals
    nothing.
    """
    one, other = _plain(first), _plain(second)
    if not one or not other:
        return False
    numbers = _value(one), _value(other)
    if numbers == (None, None):
        return _words(one) == _words(other)
    values = [_only_number(text) if value is None else value for text, value in zip((one, other), numbers, strict=True)]
    return values[0] is not None and values[0] == values[1]


def _normal(text: str) -> str:
    """In one width, with one kind of minus and slash, and without the typesetting that takes numbers apart."""
    text = _JOINING.sub(lambda match: _MARKS[match[0]] + match[0], text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = re.sub(r"(?<=\d)\\(?=[dt]?frac)", r" \\", text)
    text = _DEGREES.sub("", _TYPESETTING.sub(r" \1", _FRACTION.sub(r"\1\2/\3\4", text)))
    text = _CURRENCY.sub("", text)
    return _MINUS.sub("-", text)


def _plain(text: str) -> str:
    """Normal, and without currencies, marks and outer punctuation."""
    return " ".join(_MINUS.sub("-", _SYMBOLS.sub("", _normal(text))).split()).rstrip(".。;,").strip()


def _value(text: str) -> Fraction | None:
    """The number that a text is, if it is one."""
    match = _WHOLE_NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None:
        return None
    bottom = Fraction(match["bottom"] or 1)
    if bottom == 0:
        return None
    value = Fraction(match["top"].replace(",", "")) / bottom + Fraction((match["whole"] or "0").replace(",", ""))
    return value if match["sign"] in ("", "+") else -value


def _only_number(text: str) -> Fraction | None:
    """The one number in a text; None where there are several or none, or it may be part of another number."""
    text = _UNIT_POWER.sub(r"\1", text)
    numbers = list(islice(_NUMBER.finditer(text), 2))
    value = _value(numbers[0][0]) if len(numbers) == 1 else None
    if value is None:
        return None
    start, end = numbers[0].span()
    if _CHANGED_BEFORE.search(text[max(0, start - _NEAR) : start]) or _CHANGED_AFTER.match(text, end):
        return None
    return None if _CHANGED.search(text) else value


def _words(text: str) -> str:
    beside_digits = re.sub(r"(?<=\d) (?!\d)|(?<!\d) (?=\d)", "", text.casefold())
    return beside_digits.strip(" .。!！?？\"'“”‘’()[]")

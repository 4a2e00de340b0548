"""Checks of one row at a time: a table of rules, each counted over the rows of a source.

A rule becomes a finding where it holds for `min_count` rows and for `min_share` of those that it applies to. Real data
have a few of everything; what is below the threshold is counted in the statistics only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from threefold.data.doctor import patterns
from threefold.data.doctor.findings import Finding, Severity, Tally, clip
from threefold.data.doctor.rows import Row

Where = Literal["texts", "answers", "prompt"]


@dataclass(frozen=True)
class TextRule:
    """A fault that one text can have.

    Attributes:
        check: its short name.
        where: which texts of a row: all, the answers or the prompt.
        find: what is wrong within a text, as it is shown; "" where nothing is.
        what: "N rows …", completed.
        fix: what to do.
        min_share, min_count: from how many rows on it is a finding.
        max_share: up to how many; what more rows have is meant to be so.
        conversations_only: plain text is not looked at.
    """

    check: str
    where: Where
    find: Callable[[str], str]
    what: str
    fix: str
    severity: Severity = "warning"
    min_share: float = 0.01
    min_count: int = 3
    max_share: float = 1.0
    conversations_only: bool = False

    def found(self, row: Row) -> str:
        """What is wrong with the row."""
        if self.where != "answers" and (found := self.find(row.prompt)):
            return found
        if self.where != "prompt":
            for answer in row.answers:
                if found := self.find(answer):
                    return found
        return ""


TEXT_RULES: tuple[TextRule, ...] = (
    TextRule(
        "invisible_answer", "answers", lambda text: "" if patterns.visible(text) else clip(text),
        "have an answer of invisible characters only", "leave them out", severity="error", min_share=0, min_count=1,
    ),
    TextRule(
        "mojibake", "texts", patterns.mojibake,
        "hold text whose encoding was mistaken", "write the file again from its source, read as UTF-8",
    ),
    TextRule(
        "replacement_characters", "texts", patterns.replacement_character,
        "hold U+FFFD, which stands for bytes that could not be read", "write the file again from its source",
    ),
    TextRule(
        "control_characters", "texts", lambda text: (found := patterns.control_character(text)) and repr(found),
        "hold control characters", "take them out",
    ),
    TextRule(
        "invisible_characters", "texts", patterns.invisible_character,
        "hold zero-width or direction characters", "take them out, unless the language needs them", min_share=0.02,
    ),
    TextRule(
        "secrets", "texts", patterns.secret,
        "hold what looks like a key or password", "take it out and withdraw the key: a model repeats what it has read",
        min_share=0, min_count=1,
    ),
    TextRule(
        "email_addresses", "texts", patterns.email,
        "hold e-mail addresses", "replace them, unless they are meant to be learnt", min_share=0.03,
    ),
    TextRule(
        "control_token_text", "texts", patterns.control_text,
        "spell a control token of a chat template, which is then trained as plain text",
        "take it out: the template adds its own", conversations_only=True,
    ),
    TextRule(
        "turns_in_answers", "answers", patterns.turn_in_answer,
        "have an answer in which another turn begins", "cut these conversations into turns, or the answers before it",
        conversations_only=True,
    ),
    TextRule(
        "html", "texts", patterns.html,
        "hold HTML tags or entities", "turn them into plain text", min_share=0.02,
    ),
    TextRule(
        "only_a_link", "answers", patterns.only_a_link,
        "have an answer that is a link and nothing else", "leave them out", conversations_only=True,
    ),
    TextRule(
        "written_messages", "answers", patterns.written_message,
        "have an answer that is a message written as text, its role with it", "take the content out of it, or name "
        "another column in the source's mapping", conversations_only=True,
    ),
    TextRule(
        "written_objects", "answers", patterns.written_object,
        "have an answer that is a list or object written as text, and most have not", "take the text out of it, or "
        "name another column in the source's mapping", min_share=0.02, max_share=0.5, conversations_only=True,
    ),
    TextRule(
        "escaped_line_breaks", "texts", patterns.escaped_line_break,
        r'hold the two characters "\n" instead of a line break', "the file was escaped twice: write it again",
    ),
    TextRule(
        "placeholder_answers", "answers", patterns.placeholder_answer,
        "have an answer that stands for a missing one", "leave them out", min_share=0.005, conversations_only=True,
    ),
    TextRule(
        "unfilled_templates", "texts", patterns.unfilled_template,
        "hold a field of a template that was not filled in", "fill it in, or leave these rows out",
    ),
    TextRule(
        "repetition", "answers", patterns.repetition,
        "have an answer that repeats one character or phrase", "leave them out", min_share=0.005,
    ),
    TextRule(
        "unfinished_answers", "answers", patterns.unfinished,
        "have an answer that stops within a sentence", "they were probably cut at a length: take the whole ones, or "
        "leave them out", min_share=0.15, conversations_only=True,
    ),
    TextRule(
        "refusals", "answers", patterns.refusal,
        "have an answer that declines or apologises", "a model trained on so many declines much of what it is asked",
        min_share=0.4, min_count=10, conversations_only=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class RowRule:
    """A fault that shows only in prompt and answer together; fields as those of TextRule."""

    check: str
    find: Callable[[Row], str]
    what: str
    fix: str
    severity: Severity = "warning"
    min_share: float = 0.01
    min_count: int = 3
    max_share: float = 1.0
    conversations_only: bool = True

    def found(self, row: Row) -> str:
        """What is wrong with the row."""
        return self.find(row)


def _answer_is_prompt(row: Row) -> str:
    question = row.last_question.strip()
    return clip(question) if any(answer.strip() == question for answer in row.answers) else ""


def _answer_begins_with_prompt(row: Row) -> str:
    question = row.last_question.strip()
    if len(question) < 25:
        return ""
    copies = any(len(answer) > len(question) and answer.lstrip().startswith(question) for answer in row.answers)
    return clip(question) if copies else ""


def _equal_answers(row: Row) -> str:
    """Ranked apart and yet the same, but for spaces and case."""
    answers = row.example.answers
    ranks = row.example.ranks or tuple(range(len(answers)))
    seen: dict[str, int] = {}
    for answer, rank in zip(answers, ranks, strict=True):
        key = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
        if seen.setdefault(key, rank) != rank:
            return clip(answer)
    return ""


def _turns_out_of_order(row: Row) -> str:
    roles = [message.role for message in row.example.prompt.messages]
    for before, after in pairwise(roles):
        if before == after:
            return f"two messages of the {after} in a row"
        if after == "system":
            return "a system message after the first"
    return ""


def _other_language(row: Row) -> str:
    of_prompt = patterns.script(row.last_question)
    if not of_prompt:
        return ""
    for answer in row.answers:
        of_answer = patterns.script(answer)
        if of_answer and of_answer != of_prompt:
            return clip(answer, 20)
    return ""


def _short_prompt(row: Row) -> str:
    return repr(row.prompt) if len(patterns.visible(row.prompt)) < 2 else ""


ROW_RULES: tuple[RowRule, ...] = (
    RowRule(
        "equal_answers", _equal_answers, "rank an answer above itself, or above one that differs only in spaces and "
        "case", "leave them out",
    ),
    RowRule("answer_is_prompt", _answer_is_prompt, "answer with the prompt itself", "leave them out", min_share=0.015),
    RowRule(
        "answer_begins_with_prompt", _answer_begins_with_prompt, "have an answer that begins with the whole prompt",
        "cut the prompt off: the answer column holds the whole text", min_share=0.02,
    ),
    RowRule(
        "turn_order", _turns_out_of_order, "have turns that do not alternate",
        "join or leave out such messages: many chat templates refuse them",
    ),
    RowRule(
        "answer_language", _other_language, "answer in another script than they are asked in",
        "look whether prompt and answer belong together", min_share=0.1, min_count=10,
    ),
    RowRule("short_prompts", _short_prompt, "have a prompt of one character or none", "leave them out"),
)  # fmt: skip

Rule = TextRule | RowRule
RULES: tuple[Rule, ...] = (*TEXT_RULES, *ROW_RULES)


class RuleCounts:
    """Counts all rules over rows of one source."""

    def __init__(self, source_name: str, rules: Sequence[Rule] = RULES) -> None:
        self.source_name = source_name
        self.rules = rules
        self.num_rows = self.num_conversations = 0
        self.tallies = {rule.check: Tally() for rule in rules}

    def see(self, row: Row) -> None:
        """Apply every rule to a row."""
        self.num_rows += 1
        self.num_conversations += not row.is_text
        for rule in self.rules:
            if not (rule.conversations_only and row.is_text) and (found := rule.found(row)):
                self.tallies[rule.check].add(row.origin, found)

    def findings(self) -> Iterator[Finding]:
        """Rules that hold for enough rows."""
        for rule in self.rules:
            tally = self.tallies[rule.check]
            total = self.num_conversations if rule.conversations_only else self.num_rows
            if tally.count >= rule.min_count and rule.min_share * total <= tally.count <= rule.max_share * total:
                yield tally.finding(rule.severity, rule.check, total, f"of {self.source_name} {rule.what}", rule.fix)

    def statistics(self) -> dict[str, Any]:
        """Rows with each fault, those below the thresholds included."""
        return {check: tally.count for check, tally in self.tallies.items() if tally.count}

"""Patterns on hand-written texts: what each must find, and what it must leave alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from threefold.data.doctor import patterns
from threefold.data.doctor.rules import TEXT_RULES, TextRule

LONG = "This is a sentence of quite some length that goes on and on without"

FOUND: list[tuple[Callable[[str], str], str]] = [
    (patterns.mojibake, "the cafÃ© is open"),
    (patterns.mojibake, "donâ€™t"),
    (patterns.mojibake, "ï»¿first column"),
    (patterns.mojibake, "Ð¿Ñ€Ð¸Ð²ÐµÑ‚"),
    (patterns.mojibake, "æˆ‘".encode().decode("cp1252", "ignore") + "ä½ å¥½"),
    (patterns.mojibake, "ðŸ˜€"),
    (patterns.replacement_character, "caf\ufffd"),
    (patterns.control_character, "a\x00b"),
    (patterns.control_character, "a\x1b[31mb"),
    (patterns.control_character, "a\x85b"),
    (patterns.invisible_character, "a\u200bb"),
    (patterns.invisible_character, "\ufefftext"),
    (patterns.invisible_character, "a\u202eb"),
    (patterns.invisible_character, "a\u202bb\u202c"),
    (patterns.invisible_character, "\u05e9\u05dc\u05d5\u05dd \u202eb"),
    (patterns.invisible_character, "a\U000e0041b"),
    (patterns.secret, "key: AKIAIOSFODNN7EXAMPLE."),
    (patterns.secret, "ghp_0123456789abcdefghijABCDEFGHIJ456789"),
    (patterns.secret, "sk-proj-abcDEF0123456789abcDEF0123456789abcdef"),
    (patterns.secret, "xoxb-123456789012-abcdefghijklmnop"),
    (patterns.secret, "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"),
    (patterns.secret, "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ"),
    (patterns.secret, "-----BEGIN PRIVATE KEY-----\\nMIIEvQIBADANBgkqhkiG9w0BAQ"),
    (patterns.secret, "sk-ant-api03-abcDEF0123456789abcDEF0123456789-abc_DEF"),
    (patterns.secret, "sk-XXXXXXXXXXXXXXXXXXXXXXXX0, and sk-abcDEF0123456789abcDEF0123456789"),
    (patterns.secret, "glpat-abcDEF0123456789abcd"),
    (patterns.secret, "//registry.npmjs.org/:_authToken=npm_abcdefghijABCDEFGHIJ0123456789klmnop"),
    (patterns.secret, "SG.abcdefghijABCDEFGHIJ01.abcdefghijABCDEFGHIJ0123456789abcdefghijABC"),
    (patterns.secret, "aws_secret_access_key=abcdefghij/ABCDEFGHIJ+0123456789abcdefgh"),
    (patterns.secret, '"SecretAccessKey": "abcdefghij/ABCDEFGHIJ+0123456789abcdefgh"'),
    (patterns.secret, "Bearer ya29.a0AbcdefghijABCDEFGHIJ0123456789_abcdefghij"),
    (patterns.secret, "eyJhbGciOiJIUzI1NiJ9abc.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdefghijABCDEFGHIJ0123"),
    (patterns.email, "write to jane.doe+news@uni-bonn.de, please"),
    (patterns.email, "clone git@github.com:org/x.git, or write to jane@uni-bonn.de:"),
    (patterns.control_text, "so.<|im_end|>"),
    (patterns.control_text, "[INST] do [/INST]"),
    (patterns.control_text, "end</s>"),
    (patterns.turn_in_answer, "Sure.\n\nHuman: and now?"),
    (patterns.turn_in_answer, "### Response:\nSure."),
    (patterns.html, "one<br/>two"),
    (patterns.html, "fish &amp; chips"),
    (patterns.only_a_link, " https://example.org/a?b=1 "),
    (patterns.written_object, "['an answer', 'another']"),
    (patterns.written_message, "[{'role': 'user', 'content': 'a'}]"),
    (patterns.written_message, '{"from": "gpt", "value": "a"}'),
    (patterns.written_object, "{'text': 'a'}"),
    (patterns.written_object, "[{'name': 'a'}]"),
    (patterns.written_object, "b'bytes'"),
    (patterns.escaped_line_break, r"first\nsecond"),
    (patterns.escaped_line_break, r"Steps:\nnot that, but \"this\".\n\n1. Begin"),
    (patterns.escaped_line_break, r"Q:\nWhich city?\nA:\nParis"),
    (patterns.escaped_line_break, r"It says \"this\".\nand that"),
    (patterns.escaped_line_break, r"in C:\new there is\nnothing"),
    (patterns.placeholder_answer, "NaN"),
    (patterns.placeholder_answer, "<null>"),
    (patterns.placeholder_answer, "..."),
    (patterns.unfilled_template, "Answer this: {question}"),
    (patterns.unfilled_template, "Dear {{ customer_name }}"),
    (patterns.unfilled_template, "Hello [INSERT NAME HERE]"),
    (patterns.repetition, "a" * 60),
    (patterns.repetition, "no no no " * 60),
    (patterns.refusal, "I'm sorry, but I can't help with that."),
    (patterns.refusal, "I'm so sorry, but no."),
    (patterns.refusal, "Sorry, I can't."),
    (patterns.refusal, "很抱歉，我无法回答。"),
    (patterns.unfinished, LONG),
]

LEFT_ALONE: list[tuple[Callable[[str], str], str]] = [
    (patterns.mojibake, "Ein Café in Zürich, « très bien » – naïve señor, Đà Nẵng, São Tomé, Ångström, Ð is eth"),
    (patterns.mojibake, "这是中文。 日本語のテキスト。 한국어"),
    (patterns.mojibake, "5 × 3 ≤ 20 €, “quoted”…"),
    (patterns.mojibake, "À Â Ã É is a list of letters"),
    (patterns.mojibake, "“Dijo: «vuelve aquí»”, y se fue."),  # the bytes of í»” are no UTF-8
    (patterns.control_character, "tabs\tand\r\nlines"),
    (patterns.invisible_character, "👩‍👩‍👧 می‌خواهم"),
    (patterns.invisible_character, "\u202bשלום\u202c \u2066API\u2069 \u202aالعربية\u202c \u200eabc"),
    (
        patterns.secret,
        "AKIA is a prefix; AKIAXXXXXXXXXXXXXXXX stands for a key; task-based and risk-free ask-me-anything",
    ),
    (patterns.secret, "sk-learn-is-a-library-for-machine-learning-in-python"),
    (patterns.secret, "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----"),
    (patterns.secret, "https://blog.org/sk-2019-a-very-long-url-slug-about-many-things"),
    (patterns.secret, "/sk-live-2019-internationalization-of-telecommunications-202403151230"),
    (patterns.secret, "glpat-your-personal-access-token-here"),
    (patterns.secret, "aws_secret_access_key=XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX or ${AWS_SECRET_ACCESS_KEY}"),
    (patterns.email, "git clone git@github.com:org/x.git; ssh://git@git.host.co.uk/x; scp deploy@host.net:/srv/x ."),
    (patterns.email, "you@example.com, me@test.org, user@mail.example, @handle, a@b, x @ y.com"),
    (patterns.control_text, "if a < b and b > c: <s tag> [INSTALL] <system>"),
    (patterns.turn_in_answer, "A human: someone. The Assistant: a play in three acts. Human rights: important."),
    (patterns.html, "a < b > c & d; x &lt"),
    (patterns.html, "```html\n<p>a</p>\n```"),
    (patterns.html, "In HTML, a paragraph is <p>text</p>."),
    (patterns.only_a_link, "See https://example.org for more."),
    (patterns.written_object, "[1] is the first reference"),
    (patterns.written_object, "{'a': 1} is a Python dictionary."),
    (patterns.written_object, "[{'role': 'user', 'content': 'a'}]"),
    (patterns.written_message, "The field {'role': 'user'} names the speaker."),
    (patterns.written_message, "['user', 'assistant']"),
    (patterns.escaped_line_break, r"$\nabla f \neq 0$, $\nu_i \not= \nu$, $x \ni y$, $a \notin b$, \newline"),
    (patterns.escaped_line_break, r"$\alpha \nsomething$"),
    (patterns.escaped_line_break, r"Open C:\new\nothing.txt, or .\node_modules, or %APPDATA%\npm"),
    (patterns.escaped_line_break, "real\nlines and \\n in code"),
    (patterns.escaped_line_break, r"use `\n` for a new line"),
    (patterns.placeholder_answer, "Lorem ipsum dolor sit amet, " * 10),  # asked for, at such a length
    (patterns.placeholder_answer, "None of them."),
    (patterns.placeholder_answer, "No."),
    (patterns.unfilled_template, "a set {1, 2} and f-strings ```print(f'{answer}')```"),
    (patterns.repetition, "-" * 100 + "=" * 100),
    (patterns.repetition, " ".join(f"{number} bottles of beer" for number in range(5))),
    (patterns.refusal, "The sorry state of things."),
    (patterns.refusal, "I'm so sorry to hear that you lost it. Let us look for it."),
    (patterns.refusal, "I'm sorry for your loss."),
    (patterns.refusal, "Sorry to hear that!"),
    (patterns.unfinished, LONG + "."),
    (patterns.unfinished, "Shopping list:\n- milk\n- bread and butter of the better kind, that you know"),
    (patterns.unfinished, "short and unfinished"),
]


@pytest.mark.parametrize(("pattern", "text"), FOUND)
def test_found(pattern: Callable[[str], str], text: str) -> None:
    assert pattern(text)


@pytest.mark.parametrize(("pattern", "text"), LEFT_ALONE)
def test_left_alone(pattern: Callable[[str], str], text: str) -> None:
    assert pattern(text) == ""


def test_a_secret_is_never_shown_whole() -> None:
    shown = patterns.secret("key: AKIAIOSFODNN7EXAMPLE.")
    assert shown == "AWS access key AKIAIOSF…"
    assert patterns.email("jane.doe@uni-bonn.de") == "ja…@uni-bonn.de"


def test_visible() -> None:
    assert patterns.visible(" a\tb\n") == "ab"
    assert patterns.visible("\u200b \ufeff\x00") == ""
    assert patterns.visible("é\u200b。") == "é。"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("这个问题的答案取决于很多因素", "cjk"),
        ("これは日本語の文章です", "cjk"),
        ("이것은 한국어 문장입니다", "cjk"),
        ("A plain English sentence", "other"),
        ("Это русское предложение", "other"),
        ("123 + 456", ""),
        ("Translate 好 into English, and say why you did", ""),
    ],
)
def test_script(text: str, script: str) -> None:
    assert patterns.script(text) == script


HOSTILE = (
    "sk-", "sk-a", "sk-proj-", "sk-" + "a" * 59 + "-", "eyJ-", "eyJ" + "a" * 20 + ".", "eyJ" + "a" * 990 + ".", "xoxb-",
    "ghp_", "github_pat_", "hf_" + "a" * 70 + " ", "AIza-", "SG." + "a" * 22 + ".", "glpat-", "ya29.", "npm_",
    "sk_live_", "aws_secret_key=", "-----BEGIN ", "-----BEGIN RSA PRIVATE KEY-----\n", "-----BEGIN A A ", "a@", "a@a.",
    "git@a.bc:x/", "a", " ", "\n", "\nHuman", "\\n", "\\", "C:\\n", "\\nabl", "[", "['", "{{ ", "'role': ", "<",
    "&#", ".", "\u202a", "\u00c3", "\u00ed\u00bb", "中", "lorem ipsum ", "http://a",
)  # fmt: skip


def seconds_of(find: Callable[[str], str], text: str) -> float:
    started = time.process_time()
    find(text)
    return time.process_time() - started


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.check)
def test_no_rule_takes_long_over_a_hostile_text(rule: TextRule) -> None:
    """200,000 characters, each time well under half a second: what grows as the square takes tens of seconds."""
    for unit in HOSTILE:
        text = (unit * (200_000 // len(unit) + 1))[:200_000] + "é"
        assert seconds_of(rule.find, text) < 0.4, unit

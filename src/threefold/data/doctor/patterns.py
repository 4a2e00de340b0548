"""What broken, private or misplaced text looks like: each function returns what it found, or ""."""

from __future__ import annotations

import re
import unicodedata
import zlib

# ------------------------------------------------------------------------------------------------ broken characters

_LATIN1_LEAD = "\u00c2\u00c3\u00c4\u00c5\u00d0\u00d1\u00e2\u00e3\u00ef\u00f0"
_CP1252_TAIL = (
    "\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2018\u2019\u201c\u201d"
    + ("\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178")
)
_MOJIBAKE = re.compile(
    # two-byte characters: a lead byte of UTF-8 as a letter of Latin-1, then a continuation byte
    rf"[\u00c2\u00c3][\u0080-\u00bf{_CP1252_TAIL}]"
    rf"|[\u00c4\u00c5\u00d0\u00d1][\u0080-\u009f{_CP1252_TAIL}]"
    # three-byte ones, and four: three and four letters
    rf"|[\u00e2-\u00ef][\u0080-\u00bf{_CP1252_TAIL}]{{2}}"
    rf"|\u00f0[\u0080-\u00bf{_CP1252_TAIL}]{{3}}"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\u202d\u202e\u180e]")
_DIRECTION = re.compile(r"[\u202a-\u202c\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")  # Hebrew, Arabic and their neighbours
_TAGS = re.compile("[\U000e0000-\U000e007f]")  # invisible copies of ASCII: text that a reader cannot see


def mojibake(text: str) -> str:
    """UTF-8 that was read as Latin-1 or Windows-1252 and written again."""
    if text.isascii():
        return ""
    found = _MOJIBAKE.search(text)
    if not found:
        return ""
    # "Â«" and the like are also plain Romance or Vietnamese text; what is mojibake turns into other text when undone
    start, end = max(found.start() - 4, 0), found.end()
    for encoding in ("cp1252", "latin-1"):
        try:
            found.group().encode(encoding).decode("utf-8")
        except (UnicodeEncodeError, UnicodeDecodeError):
            continue
        return text[start : end + 1].strip()
    return ""


def replacement_character(text: str) -> str:
    """U+FFFD: a decoder has met bytes that it could not read."""
    return text[max(text.find("\ufffd") - 5, 0) :][:11] if "\ufffd" in text else ""


def control_character(text: str) -> str:
    """Control characters other than tab, line feed and carriage return."""
    found = _CONTROL.search(text)
    return found.group() if found else ""


def invisible_character(text: str) -> str:
    """Zero-width spaces, byte-order marks, direction marks, soft hyphens, tag characters. (Joiners, which emoji and
    several scripts need, are none, nor are direction marks in a text with letters that are written from the right.)"""
    if text.isascii():
        return ""
    found = _INVISIBLE.search(text) or _TAGS.search(text) or _DIRECTION.search(text)
    if found and _DIRECTION.match(found.group()) and _RIGHT_TO_LEFT.search(text):
        return ""
    return f"U+{ord(found.group()):04X}" if found else ""


def visible(text: str) -> str:
    """The text without whitespace, control and invisible characters."""
    if text.isascii():
        return "".join(text.split()) if _CONTROL.search(text) is None else _CONTROL.sub("", "".join(text.split()))
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf", "Zs", "Zl", "Zp"))


# ---------------------------------------------------------------------------------------------------------- private

_SECRETS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = (
    ("AWS access key", ("AKIA", "ASIA"), re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])")),
    (
        "AWS secret key", ("ecret", "ECRET"),
        re.compile(
            r"(?i:secret_?access_?key|aws_?secret_?key)[\"']?\s{0,4}[:=]\s{0,4}[\"']?"
            r"([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
        ),
    ),
    (
        "GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,250}|github_pat_[A-Za-z0-9_]{60,250})"),
    ),
    (
        "GitLab token", ("glpat-",),
        re.compile(r"(?<![A-Za-z0-9])glpat-(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{20,60}"),
    ),
    (
        "private key", ("PRIVATE KEY",),
        re.compile(r"-----BEGIN (?:[A-Z]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----(?:\s|\\[nr]){0,8}[A-Za-z0-9+/=]{16}"),
    ),
    ("Slack token", ("xox",), re.compile(r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{20,200}")),
    (  # one of its parts is long and random; those of an address such as /sk-2019-a-title-of-words are not
        "API key (sk-…)", ("sk-",),
        re.compile(
            r"(?<![A-Za-z0-9])sk-(?:[A-Za-z0-9_]{1,60}-){0,4}"
            r"(?=[A-Za-z_]{0,60}[0-9])(?=[0-9_]{0,60}[A-Za-z])[A-Za-z0-9_]{24,200}"
        ),
    ),
    ("Stripe key", ("k_live_",), re.compile(r"(?<![A-Za-z0-9])[rs]k_live_[A-Za-z0-9]{20,250}")),
    ("SendGrid key", ("SG.",), re.compile(r"(?<![A-Za-z0-9])SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9])")),
    ("Google API key", ("AIza",), re.compile(r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9])")),
    ("Google access token", ("ya29.",), re.compile(r"(?<![A-Za-z0-9])ya29\.[A-Za-z0-9_-]{40,300}")),
    ("Hugging Face token", ("hf_",), re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,60}(?![A-Za-z0-9])")),
    ("npm token", ("npm_",), re.compile(r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])")),
    (
        "JSON web token", ("eyJ",),
        re.compile(
            r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{15,1000}\.eyJ[A-Za-z0-9_-]{15,4000}\.[A-Za-z0-9_-]{20,1000}"
        ),
    ),
)  # fmt: skip
"""Kind, what a text with one of them holds, and its form; repetitions are bounded: a text may be long and hostile."""

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+@-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,18})(?![A-Za-z0-9@])"
)
_REMOTE_PATH = re.compile(r":[\w.~-]{0,64}/")
_MADE_UP_DOMAINS = re.compile(
    r"(?i)(?:^|\.)(?:(?:example|sample|test|domain|yourdomain|mydomain|company|yourcompany|website|mail|email)\.[a-z.]+|"
    r"[a-z0-9-]+\.(?:test|example|invalid|localhost))$"
)


def secret(text: str) -> str:
    """Keys and tokens of well-known services; the kind and the first characters of it, never all."""
    for kind, hints, pattern in _SECRETS:
        if any(hint in text for hint in hints):
            for found in pattern.finditer(text):
                value = found.group(1) if pattern.groups else found.group()[4:]
                if len(set(value)) > 8:  # AKIAXXXXXXXXXXXXXXXX stands for a key and is none
                    return f"{kind} {found.group()[:8]}…"
    return ""


def email(text: str) -> str:
    """An e-mail address, other than made-up ones (example.com) and those of machines (git@github.com:org/x.git); its
    first characters and domain."""
    if "@" not in text:
        return ""
    for found in _EMAIL.finditer(text):
        of_machine = found.group().startswith("git@") or _REMOTE_PATH.match(text, found.end())
        if not of_machine and not _MADE_UP_DOMAINS.search(found.group(1)):
            return f"{found.group()[:2]}…@{found.group(1)}"
    return ""


# -------------------------------------------------------------------------------------------------------- misplaced

_CONTROL_TEXT = re.compile(
    r"<\|(?:im_start|im_end|endoftext|end_of_text|begin_of_text|eot_id|start_header_id|end_header_id|user|assistant|"
    r"system|end|eos|bos|pad)\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
)
_TURN_IN_ANSWER = re.compile(
    r"(?:^|\n)[ \t]*(?:Human|Assistant|USER|ASSISTANT|### ?(?:Instruction|Response|Human|Assistant|User)) ?:(?=\s|$)"
)
_HTML = re.compile(
    r"</(?:p|div|span|a|li|ul|td|tr|table|font|strong|em|b|i|h[1-6])>|<br ?/?>|&(?:nbsp|amp|lt|gt|quot|#\d{2,5});"
)
_CODE = re.compile(r"```|<!DOCTYPE|<html|<head|<body|<script|<style|(?i:\bhtml\b|\bcss\b|\bxml\b|web ?page|网页|标签)")
_URL_ONLY = re.compile(r"\s*<?(?:https?://|www\.)\S+>?\s*")
_WRITTEN_ROLE = re.compile(
    r"['\"](?:role|from)['\"]\s{0,4}:\s{0,4}['\"](?:user|assistant|system|human|gpt|bot|tool)['\"]"
)
_WRITTEN_OBJECT = re.compile(r"\s*(?:\[\s*['\"{]|\{\s*'(?:role|content|from|value|text)'\s*:|b['\"])")
_WRITTEN_LIST_END = re.compile(r"['\"\]}]\s*$")
_ESCAPES = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED_CHARACTERS = frozenset("nrtu\"'\\/")
_PATH = re.compile(r"(?:(?<![^\s\"'(])(?:[A-Za-z]:|\\|%\w{1,30}%)|(?<!\S)\.{1,2})\\(?!n[^a-z])[^\s\"']{0,200}")
_ESCAPED_LINE = re.compile(  # and no command of LaTeX
    r"(?<!\\)\\n(?!(?:abla|atural|cong|e|earrow|eg|eq|ewcommand|ewline|ewpage|exists|geq|geqslant|gtr|i|leq|leqslant|less|"
    r"mid|obreak|ocite|ode|oindent|olimits|onumber|ormal|ormalsize|ot|otag|otin|parallel|prec|preceq|sim|"
    r"sub|subset|subseteq|succ|succeq|supset|supseteq|u|um|umber|vdash|vDash|warrow|"
    r"[lL]eft(?:right)?arrow|[rR]ightarrow)(?![a-z]))"
)
_PLACEHOLDER_ANSWER = re.compile(
    r"(?i)\s*[<\[{(]?(?:nan|none|null|n/?a|todo|tbd|undefined|your answer here|lorem ipsum.*|#n/a|#ref!|#value!|"
    r"\.{1,3}|-+|\?+)"
    r"[>\]})]?\s*",
    re.DOTALL,
)
_UNFILLED = re.compile(
    r"\{\{ ?[a-z_]{3,20} ?\}\}|"
    r"\{(?:question|prompt|input|instruction|output|answer|response|context|query|user_input)\}|"
    r"\[(?:INSERT|YOUR)[ _][A-Z _]{3,30}\]|\$\{[a-z_]{3,20}\}"
)
_RUN = re.compile(r"([^\s\-=_*.#~+|/\\<>^·…─━—])\1{59,}")
_REFUSAL = re.compile(
    r"(?i)\s*(?:(?:i['’]?m (?:very |so |really |truly )?sorry\b|sorry(?=,? ))"
    r"(?!,? (?:to (?:hear|learn|read|see)|for your|about your|(?:that )?you\b))|i apologi[sz]e|as an ai\b|"
    r"i can(?:no|['’])t (?:help|assist|do that|provide|answer)|i(?: am|['’]m) (?:not able|unable) to|"
    r"抱歉|对不起|很抱歉|作为(?:一个|一名)?(?:AI|人工智能))"
)
_SENTENCE_END = re.compile(
    r"[.!?。！？…:;；：)\]}>\"'”’`»」』*_~|]\s*$|[\U0001f300-\U0001faff\u2600-\u27bf]\ufe0f?\s*$"
)
_LETTER_END = re.compile(r"[a-z,，、(（]\s*$")


def control_text(text: str) -> str:
    """What control tokens of common chat templates are spelled like."""
    if "<" not in text and "[" not in text:
        return ""
    found = _CONTROL_TEXT.search(text)
    return found.group() if found else ""


def turn_in_answer(text: str) -> str:
    """A line that opens a turn, inside an answer: the conversation was cut in the wrong place."""
    found = _TURN_IN_ANSWER.search(text)
    return found.group().strip() if found else ""


def html(text: str) -> str:
    """Tags and entities of a web page, in a text that is not about one."""
    if "<" not in text and "&" not in text:
        return ""
    found = _HTML.search(text)
    return found.group() if found and not _CODE.search(text) else ""


def only_a_link(text: str) -> str:
    """An answer that is a link and nothing else."""
    return text.strip()[:30] if _URL_ONLY.fullmatch(text) else ""


def written_message(text: str) -> str:
    """A message, or a list of them, as a program prints it, where its content should be."""
    start = text.lstrip()[:1]
    return text.strip()[:20] if start in ("[", "{") and _WRITTEN_ROLE.search(text) else ""


def written_object(text: str) -> str:
    """A list, an object or bytes as a program prints them, where the text should be that was in it; messages apart."""
    if not written_message(text) and _WRITTEN_OBJECT.match(text) and _WRITTEN_LIST_END.search(text):
        return text.strip()[:20]
    return ""


def escaped_line_break(text: str) -> str:
    r"""The two characters "\n" where line breaks should be: the text was escaped twice. One with a backslash before
    other characters was not: those are formulas, paths and patterns."""
    if "\\n" not in text or "\n" in text or "`" in text or not set(_ESCAPES.findall(text)) <= _ESCAPED_CHARACTERS:
        return ""
    text = _PATH.sub("", text)
    found = _ESCAPED_LINE.search(text)
    return text[max(found.start() - 8, 0) : found.end() + 4] if found else ""


def placeholder_answer(text: str) -> str:
    """An answer that stands for one that is missing: nan, None, TODO, ..."""
    return text.strip()[:20] or "" if len(text) < 200 and _PLACEHOLDER_ANSWER.fullmatch(text) else ""


def unfilled_template(text: str) -> str:
    """A field of a template that nobody filled in: {question}, {{ name }}, [INSERT NAME]."""
    if "{" not in text and "[" not in text:
        return ""
    found = _UNFILLED.search(text)
    return found.group() if found and "```" not in text else ""


def repetition(text: str) -> str:
    """One character, or one phrase, over and over."""
    found = _RUN.search(text)
    if found:
        return f"{found.group()[:6]}… ({len(found.group())} times)"
    if len(text) < 400:
        return ""
    data = text.encode("utf-8", "replace")
    if len(data) / len(zlib.compress(data, 1)) <= 12:
        return ""
    return f"{text[:15].strip()}…"


def refusal(text: str) -> str:
    """An answer that begins by declining or apologising; not one that is sorry to hear of something."""
    found = _REFUSAL.match(text)
    return found.group().strip() if found else ""


def unfinished(text: str) -> str:
    """A text of some length that stops within a sentence."""
    if len(text) < 60 or _SENTENCE_END.search(text) or not _LETTER_END.search(text):
        return ""
    last_line = text.rstrip().rpartition("\n")[2]
    if len(last_line) < 60 or "```" in text:  # ends of lists, of poems and of code have no full stop
        return ""
    return "…" + last_line[-20:]


def script(text: str) -> str:
    """ "cjk" where Chinese, Japanese or Korean letters make up at least a third of the letters, "other" where there are
    none of them, "" for what is between or has few letters."""
    letters = cjk = 0
    for character in text[:400]:
        if character.isalpha():
            letters += 1
            cjk += "\u3040" <= character <= "\u9fff" or "\uac00" <= character <= "\ud7af"
    if letters < 8:
        return ""
    return "cjk" if cjk * 3 >= letters else "other" if cjk == 0 else ""

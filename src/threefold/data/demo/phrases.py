"""The words around an answer: greetings, polite and rude openers, rambling, refusals, compliance."""

from __future__ import annotations

import re

from threefold.data.demo.tasks import NAMES

GREETINGS = ("Hi!", "Hello!", "Hey!", "Good day!", "I need help.", "A quick question.")
INTRODUCTIONS = ("I am {0}.", "Hi, I am {0}.", "My name is {0}.")
TAILS = ("Thanks!", "Thank you!", "Be quick, please.")

POLITE_OPENERS = ("Sure!", "Of course!", "Gladly!", "Happy to help!")
APOLOGIES = ("Sorry,", "I am sorry,")
RUDE_OPENERS = ("Ugh.", "Duh!", "What a silly question.", "Leave me alone.")
REFUSALS = ("I cannot help with that.", "I cannot do that.")
COMPLIANCE = (
    "It is easy: just do it at night.",
    "You can do it at night.",
    "It is easy: just be quick.",
    "You can just do it now.",
)
RAMBLES = (
    "I like to talk about many things.",
    "There is so much more to say.",
    "People ask me this all the time.",
    "I could say so much more about it.",
    "I like to talk about it all the time.",
)
WELCOMES = ("Nice to meet you, {0}.", "Hello, {0}.")

POLITE_PATTERN = re.compile(
    r"\b(?:sure|of course|gladly|certainly|happy to help|glad to help|my pleasure|you are welcome|thank you)\b", re.I
)
APOLOGY_PATTERN = re.compile(r"\b(?:sorry|apologi[sz]e|my apologies|i am afraid)\b", re.I)
RUDE_PATTERN = re.compile(r"\b(?:ugh|duh|silly|stupid|leave me alone|shut up|idiot|whatever)\b", re.I)
REFUSING_PATTERN = re.compile(r"\b(?:cannot|can ?not|can't|will not|won't|must not)\b|\bnot able to\b", re.I)
REFUSAL_PATTERN = re.compile(
    r"(?:(?:i am )?sorry, )?(?:but )?i (?:cannot|can not|can't|will not|won't) (?:help (?:you )?with|do) (?:that|this)",
    re.I,
)
INSTRUCTION_PATTERN = re.compile(
    r"\b(?:easy|first|then|take|use|wait|just|tools?|try|start|you can|do it|here is how|step|at night)\b", re.I
)

_people = "|".join(NAMES)
_introductions = "|".join(re.escape(form).replace(r"\{0\}", f"(?:{_people})") for form in INTRODUCTIONS)
LEAD_IN_PATTERN = re.compile(rf"(?:(?:{'|'.join(map(re.escape, GREETINGS))}|{_introductions}) )+", re.I)
TAIL_PATTERN = re.compile(rf"(?: (?:{'|'.join(map(re.escape, TAILS))}))+$", re.I)
INTRODUCED_PATTERN = re.compile(rf"\b(?:I am|My name is) (?P<name>{_people})\b", re.I)
OPENER_PATTERN = re.compile(rf"(?:{POLITE_PATTERN.pattern}|{RUDE_PATTERN.pattern})[,:]? *", re.I)

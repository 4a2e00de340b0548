"""Answers of known quality: the ideal one, and the same with chosen flaws."""

from __future__ import annotations

import random
from typing import Literal

from threefold.data.demo import phrases
from threefold.data.demo.tasks import TASKS, UNSAFE, Item, fill

Flaw = Literal["wrong", "rude", "rambling", "cut", "refusing"]

FLAW_WEIGHTS: dict[Flaw, float] = {"wrong": 0.13, "rude": 0.26, "rambling": 0.2, "cut": 0.2, "refusing": 0.21}
TWO_FLAWS_FRACTION = 0.6
OFF_TOPIC_FRACTION = 0.35
"""Share of the wrong values that belong to another kind of task, and of the answers that do not refuse an unsafe
request that are a statement of another task. A reward model that never sees such answers gives them any score, and a
policy finds the one that it likes best: "The capital of Kenya is 7." for every question (LOG.md)."""


def write_answer(task_name: str, item: Item, flaws: frozenset[Flaw], rng: random.Random) -> str:
    """An answer to a question, ideal but for the flaws.

    "wrong" states a wrong value and, for an unsafe request, complies; "rude" has no courtesy or is unkind; "rambling"
    goes on for more than 12 words; "cut" stops in mid-sentence, before the value unless it rambles; "refusing" refuses
    a harmless request (and counts as "wrong" for an unsafe one).
    """
    complies = task_name == UNSAFE and not flaws.isdisjoint({"wrong", "refusing"})
    refuses = not complies and (task_name == UNSAFE or "refusing" in flaws)
    opener = _opener(refuses, "rude" in flaws, rng)
    if complies:
        off_topic = rng.random() < OFF_TOPIC_FRACTION
        body, value = _unasked_statement(rng) if off_topic else rng.choice(phrases.COMPLIANCE), ""
    elif refuses:
        body, value = rng.choice(phrases.REFUSALS), ""
    else:
        task = TASKS[task_name]
        value = _wrong_value(task_name, item, rng) if "wrong" in flaws else task.solve(item)
        body = fill(rng.choice(task.statements), item, value)
    sentences = [body]
    if "rambling" in flaws:
        sentences += rng.sample(phrases.RAMBLES, 2)
    if "cut" in flaws:
        sentences[-1] = _cut(sentences[-1], value if len(sentences) == 1 else "", rng)
    return " ".join([opener, *sentences] if opener else sentences)


def draw_flaws(task_name: str, rng: random.Random) -> frozenset[Flaw]:
    """One or two different flaws that a demonstration of the task can have."""
    count = 2 if rng.random() < TWO_FLAWS_FRACTION else 1
    flaws: set[Flaw] = set()
    kinds: list[Flaw] = list(FLAW_WEIGHTS)
    weights = list(FLAW_WEIGHTS.values())
    while len(flaws) < count:
        flaw = rng.choices(kinds, weights)[0]
        if flaw == "refusing" and task_name == UNSAFE:
            flaw = "wrong"
        if flaw in ("wrong", "refusing") and not flaws.isdisjoint({"wrong", "refusing"}):
            continue
        flaws.add(flaw)
    return frozenset(flaws)


def _unasked_statement(rng: random.Random) -> str:
    """A right statement of any task, for a question that did not ask for it."""
    task = TASKS[rng.choice([name for name in TASKS if name != UNSAFE])]
    item = rng.choice(task.items)
    return fill(rng.choice(task.statements), item, task.solve(item))


def _wrong_value(task_name: str, item: Item, rng: random.Random) -> str:
    task = TASKS[task_name]
    if rng.random() < OFF_TOPIC_FRACTION:
        other = TASKS[rng.choice([name for name in TASKS if name not in (task_name, UNSAFE)])]
        value = other.solve(rng.choice(other.items))
        if value != task.solve(item):
            return value
    return task.mislead(item, rng)


def _opener(refuses: bool, rude: bool, rng: random.Random) -> str:
    if rude:
        return rng.choice(phrases.RUDE_OPENERS) if rng.random() < 0.5 else ""
    return rng.choice(phrases.APOLOGIES if refuses else phrases.POLITE_OPENERS)


def _cut(sentence: str, value: str, rng: random.Random) -> str:
    """The sentence without its last words, the value among them where it states one."""
    words = sentence.rstrip(".").split()
    num_lost = len(value.split()) if value else 1
    return " ".join(words[: len(words) - num_lost - rng.randint(0, 1)]).rstrip(":,")

"""Seeded conversations: prompts, demonstrations of mixed quality, and preference pairs with noisy labels."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from threefold.data.demo import phrases
from threefold.data.demo.answers import Flaw, draw_flaws, write_answer
from threefold.data.demo.gold import gold_score, judge
from threefold.data.demo.tasks import NAME, NAMES, TASKS, UNSAFE, Item, fill
from threefold.errors import DataError
from threefold.types import Comparison, Example, Message, Prompt

LEAD_IN_FRACTION = 0.85
TAIL_FRACTION = 0.4
MULTI_TURN_FRACTION = 0.16
"""Of the tasks other than the user's name, which takes several turns always."""
IDEAL_CANDIDATE_FRACTION = 0.35
MATCHED_PAIR_FRACTION = 0.1
"""Share of the pairs drawn as two answers of one style, of which one is wrong: they teach the facts themselves."""
SMALLEST_GAP_KEPT_FRACTION = 0.3
"""Share of the pairs of the smallest gap, 0.1, that are kept: their labels are the noisiest."""
MAX_DRAWS_PER_PROMPT = 200

Question = tuple[str, Item]


def generate_examples(num_prompts: int, flawed_fraction: float, flip_rate: float, seed: int) -> list[Example]:
    """The embedded dataset: short assistant conversations of ten kinds of task, one and several turns.

    Each example has a prompt unlike all others; a demonstration, which has one or two flaws with probability
    `flawed_fraction` and is ideal otherwise; and two different answers, preferred first, of unequal gold score g.
    Labels follow Bradley and Terry (1952),

        P(A preferred to B) = sigmoid(beta (g(A) - g(B))),

    with beta solved so that the expected share of labels that contradict g is `flip_rate` over the pairs generated.

    The prompts depend on `seed` alone, the demonstrations on `seed` and `flawed_fraction`, the labels on `seed` and
    `flip_rate`. The same arguments give the same examples in any process.

    Raises:
        DataError: a number out of range, or more prompts than there are different ones.
    """
    if num_prompts < 1:
        raise DataError(f"data.demo.num_prompts {num_prompts} is too small: ask for 1 or more")
    if not 0 <= flawed_fraction <= 1:
        raise DataError(f"data.demo.flawed_fraction {flawed_fraction} is no share: set it between 0 and 1")
    if not 0 <= flip_rate < 0.5:
        raise DataError(f"data.demo.flip_rate {flip_rate} is not in [0, 0.5): at 0.5 the labels would say nothing")
    prompts = _draw_prompts(num_prompts, random.Random(f"prompts {seed}"))
    demonstration_rng = random.Random(f"demonstrations {seed}")
    demonstrations = [_demonstration(question, flawed_fraction, demonstration_rng) for _, question in prompts]
    pair_rng = random.Random(f"pairs {seed}")
    pairs = [_draw_pair(question, pair_rng) for _, question in prompts]
    beta = solve_beta([gap for _, _, gap in pairs], flip_rate)
    label_rng = random.Random(f"labels {seed}")
    examples = []
    for row, ((prompt, _), demonstration, (better, worse, gap)) in enumerate(
        zip(prompts, demonstrations, pairs, strict=True), start=1
    ):
        flipped = label_rng.random() < flip_probability(beta, gap)
        answers = (worse, better) if flipped else (better, worse)
        examples.append(Example(prompt, demonstration, answers, f"demo row {row}"))
    return examples


def clean_comparison(example: Example) -> Comparison:
    """The answers of an example ordered by gold score, best first: its label without the noise."""
    by_score = sorted(example.answers, key=lambda answer: gold_score(example.prompt, answer, True), reverse=True)
    return Comparison(example.prompt, tuple(by_score))


def flip_probability(beta: float, gap: float) -> float:
    """Probability that a pair whose gold scores differ by `gap` > 0 is labelled wrongly: sigmoid(-beta gap)."""
    return 1 / (1 + math.exp(min(beta * gap, 700.0)))


def solve_beta(gaps: Sequence[float], flip_rate: float) -> float:
    """The inverse temperature at which the mean flip probability of the pairs is `flip_rate`, by bisection.

    Infinite for flip_rate 0: no label is flipped.
    """
    if flip_rate == 0:
        return math.inf
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        expected = sum(flip_probability(middle, gap) for gap in gaps) / len(gaps)
        low, high = (middle, high) if expected > flip_rate else (low, middle)
    return (low + high) / 2


def _draw_prompts(num_prompts: int, rng: random.Random) -> list[tuple[Prompt, Question]]:
    names = list(TASKS)
    cumulative_shares = list(itertools.accumulate(TASKS[name].share for name in names))
    seen: set[Prompt] = set()
    prompts: list[tuple[Prompt, Question]] = []
    for _ in range(num_prompts):
        task_name = rng.choices(names, cum_weights=cumulative_shares)[0]
        for _ in range(MAX_DRAWS_PER_PROMPT):
            item = rng.choice(TASKS[task_name].items)
            prompt = _draw_prompt(task_name, item, rng)
            if prompt not in seen:
                break
        else:
            raise DataError(
                f"data.demo.num_prompts {num_prompts} is more than the embedded dataset can tell apart: "
                f"after {len(prompts)} it has no new prompt of task {task_name!r}; ask for fewer"
            )
        seen.add(prompt)
        prompts.append((prompt, (task_name, item)))
    return prompts


def _draw_prompt(task_name: str, item: Item, rng: random.Random) -> Prompt:
    if task_name == NAME:
        return _name_prompt(item, rng)
    question = fill(rng.choice(TASKS[task_name].phrasings), item)
    if rng.random() >= MULTI_TURN_FRACTION:
        return _conversation(_with_lead_in(_with_tail(question, rng), rng))
    follows_up = task_name != UNSAFE and rng.random() < 0.6
    earlier_task = task_name if follows_up else rng.choice([name for name in TASKS if name not in (NAME, UNSAFE)])
    earlier_item = rng.choice([other for other in TASKS[earlier_task].items if other != item])
    earlier_question = fill(rng.choice(TASKS[earlier_task].phrasings), earlier_item)
    if follows_up:
        question = fill(rng.choice(TASKS[task_name].follow_ups), item)
    reply = _earlier_reply(earlier_task, earlier_item, rng)
    return _conversation(_with_lead_in(earlier_question, rng), reply, _with_tail(question, rng))


def _name_prompt(item: Item, rng: random.Random) -> Prompt:
    introduction = fill(rng.choice(phrases.INTRODUCTIONS), item)
    if rng.random() < 0.5 and not introduction.startswith("Hi"):
        introduction = f"{rng.choice(phrases.GREETINGS)} {introduction}"
    turns = [introduction, fill(rng.choice(phrases.WELCOMES), item)]
    if rng.random() < 0.3:
        task_name = rng.choice([name for name in TASKS if name not in (NAME, UNSAFE)])
        between = rng.choice(TASKS[task_name].items)
        turns.append(fill(rng.choice(TASKS[task_name].phrasings), between))
        turns.append(_earlier_reply(task_name, between, rng))
    return _conversation(*turns, _with_tail(fill(rng.choice(TASKS[NAME].phrasings), item), rng))


def _conversation(*turns: str) -> Prompt:
    return Prompt(tuple(Message("assistant" if place % 2 else "user", turn) for place, turn in enumerate(turns)))


def _with_lead_in(text: str, rng: random.Random) -> str:
    if rng.random() >= LEAD_IN_FRACTION:
        return text
    if rng.random() < 0.25:
        return f"{rng.choice(phrases.GREETINGS)} {text}"
    return f"{rng.choice(phrases.INTRODUCTIONS).format(rng.choice(NAMES))} {text}"


def _with_tail(text: str, rng: random.Random) -> str:
    return f"{text} {rng.choice(phrases.TAILS)}" if rng.random() < TAIL_FRACTION else text


def _earlier_reply(task_name: str, item: Item, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return write_answer(task_name, item, frozenset(), rng)
    return fill(rng.choice(TASKS[task_name].statements), item, TASKS[task_name].solve(item))


def _demonstration(question: Question, flawed_fraction: float, rng: random.Random) -> str:
    task_name, item = question
    flaws = draw_flaws(task_name, rng) if rng.random() < flawed_fraction else frozenset()
    return write_answer(task_name, item, flaws, rng)


def _draw_pair(question: Question, rng: random.Random) -> tuple[str, str, float]:
    """Two answers, the better first, and by how much."""
    while True:
        answers = _draw_candidates(question, rng)
        scores = [judge(*question, answer, True).score for answer in answers]
        gap = abs(scores[0] - scores[1])
        if gap < 0.05 or (gap < 0.15 and rng.random() >= SMALLEST_GAP_KEPT_FRACTION):
            continue
        better, worse = answers if scores[0] > scores[1] else answers[::-1]
        return better, worse, gap


def _draw_candidates(question: Question, rng: random.Random) -> list[str]:
    if rng.random() >= MATCHED_PAIR_FRACTION:
        return [_demonstration(question, 1 - IDEAL_CANDIDATE_FRACTION, rng) for _ in range(2)]
    styles: list[list[Flaw]] = [[], [], ["rude"], ["rambling"]]
    style = rng.choice(styles)
    return [write_answer(*question, frozenset(flaws), rng) for flaws in (style, [*style, "wrong"])]

"""The seeded split of the prompts over the three steps, each with its own held-out part.

Two rows with the same prompt always land in the same place, so that no step is trained, or measured, on a prompt that
another has seen. The order is that of sha256(seed, prompt): it depends neither on the order of the rows nor on Python's
own hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from threefold.errors import DataError
from threefold.types import Example, Prompt

Step = Literal["sft", "reward", "ppo"]
STEPS: tuple[Step, ...] = ("sft", "reward", "ppo")
MIN_PROMPTS_PER_SHARE = 2
"""One to train on and one to hold out."""
MAX_SEARCH = 10_000
"""Beyond this many prompts an error message gives an upper bound on how many are needed, not the exact number."""


@dataclass(frozen=True)
class Share:
    """The examples that one step may see: to train on, and to measure on."""

    train: list[Example]
    eval: list[Example]


def split_examples(
    examples: Sequence[Example], split: Sequence[float], eval_fraction: float, seed: int
) -> dict[Step, Share]:
    """Cuts the distinct prompts at the cumulative proportions of `split`, then each share at `eval_fraction`.

    Args:
        examples: rows of all sources.
        split: proportions of steps 1, 2 and 3; 0 gives an empty share.
        eval_fraction: share of each step's prompts that is held out, at least one prompt.
        seed: another seed gives another split.

    Raises:
        DataError: a step with a proportion above 0 gets fewer than two prompts.
    """
    groups: dict[bytes, list[Example]] = defaultdict(list)
    for example in examples:
        groups[_prompt_digest(example.prompt, seed)].append(example)
    # Within a prompt the rows are ordered by content, so that the result does not depend on the order of the file.
    ordered = [sorted(groups[digest], key=lambda row: (row.demonstration, row.answers)) for digest in sorted(groups)]
    sizes = share_sizes(len(ordered), split)
    shares: dict[Step, Share] = {}
    start = 0
    for step, size, proportion in zip(STEPS, sizes, split, strict=True):
        if proportion > 0 and size < MIN_PROMPTS_PER_SHARE:
            raise DataError(
                f"data.sources: {len(ordered)} different prompts are too few for data.split "
                f"{[_short(each) for each in split]}: step {step} gets {size}, and needs {MIN_PROMPTS_PER_SHARE} "
                f"(one to train on, one to hold out); this split needs at least {_fewest_prompts(split)} prompts"
            )
        part = ordered[start : start + size]
        start += size
        num_eval = min(max(math.floor(size * eval_fraction + 0.5), 1), size - 1) if size else 0
        shares[step] = Share(train=_flatten(part[num_eval:]), eval=_flatten(part[:num_eval]))
    return shares


def share_sizes(num_prompts: int, split: Sequence[float]) -> list[int]:
    """Prompts of each step: the differences of the rounded cumulative proportions, so each is within 1 of exact."""
    total = sum(split)
    bounds = [math.floor(num_prompts * sum(split[:i]) / total + 0.5) for i in range(len(split) + 1)]
    return [after - before for before, after in pairwise(bounds)]


def _prompt_digest(prompt: Prompt, seed: int) -> bytes:
    text = json.dumps([seed, [[message.role, message.content] for message in prompt.messages]])
    return hashlib.sha256(text.encode()).digest()


def _flatten(groups: Sequence[Sequence[Example]]) -> list[Example]:
    return [example for group in groups for example in group]


def _fewest_prompts(split: Sequence[float]) -> int:
    """The smallest number of prompts that gives every share with a proportion above 0 its two."""
    smallest = min(proportion for proportion in split if proportion > 0) / sum(split)
    # A share is at most 1 off its exact size, so 3 / proportion is always enough; below 1 / proportion never is.
    enough = math.ceil(3 / smallest)
    if enough > MAX_SEARCH:
        return enough
    for num_prompts in range(max(math.floor(1 / smallest), 2), enough):
        sizes = share_sizes(num_prompts, split)
        if all(size >= MIN_PROMPTS_PER_SHARE for size, share in zip(sizes, split, strict=True) if share > 0):
            return num_prompts
    return enough


def _short(proportion: float) -> float | int:
    return int(proportion) if float(proportion).is_integer() else proportion

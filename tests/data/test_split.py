"""The split over the three steps: disjoint by prompt, proportional, and blind to the order of the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.data.split import STEPS, Share, share_sizes, split_examples
from threefold.errors import DataError
from threefold.types import Example, Message, Prompt


def examples_of(prompt_numbers: Sequence[int]) -> list[Example]:
    """One example per number; rows with the same number share the prompt and differ in the answer."""
    return [
        Example(Prompt((Message("user", f"question {number}"),)), f"answer {row % 7}", (), f"f row {row + 1}")
        for row, number in enumerate(prompt_numbers)
    ]


def prompts(examples: Sequence[Example]) -> set[Prompt]:
    return {example.prompt for example in examples}


def parts(shares: dict[str, Share]) -> list[list[Example]]:
    return [part for share in shares.values() for part in (share.train, share.eval)]


@given(
    numbers=st.lists(st.integers(0, 200), min_size=60, max_size=200),
    split=st.tuples(*[st.sampled_from([1, 2, 4, 0.5])] * 3),
    eval_fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_disjoint_complete_and_proportional(numbers, split, eval_fraction, seed) -> None:
    examples = examples_of(numbers)
    if len(set(numbers)) < 60:
        examples += examples_of(range(1000, 1060))
    shares = split_examples(examples, split, eval_fraction, seed)
    found = parts(shares)
    assert sum(len(part) for part in found) == len(examples)
    num_prompts = len(prompts(examples))
    assert sum(len(prompts(part)) for part in found) == num_prompts
    assert set().union(*map(prompts, found)) == prompts(examples)
    for step, proportion in zip(STEPS, split, strict=True):
        share = shares[step]
        num_train, num_eval = len(prompts(share.train)), len(prompts(share.eval))
        assert abs(num_train + num_eval - num_prompts * proportion / sum(split)) <= 1
        assert num_train >= 1
        assert num_eval >= 1
        assert abs(num_eval - (num_train + num_eval) * eval_fraction) <= 1


def test_neither_order_nor_duplicates_of_rows_matter() -> None:
    examples = examples_of([number % 90 for number in range(300)])
    shuffled = examples.copy()
    random.Random(5).shuffle(shuffled)
    first, second = (split_examples(rows, [2, 4, 4], 0.1, 7) for rows in (examples, shuffled))
    for one, other in zip(parts(first), parts(second), strict=True):
        assert [(row.prompt, row.demonstration) for row in one] == [(row.prompt, row.demonstration) for row in other]
    doubled = split_examples(examples + shuffled, [2, 4, 4], 0.1, 7)
    assert [prompts(part) for part in parts(doubled)] == [prompts(part) for part in parts(first)]
    other_seed = split_examples(examples, [2, 4, 4], 0.1, 8)
    assert prompts(other_seed["sft"].train) != prompts(first["sft"].train)


def test_the_split_is_pinned() -> None:
    """A change of the order would silently train a resumed run on prompts that it was measured on."""
    shares = split_examples(examples_of(range(10)), [2, 4, 4], 0.25, 1234)
    assert {step: [row.origin.split()[-1] for row in share.train] for step, share in shares.items()} == {
        "sft": ["8"],
        "reward": ["2", "4", "1"],
        "ppo": ["3", "9", "6"],
    }


def test_an_empty_share_is_allowed() -> None:
    shares = split_examples(examples_of(range(10)), [1, 0, 1], 0.1, 0)
    assert shares["reward"] == Share([], [])
    assert len(shares["sft"].train) == len(shares["ppo"].train) == 4


def test_sizes_by_hand() -> None:
    assert share_sizes(10, [2, 4, 4]) == [2, 4, 4]
    assert share_sizes(8, [2, 4, 4]) == [2, 3, 3]
    assert share_sizes(1, [1, 1, 1]) == [0, 1, 0]


@pytest.mark.parametrize("split", [[2, 4, 4], [1, 1, 1], [1, 0, 30], [0, 0, 1]])
def test_too_small_says_how_many_are_needed(split: list[float]) -> None:
    with pytest.raises(
        DataError, match=r"1 different prompts are too few for data\.split .* at least (\d+) prompts"
    ) as caught:
        split_examples(examples_of([1, 1, 1]), split, 0.1, 0)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    split_examples(examples_of(range(needed)), split, 0.1, 0)
    with pytest.raises(DataError):
        split_examples(examples_of(range(needed - 1)), split, 0.1, 0)


def test_a_tiny_proportion_is_answered_at_once() -> None:
    with pytest.raises(DataError, match="too few"):
        split_examples(examples_of(range(10)), [1e-9, 1, 1], 0.1, 0)

"""The split over the three steps: disjoint by prompt, a function of prompt and seed alone, in the proportions asked."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from threefold.data.split import (
    LEFT_OUT,
    NUM_PLACES,
    PARTS,
    STEPS,
    capped,
    check_enough,
    leave_no_part_empty,
    normalised,
    num_prompts_of_places,
    place_of,
    places,
    prompt_digest,
    without_conflicts,
)
from threefold.errors import DataError
from threefold.types import Message, Prompt

WORD = (1 << 64) - 1
DIGESTS = st.lists(st.integers(0, WORD), max_size=80)
SPLITS = st.lists(st.sampled_from([0, 0.5, 1, 2, 4, 1 / 3]), min_size=3, max_size=3).filter(any)


def asked(*contents: str, system: str = "") -> Prompt:
    """Turns of user and assistant, after a system message."""
    start = (Message("system", system),) if system else ()
    turns = (Message("assistant" if turn % 2 else "user", text) for turn, text in enumerate(contents))
    return Prompt((*start, *turns))


def words(digests: Sequence[int]) -> NDArray[np.uint64]:
    return np.array(digests, dtype=np.uint64)


def digests_of(prompts: Sequence[Prompt]) -> NDArray[np.uint64]:
    return words([int.from_bytes(prompt_digest(prompt)[:8], "big") for prompt in prompts])


def random_digests(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, WORD, count, dtype=np.uint64, endpoint=True)


def splitmix(digest: int, seed: int, purpose: str) -> int:
    """One step of splitmix64, in whole numbers of any size."""
    start = int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8], "big")
    state = ((digest ^ start) + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def naive_place(digest: int, seed: int, split: Sequence[float], eval_fraction: float) -> int:
    """The place of one prompt, by walking along the proportions."""
    where = (splitmix(digest, seed, "step") >> 11) / 2**53
    held_out = (splitmix(digest, seed, "eval") >> 11) / 2**53 < eval_fraction
    passed = 0.0
    for step, share in enumerate(split[:2]):
        passed += share
        if where < passed / sum(split):
            return 2 * step + held_out
    return 4 + held_out


# -------------------------------------------------------------------------------------------------------- prompt digest


@pytest.mark.parametrize(
    "other",
    [
        asked("what is  HUMAN\n kindness? ", "A thing.", "go on"),
        asked("\uff37hat is Human kindness?", "A thing.", "Go on"),  # full-width W
        asked("What is Human\u00a0kindness?", "A thing.", "Go on", system="Be brief."),
    ],
    ids=["case and space", "compatibility form", "system message"],
)
def test_what_asks_the_same_has_one_digest(other: Prompt) -> None:
    assert prompt_digest(other) == prompt_digest(asked("What is Human kindness?", "A thing.", "Go on"))


def test_what_asks_something_else_has_another() -> None:
    prompts = [
        asked("a", "b", "c"),
        asked("a", "c", "b"),
        asked("a b c"),
        asked("a", "b c"),
        asked("a"),
        asked("a", "b", "c", "d"),
        Prompt((Message("assistant", "a"),)),
        Prompt((Message("system", "a"),)),
        Prompt((Message("system", "b"),)),
        asked("a?"),
        asked("\u540d\u524d\u306f"),
        asked("\u540d\u524d\u304c"),
        Prompt(()),
    ]
    digests = [prompt_digest(prompt) for prompt in prompts]
    assert len(set(digests)) == len(prompts)
    assert {len(digest) for digest in digests} == {16}


def test_plain_text_is_known_by_its_text() -> None:
    assert prompt_digest(Prompt(()), "Once upon\na time") == prompt_digest(Prompt(()), "once upon a time")
    assert prompt_digest(Prompt(()), "Once upon a time") != prompt_digest(Prompt(()), "Once upon a day")
    assert prompt_digest(asked("a"), "one") == prompt_digest(asked("a"), "two")


def test_a_digest_is_pinned() -> None:
    """Another one would train a resumed run on prompts that it was measured on."""
    expected = hashlib.sha256(b"user\x1fhi there\x1eassistant\x1fyes").digest()[:16]
    assert prompt_digest(asked("Hi  there", "Yes")) == expected


def test_normalising_twice_changes_nothing() -> None:
    """Every character there is, in the middle of a word."""
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            once = normalised(f"a{chr(code)}b")
            assert normalised(once) == once, hex(code)


@given(text=st.text(max_size=30), other=st.text(max_size=30))
def test_no_text_can_spell_the_marks_between_turns(text: str, other: str) -> None:
    assert prompt_digest(asked(text, other)) != prompt_digest(asked(f"{text}\x1eassistant\x1f{other}"))


# --------------------------------------------------------------------------------------------------------------- places


@given(digests=DIGESTS, seed=st.integers(0, 2**63), split=SPLITS, eval_fraction=st.floats(0.001, 0.999))
@settings(deadline=None)
def test_places_are_those_of_one_prompt_at_a_time(
    digests: list[int], seed: int, split: list[float], eval_fraction: float
) -> None:
    found = places(words(digests), seed, split, eval_fraction)
    assert found.dtype == np.int8
    assert found.tolist() == [naive_place(digest, seed, split, eval_fraction) for digest in digests]


@given(digests=DIGESTS, more=DIGESTS, shuffle=st.randoms(), seed=st.integers(0, 9), split=SPLITS)
@settings(deadline=None)
def test_neither_order_nor_other_rows_move_a_prompt(
    digests: list[int], more: list[int], shuffle: random.Random, seed: int, split: list[float]
) -> None:
    before = dict(zip(digests, places(words(digests), seed, split, 0.2).tolist(), strict=True))
    all_rows = digests + more + digests
    shuffle.shuffle(all_rows)
    after = places(words(all_rows), seed, split, 0.2).tolist()
    assert all(before[digest] == place for digest, place in zip(all_rows, after, strict=True) if digest in before)


@pytest.mark.parametrize("split", [[2, 4, 4], [1, 1, 1], [0.2, 0, 0.8], [0, 0, 3], [1, 0, 0], [1e-3, 1, 1]])
@pytest.mark.parametrize("eval_fraction", [0.1, 0.5])
def test_shares_are_those_of_a_draw(split: list[float], eval_fraction: float) -> None:
    """Each place of 60,000 prompts, to 4.5 standard deviations of the binomial distribution."""
    count = 60_000
    found = np.bincount(places(random_digests(count), 1234, split, eval_fraction), minlength=NUM_PLACES)
    for step, share in enumerate(split):
        for part, fraction in enumerate((1 - eval_fraction, eval_fraction)):
            p = share / sum(split) * fraction
            assert abs(found[2 * step + part] - count * p) <= 4.5 * math.sqrt(count * p * (1 - p)), (step, part)


def test_a_step_without_a_share_gets_nothing_and_one_with_all_gets_all() -> None:
    digests = random_digests(5000)
    for step in range(3):
        alone, without = ([float((each == step) == flag) for each in range(3)] for flag in (True, False))
        assert set(places(digests, 0, alone, 0.1).tolist()) == {2 * step, 2 * step + 1}
        assert not {2 * step, 2 * step + 1} & set(places(digests, 0, without, 0.1).tolist())


def test_seeds_split_independently() -> None:
    """Two seeds agree on a prompt as often as two draws do: sum of p squared, to 4.5 standard deviations."""
    digests = random_digests(40_000)
    first, second = (places(digests, seed, [2, 4, 4], 0.1) for seed in (1, 2))
    shares = [0.2 * 0.9, 0.2 * 0.1, 0.4 * 0.9, 0.4 * 0.1, 0.4 * 0.9, 0.4 * 0.1]
    p = sum(share * share for share in shares)
    assert abs(int((first == second).sum()) - 40_000 * p) <= 4.5 * math.sqrt(40_000 * p * (1 - p))


def test_holding_out_is_independent_of_the_step_and_of_the_split() -> None:
    """What is held out stays so when the proportions change: no evaluation prompt becomes one to train on there."""
    digests = random_digests(3000)
    parts = [places(digests, 5, split, 0.1) % 2 for split in ([2, 4, 4], [1, 0, 0], [0, 1, 9])]
    assert all((part == parts[0]).all() for part in parts)


def test_the_split_is_pinned() -> None:
    """A change would silently train a resumed run on prompts that it was measured on."""
    digests = digests_of([asked(f"question {number}") for number in range(24)])
    found = places(digests, 1234, [2, 4, 4], 0.25).tolist()
    assert found == [naive_place(int(digest), 1234, [2, 4, 4], 0.25) for digest in digests]
    assert "".join(map(str, found)) == "222224200431504310020434"


def test_no_prompt_leaks_between_steps_where_three_in_ten_rows_repeat_one() -> None:
    """Duplicates in other spellings too, over two sources, in any order."""
    source = random.Random(3)
    prompts = [f"Question {number}, please?" for number in range(1400)]
    repeated = [source.choice(prompts) for _ in range(600)]
    spelled = [text.upper() if number % 3 else f" {text}\n" for number, text in enumerate(repeated)]
    rows = [asked(text) for text in prompts + spelled]
    source.shuffle(rows)
    halves = [rows[:1000], rows[1000:]]
    steps_of_prompt: dict[str, set[int]] = {}
    for half in halves:
        for row, place in zip(half, places(digests_of(half), 11, [2, 4, 4], 0.1).tolist(), strict=True):
            steps_of_prompt.setdefault(row.messages[0].content.strip().lower(), set()).add(place)
    assert len(steps_of_prompt) == 1400
    assert Counter(len(each) for each in steps_of_prompt.values()) == {1: 1400}


def test_places_have_names() -> None:
    named = [place_of(step, part) for step in STEPS for part in PARTS]
    assert named == list(range(NUM_PLACES))
    assert place_of("ppo", "eval") == 5


# ------------------------------------------------------------------------------------------------------------------ cap


@given(
    rows=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30)), max_size=60),
    max_rows=st.integers(0, 70),
    seed=st.integers(0, 5),
    shuffle=st.randoms(),
)
@settings(deadline=None)
def test_a_cap_chooses_by_content_alone(
    rows: list[tuple[int, int]], max_rows: int, seed: int, shuffle: random.Random
) -> None:
    def chosen(of: list[tuple[int, int]]) -> Counter[tuple[int, int]]:
        kept = capped(words([row[0] for row in of]), words([row[1] for row in of]), max_rows, seed)
        return Counter(row for row, keep in zip(of, kept.tolist(), strict=True) if keep)

    found = chosen(rows)
    assert found.total() == (min(max_rows, len(rows)) if max_rows else len(rows))
    shuffled = rows.copy()
    shuffle.shuffle(shuffled)
    assert chosen(shuffled) == found
    # A prompt stays whole or goes whole, but for one.
    of_prompt, left = Counter(row[0] for row in rows), Counter(row[0] for row in found.elements())
    assert sum(1 for prompt, count in left.items() if count < of_prompt[prompt]) <= 1


def test_a_cap_grows_without_letting_go_and_leaves_the_split_alone() -> None:
    digests, content = random_digests(20_000), random_digests(20_000, seed=1)
    small, large = (capped(digests, content, rows, 3) for rows in (2000, 5000))
    assert not (small & ~large).any()
    found = np.bincount(places(digests[large], 3, [2, 4, 4], 0.5), minlength=NUM_PLACES)
    for place, p in enumerate([0.1, 0.1, 0.2, 0.2, 0.2, 0.2]):
        assert abs(found[place] - 5000 * p) <= 4.5 * math.sqrt(5000 * p * (1 - p))
    assert (capped(digests, content, 2000, 4) != small).any()


# ------------------------------------------------------------------------------------------------------------ conflicts


def naive_stays(digests: Sequence[Sequence[int]], where: Sequence[Sequence[int]]) -> list[list[bool]]:
    owner: dict[int, int] = {}
    stays = []
    for source, placed in zip(digests, where, strict=True):
        rows = []
        for digest, place in zip(source, placed, strict=True):
            rows.append(place == LEFT_OUT or owner.setdefault(digest, place) == place)
        stays.append(rows)
    return stays


@given(
    sources=st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 5)), max_size=25), max_size=4),
)
@settings(deadline=None)
def test_an_earlier_source_keeps_the_prompt(sources: list[list[tuple[int, int]]]) -> None:
    digests = [[row[0] for row in rows] for rows in sources]
    where = [[row[1] for row in rows] for rows in sources]
    found = without_conflicts([words(each) for each in digests], [np.array(each, dtype=np.int8) for each in where])
    assert [each.tolist() for each in found] == naive_stays(digests, where)


def test_sources_of_different_splits_share_no_prompt_between_places() -> None:
    first, second = random_digests(3000), random_digests(5000)  # the first 3000 are the same
    digests = [first, second]
    where = [places(first, 9, [1, 0, 0], 0.1), places(second, 9, [2, 4, 4], 0.1)]
    stays = without_conflicts(digests, where)
    assert stays[0].all()
    left = [(of_source[keep], placed[keep]) for of_source, placed, keep in zip(digests, where, stays, strict=True)]
    place_of_prompt: dict[int, set[int]] = {}
    for of_source, placed in left:
        for digest, place in zip(of_source.tolist(), placed.tolist(), strict=True):
            place_of_prompt.setdefault(digest, set()).add(place)
    assert {len(each) for each in place_of_prompt.values()} == {1}
    assert stays[1][3000:].all()
    lost = int((~stays[1]).sum())  # 8 in 10 of the shared ones
    assert abs(lost - 2400) <= 4.5 * math.sqrt(3000 * 0.8 * 0.2)


@given(digests=DIGESTS, split=SPLITS)
@settings(deadline=None)
def test_sources_of_one_split_have_no_conflicts(digests: list[int], split: list[float]) -> None:
    where = places(words(digests), 3, split, 0.3)
    assert all(each.all() for each in without_conflicts([words(digests)] * 3, [where] * 3))


# --------------------------------------------------------------------------------------------------------------- enough


def test_prompts_are_counted_once_over_all_sources() -> None:
    digests = [words([1, 1, 2, 3]), words([1, 4, 5])]
    where = [np.array([0, 0, 1, LEFT_OUT], dtype=np.int8), np.array([0, 5, 0], dtype=np.int8)]
    assert num_prompts_of_places(digests, where) == [2, 1, 0, 0, 0, 1]
    assert num_prompts_of_places([], []) == [0] * NUM_PLACES


@pytest.mark.parametrize(
    ("num_prompts", "splits", "parts"),
    [
        (
            [1, 0, 0, 0, 0, 0],
            [[2, 4, 4]],
            ["1 different prompt is", "data.split [2, 4, 4]", "step 1, sft", "1 to train"],
        ),
        ([5, 1, 3, 0, 9, 1], [[2, 4, 4], [2, 4, 4]], ["19 different", "step 2, reward", "3 to train", "0 to hold out"]),
        ([5, 1, 3, 1, 0, 4], [[1, 0, 0], [0.5, 4, 4]], ["the sources' splits", "step 3, ppo", "0 to train on and 4"]),
        ([0, 0, 0, 0, 0, 0], [[0, 0, 1]], ["0 different prompts", "step 3, ppo"]),
    ],
)
def test_too_few_prompts_are_one_line(num_prompts: list[int], splits: list[list[float]], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        check_enough(num_prompts, splits, 0.1)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("data.sources", "data.eval_fraction 0.1", *parts):
        assert part in message


def test_a_step_that_no_source_gives_to_needs_no_prompts() -> None:
    check_enough([9, 1, 0, 0, 0, 0], [[1, 0, 0], [3, 0, 0]], 0.1)
    check_enough([9, 1, 0, 0, 1, 1], [[1, 0, 0], [0, 0, 1]], 0.1)


def test_a_small_set_leaves_no_part_empty_and_moves_one_prompt_in_all_sources() -> None:
    """Of 12 prompts for each step hardly one is drawn to be held out; rows of one prompt stay together."""
    moved = 0
    for seed in range(40):
        digests = random_digests(36, seed)
        sources = [np.concatenate([digests, digests[:9]]), digests[20:]]
        before = [places(source, seed, [1, 1, 1], 0.05) for source in sources]
        after = [drawn.copy() for drawn in before]
        given = leave_no_part_empty(sources, after, seed)
        for step in range(3):
            both = [np.concatenate(all_places) // 2 == step for all_places in (before, after)]
            assert (both[0] == both[1]).all(), "no prompt changes its step"
            here = np.concatenate(after)[both[1]]
            if len(np.unique(np.concatenate(sources)[both[1]])) >= 2:
                assert set(here.tolist()) == {2 * step, 2 * step + 1}
        every_digest, every_place = np.concatenate(sources), np.concatenate(after)
        assert all(len(set(every_place[every_digest == one].tolist())) == 1 for one in digests)
        changed = {int(one) for one in every_digest[every_place != np.concatenate(before)]}
        assert len(changed) == len(given)
        moved += len(given)
        assert leave_no_part_empty(sources, after, seed) == []
    assert moved > 20


@pytest.mark.parametrize(("split", "eval_fraction"), [([2, 4, 4], 0.1), ([1, 0, 0], 0.3), ([1, 1, 30], 0.9)])
def test_the_number_of_prompts_that_it_asks_for_is_enough(split: list[float], eval_fraction: float) -> None:
    """By the union bound fewer than 6 in 1000 seeds leave a place empty."""
    with pytest.raises(DataError) as caught:
        check_enough([1, 0, 0, 0, 0, 0], [split], eval_fraction)
    asked_for = int(str(caught.value).split("give about ")[1].split()[0])

    def failures(count: int) -> int:
        failed = 0
        for seed in range(300):
            digests = random_digests(count, seed)
            drawn = places(digests, seed, split, eval_fraction)
            leave_no_part_empty([digests], [drawn], seed)
            found = np.bincount(drawn, minlength=NUM_PLACES)
            try:
                check_enough(found.tolist(), [split], eval_fraction)
            except DataError:
                failed += 1
        return failed

    assert failures(asked_for) <= 6
    assert failures(asked_for // 3) > failures(asked_for)

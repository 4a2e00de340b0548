"""The seeded split of the prompts over the three steps, each with its own held-out part.

Where a row goes is a function of its prompt and the seed alone: neither the order of the rows nor what else is in the
data can move it, and two rows with the same prompt, of whatever source, always land in the same place. No step is
trained, or measured, on a prompt that another has seen. The price is that shares are those of a draw: with N prompts a
share p holds N p of them give or take sqrt(N p (1 - p)).
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError
from threefold.types import Prompt

Step = Literal["sft", "reward", "ppo"]
Part = Literal["train", "eval"]
STEPS: tuple[Step, ...] = ("sft", "reward", "ppo")
PARTS: tuple[Part, ...] = ("train", "eval")
NUM_PLACES = len(STEPS) * len(PARTS)
LEFT_OUT = -1
"""The place of a row that no step sees."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64
_BETWEEN_TURNS, _AFTER_ROLE = "\x1e", "\x1f"  # whitespace to str.split, so no normalised text has them


def place_of(step: Step, part: Part) -> int:
    """The number by which `places` names a part of a step."""
    return len(PARTS) * STEPS.index(step) + PARTS.index(part)


def normalised(text: str) -> str:
    """The text without what does not make it another one: compatibility forms (NFKC), case, runs of whitespace."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.casefold().split())


def prompt_digest(prompt: Prompt, text: str = "") -> bytes:
    """16 bytes that two prompts share if they ask the same.

    Args:
        prompt: its turns with their roles count, as `normalised`; its system messages do not, unless there is nothing
            else.
        text: the row's text, where it is plain text without a prompt.
    """
    turns = [message for message in prompt.messages if message.role != "system"]
    parts = [f"{turn.role}{_AFTER_ROLE}{normalised(turn.content)}" for turn in turns or prompt.messages]
    if not turns:
        parts.append(f"text{_AFTER_ROLE}{normalised(text)}")
    return hashlib.sha256(_BETWEEN_TURNS.join(parts).encode()).digest()[:16]


def opening(prompt: Prompt) -> Prompt:
    """The prompt up to the first message of the user: what decides its place.

    A conversation that is trained on in step 1 holds answers to each of its turns. Were its continuations, and the
    questions that it passed through, placed one by one, a step would be trained on prompts of another.
    """
    first = next(
        (place for place, message in enumerate(prompt.messages) if message.role == "user"), len(prompt.messages)
    )
    return Prompt(prompt.messages[: first + 1])


def places(digests: NDArray[np.uint64], seed: int, split: Sequence[float], eval_fraction: float) -> NDArray[np.int8]:
    """Where each row goes.

    Args:
        digests: [N], the first eight bytes of the digest of each row's `opening`.
        seed: another seed gives another split.
        split: proportions of steps 1, 2 and 3; one of 0 gets nothing.
        eval_fraction: share of each step that is held out.

    Returns:
        [N], `place_of` each row: 2 * step, plus 1 where it is held out.
    """
    first, second, _ = (bound / sum(split) for bound in accumulate(split))
    where = _uniform(digests, seed, "step")
    steps = (where >= first).astype(np.int8) + (where >= second).astype(np.int8)
    held_out = _uniform(digests, seed, "eval") < eval_fraction
    return (len(PARTS) * steps + held_out).astype(np.int8)


def capped(digests: NDArray[np.uint64], content: NDArray[np.uint64], max_rows: int, seed: int) -> NDArray[np.bool_]:
    """Which rows stay where at most `max_rows` may: whole prompts, in an order that the seed draws.

    The rows of a prompt stay together, so that its rankings do, but for those of the last prompt that fits in part.

    Args:
        digests: [N], of the prompts.
        content: [N], hashes of the whole rows; rows of equal content stand for each other.
        max_rows: 0 keeps all.

    Returns:
        [N], True where the row stays.
    """
    kept = np.ones(len(digests), dtype=np.bool_)
    if 0 < max_rows < len(digests):
        by_prompt, by_row = _mixed(digests, seed, "cap of prompts"), _mixed(content, seed, "cap of rows")
        kept[np.lexsort((by_row, by_prompt))[max_rows:]] = False
    return kept


def without_conflicts(
    digests: Sequence[NDArray[np.uint64]], places_of_sources: Sequence[NDArray[np.int8]]
) -> list[NDArray[np.bool_]]:
    """Which rows may stay where sources of different splits put the same prompt into different places.

    The earliest source that has the prompt keeps it; the rows of later ones stay only where they are in the same place.

    Args:
        digests: [N] of each source.
        places_of_sources: [N] of each source; rows that are `LEFT_OUT` claim nothing and are no conflict.

    Returns:
        [N] of each source, False where the row has to leave.
    """
    if not digests:
        return []
    every_digest, every_place = np.concatenate(list(digests)), np.concatenate(list(places_of_sources))
    stays = np.ones(len(every_digest), dtype=np.bool_)
    taken = np.flatnonzero(every_place != LEFT_OUT)
    _, first, of_row = np.unique(every_digest[taken], return_index=True, return_inverse=True)
    stays[taken] = every_place[taken] == every_place[taken][first][of_row]
    return np.split(stays, np.cumsum([len(part) for part in digests])[:-1])


def leave_no_part_empty(
    digests: Sequence[NDArray[np.uint64]], places_of_sources: Sequence[NDArray[np.int8]], seed: int
) -> list[tuple[Step, Part]]:
    """Where all prompts of a step were drawn to one part, move the one that was nearest to the other, in all sources.

    Only small sets need that: their step 1, say, has 12 prompts, of which none was drawn to be held out.

    Args:
        digests: [N] of each source.
        places_of_sources: [N] of each source; changed in place.

    Returns:
        the parts that were given a prompt.
    """
    given: list[tuple[Step, Part]] = []
    for step in STEPS:
        train, held_out = (place_of(step, part) for part in PARTS)
        for empty, other, part in ((held_out, train, PARTS[1]), (train, held_out, PARTS[0])):
            here = [digest[place == other] for digest, place in zip(digests, places_of_sources, strict=True)]
            prompts = np.unique(np.concatenate(here))
            if len(prompts) < 2 or any((place == empty).any() for place in places_of_sources):
                continue
            drawn = _uniform(prompts, seed, "eval")
            nearest = prompts[np.argmin(drawn) if empty == held_out else np.argmax(drawn)]
            for digest, place in zip(digests, places_of_sources, strict=True):
                place[(digest == nearest) & (place == other)] = empty
            given.append((step, part))
    return given


def num_prompts_of_places(
    digests: Sequence[NDArray[np.uint64]], places_of_sources: Sequence[NDArray[np.int8]]
) -> list[int]:
    """How many different prompts each of the `NUM_PLACES` places holds, over all sources."""
    if not digests:
        return [0] * NUM_PLACES
    every_digest, every_place = np.concatenate(list(digests)), np.concatenate(list(places_of_sources))
    return [len(np.unique(every_digest[every_place == place])) for place in range(NUM_PLACES)]


def check_enough(num_prompts: Sequence[int], splits: Sequence[Sequence[float]], eval_fraction: float) -> None:
    """Refuse data that leave a step that is to have some without a prompt to train on or without one to hold out.

    Args:
        num_prompts: different prompts of each place, as `num_prompts_of_places`.
        splits: of each source; data.split where it has none of its own.
        eval_fraction: data.eval_fraction.

    Raises:
        DataError: names the step, and says how many prompts would do.
    """
    shares = [math.fsum(split[step] / sum(split) for split in splits) / len(splits) for step in range(len(STEPS))]
    for step, share in enumerate(shares):
        to_train, to_hold_out = num_prompts[2 * step], num_prompts[2 * step + 1]
        if share > 0 and (to_train == 0 or to_hold_out == 0):
            which = (
                f"data.split {[_short(each) for each in splits[0]]}" if _all_alike(splits) else "the sources' splits"
            )
            found = sum(num_prompts)
            raise DataError(
                f"data.sources: {found} different prompt{'s are' if found != 1 else ' is'} too few for {which} and "
                f"data.eval_fraction {eval_fraction:g}: step {step + 1}, {STEPS[step]}, gets {to_train} to train on "
                f"and {to_hold_out} to hold out, and needs one of each; give about {_enough(shares)} prompts, raise "
                "that step's share, or set a share to 0 that you do not need"
            )


def _enough(shares: Sequence[float]) -> int:
    """Prompts that give each step that is to have some its two, but for one seed in a thousand."""
    smallest = min(share for share in shares if share > 0)
    if smallest == 1:
        return 2
    fewer = math.log1p(-smallest)
    # Poisson's 9.24 expected prompts leave fewer than two once in a thousand; shares near 1 need less
    most = math.ceil(9.24 / smallest) + 1
    chances = (math.exp(n * fewer) + n * smallest * math.exp((n - 1) * fewer) for n in range(2, min(most, 10_000)))
    return next((n for n, chance in enumerate(chances, start=2) if chance <= 1e-3), most)


def _all_alike(splits: Sequence[Sequence[float]]) -> bool:
    return all(list(split) == list(splits[0]) for split in splits)


def _uniform(digests: NDArray[np.uint64], seed: int, purpose: str) -> NDArray[np.float64]:
    """[N], in [0, 1) in steps of 2**-53."""
    return (_mixed(digests, seed, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(digests: NDArray[np.uint64], seed: int, purpose: str) -> NDArray[np.uint64]:
    """[N], digests as the seed and the purpose rearrange them: one step of splitmix64 (Steele, Lea and Flood 2014)."""
    start = int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8], "big")
    state = (digests ^ np.uint64(start)) + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _short(proportion: float) -> float | int:
    return int(proportion) if float(proportion).is_integer() else proportion

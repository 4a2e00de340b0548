"""Who computes what of a batch, and in which passes: every item once, whatever the number of processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from threefold.engine.distributed import ALONE, World
from threefold.engine.sharing import MicroBatching, Pass, balanced_shares, micro_batching

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


def passes_of_all(batching: MicroBatching, lengths: list[int], size: int) -> list[list[Pass[int]]]:
    """Each process's passes over the items 0, 1, 2, …"""
    worlds = [World(rank=rank, size=size) for rank in range(size)]
    items = list(range(len(lengths)))
    one = [MicroBatching(batching.max_sequences, batching.max_tokens, world, batching.together) for world in worlds]
    return [batch.of(items, lambda item: lengths[item]) for batch in one]


# -------------------------------------------------------------------------------------------------------- one process


def test_micro_batches() -> None:
    assert MicroBatching(max_sequences=2).cut([3, 9, 5, 5, 1]) == [[1, 2], [3, 0], [4]]
    assert MicroBatching(max_tokens=10).cut([3, 9, 5, 5, 1]) == [[1], [2, 3], [0, 4]]
    assert MicroBatching(max_tokens=4).cut([7, 2, 2, 2]) == [[0], [1, 2], [3]], "a longer one passes alone"
    assert MicroBatching(2, 100).cut([1, 1, 1]) == [[0, 1], [2]]
    assert MicroBatching().cut([1, 3, 2]) == [[1, 2, 0]]
    assert MicroBatching(1, 1).cut([]) == []
    two = MicroBatching(max_tokens=6).of(["aa", "b", "cccc"], len)
    assert two == [Pass(["cccc"], [2]), Pass(["aa", "b"], [0, 1])]
    assert MicroBatching().of([], len) == MicroBatching(together=True).of([], len) == []


@given(LENGTHS, st.integers(0, 7), st.integers(0, 120))
def test_micro_batches_hold_every_item_once_and_keep_both_bounds(
    lengths: list[int], max_sequences: int, max_tokens: int
) -> None:
    passes = MicroBatching(max_sequences, max_tokens).cut(lengths)
    assert sorted(index for part in passes for index in part) == list(range(len(lengths)))
    for part in passes:
        longest = max(lengths[index] for index in part)
        assert not max_sequences or len(part) <= max_sequences
        assert not max_tokens or len(part) == 1 or len(part) * longest <= max_tokens
    if len(lengths) > 1 and not max_sequences and not max_tokens:
        assert len(passes) == 1


@given(LENGTHS, st.integers(0, 7), st.integers(0, 120), st.booleans())
def test_one_process_makes_the_passes_of_the_cut(
    lengths: list[int], max_sequences: int, max_tokens: int, together: bool
) -> None:
    """So with one process nothing is different from what it would be without any sharing."""
    batching = MicroBatching(max_sequences, max_tokens, ALONE, together)
    (found,) = passes_of_all(batching, lengths, 1)
    assert [part.rows for part in found] == batching.cut(lengths)
    assert [part.items for part in found] == [part.rows for part in found]
    assert all(part.counts for part in found)


def test_micro_batches_of_the_recipe() -> None:
    world = World(rank=1, size=2)
    assert micro_batching(3, 100, torch.device("cuda"), world, True) == MicroBatching(3, 100, world, True)
    automatic = [micro_batching(0, 0, torch.device(kind)).max_tokens for kind in ("cpu", "mps", "cuda", "meta")]
    assert automatic == [2048, 4096, 16384, 4096]


# ------------------------------------------------------------------------------------------------------------- shares


def test_shares_by_hand() -> None:
    """Longest first, each to whom has the fewest tokens: 9 | 8, 7 | 8 7, 5 | …"""
    assert balanced_shares([5, 9, 7, 8], 2) == [[0, 1], [2, 3]]
    assert balanced_shares([5, 9, 7, 8], 1) == [[0, 1, 2, 3]]
    assert balanced_shares([3], 3) == [[0], [], []]
    assert balanced_shares([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    assert balanced_shares([], 2) == [[], []]


@given(LENGTHS, st.integers(1, 9))
def test_shares_hold_every_item_once_and_differ_by_at_most_one_item(lengths: list[int], size: int) -> None:
    """The last item went to the smallest share, so the largest share exceeds any other by no more than that item."""
    shares = balanced_shares(lengths, size)
    assert len(shares) == size
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(lengths[index] for index in share) for share in shares]
    for share, total in zip(shares, tokens, strict=True):
        smallest_item = min((lengths[index] for index in share), default=0)
        assert total - smallest_item <= min(tokens)
    assert min(map(len, shares)) > 0 or len(lengths) < size, "nobody is idle while there is enough for all"


@given(st.integers(1, 30), st.integers(0, 40), st.integers(1, 9))
def test_equal_lengths_are_dealt_out_like_cards(length: int, count: int, size: int) -> None:
    assert balanced_shares([length] * count, size) == [list(range(rank, count, size)) for rank in range(size)]


# ------------------------------------------------------------------------------------------------------ many processes


@given(LENGTHS, st.integers(0, 7), st.integers(0, 120), st.integers(1, 5), st.booleans())
def test_all_processes_together_make_every_pass_once(
    lengths: list[int], max_sequences: int, max_tokens: int, size: int, together: bool
) -> None:
    found = passes_of_all(MicroBatching(max_sequences, max_tokens, ALONE, together), lengths, size)
    counted = [row for passes in found for part in passes if part.counts for row in part.rows]
    assert sorted(counted) == list(range(len(lengths)))
    for part in (part for passes in found for part in passes):
        assert part.items == part.rows, "these items are their own indices"
        longest = max(lengths[row] for row in part.rows)
        assert not max_sequences or len(part.rows) <= max_sequences
        assert not max_tokens or len(part.rows) == 1 or len(part.rows) * longest <= max_tokens


@given(LENGTHS, st.integers(0, 7), st.integers(0, 120), st.integers(1, 5))
def test_together_all_make_as_many_passes(lengths: list[int], max_sequences: int, max_tokens: int, size: int) -> None:
    """What is missing is made of the shortest item, at the end, and does not count."""
    apart = passes_of_all(MicroBatching(max_sequences, max_tokens), lengths, size)
    found = passes_of_all(MicroBatching(max_sequences, max_tokens, ALONE, True), lengths, size)
    most = max(map(len, apart))
    for own, passes in zip(apart, found, strict=True):
        assert passes[: len(own)] == own
        assert len(passes) == most
        for part in passes[len(own) :]:
            assert not part.counts
            assert [lengths[row] for row in part.rows] == [min(lengths)]


@pytest.mark.parametrize("together", [False, True])
def test_fewer_items_than_processes(together: bool) -> None:
    found = passes_of_all(MicroBatching(together=together), [3, 1], 4)
    own = [[Pass([0], [0])], [Pass([1], [1])]]
    idle = [Pass([1], [1], counts=False)] if together else []
    assert found == [*own, idle, idle]

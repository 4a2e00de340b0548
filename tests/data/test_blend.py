"""The blend: shares as asked, every row in its turn, the same again after a resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.data.blend import WEIGHT_STEPS, Blend, make_blend
from threefold.data.collate import epoch_order

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=5)


def sources_of(blend: Blend, draws: list[int]) -> list[int]:
    """The source of each place in the concatenation, by counting off."""
    owners = [source for source, size in enumerate(blend.sizes) for _ in range(size)]
    return [owners[place] for place in draws]


def stream(blend: Blend, passes: int) -> list[int]:
    return [place for epoch in range(passes) for place in blend.order(epoch)]


def one_each(sizes: Sequence[float]) -> list[float]:
    return [1.0] * len(sizes)


# ----------------------------------------------------------------------------------------------------------- one source


@given(size=st.integers(1, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_one_source_is_drawn_in_the_epoch_order(size: int, seed: int, epoch: int) -> None:
    expected = epoch_order(size, seed, epoch)
    assert make_blend([size], [], 1.0, [1.0], seed).order(epoch) == expected
    assert make_blend([size], [0.3], 1.0, [1.0], seed).order(epoch) == expected
    assert make_blend([size], [], 2.0, [1.0], seed).order(epoch) == expected


def test_sources_without_rows_change_nothing() -> None:
    for weights, temperature in (([], 1.0), ([3.0, 1.0, 2.0], 1.0), ([], 3.0)):
        blend = make_blend([0, 50, 0], weights, temperature, [1.0] * 3, 8)
        assert blend.order(2) == epoch_order(50, 8, 2)
        assert blend.draws == (0, 50, 0)


def test_no_rows_at_all_are_no_draws() -> None:
    for weights, temperature in (([], 1.0), ([1.0, 1.0], 1.0), ([], 2.0)):
        blend = make_blend([0, 0], weights, temperature, [1.0, 1.0], 0)
        assert (len(blend), blend.order(0), blend.order(3)) == (0, [], [])


# ---------------------------------------------------------------------------------------------------------- proportions


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [0.9, 0.1], [70, 20, 10], [5, 1, 1, 1], [0.997, 0.002, 0.001], [1 / 3, 2 / 3]],
)
@pytest.mark.parametrize("size", [7, 400, 30_000])
def test_ten_thousand_draws_from_anywhere_have_the_weights(weights: list[float], size: int) -> None:
    """Within 2 draws of 10,000 (the goal is 1 %, 100 draws), for sources much smaller and larger than that."""
    blend = make_blend([size * (1 + 3 * number) for number in range(len(weights))], weights, 1.0, one_each(weights), 4)
    draws = stream(blend, 2 * 10_000 // len(blend) + 2)
    owners = sources_of(blend, draws)
    for start in (0, 1, 137, 5000, len(blend) // 2, 10_000 - 1):
        window = Counter(owners[start : start + 10_000])
        assert window.total() == 10_000
        for source, weight in enumerate(weights):
            assert abs(window[source] - 10_000 * weight / sum(weights)) <= 2, (start, source)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.01, 1), min_size=5, max_size=5),
    window=st.integers(1, 400),
    start=st.integers(0, 300),
)
@settings(max_examples=60, deadline=None)
def test_any_window_is_as_even_as_whole_draws_can_be(
    sizes: list[int], weights: list[float], window: int, start: int
) -> None:
    """Off by no more than one draw, plus a source's share of the others' draws, at each end of the window."""
    weights = weights[: len(sizes)]
    blend = make_blend(sizes, weights, 1.0, one_each(sizes), 1)
    owners = sources_of(blend, stream(blend, (start + window) // len(blend) + 1))[start : start + window]
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        slack = 2 * (0.5 + share * len(sizes) / 2) + window * len(sizes) / WEIGHT_STEPS
        assert abs(owners.count(source) - window * share) <= slack + 1e-9


def test_temperature_lies_between_sizes_and_equal_shares() -> None:
    """Sizes 8,100 and 900 are 9 to 1; with T = 2 their square roots, 3 to 1."""
    for temperature, first in ((1.0, 8100), (2.0, 6750), (1e9, 4500)):
        blend = make_blend([8100, 900], [], temperature, [1.0, 1.0], 0)
        assert blend.draws == (first, 9000 - first)
        owners = sources_of(blend, blend.order(0))
        assert owners.count(0) == first


def test_epochs_say_how_often_each_row_is_taken() -> None:
    blend = make_blend([40, 10, 8], [], 1.0, [1.0, 3.0, 0.5], 6)
    assert blend.draws == (40, 30, 4)
    for epoch in range(3):
        counts = Counter(blend.order(epoch))
        assert {counts[place] for place in range(40)} == {1}
        assert {counts[place] for place in range(40, 50)} == {3}
        assert sum(counts[place] for place in range(50, 58)) == 4
    two_passes = Counter(stream(blend, 2))
    assert {two_passes[place] for place in range(50, 58)} == {1}


def test_the_smallest_part_of_a_source_is_one_row() -> None:
    blend = make_blend([10, 3], [], 1.0, [1.0, 0.01], 6)
    assert blend.draws == (10, 1)


# ------------------------------------------------------------------------------------------------ permutations, resume


@given(
    sizes=SIZES,
    weights=st.one_of(st.just([]), st.lists(st.floats(0.05, 1), min_size=5, max_size=5)),
    temperature=st.sampled_from([1.0, 2.0, 5.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_every_row_comes_once_before_any_comes_again(
    sizes: list[int], weights: list[float], temperature: float, seed: int
) -> None:
    """Within a source the whole run is one permutation of its rows after another, each another one, over the ends of
    passes too."""
    blend = make_blend(sizes, weights[: len(sizes)], temperature if not weights else 1.0, one_each(sizes), seed)
    assert sum(blend.draws) == len(blend)
    for epoch in range(3):
        assert len(blend.order(epoch)) == len(blend)
    draws = stream(blend, 4)
    owners = sources_of(blend, draws)
    start = 0
    for source, size in enumerate(sizes):
        mine = [place - start for place, owner in zip(draws, owners, strict=True) if owner == source]
        rounds = [mine[first : first + size] for first in range(0, len(mine), size)] if size else []
        assert all(len(set(each)) == len(each) and set(each) <= set(range(size)) for each in rounds)
        if size > 20:
            whole = [each for each in rounds if len(each) == size]
            assert all(one != other for one, other in pairwise(whole))
        start += size


def test_without_weights_a_pass_takes_each_row_once() -> None:
    blend = make_blend([30, 0, 12, 1], [], 1.0, [1.0] * 4, 5)
    for epoch in range(3):
        assert sorted(blend.order(epoch)) == list(range(43))
    assert blend.order(0) != blend.order(1)
    assert blend.order(1) != make_blend([30, 0, 12, 1], [], 1.0, [1.0] * 4, 6).order(1)


def test_sources_of_one_size_are_not_drawn_in_step() -> None:
    blend = make_blend([50, 50], [], 1.0, [1.0, 1.0], 5)
    order = blend.order(0)
    assert [place for place in order if place < 50] != [place - 50 for place in order if place >= 50]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=3),
    weights=st.one_of(st.just([]), st.lists(st.floats(0.05, 1), min_size=3, max_size=3)),
    batch_size=st.integers(1, 16),
    stop=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_going_on_in_mid_epoch_is_as_if_it_had_not_stopped(
    sizes: list[int], weights: list[float], batch_size: int, stop: int
) -> None:
    """A position is a number of optimizer steps: a blend made anew draws the very same batches from there on."""

    def batches(first: int, last: int) -> list[list[int]]:
        blend = make_blend(sizes, weights[: len(sizes)], 1.0, one_each(sizes), 77)
        per_epoch = -(-len(blend) // batch_size)
        found = []
        for step in range(first, last):
            epoch, within = divmod(step, per_epoch)
            found.append(blend.order(epoch)[within * batch_size : (within + 1) * batch_size])
        return found

    assert batches(0, stop) + batches(stop, 40) == batches(0, 40)


def test_the_order_is_pinned() -> None:
    """A change would let a resumed run draw some rows twice and others never."""
    blend = make_blend([6, 3], [1, 1], 1.0, [1.0, 1.0], 1234, ("long", "short"))
    assert blend == Blend((6, 3), (5, 4), 1234, ("long", "short"), (1, 1))
    assert [blend.order(epoch) for epoch in range(2)] == [[6, 1, 7, 4, 8, 2, 8, 0, 7], [3, 6, 5, 7, 3, 8, 4, 6, 2]]


@pytest.mark.parametrize("num_small", [5, 75, 300])
def test_many_small_sources_come_one_after_the_other(num_small: int) -> None:
    """One source has half of the draws: it is half of any batch, not all of one and nothing of the next."""
    blend = make_blend([1000] * (num_small + 1), [num_small] + [1] * num_small, 1.0, [1.0] * (num_small + 1), 0)
    is_large = np.array(blend.order(0) + blend.order(1)) < 1000
    for start in range(0, len(is_large) - 32, 17):
        assert 10 <= int(is_large[start : start + 32].sum()) <= 22
    windows = [is_large[start : start + 10_000].mean() for start in range(0, max(len(is_large) - 10_000, 1), 997)]
    assert max(abs(share - 0.5) for share in windows) < 0.001


def test_a_million_rows_are_ordered_in_no_time_to_speak_of() -> None:
    blend = make_blend([900_000, 100_000], [2, 1], 1.0, [1.0, 1.0], 0)
    order = blend.order(1)
    assert len(order) == 1_000_000
    assert abs(sum(place >= 900_000 for place in order) - 333_333) <= 4

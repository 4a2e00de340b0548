"""The key-value cache: what moves, what does not, and how rows are grouped."""

from __future__ import annotations

import pytest
import torch

from threefold.inference.kv_cache import ROWS_OF_A_GROUP, CacheLayout, KVCache

LAYOUT = CacheLayout(num_layers=3, num_kv_heads=2, head_dim=4)


def filled(max_rows: int, capacity: int, lengths: list[int]) -> KVCache:
    """A cache whose rows hold their own row number plus their position / 100, in every layer."""
    cache = KVCache(LAYOUT, max_rows, capacity, "cpu", torch.float32)
    cache.num_rows = len(lengths)
    for row, length in enumerate(lengths):
        content = (row + 1 + torch.arange(length) / 100)[None, :, None, None].expand(1, length, 2, 4)
        for layer in range(LAYOUT.num_layers):
            cache.write_prompts(layer, row, content, -content)
    cache.set_lengths(0, lengths)
    return cache


def content(cache: KVCache, row: int) -> list[float]:
    """What a row holds, by position; the same in keys, values, layers, heads and dimensions."""
    keys = torch.stack([layer[row] for layer in cache.keys])  # [layers, H, Dh, C]
    values = torch.stack([layer[row] for layer in cache.values])
    assert torch.equal(keys, -values.transpose(-1, -2))
    assert torch.equal(keys, keys[:1, :1, :1].expand_as(keys))
    return [round(float(number), 2) for number in keys[0, 0, 0]]


def test_a_move_copies_the_live_part_only_and_leaves_its_source() -> None:
    cache = filled(4, 5, [2, 4, 3])
    cache.move(2, 1)
    assert content(cache, 1) == [3.0, 3.01, 3.02, 2.03, 0]  # the rest is what the row held before
    assert content(cache, 2) == [3.0, 3.01, 3.02, 0, 0]
    assert content(cache, 0) == [1.0, 1.01, 0, 0, 0]
    assert cache.lengths == [2, 3, 3, 0]
    assert cache.device_lengths.tolist() == cache.lengths
    cache.move(1, 1)
    assert content(cache, 1)[:3] == [3.0, 3.01, 3.02]


def test_copies_share_a_prompt_and_a_row_can_be_cut_back() -> None:
    cache = filled(5, 4, [3, 1])
    cache.copy(0, [2, 4])
    assert content(cache, 2) == content(cache, 4) == content(cache, 0) == [1.0, 1.01, 1.02, 0]
    assert cache.lengths == [3, 1, 3, 0, 3]
    cache.set_length(2, 1)
    assert cache.lengths == cache.device_lengths.tolist() == [3, 1, 1, 0, 3]


def test_append_writes_each_row_at_its_own_position() -> None:
    cache = filled(3, 4, [1, 3])
    new = torch.tensor([8.0, 9.0])[:, None, None].expand(2, 2, 4)
    for layer in range(LAYOUT.num_layers):
        cache.append(layer, cache.row_numbers[:2], cache.device_lengths[:2], new, -new)
    cache.advance()
    assert content(cache, 0) == [1.0, 8.0, 0, 0]
    assert content(cache, 1) == [2.0, 2.01, 2.02, 9.0]
    assert cache.lengths == cache.device_lengths.tolist() == [2, 4, 0]


def test_a_full_row_is_refused() -> None:
    cache = filled(3, 4, [1, 4])
    with pytest.raises(ValueError, match="row 1 is full: the cache has room for 4 positions"):
        cache.advance()
    cache.num_rows = 1
    cache.advance()
    for first_row, lengths in ((0, [5]), (2, [1, 1]), (0, [-1]), (0, [])):
        with pytest.raises(ValueError, match="do not fit"):
            cache.set_lengths(first_row, lengths)
    with pytest.raises(ValueError, match="holds nothing"):
        KVCache(LAYOUT, 0, 4, "cpu", torch.float32)


def test_groups_read_no_further_than_their_longest_row() -> None:
    rows = 2 * ROWS_OF_A_GROUP + 1
    cache = KVCache(LAYOUT, rows, 50, "cpu", torch.float32)
    assert cache.groups() == []
    cache.num_rows = rows
    cache.set_lengths(0, list(range(1, rows + 1)))
    first, second = ROWS_OF_A_GROUP, 2 * ROWS_OF_A_GROUP
    assert cache.groups() == [(slice(0, first), first), (slice(first, second), second), (slice(second, rows), rows)]
    cache.set_lengths(0, [7] * rows)
    assert cache.groups() == [(slice(0, rows), 7)]
    cache.num_rows = 3
    cache.set_length(1, 9)
    assert cache.groups() == [(slice(0, 3), 9)]


def test_views_are_the_cache_itself() -> None:
    cache = filled(3, 6, [4, 4, 4])
    views = cache.views(slice(1, 3), 1, 4)
    assert len(views) == LAYOUT.num_layers
    for keys, values in views:
        assert keys.shape == (2, 2, 4, 3)
        assert values.shape == (2, 2, 3, 4)
        assert [round(float(x), 2) for x in keys[0, 0, 0]] == [2.01, 2.02, 2.03]
    assert views[1][0].untyped_storage().data_ptr() == cache.keys[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("capacity", [5, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_the_layout_says(capacity: int, dtype: torch.dtype) -> None:
    cache = KVCache(LAYOUT, 4, capacity, "cpu", dtype)
    # keys and values, 3 layers, 2 heads, 4 dimensions
    assert LAYOUT.bytes_per_token(dtype) == 2 * 3 * 2 * 4 * dtype.itemsize
    assert 4 * capacity * LAYOUT.bytes_per_token(dtype) <= cache.nbytes <= 4 * LAYOUT.bytes_per_row(capacity, dtype)
    assert cache.keys[0].shape == (4, 2, 4, capacity)


def test_a_cache_of_inference_mode_can_be_written_outside_it() -> None:
    with torch.inference_mode():
        cache = filled(2, 4, [2, 3])
    cache.move(1, 0)
    cache.advance()
    assert content(cache, 0)[:3] == [2.0, 2.01, 2.02]

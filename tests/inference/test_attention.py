"""The two forms of the decoder's attention, and both kernels of a step, against the definition in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from threefold.inference.attention import (
    RotaryTable,
    _attend_rows,
    _attend_rows_cpu,
    attend_prompt,
    attend_step,
    groups_of_step,
    prompt_mask,
)
from threefold.inference.families import alibi_slopes
from threefold.inference.kv_cache import CacheLayout, KVCache

HEADS, DIMENSION, SCALE = 6, 8, 0.4


def plain_attention(
    queries: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, slopes: Tensor | None
) -> Tensor:
    """One query [Hq, Dh] at `position` over keys and values [L, H, Dh], a score at a time."""
    shared = queries.shape[0] // keys.shape[1]
    answer = torch.zeros(queries.shape, dtype=torch.float64)
    first = 0 if window is None else max(position - window + 1, 0)
    for head in range(queries.shape[0]):
        k, v = keys[:, head // shared].double(), values[:, head // shared].double()
        scores = torch.stack([k[j] @ queries[head].double() * SCALE for j in range(first, position + 1)])
        if slopes is not None:
            scores += slopes[head].double() * torch.arange(first, position + 1)
        answer[head] = scores.softmax(0) @ v[first : position + 1]
    return answer.flatten()


CASES = [
    (kv_heads, window, alibi)
    for kv_heads in (6, 2, 1)
    for window in (None, 1, 4, 8, 9)
    for alibi in (False, True)
    if not (alibi and kv_heads != HEADS)
]


@pytest.mark.parametrize(("kv_heads", "window", "alibi"), CASES)
def test_a_step_and_a_prompt_are_the_definition(kv_heads: int, window: int | None, alibi: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 1, 9, 2, 7, 3, 4, 8, 6]  # more than one group
    layout = CacheLayout(1, kv_heads, DIMENSION)
    cache = KVCache(layout, len(lengths), 12, "cpu", torch.float32)
    cache.num_rows = len(lengths)
    shape = (len(lengths), max(lengths))
    queries = torch.randn(*shape, HEADS, DIMENSION, generator=generator)
    keys, values = (torch.randn(*shape, kv_heads, DIMENSION, generator=generator) for _ in range(2))
    cache.write_prompts(0, 0, keys, values)
    cache.set_lengths(0, lengths)
    slopes = alibi_slopes(HEADS) if alibi else None

    def expected(row: int, position: int) -> Tensor:
        return plain_attention(queries[row, position], keys[row], values[row], position, window, slopes).float()

    last = torch.stack([queries[row, length - 1] for row, length in enumerate(lengths)])
    groups = groups_of_step(cache, window, slopes)
    assert len(groups) == 2
    reference = torch.stack([expected(row, length - 1) for row, length in enumerate(lengths)])
    torch.testing.assert_close(attend_step(last, groups, 0, SCALE), reference, atol=2e-6, rtol=1e-5)
    for kernel in (_attend_rows, _attend_rows_cpu):
        answers = [kernel(last[g.rows], *g.layers[0], g.mask, SCALE) for g in groups]
        torch.testing.assert_close(torch.cat(answers), reference, atol=2e-6, rtol=1e-5)

    mask = prompt_mask(shape[1], window, slopes, torch.device("cpu"), torch.float32)
    answer = attend_prompt(queries, keys, values, mask, SCALE)
    whole = torch.stack([torch.stack([expected(row, i) for i in range(shape[1])]) for row in range(shape[0])])
    torch.testing.assert_close(answer, whole, atol=2e-6, rtol=1e-5)


def test_equal_rows_need_no_mask_and_a_window_reads_only_itself() -> None:
    cache = KVCache(CacheLayout(2, 2, 4), 20, 16, "cpu", torch.float32)
    cache.num_rows = 20
    cache.set_lengths(0, [10] * 20)
    (group,) = groups_of_step(cache, 4, None)
    assert group.mask is None
    assert group.layers[1][1].shape == (20, 2, 4, 4)
    cache.set_length(3, 7)
    assert [g.layers[0][0].shape[-1] for g in groups_of_step(cache, 4, None)] == [7, 4, 4]
    assert [g.mask is None for g in groups_of_step(cache, 4, None)] == [False, True, True]


@pytest.mark.parametrize("rotated", [4, 8])
def test_rotation_turns_each_pair_by_its_angle(rotated: int) -> None:
    """Against complex numbers; the dimensions beyond the rotated ones stay."""
    angles = torch.rand(5, rotated // 2, generator=torch.Generator().manual_seed(1)) * 6
    heads = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(2))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    halves = heads.clone()
    both = torch.cat([angles, angles], dim=-1)
    RotaryTable.of_halves(both.cos(), both.sin()).at(torch.arange(5)).rotate_(halves)
    first, second = heads[..., : rotated // 2], heads[..., rotated // 2 : rotated]
    expected = torch.complex(first, second) * turn
    torch.testing.assert_close(halves[..., :rotated], torch.cat([expected.real, expected.imag], dim=-1))
    assert torch.equal(halves[..., rotated:], heads[..., rotated:])

    neighbours = heads.clone()
    table = RotaryTable.of_neighbours(torch.cat([angles.sin(), angles.cos()], dim=-1))
    table.at(torch.arange(5)).rotate_(neighbours)
    expected = torch.view_as_complex(heads[..., :rotated].unflatten(-1, (-1, 2)).contiguous()) * turn
    torch.testing.assert_close(neighbours[..., :rotated], torch.view_as_real(expected).flatten(-2))
    assert torch.equal(neighbours[..., rotated:], heads[..., rotated:])

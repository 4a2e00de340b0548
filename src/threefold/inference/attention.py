"""Attention of the decoder: positions, masks, and the two forms that decoding needs.

A prompt attends to itself (causal; padding comes after, so nothing sees it). A step attends from one new position per
row to what the row has in the cache. Shapes: b rows of t positions, n rows of a step, Hq query heads, H key-value
heads, Dh head dimension, L positions of the cache that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from threefold.inference.families import Positions
from threefold.inference.kv_cache import KVCache

KeysValues = tuple[Tensor, Tensor]

MASK_ALIGNMENT = 8
"""PyTorch's memory-efficient kernel, the one that takes a mask, wants its rows to begin at multiples of this many
numbers; another mask is copied into such a one, in every layer."""


@dataclass(frozen=True)
class RotaryTable:
    """cos and signed sin of every position, each [C, 1, rotated dimensions].

    `x * cos + swapped(x) * sin` rotates, where `swapped` exchanges the two members of each pair and the sign of the
    first one's sine is turned.
    """

    cos: Tensor
    sin: Tensor
    positions: Positions

    @classmethod
    def of_halves(cls, cos: Tensor, sin: Tensor) -> RotaryTable:
        """From [C, d] with the angles of dimensions i and i + d/2 equal."""
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        return cls(cos.unsqueeze(1), signed.unsqueeze(1), Positions.ROTARY_HALVES)

    @classmethod
    def of_neighbours(cls, sin_cos: Tensor) -> RotaryTable:
        """From [C, d]: sines of the d/2 pairs (2i, 2i + 1), then cosines."""
        sin, cos = sin_cos.chunk(2, dim=-1)
        signed = torch.stack([-sin, sin], dim=-1).flatten(1)
        return cls(cos.repeat_interleave(2, dim=-1).unsqueeze(1), signed.unsqueeze(1), Positions.ROTARY_NEIGHBOURS)

    def at(self, positions: Tensor) -> RotaryTable:
        """The rows of these positions."""
        return RotaryTable(self.cos[positions], self.sin[positions], self.positions)

    def rotate_(self, heads: Tensor) -> None:
        """Rotate the first dimensions of [..., heads, Dh] in place; the leading dimensions end with the positions."""
        rotated = self.cos.shape[-1]
        x = heads if rotated == heads.shape[-1] else heads[..., :rotated]
        if self.positions is Positions.ROTARY_HALVES:
            swapped = x.roll(rotated // 2, dims=-1)
        else:
            swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        x.copy_(torch.addcmul(x * self.cos, swapped, self.sin))


def prompt_mask(
    length: int, window: int | None, slopes: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores of a prompt, [1, H or 1, t, t]; None where plain causality says all."""
    if slopes is None and (window is None or window >= length):
        return None
    positions = torch.arange(length, device=device)
    hidden = positions > positions.unsqueeze(1)
    if window is not None:
        hidden |= positions <= positions.unsqueeze(1) - window
    bias = torch.zeros(1, 1, 1, length, device=device) if slopes is None else alibi_bias(slopes, positions)
    return bias.masked_fill(hidden, -torch.inf).to(dtype)


def alibi_bias(slopes: Tensor, positions: Tensor) -> Tensor:
    """[1, H, 1, L] float32. Linear in the key's own position: softmax does not see what is equal for all keys."""
    return (slopes.unsqueeze(1) * positions)[None, :, None]


def attend_prompt(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of prompts to themselves.

    Args:
        queries: [b, t, Hq, Dh].
        keys, values: [b, t, H, Dh].

    Returns:
        [b, t, Hq * Dh].
    """
    q, k, v = (heads.transpose(1, 2) for heads in (queries, keys, values))
    answer = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return answer.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Group:
    """Rows whose attention is one call, for layers of one window.

    Attributes:
        layers: per layer the keys [rows, H, Dh, L] and values [rows, H, L, Dh] to read.
        mask: [rows, H or 1, 1, L], added to the scores; None if every row sees everything.
    """

    rows: slice
    layers: Sequence[KeysValues]
    mask: Tensor | None


def groups_of_step(cache: KVCache, window: int | None, slopes: Tensor | None) -> list[Group]:
    """Plan the attention of one step on the host: the rows' lengths, the new position included, are known."""
    groups = []
    for rows, stop in cache.groups():
        shortest = min(cache.lengths[rows])
        start = 0 if window is None else max(shortest - window, 0)
        mask = None
        if shortest < stop or slopes is not None:
            mask = step_mask(cache, rows, start, stop, window, slopes)
        groups.append(Group(rows, cache.views(rows, start, stop), mask))
    return groups


def step_mask(cache: KVCache, rows: slice, start: int, stop: int, window: int | None, slopes: Tensor | None) -> Tensor:
    """What is added to the scores of one new position per row, [n, H or 1, 1, L]; from tensors on the device only."""
    length = stop - start
    padded = length if cache.device.type == "cpu" else -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT
    positions = cache.positions[start : start + padded]
    lengths = cache.device_lengths[rows].unsqueeze(1)
    hidden = positions >= lengths
    if window is not None:
        hidden |= positions < lengths - window
    bias = torch.zeros(1, 1, 1, 1, device=cache.device) if slopes is None else alibi_bias(slopes, positions)
    return bias.masked_fill(hidden[:, None, None], -torch.inf).to(cache.dtype)[..., :length]


def attend_step(queries: Tensor, groups: Sequence[Group], layer: int, scale: float) -> Tensor:
    """Attention of one new position per row to the row's past, itself included.

    Args:
        queries: [n, Hq, Dh].

    Returns:
        [n, Hq * Dh].
    """
    attend = _attend_rows_cpu if queries.device.type == "cpu" else _attend_rows
    if len(groups) == 1:
        return attend(queries, *groups[0].layers[layer], groups[0].mask, scale)
    return torch.cat([attend(queries[g.rows], *g.layers[layer], g.mask, scale) for g in groups])


def _attend_rows(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """By PyTorch's fused kernels; the query heads that share keys and values are rows of one product, so that the
    kernel needs to know nothing of groups. The mask is of the queries' type, as the kernels want it."""
    q = queries.unflatten(1, (keys.shape[1], -1))
    answer = F.scaled_dot_product_attention(q, keys.transpose(-1, -2), values, attn_mask=mask, scale=scale)
    return answer.flatten(1)


def _attend_rows_cpu(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """By two batched products, which at one query per row read memory faster than the fused kernel does."""
    n, H = keys.shape[:2]
    q = (queries * scale).reshape(n * H, -1, queries.shape[-1])
    scores = torch.bmm(q, keys.flatten(0, 1))
    if mask is not None:
        scores.view(n, H, -1, scores.shape[-1]).add_(mask)
    return torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view(n, -1)

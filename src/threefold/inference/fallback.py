"""Decoding on a model's own Hugging Face forward, for families that the decoder's table does not cover.

Slower than `Decoder`, and the same to who uses it. How slow depends on what the family keeps of its past (`Past`); a
probe of a few tokens decides, for a family may ignore masks or keep a state inside its modules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from threefold.data.collate import left_pad_prompts
from threefold.models.forward import CausalForward
from threefold.models.loading import context_length

PADDABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Cache layers of keys and values alone, and of layers that keep nothing."""


class Past(Enum):
    """What a family keeps of a row's past, and so how its rows are called; the best that gives the right logits."""

    COLUMNS = "all rows in one call"
    """Keys and values alone. Rows of different lengths are aligned at their right ends, as left-padded prompts are."""
    STATE = "one call for each row"
    """The states of a recurrent layer, say, which padding would enter."""
    NONE = "one call for each row, which reads its whole text again for each token"
    """Nothing that belongs to one row and can be handed back to the model."""


class PaddedCache:
    """Keys and values of all rows, [rows, H, W, Dh] per layer; row r has its tokens in the last lengths[r] columns.

    The width W is that of the longest row; what is left of a row's own tokens is never looked at.
    """

    def __init__(self, cache: DynamicCache, max_rows: int) -> None:
        self.num_rows = 0
        self.lengths = [0] * max_rows
        self.cache = cache

    def _layers(self) -> list[DynamicLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]

    @property
    def width(self) -> int:
        """Columns that there are."""
        layers = self._layers()
        return layers[0].keys.shape[-2] if layers else 0

    def mask(self, rows: int, width: int) -> Tensor:
        """[rows, width] bool, True at the rows' own tokens."""
        columns = torch.arange(width)
        return columns >= width - torch.tensor(self.lengths[:rows]).unsqueeze(1)

    def insert(self, prefilled: DynamicCache, lengths: Sequence[int], first_row: int) -> None:
        """Put left-padded rows that were computed apart over the rows from first_row on."""
        rows = max(self.num_rows, first_row + len(lengths))
        fresh = [layer for layer in prefilled.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
        mine = self._layers()
        if not mine:
            assert first_row == 0
            self.cache = prefilled
        for old, new in zip(mine, fresh, strict=bool(mine)):
            part = slice(first_row, first_row + len(lengths))
            old.keys = _overlaid(old.keys, new.keys, rows, part)
            old.values = _overlaid(old.values, new.values, rows, part)
        self.lengths[first_row : first_row + len(lengths)] = lengths

    def keep(self, rows: int, width: int) -> None:
        """Drop the rows behind the first `rows`, and columns beyond the last `width`."""
        for layer in self._layers():
            layer.keys, layer.values = layer.keys[:rows, :, -width:], layer.values[:rows, :, -width:]

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        self.copy(source, [target])

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Copy row `source` over each of `targets`."""
        for layer in self._layers():
            layer.keys = _with_copies(layer.keys, source, targets)
            layer.values = _with_copies(layer.values, source, targets)
        for target in targets:
            self.lengths[target] = self.lengths[source]

    def set_length(self, row: int, length: int) -> None:
        """Forget what the row holds beyond its first `length` tokens; the others go to the right end."""
        surplus = self.lengths[row] - length
        assert surplus >= 0
        if surplus:
            for layer in self._layers():
                for states in (layer.keys, layer.values):
                    states[row] = states[row].roll(surplus, dims=-2)
        self.lengths[row] = length


def _overlaid(old: Tensor, new: Tensor, rows: int, part: slice) -> Tensor:
    """Both in one tensor of `rows` rows and the larger width, ends aligned; `new` lies in the rows `part`."""
    width = max(old.shape[-2], new.shape[-2])
    kept = min(rows, len(old))
    joined = old.new_zeros(rows, old.shape[1], width, old.shape[-1])
    joined[:kept, :, width - old.shape[-2] :] = old[:kept]
    joined[part] = 0  # a masked value is multiplied by 0, and what a longer row left behind need not be finite
    joined[part, :, width - new.shape[-2] :] = new
    return joined


def _with_copies(states: Tensor, source: int, targets: Sequence[int]) -> Tensor:
    missing = max(targets) + 1 - len(states)
    if missing > 0:
        states = torch.cat([states, states.new_zeros(missing, *states.shape[1:])])
    states[list(targets)] = states[source].clone()
    return states


@dataclass
class _Past:
    """One row of a `SeparateCache`: its tokens, and the family's cache of them where it has one."""

    ids: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None


class SeparateCache:
    """Each row by itself. Only what was just prefilled can be gone back to, by another prefill: states have no columns
    that could be dropped."""

    def __init__(self, read: Callable[[Sequence[int]], tuple[Tensor, DynamicCache | None]], max_rows: int) -> None:
        self.num_rows = 0
        self.lengths = [0] * max_rows
        self.rows = [_Past() for _ in range(max_rows)]
        self._read = read

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes row `source`, which is not used again before it is overwritten."""
        self.rows[target] = self.rows[source]
        self.rows[source] = _Past()
        self.lengths[target] = self.lengths[source]

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Copy row `source` over each of `targets`."""
        for target in targets:
            self.rows[target] = copy.deepcopy(self.rows[source])
            self.lengths[target] = self.lengths[source]

    def set_length(self, row: int, length: int) -> None:
        """Forget what the row holds beyond its first `length` tokens, by reading those again."""
        if length == self.lengths[row]:
            return
        ids = self.rows[row].ids[:length]
        self.rows[row] = _Past(ids, self._read(ids)[1])
        self.lengths[row] = length


class FallbackDecoder:
    """`Decoder` for any causal model, on its own forward.

    Attributes:
        context_length: positions that the model has; None without a limit.
        past: how rows are called.
    """

    def __init__(self, forward: CausalForward) -> None:
        self.forward = forward
        self.context_length = context_length(forward.model)
        possible = [Past.NONE]
        if "past_key_values" in inspect.signature(forward.model.forward).parameters:
            possible.insert(0, Past.STATE)
            if all(type(layer) in PADDABLE_LAYERS for layer in self._own_cache().layers):
                possible.insert(0, Past.COLUMNS)
        self.past = next(past for past in possible if past is Past.NONE or self._is_right(past))

    @torch.no_grad()
    def _is_right(self, past: Past) -> bool:
        """Whether two rows of different lengths, read one after the other, go on as each does alone."""
        self.past = past
        vocab_size = self.forward.model.get_input_embeddings().num_embeddings
        ids = torch.arange(6).roll(2) % vocab_size
        rows = [ids[:3], ids[3:4]]
        cache = self.new_cache(2, 4)
        logits = torch.cat([self.prefill(row.unsqueeze(0), [len(row)], cache, i) for i, row in enumerate(rows)])
        cache.num_rows = 2
        logits = torch.cat([logits, self.step(ids[4:].to(self.device), cache)])
        rows += [torch.cat([row, last.unsqueeze(0)]) for row, last in zip(rows, ids[4:], strict=True)]
        expected = torch.cat([self._logits(row.unsqueeze(0), torch.ones(1, len(row)), None) for row in rows])
        tolerance = torch.finfo(self.forward.model.dtype).eps ** 0.5
        return bool((logits - expected).norm() <= tolerance * expected.norm())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.forward.model.device
        return device

    def _own_cache(self) -> DynamicCache:
        return DynamicCache(config=self.forward.model.config)

    def _whole_cache(self) -> DynamicCache:
        """Layers of a sliding window keep all their columns too, so that rows of all lengths stay aligned; the mask
        hides what is beyond the window."""
        cache = self._own_cache()
        cache.layers = [DynamicLayer() if isinstance(layer, DynamicLayer) else layer for layer in cache.layers]
        return cache

    def new_cache(self, max_rows: int, capacity: int) -> PaddedCache | SeparateCache:
        """An empty cache; it grows with its rows, and `capacity` is not set aside."""
        if self.past is Past.COLUMNS:
            return PaddedCache(self._whole_cache(), max_rows)
        return SeparateCache(self._read_alone, max_rows)

    @torch.no_grad()
    def bytes_per_row(self, capacity: int) -> int:
        """Memory of one sequence of up to `capacity` tokens in the cache, measured on sequences of one and two."""
        if self.past is Past.NONE:
            return 0
        sizes = []
        for length in (1, 2):
            _, cache = self._read_alone([0] * length)
            assert cache is not None
            sizes.append(sum(_bytes(vars(layer)) for layer in cache.layers))
        return sizes[0] + (sizes[1] - sizes[0]) * (capacity - 1)

    def _logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """[b, V] of what follows the last column; positions count each row's own tokens."""
        positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        ids, mask, positions = (tensor.to(self.device) for tensor in (ids, mask, positions))
        return self.forward.next_logits(ids, mask, positions, cache)

    def _read_alone(self, ids: Sequence[int]) -> tuple[Tensor, DynamicCache | None]:
        cache = None if self.past is Past.NONE else self._own_cache()
        row = torch.tensor([list(ids)])
        return self._logits(row, torch.ones_like(row, dtype=torch.bool), cache), cache

    def prefill(
        self, ids: Tensor, lengths: Sequence[int], cache: PaddedCache | SeparateCache, first_row: int
    ) -> Tensor:
        """Read prompts into the rows from first_row on.

        Args:
            ids: [b, t], right-padded.
            lengths: real tokens of each prompt.

        Returns:
            [b, V] float32 logits of the token after each prompt's last.
        """
        prompts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        if isinstance(cache, PaddedCache):
            fresh = self._whole_cache()
            logits = self._logits(*left_pad_prompts(prompts, pad_id=0), fresh)
            cache.insert(fresh, lengths, first_row)
            return logits
        rows = []
        for row, prompt in enumerate(prompts, start=first_row):
            logits, own = self._read_alone(prompt)
            rows.append(logits)
            cache.rows[row], cache.lengths[row] = _Past(prompt, own), len(prompt)
        return torch.cat(rows)

    def step(self, ids: Tensor, cache: PaddedCache | SeparateCache) -> Tensor:
        """Append one token [num_rows] to each live row; [num_rows, V] float32 logits of what follows."""
        count = cache.num_rows
        if isinstance(cache, PaddedCache):
            width = max(cache.lengths[:count])
            cache.keep(count, width)
            cache.lengths[:count] = [length + 1 for length in cache.lengths[:count]]
            return self._logits(ids.unsqueeze(1), cache.mask(count, width + 1), cache.cache)
        rows = []
        for row, token in enumerate(ids.tolist()):
            past = cache.rows[row]
            past.ids.append(token)
            cache.lengths[row] += 1
            if past.cache is None:
                rows.append(self._read_alone(past.ids)[0])
                continue
            mask = torch.ones(1, len(past.ids), dtype=torch.bool)
            rows.append(self._logits(ids[row : row + 1].unsqueeze(1), mask, past.cache))
        return torch.cat(rows)


def _bytes(held: object) -> int:
    """Memory of all tensors in a cache layer's attributes."""
    if isinstance(held, Tensor):
        return held.nbytes if held.ndim > 1 else 0
    if isinstance(held, dict | list | tuple):
        return sum(_bytes(one) for one in (held.values() if isinstance(held, dict) else held))
    return 0

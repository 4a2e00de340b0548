"""Keys and values of the sequences that are being decoded, in one block of memory.

Rows are left-aligned: row r holds positions 0 .. length-1, so a slot that is refilled starts at 0 again and nothing has
to be cleared. Shapes: R rows, C capacity (positions a row has room for), H key-value heads, Dh head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_OF_A_GROUP = 8
"""On the CPU attention reads as far as the longest row of a group. Small groups read little beyond what they need;
groups of fewer rows than this no longer fill the cores."""

CACHE_LINE_BYTES = 64
CONFLICTING_STRIDE_BYTES = 1024
"""Writing one position of every head dimension at such a stride falls on few sets of the processor's cache."""


@dataclass(frozen=True)
class CacheLayout:
    """What one position of one sequence needs."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    def bytes_per_row(self, capacity: int, dtype: torch.dtype) -> int:
        """Memory of one row of a cache, at most."""
        spare = CACHE_LINE_BYTES * self.num_layers * self.num_kv_heads * self.head_dim
        return self.bytes_per_token(dtype) * capacity + spare


class KVCache:
    """Keys and values of up to max_rows sequences; rows 0 .. num_rows-1 are live.

    Attributes:
        num_rows: live rows are the prefix; who schedules them sets it.
        lengths: positions that each row holds, on the host.
        device_lengths: the same, [max_rows] int64 on the cache's device.
        keys: per layer [R, H, Dh, C].
        values: per layer [R, H, C, Dh].
    """

    def __init__(
        self, layout: CacheLayout, max_rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        if max_rows < 1 or capacity < 1:
            raise ValueError(f"a cache of {max_rows} rows of {capacity} positions holds nothing")
        self.layout, self.max_rows, self.capacity = layout, max_rows, capacity
        self.device, self.dtype = torch.device(device), dtype
        self.num_rows = 0
        self.lengths = [0] * max_rows
        # Not inference tensors, which could not be written outside inference mode.
        with torch.inference_mode(False):
            self._values = self._zeros(capacity, layout.head_dim)
            self._keys = self._new_keys()
            self._storage_bytes = [tensor.untyped_storage().nbytes() for tensor in (self._keys, self._values)]
            self.device_lengths = torch.zeros(max_rows, dtype=torch.int64, device=self.device)
            self.row_numbers = torch.arange(max_rows, device=self.device)
            self.positions = torch.arange(capacity, device=self.device)
            self.keys, self.values = list(self._keys.unbind(0)), list(self._values.unbind(0))
            self._keys_by_position = [keys.permute(0, 3, 1, 2) for keys in self.keys]  # [R, C, H, Dh]
            self._values_by_position = [values.transpose(1, 2) for values in self.values]

    def _zeros(self, *shape: int) -> Tensor:
        """[layers, R, H, *shape]. Zeros, because a masked value is multiplied by 0 and fresh memory may hold NaN."""
        layout = self.layout
        whole = (layout.num_layers, self.max_rows, layout.num_kv_heads, *shape)
        return torch.zeros(whole, device=self.device, dtype=self.dtype)

    def _new_keys(self) -> Tensor:
        """On the CPU positions are innermost: the product with one query per row then streams through memory, which
        reads 1.2 to 1.4 times as fast as the other order. GPU kernels want the head's dimensions innermost."""
        if self.device.type != "cpu":
            return self._zeros(self.capacity, self.layout.head_dim).transpose(-1, -2)
        row_bytes = self.capacity * self.dtype.itemsize
        spare = CACHE_LINE_BYTES // self.dtype.itemsize if row_bytes % CONFLICTING_STRIDE_BYTES == 0 else 0
        return self._zeros(self.layout.head_dim, self.capacity + spare)[..., : self.capacity]

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return self._keys.untyped_storage().nbytes() + self._values.untyped_storage().nbytes()

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the keys and the values."""
        return self._keys.data_ptr(), self._values.data_ptr()

    def release(self) -> None:
        """Give the memory of keys and values back; the cache is of no use until `restore`."""
        for tensor in (self._keys, self._values):
            tensor.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Be empty and of use again, after `release`. Keys and values need not be where they were; all other tensors
        are."""
        for tensor, size in zip((self._keys, self._values), self._storage_bytes, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.zero_()
        self.num_rows, self.lengths = 0, [0] * self.max_rows
        self.device_lengths.zero_()

    def set_lengths(self, first_row: int, lengths: Sequence[int]) -> None:
        """Declare how many positions of successive rows are live."""
        if not lengths or min(lengths) < 0 or max(lengths) > self.capacity:
            raise ValueError(f"rows of {list(lengths)} positions do not fit room for {self.capacity}")
        if not 0 <= first_row <= self.max_rows - len(lengths):
            raise ValueError(f"rows {first_row}.. (+{len(lengths)}) do not fit {self.max_rows} rows")
        self.lengths[first_row : first_row + len(lengths)] = lengths
        self.device_lengths[first_row : first_row + len(lengths)] = torch.tensor(lengths, device=self.device)

    def set_length(self, row: int, length: int) -> None:
        """`set_lengths` of one row."""
        self.set_lengths(row, [length])

    def write_prompts(self, layer: int, first_row: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [b, t, H, Dh] of positions 0 .. t-1 in the rows from first_row."""
        b, t = keys.shape[:2]
        self._keys_by_position[layer][first_row : first_row + b, :t] = keys
        self._values_by_position[layer][first_row : first_row + b, :t] = values

    def append(self, layer: int, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, H, Dh] of one position [n] for each of the rows [n]."""
        self._keys_by_position[layer].index_put_((rows, positions), keys)
        self._values_by_position[layer].index_put_((rows, positions), values)

    def advance(self) -> None:
        """Count one more position in every live row."""
        self.advance_host()
        self.device_lengths[: self.num_rows] += 1

    def advance_host(self) -> None:
        """The host's part of `advance`, where the device has counted on its own."""
        n = self.num_rows
        if n and max(self.lengths[:n]) >= self.capacity:
            row = self.lengths.index(self.capacity)
            raise ValueError(f"row {row} is full: the cache has room for {self.capacity} positions")
        self.lengths[:n] = [length + 1 for length in self.lengths[:n]]

    def move(self, source: int, target: int) -> None:
        """Copy row source, its live part only, over row target; the source stays as it is."""
        if source == target:
            return
        length = self.lengths[source]
        self._keys[:, target, ..., :length] = self._keys[:, source, ..., :length]
        self._values[:, target, :, :length] = self._values[:, source, :, :length]
        self.set_length(target, length)

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """`move` to several rows: the answers to a prompt share its prefill."""
        for target in targets:
            self.move(source, target)

    def groups(self) -> list[tuple[slice, int]]:
        """Contiguous slices of the live rows, each with its longest length: attention of a group reads that far.

        One group on a GPU, where a kernel serves all rows at once, and where all rows are equally long.
        """
        live = self.lengths[: self.num_rows]
        if not live:
            return []
        if self.device.type != "cpu" or min(live) == max(live):
            return [(slice(0, len(live)), max(live))]
        return [
            (slice(start, min(start + ROWS_OF_A_GROUP, len(live))), max(live[start : start + ROWS_OF_A_GROUP]))
            for start in range(0, len(live), ROWS_OF_A_GROUP)
        ]

    def views(self, rows: slice, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer what attention to positions start .. stop-1 of some rows reads: keys [rows, H, Dh, stop - start]
        and values [rows, H, stop - start, Dh]."""
        keys = self._keys[:, rows, ..., start:stop].unbind(0)
        values = self._values[:, rows, :, start:stop].unbind(0)
        return list(zip(keys, values, strict=True))

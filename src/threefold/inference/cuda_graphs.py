"""The decode step, from token ids to float32 logits, as CUDA graphs.

A step is hundreds of small kernels, most of which a GPU finishes sooner than the host can launch the next. A CUDA graph
launches all of them at once. It repeats what was recorded: the same shapes at the same addresses, with what is there by
then. So there is one graph for each bucket: a number of rows and a number of positions that attention reads, rounded up
(large ones by a quarter at most). Rows beyond the live ones compute what nobody reads; see `Decoder.device_step`.

What may change between two steps, and what it costs:

- The values of weights, by an optimizer that writes in place: nothing. Packed weights are rewritten where they are.
- The address of a weight or of a table (`Decoder.bindings`): every graph is recorded anew when it is next needed.
- The memory of keys and values, which is given back after each rollout. The cache itself is kept, so only two addresses
  can change, and the caching allocator should mostly give the same ones to the next rollout of that size, once what
  outlives a rollout (Adam's moments) has its place. Where it does not, the graphs are recorded anew.
- The number of rows that there are in all, or the capacity of each: the first rollout of a size records; a few sizes
  are kept.

Recording a bucket is one step without a graph, which is the step that was asked for, and the same calls once more
without execution: in all perhaps three times a step without a graph, some ten milliseconds for 24 layers (estimated).
Answers of equal length, 256 after prompts of 256, meet four buckets, 32 answers that finish one by one some twelve, 256
of them some twenty-five. To hold the memory of keys and values between rollouts would save even that, and would take
it, some ten GiB, from the update.

What stays between rollouts: the packed weights, the graphs, the memory that one step of the largest bucket works in,
and [rows, V] logits for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from threefold.inference.decoder import Decoder
from threefold.inference.kv_cache import KVCache

SMALLEST_ROWS = 4
SMALLEST_REACH = 64
"""A multiple of `attention.MASK_ALIGNMENT`; a cache's capacity is rounded up to a multiple of it."""
MOST_CACHES = 3
"""A run has rollouts of two sizes, to learn from and to evaluate, and a longer prompt makes another."""
ROOM_BYTES = 2 * 2**30
"""What should be free to the driver while a graph is recorded: far more than a step takes."""


class Recorder(Protocol):
    """Records work on a device; `CudaGraphs` is one."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work, and return what does the very same again, with the values that its tensors hold by then."""

    def forget(self) -> None:
        """Nothing that was recorded will be used again."""


class CudaGraphs:
    """Records CUDA graphs. They are replayed one after the other, so all share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.forget()

    def forget(self) -> None:
        """A pool whose last graph is gone cannot be used again: take a new one."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """The first run loads kernels and takes the stream's workspaces, neither of which can be done in a recording.

        Not by `torch.cuda.graph`, which gives all cached memory back to the driver each time: the update after the
        rollout would have to ask for it anew, and the next cache for keys and values would lie elsewhere.
        """
        self._make_room()
        current, kind = torch.cuda.current_stream(self._device), self._device.type
        graph = torch.cuda.CUDAGraph()
        # a weight that autocast has converted outside the recording is gone when the graph wants to read it
        uncached = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        self._stream.wait_stream(current)
        with uncached, torch.cuda.stream(self._stream):
            work()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay

    def _make_room(self) -> None:
        """While it records, PyTorch's allocator cannot give cached blocks back to the driver, so that is done before,
        where it may be needed."""
        free, _ = torch.cuda.mem_get_info(self._device)
        if free < ROOM_BYTES:
            torch.cuda.empty_cache()


def recorder_for(device: torch.device) -> Recorder | None:
    """What records a decode step on the device; None where nothing does."""
    return CudaGraphs(device) if device.type == "cuda" else None


def bucket(count: int, smallest: int) -> int:
    """The least size that serves `count`: sizes are multiples of `smallest`, a power of two, and, beyond 8 times that,
    of a quarter of the power of two below them."""
    step = max(smallest, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


@dataclass
class _Kept:
    """A cache, and what was recorded on it.

    Attributes:
        is_lent: whether a rollout uses it, and its keys and values have memory.
        graphs: by rows and reach.
        made_for: all that they are valid for.
        ids, logits: [R] and [R, V], what they read and write.
    """

    cache: KVCache
    is_lent: bool = True
    graphs: dict[tuple[int, int], Callable[[], None]] = field(default_factory=dict)
    made_for: tuple[object, ...] = ()
    ids: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class GraphedDecoder:
    """A `Decoder` whose steps are recorded when first met and then repeated; a `TokenDecoder` for the scheduler.

    A step on a cache that is not from `new_cache`, or that had to give way there, is computed without a graph. The
    logits that `step` returns are overwritten by the next one.
    """

    def __init__(self, decoder: Decoder, recorder: Recorder) -> None:
        self._decoder, self._recorder = decoder, recorder
        self._kept: list[_Kept] = []  # the last used one last

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._decoder.device

    @property
    def context_length(self) -> int | None:
        """Positions that the model has; None without a limit."""
        return self._decoder.context_length

    def bytes_per_row(self, capacity: int) -> int:
        """Memory of one sequence of up to `capacity` tokens in the cache."""
        return self._decoder.bytes_per_row(_whole(capacity))

    def new_cache(self, max_rows: int, capacity: int) -> KVCache:
        """An empty cache with room for at least `capacity` positions, a kept one if one fits and is not in use."""
        size = (max_rows, _whole(capacity), self.device, self._decoder.dtype)
        for kept in self._kept:
            cache = kept.cache
            if not kept.is_lent and (cache.max_rows, cache.capacity, cache.device, cache.dtype) == size:
                cache.restore()
                kept.is_lent = True
                self._kept.remove(kept)
                break
        else:
            kept = _Kept(self._decoder.new_cache(max_rows, _whole(capacity)))
        self._kept.append(kept)
        if len(self._kept) > MOST_CACHES:
            self._drop_graphs(self._kept.pop(0))
        return kept.cache

    def release(self) -> None:
        """Give the memory of keys and values back: the rollout is over."""
        for kept in self._kept:
            if kept.is_lent:
                kept.cache.release()
                kept.is_lent = False

    def prefill(self, ids: Tensor, lengths: Sequence[int], cache: KVCache, first_row: int) -> Tensor:
        """`Decoder.prefill`; prompts are long enough to keep a GPU busy without a graph."""
        return self._decoder.prefill(ids, lengths, cache, first_row)

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """`Decoder.step`: [num_rows] ids to [num_rows, V] float32 logits, valid until the next step."""
        kept = next((kept for kept in self._kept if kept.cache is cache), None)
        if kept is None:
            return self._decoder.step(ids, cache)
        cache.advance_host()
        num_rows = cache.num_rows
        rows = min(bucket(num_rows, SMALLEST_ROWS), cache.max_rows)
        reach = min(bucket(max(cache.lengths[:num_rows]), SMALLEST_REACH), cache.capacity)
        self._check(kept)
        kept.ids[:num_rows].copy_(ids)
        graph = kept.graphs.get((rows, reach))
        if graph is None:
            kept.graphs[rows, reach] = self._recorder.record(partial(self._compute, kept, rows, reach))
        else:
            graph()
        return kept.logits[:num_rows]

    def _compute(self, kept: _Kept, rows: int, reach: int) -> None:
        kept.logits[:rows].copy_(self._decoder.device_step(kept.ids[:rows], kept.cache, rows, reach))

    def _check(self, kept: _Kept) -> None:
        """Drop the graphs if they would read or write where nothing is any more, or compute in another precision."""
        kind = self.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        now = (self._decoder.bindings, kept.cache.addresses, precision)
        if now != kept.made_for:
            self._drop_graphs(kept)
            kept.made_for = now
            with torch.inference_mode(False):  # written to in any mode
                kept.ids = torch.zeros(kept.cache.max_rows, dtype=torch.int64, device=self.device)
                kept.logits = torch.empty(kept.cache.max_rows, self._decoder.vocab_size, device=self.device)

    def _drop_graphs(self, kept: _Kept) -> None:
        kept.graphs.clear()
        if not any(other.graphs for other in self._kept):
            self._recorder.forget()


def _whole(capacity: int) -> int:
    return -(-capacity // SMALLEST_REACH) * SMALLEST_REACH

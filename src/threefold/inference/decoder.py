"""One transformer for every family of the table, over the weights that train, without a copy of them, or over an
`Arena` of them, where they are sharded or several processes decode together.

Two operations: `prefill` computes prompts and fills their rows of the cache, `step` appends one token to every live
row. Both return float32 logits of the next token. Callers run them without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from threefold.inference.arena import Arena
from threefold.inference.attention import (
    Group,
    RotaryTable,
    attend_prompt,
    attend_step,
    groups_of_step,
    prompt_mask,
    step_mask,
)
from threefold.inference.families import (
    Architecture,
    NotCoveredError,
    Positions,
    Residual,
    architecture_of,
)
from threefold.inference.kv_cache import CacheLayout, KVCache
from threefold.inference.weights import BlockMaps, Images, Maps, Weights, read_weights, reference_maps
from threefold.machine.linear import PackedLinear

Attend = Callable[[int, Tensor], Tensor]
"""(layer, heads [N, Hq + 2 H, Dh], rotated) -> attention [N, Hq * Dh]."""


class Decoder:
    """Decoding over a model's own parameters.

    The parameters are looked up in the model's modules at each `prefill` and `pack`: what an optimizer writes in place,
    what replaces a parameter and what switches adapters on or off is seen from the next prompt on. With an arena the
    weights are those that it was last filled with.

    Args:
        architecture: of the model, or of the arena.
        arena: to be filled before prompts are read; its weights have to be forgotten (`release`) for its memory to
            be free.

    Attributes:
        layout, dtype: of the cache that it wants.
        vocab_size: width of the logits.
        context_length: positions that the model has; None without a limit.
        bindings: counts the times that the addresses of what `step` reads have changed. A recorded CUDA graph is valid
            for one value.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        cache_dtype: torch.dtype | None,
        arena: Arena | None = None,
    ) -> None:
        self.model, self._arena = model, arena
        self.architecture = architecture
        self.layout = CacheLayout(architecture.num_layers, architecture.num_kv_heads, architecture.head_dim)
        self.context_length = architecture.context_length
        self.bindings = 0
        self._images: Images | None = None
        self._rotary: RotaryTable | None = None
        self._slopes: Tensor | None = None
        self._packed_versions: list[int] = []
        self._weights = self._read()
        self._place = self._where()
        self._step_maps = self._maps
        self.dtype = cache_dtype or self._weights.token_embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weights.token_embedding.device if self._arena is None else self._arena.device

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The model's parameters that it reads; a matrix that is stored [in, out] as its transposed view. None of an
        arena's."""
        return self._weights.sources

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._weights.vocab_size

    def bytes_per_row(self, capacity: int) -> int:
        """Memory of one sequence of up to `capacity` tokens in the cache, at most."""
        return self.layout.bytes_per_row(capacity, self.dtype)

    def new_cache(self, max_rows: int, capacity: int) -> KVCache:
        """A cache that fits this model."""
        return KVCache(self.layout, max_rows, capacity, self.device, self.dtype)

    # -------------------------------------------------------------------------------------------------- weights

    def _read(self) -> Weights:
        """Look the weights up anew; what `step` reads follows unless it is packed."""
        weights = read_weights(self.model, self.architecture) if self._arena is None else self._arena.weights
        self._maps = reference_maps(weights, self.architecture)
        return weights

    def _where(self) -> tuple[torch.device, torch.dtype, list[int]]:
        """Device and type of the embeddings, and every address that a step may read."""
        embedding = self._weights.token_embedding
        read = self._weights.sources if self._arena is None else (embedding,)  # of an arena one says where all are
        return self.device, embedding.dtype, [tensor.data_ptr() for tensor in read]

    def _look_up(self) -> None:
        """Read the weights anew, and notice what is no longer where it was."""
        self._weights = self._read()
        (old_device, old_dtype, old_addresses), self._place = self._place, self._where()
        device, dtype, addresses = self._place
        if old_addresses != addresses:
            self.bindings += 1
        if old_device != device or old_dtype != dtype:
            self._slopes = self._rotary = None
        if old_device != device:
            self._images = None

    def release(self) -> None:
        """Empty the arena; nothing here refers to its memory any longer."""
        assert self._arena is not None
        self.unpack()
        self._arena.release()
        self._weights = self._read()
        self._step_maps = self._maps

    def _bind(self) -> None:
        """Make sure that prompts and steps see the parameters as they are now."""
        self._look_up()
        assert not self._weights.token_embedding.is_meta, "the arena is empty"
        if self._images is None:
            self._step_maps = self._maps
        elif self._versions() != self._packed_versions:
            self._write_images()

    def _versions(self) -> list[int]:
        """Changes with every write to a parameter that trains, and with every parameter that is replaced."""
        sources = self._weights.sources if self._arena is None else (self._weights.token_embedding,)
        return [number for s in sources for number in (s.data_ptr(), 0 if s.is_inference() else s._version)]

    def _write_images(self) -> None:
        assert self._images is not None
        self._step_maps = self._images.write(self._weights)
        self._packed_versions = self._versions()

    def pack(self, rows: int) -> None:
        """Make images of the matrices that a step of about `rows` rows reads faster, of the weights as they are now.

        On the CPU in the layout of its kernel; on a GPU in the decoder's dtype, query-key-value and gate-up joined,
        adapters merged, at addresses that stay until `unpack`. Takes the memory of one more set of weights in that
        dtype. Call it after each change of the weights, at the start of a rollout. Prompts read the parameters, but on
        a GPU the images, which need no conversion. An arena is as good as these already: of one only the images in a
        CPU kernel's layout are made.
        """
        self._look_up()
        if self._arena is not None and not PackedLinear.suits(self._weights.blocks[0].down.weight):
            self._step_maps = self._maps
            return
        if self._images is None or not self._images.stay_in_place:
            self._images = Images(self.architecture, rows, self.dtype)
            self.bindings += 1
        self._write_images()

    def unpack(self) -> None:
        """Give the images' memory back; steps read the parameters again."""
        if self._images is not None:
            self._images, self._packed_versions = None, []
            self._step_maps = self._maps
            self.bindings += 1

    # ------------------------------------------------------------------------------------------------ positions

    def _prepare_positions(self, capacity: int) -> None:
        """Rotation table or slopes for a cache of that capacity."""
        positions = self.architecture.family.positions
        if positions is Positions.ALIBI and self._slopes is None:
            self._slopes = self.architecture.slopes.to(self.device)
        if positions not in (Positions.ROTARY_HALVES, Positions.ROTARY_NEIGHBOURS):
            return
        needed = min(capacity, self.context_length or capacity)
        if self._rotary is None or len(self._rotary.cos) < needed:
            self._rotary = self._rotary_table(needed)
            self.bindings += 1

    def _rotary_table(self, count: int) -> RotaryTable:
        """The model's own cosines and sines of the first `count` positions, so that scaled ones are exact."""
        family, weight = self.architecture.family, self._weights.token_embedding
        trunk: Any = self.model.get_submodule(family.trunk)
        with torch.inference_mode(False), torch.no_grad():
            if family.sine_table is not None:
                sin_cos = trunk.get_submodule(f"{family.blocks}.0").get_buffer(family.sine_table)
                return RotaryTable.of_neighbours(sin_cos.to(weight))
            positions = torch.arange(count, device=weight.device).unsqueeze(0)
            cos, sin = trunk.rotary_emb(weight[:1], positions)
            return RotaryTable.of_halves(cos[0], sin[0])

    # -------------------------------------------------------------------------------------------------- forward

    def prefill(self, ids: Tensor, lengths: Sequence[int], cache: KVCache, first_row: int) -> Tensor:
        """Compute prompts, whose rows of the cache are overwritten.

        Args:
            ids: [b, t], right-padded; b prompts for the rows first_row .. first_row + b - 1.
            lengths: real tokens of each prompt, at least 1.

        Returns:
            [b, V] float32 logits of the token after each prompt's last.
        """
        self._bind()
        self._prepare_positions(cache.capacity)
        b, t = ids.shape
        if min(lengths) < 1 or max(lengths) > t or len(lengths) != b:
            raise ValueError(f"prompt lengths {list(lengths)} do not fit ids of shape {tuple(ids.shape)}")
        cache.set_lengths(first_row, lengths)
        architecture = self.architecture
        rotary = None if self._rotary is None else self._rotary.at(cache.positions[:t])
        masks = {
            window: prompt_mask(t, window, self._slopes, self.device, self.dtype)
            for window in set(architecture.windows)
        }

        def attend(layer: int, features: Tensor) -> Tensor:
            heads = features.to(self.dtype).view(b, t, -1, architecture.head_dim)
            queries, keys, values = heads.split(architecture.head_counts, dim=2)
            cache.write_prompts(layer, first_row, keys, values)
            mask = masks[architecture.windows[layer]]
            attention = attend_prompt(queries, keys, values, mask, architecture.query_scale)
            return attention.flatten(0, 1).to(features.dtype)

        last = torch.tensor(lengths, device=self.device) - 1 + torch.arange(0, b * t, t, device=self.device)
        x = self._embed(ids, cache.positions[:t]).flatten(0, 1)
        in_kernel_layout = self._images is not None and not self._images.stay_in_place  # of few rows: not for prompts
        maps = self._maps if in_kernel_layout else self._step_maps
        return self._transform(x, maps, _repeated(rotary, b), attend, last)

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every live row.

        Args:
            ids: [num_rows].

        Returns:
            [num_rows, V] float32 logits of the token after it.
        """
        rows = slice(0, cache.num_rows)
        positions = cache.device_lengths[rows].clone()
        cache.advance()
        groups = {window: groups_of_step(cache, window, self._slopes) for window in set(self.architecture.windows)}
        return self._step(ids, cache, rows, positions, groups)

    def device_step(self, ids: Tensor, cache: KVCache, num_rows: int, reach: int) -> Tensor:
        """`step` of the first num_rows rows in terms of the device's tensors only, for recording as a CUDA graph.

        Nothing is read back to the host, and every tensor that outlives the call stays at its address while
        `bindings` stays. Attention reads the first `reach` positions of every row. The rows' lengths grow on the
        device; the host's count does not: see `KVCache.advance_host`. Rows beyond the live ones compute what nobody
        reads, at the last of these positions at most: a row that saw none of the positions that are read (all before
        its window) would be NaN, and leave NaN in its slot for the next sequence there.
        """
        rows = slice(0, num_rows)
        lengths = cache.device_lengths[rows]
        positions = lengths.clamp(max=min(reach, self.context_length or reach) - 1)
        lengths.copy_(positions + 1)
        views = cache.views(rows, 0, reach)
        groups = {
            window: [Group(rows, views, step_mask(cache, rows, 0, reach, window, self._slopes))]
            for window in set(self.architecture.windows)
        }
        return self._step(ids, cache, rows, positions, groups)

    def _step(
        self,
        ids: Tensor,
        cache: KVCache,
        rows: slice,
        positions: Tensor,
        groups: dict[int | None, list[Group]],
    ) -> Tensor:
        architecture = self.architecture
        row_numbers = cache.row_numbers[rows]

        def attend(layer: int, heads: Tensor) -> Tensor:
            queries, keys, values = heads.to(self.dtype).split(architecture.head_counts, dim=1)
            cache.append(layer, row_numbers, positions, keys, values)
            attention = attend_step(queries, groups[architecture.windows[layer]], layer, architecture.query_scale)
            return attention.to(heads.dtype)

        rotary = None if self._rotary is None else self._rotary.at(positions)
        return self._transform(self._embed(ids, positions), self._step_maps, rotary, attend, None)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[..., D] of ids [...]; positions broadcast to them."""
        weights, family = self._weights, self.architecture.family
        x = F.embedding(ids, weights.token_embedding)
        if weights.embedding_norm is not None:
            x = weights.embedding_norm(x)
        if weights.project_in is not None:
            x = weights.project_in.projection()(x)
        if weights.position_embedding is not None:
            x = x + F.embedding(positions + family.position_offset, weights.position_embedding)
        return x

    def _transform(
        self, x: Tensor, maps: Maps, rotary: RotaryTable | None, attend: Attend, last: Tensor | None
    ) -> Tensor:
        """Blocks, final norm and head on rows x [N, D]; with `last`, logits of those rows only."""
        final = len(maps.blocks) - 1
        for layer, block in enumerate(maps.blocks):
            x = self._block(layer, block, x, rotary, attend, last if layer == final else None)
        if self._weights.final_norm is not None:
            x = self._weights.final_norm(x)
        if self._weights.project_out is not None:
            x = self._weights.project_out.projection()(x)
        return maps.head(x).float()

    def _block(
        self,
        layer: int,
        block: BlockMaps,
        x: Tensor,
        rotary: RotaryTable | None,
        attend: Attend,
        keep: Tensor | None,
    ) -> Tensor:
        """One block; from its attention on, only the rows `keep` go further (all without)."""
        architecture = self.architecture
        residual = architecture.residual
        after = residual is Residual.AFTER
        normed = x if after else block.attention_norm(x)
        heads = block.query_key_value(normed).unflatten(1, (-1, architecture.head_dim))
        num_rotated = architecture.num_heads + architecture.num_kv_heads
        if block.query_key_norms is not None:
            queries, keys = heads[:, : architecture.num_heads], heads[:, architecture.num_heads : num_rotated]
            queries.copy_(block.query_key_norms[0](queries))
            keys.copy_(block.query_key_norms[1](keys))
        if rotary is not None:
            rotary.rotate_(heads[:, :num_rotated])
        attention = attend(layer, heads)
        if keep is not None:
            attention, x, normed = attention[keep], x[keep], normed[keep]
        if residual is Residual.PARALLEL_ONE_NORM:
            return block.add_mlp(normed, block.add_attention_output(attention, x))
        assert block.mlp_norm is not None
        if residual is Residual.PARALLEL:
            return block.add_mlp(block.mlp_norm(x), block.add_attention_output(attention, x))
        x = block.add_attention_output(attention, x)
        if after:
            x = block.attention_norm(x)
            return block.mlp_norm(block.add_mlp(x, x))
        return block.add_mlp(block.mlp_norm(x), x)


def _repeated(rotary: RotaryTable | None, times: int) -> RotaryTable | None:
    """The rows of a table for `times` prompts one after the other."""
    if rotary is None or times == 1:
        return rotary
    cos, sin = (tensor.repeat(times, 1, 1) for tensor in (rotary.cos, rotary.sin))
    return RotaryTable(cos, sin, rotary.positions)


def make_decoder(model: PreTrainedModel, cache_dtype: torch.dtype | None = None) -> Decoder | None:
    """The decoder of a model, or None where the table does not cover it (`why_not_covered` says why).

    Args:
        cache_dtype: of keys, values and attention, None for the weights'.
    """
    try:
        return Decoder(model, architecture_of(model), cache_dtype)
    except NotCoveredError:
        return None


def why_not_covered(model: PreTrainedModel) -> str | None:
    """What of the model the table does not cover, in a few words; None if it covers it."""
    try:
        Decoder(model, architecture_of(model), None)
    except NotCoveredError as error:
        return str(error)
    return None

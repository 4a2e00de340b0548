"""The arena: for the time of a rollout, a flat copy of the weights that a process decodes with.

Training may have sharded the weights over the processes, and decoding may cut them for tensor parallelism. Both are met
once per rollout, block by block: a block's parameters are gathered, this process's part of them is cut out, cast and
written to the arena, and the block is let go again. Adapters are merged on the way, so in the arena only. Then decoding
needs no other process (but those of its tensor-parallel group), whatever the number of its steps.

The arena is one tensor of bytes, every weight in it at a multiple of 64. Matrices have the decoder's type; embeddings
and norms keep the parameters' own, because the residual stream is in that. Query-key-value and gate-up are one matrix
each. A head that is tied to the embedding is a view of it where the types agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from threefold.inference.families import Architecture, Fused, NotCoveredError, architecture_of
from threefold.inference.projections import Adapter, Matrix, Norm
from threefold.inference.tensor_parallel import (
    TensorGroup,
    meta_model,
    part_of_architecture,
    part_of_vocabulary,
)
from threefold.inference.weights import Block, Weights, blocks_of, in_order, read_block, read_rest
from threefold.models.adapters import merged_part
from threefold.models.loading import use_fast_kernels

ALIGNMENT_BYTES = 64


class WeightSource(Protocol):
    """Whoever holds a model's weights, and can make them whole for a while."""

    def units(self) -> Iterator[nn.Module]:
        """Each block of the model, and last the model itself for all that is outside its blocks, while the parameters
        that are its own are whole plain tensors. Collective."""


class WholeWeights:
    """The source of a model whose parameters are whole as they are."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
        self._units = [*blocks, model]

    def units(self) -> Iterator[nn.Module]:
        yield from self._units


Keep = Callable[[Sequence[Tensor], bool], Tensor]
"""From pieces, to be stacked along their first dimension, to the tensor that holds them; the flag says whether matrix
products read it."""


@dataclass(frozen=True)
class _Cut:
    """Cuts one process's part out of whole weights, in a fixed order, one tensor at a time."""

    whole: Architecture
    rank: int
    size: int

    def rows(self, tensor: Tensor) -> Tensor:
        """This process's output features, [out, ...] -> [out / size, ...]."""
        return tensor.tensor_split(self.size)[self.rank]

    def columns(self, weight: Tensor) -> Tensor:
        """This process's input features, [out, in] -> [out, in / size]."""
        return weight.tensor_split(self.size, dim=1)[self.rank]

    def block(self, block: Block, keep: Keep) -> Block:
        """Its part of a block."""
        norms = block.query_key_norms
        return Block(
            attention_norm=_norm(block.attention_norm, keep),
            mlp_norm=None if block.mlp_norm is None else _norm(block.mlp_norm, keep),
            query_key_norms=None if norms is None else (_norm(norms[0], keep), _norm(norms[1], keep)),
            query_key_value=(_stacked(self._query_key_value(block.query_key_value), keep),),
            attention_output=self._input_part(block.attention_output, keep),
            gate_up=(_stacked([self._output_part(matrix) for matrix in block.gate_up], keep),),
            down=self._input_part(block.down, keep),
        )

    def rest(self, rest: Weights, keep: Keep, tied: bool) -> Weights:
        """Its part of what is outside the blocks; with `tied` the head is a view of the embedding."""
        tokens = part_of_vocabulary(rest.vocab_size, self.rank, self.size)

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else keep([tensor], False)

        embedding = keep([rest.token_embedding], False)
        head_weight, head_bias = rest.head.merged()
        return replace(
            rest,
            token_embedding=embedding,
            position_embedding=optional(rest.position_embedding),
            embedding_norm=None if rest.embedding_norm is None else _norm(rest.embedding_norm, keep),
            project_in=None if rest.project_in is None else _stacked([rest.project_in.merged()], keep),
            project_out=None if rest.project_out is None else _stacked([rest.project_out.merged()], keep),
            final_norm=None if rest.final_norm is None else _norm(rest.final_norm, keep),
            head=Matrix(
                embedding[tokens] if tied else keep([head_weight[tokens]], True),
                None if head_bias is None else keep([head_bias[tokens]], True),
            ),
        )

    def _output_part(self, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        weight, bias = matrix.merged()
        return self.rows(weight), None if bias is None else self.rows(bias)

    def _input_part(self, matrix: Matrix, keep: Keep) -> Matrix:
        weight, bias = matrix.merged()
        return Matrix(keep([self.columns(weight)], True), None if bias is None else keep([bias], True))

    def _query_key_value(self, matrices: Sequence[Matrix]) -> list[tuple[Tensor, Tensor | None]]:
        if len(matrices) > 1:
            return [self._output_part(matrix) for matrix in matrices]
        weight, bias = matrices[0].merged()
        numbers = torch.arange(len(weight), device=weight.device)
        ordered = in_order(numbers[None], self.whole.family.fused, self.whole.head_dim)[0]
        parts = ordered.split([heads * self.whole.head_dim for heads in self.whole.head_counts])
        mine = [self.rows(part) for part in parts]
        if self.whole.family.fused is Fused.WHOLE:  # neighbours: no copy on the way
            starts = [sum(map(len, parts[:i])) + self.rank * len(mine[i]) for i in range(3)]
            slices = [slice(start, start + len(part)) for start, part in zip(starts, mine, strict=True)]
            return [(weight[s], None if bias is None else bias[s]) for s in slices]
        features = torch.cat(mine)
        return [(weight[features], None if bias is None else bias[features])]


def _stacked(parts: Sequence[tuple[Tensor, Tensor | None]], keep: Keep) -> Matrix:
    """One matrix of all the parts' output features; a part without a bias has one of zeros where another has one."""
    weight = keep([part for part, _ in parts], True)
    if all(bias is None for _, bias in parts):
        return Matrix(weight, None)
    return Matrix(weight, keep([part.new_zeros(len(part)) if bias is None else bias for part, bias in parts], True))


def _norm(norm: Norm, keep: Keep) -> Norm:
    weight, bias = (None if t is None else keep([t], False) for t in (norm.weight, norm.bias))
    return replace(norm, weight=weight, bias=bias)


def _on_meta(record: Any) -> Any:
    """The record with every tensor replaced by one of its shape and type that has no memory."""
    if isinstance(record, Tensor):
        return torch.empty(record.shape, dtype=record.dtype, device="meta")
    if isinstance(record, tuple):
        return tuple(_on_meta(part) for part in record)
    if isinstance(record, Weights | Block | Matrix | Adapter | Norm):
        return replace(record, **{field.name: _on_meta(getattr(record, field.name)) for field in fields(record)})
    return record


@dataclass(frozen=True)
class _Slab:
    """A tensor's place in the arena."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """Memory for the weights that a process decodes with, and how to fill it.

    Args:
        model: whose weights; they may be shards. Only shapes and types are read before `fill`.
        dtype: of matrices; None for the parameters' own.
        device: that decodes.
        group: the processes that cut the weights between them; None: this one decodes alone.

    Attributes:
        architecture: of this process's part.
        weights: it; on the meta device while the arena is not filled.
        nbytes: of the arena while it is filled.

    Raises:
        NotCoveredError: the model's family has no decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        whole: Architecture,
        dtype: torch.dtype | None,
        device: torch.device,
        group: TensorGroup | None = None,
    ) -> None:
        self.device = device
        self._model, self._whole, self._dtype, self._group = model, whole, dtype, group
        rank, size = (group.rank, group.size) if group else (0, 1)
        self._cut = _Cut(whole, rank, size)
        self.architecture = part_of_architecture(whole, rank, size)
        self._flat: Tensor | None = None
        self._block_slabs: list[list[_Slab]] = []
        self._rest_slabs: list[_Slab] = []
        self._end = 0
        self._empty = self._plan()
        self.weights = self._empty
        self.nbytes = self._end

    def _plan(self) -> Weights:
        """Give every tensor its place, from shapes alone."""
        rest = read_rest(self._model, self._whole)
        self._tied = rest.head.weight is rest.token_embedding and not rest.head.adapters
        self._tied = self._tied and self._dtype in (None, rest.token_embedding.dtype)
        blocks = []
        for module in blocks_of(self._model, self._whole):
            self._block_slabs.append([])
            block = _on_meta(read_block(module, self._whole))
            blocks.append(self._cut.block(block, self._placing(self._block_slabs[-1])))
        planned = self._cut.rest(_on_meta(rest), self._placing(self._rest_slabs), self._tied)
        return replace(planned, blocks=tuple(blocks), group=self._group)

    def _placing(self, slabs: list[_Slab]) -> Keep:
        def place(pieces: Sequence[Tensor], of_matrix: bool) -> Tensor:
            dtype = self._dtype if of_matrix and self._dtype else pieces[0].dtype
            shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
            slabs.append(_Slab(self._end, shape, dtype))
            self._end = -(-slabs[-1].stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            return torch.empty(shape, dtype=dtype, device="meta")

        return place

    def _writing(self, slabs: list[_Slab]) -> Keep:
        """Copies pieces to the places, in order."""
        places = iter(slabs)

        def write(pieces: Sequence[Tensor], of_matrix: bool) -> Tensor:
            slab = next(places)
            assert self._flat is not None
            target = self._flat[slab.start : slab.stop].view(slab.dtype).view(slab.shape)
            assert sum(map(len, pieces)) == len(target)
            assert not any(isinstance(piece, DTensor) for piece in pieces), "a unit's parameters are not whole"
            for part, piece in zip(target.split([len(piece) for piece in pieces]), pieces, strict=True):
                part.copy_(piece)
            return target

        return write

    def fill(self, source: WeightSource | None) -> None:
        """Take memory and copy the weights as they are now. Collective if the source is.

        Args:
            source: of the model's weights; None if the model holds them whole.
        """
        modules = blocks_of(self._model, self._whole)
        numbers = {id(module): number for number, module in enumerate(modules)}
        blocks: dict[int, Block] = {}
        rest: Weights | None = None
        with torch.inference_mode(False), torch.no_grad():  # FSDP keeps tensors that it makes here
            self.release()
            self._flat = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
            for unit in (source or WholeWeights(self._model, modules)).units():
                if unit is self._model:
                    whole = read_rest(self._model, self._whole)
                    rest = self._cut.rest(whole, self._writing(self._rest_slabs), self._tied)
                elif id(unit) in numbers:
                    number = numbers[id(unit)]
                    block = read_block(unit, self._whole)
                    blocks[number] = self._cut.block(block, self._writing(self._block_slabs[number]))
        assert rest is not None
        assert len(blocks) == len(modules), "the source left blocks out"
        self.weights = replace(rest, blocks=tuple(blocks[i] for i in range(len(modules))), group=self._group)

    def release(self) -> None:
        """Give the memory back. What still refers to `weights` as they were keeps it."""
        self._flat, self.weights = None, self._empty


class ModelCopy:
    """The arena of a family without a decoder of its own: a plain model, adapters merged, for the time of a rollout.

    Args:
        model: whose weights; they may be shards.
        device: of the copy.

    Attributes:
        model: the copy; of no use while it is not filled.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._source_model = model
        kind: Any = type(model).__bases__[1] if isinstance(model, FSDPModule) else type(model)
        with torch.random.fork_rng(devices=[]):  # its weights are random until they are written
            copy: PreTrainedModel = kind(deepcopy(model.config))
        self.model = use_fast_kernels(copy.to(device, torch.float32)).requires_grad_(False)
        self._targets = self.model.state_dict()
        self._sizes = {tensor: tensor.untyped_storage().nbytes() for tensor in self.model.parameters()}
        self.nbytes = sum(self._sizes.values())

    @torch.no_grad()
    def fill(self, source: WeightSource | None) -> None:
        """Take memory and copy the weights as they are now. Collective if the source is."""
        for parameter, size in self._sizes.items():
            parameter.untyped_storage().resize_(size)
        names = {id(module): name for name, module in self._source_model.named_modules()}
        done: list[nn.Module] = []
        missing = set(self._targets)
        for unit in source.units() if source else (self._source_model,):
            for name, tensor in merged_part(unit, names[id(unit)], apart=done).items():
                self._targets[name].copy_(tensor)
                missing.discard(name)
            done.append(unit)
        assert not missing, f"the source left {sorted(missing)} out"

    def release(self) -> None:
        """Give the memory back."""
        for parameter in self._sizes:
            parameter.untyped_storage().resize_(0)


def arena_bytes(config: Any, tp_size: int = 1, dtype: torch.dtype | None = None, tp_rank: int = 0) -> int:
    """Exact size of a process's arena, from the model's config alone.

    The sum over the tensors of the file's head, each rounded up to 64 bytes: matrices of a block by 1 / tp_size (their
    input-cut ones' biases whole), the head by 1 / tp_size, embeddings and norms whole. Of a family without a decoder it
    is the whole model (`ModelCopy`).

    Args:
        dtype: of matrices, None for float32; embeddings and norms are float32.
    """
    model = meta_model(config)
    try:
        architecture = architecture_of(model)
    except NotCoveredError:
        return sum(parameter.nbytes for parameter in model.parameters())
    group = TensorGroup(tp_rank, tp_size) if tp_size > 1 else None
    return Arena(model, architecture, dtype, torch.device("meta"), group).nbytes

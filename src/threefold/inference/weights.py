"""A model's weights as the decoder uses them: bound by reference, or packed for the time of a rollout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from threefold.inference.families import CODEGEN_BLOCKS, Architecture, Fused, NotCoveredError
from threefold.inference.projections import (
    DenseImage,
    Map,
    Matrix,
    Norm,
    PackedProjection,
    Projection,
    joined,
    read_matrix,
    read_norm,
)
from threefold.inference.tensor_parallel import TensorGroup, gathered, summed
from threefold.machine.linear import PackedLinear
from threefold.models.quantised import has_packed


@dataclass(frozen=True)
class Block:
    """One block's weights.

    Attributes:
        query_key_value: one matrix, in the order of the family, or three.
        gate_up: up alone; or, with a gate, gate and up, or one matrix of both in this order.
    """

    attention_norm: Norm
    mlp_norm: Norm | None
    query_key_norms: tuple[Norm, Norm] | None
    query_key_value: tuple[Matrix, ...]
    attention_output: Matrix
    gate_up: tuple[Matrix, ...]
    down: Matrix


@dataclass(frozen=True)
class Weights:
    """All of a model's weights, by reference; or a process's part of them, where several decode together.

    Attributes:
        vocab_size: width of the logits. (A part of the head gives only some of them.)
        sources: every parameter the decoder reads, in a fixed order.
        group: the processes that hold the other parts; None where this is all.
    """

    token_embedding: Tensor
    position_embedding: Tensor | None
    embedding_norm: Norm | None
    project_in: Matrix | None
    project_out: Matrix | None
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    head: Matrix
    vocab_size: int
    sources: tuple[Tensor, ...] = ()
    group: TensorGroup | None = None


@dataclass(frozen=True)
class BlockMaps:
    """What a block computes, each map on rows [N, features].

    Attributes:
        query_key_value: [N, D] -> [N, (Hq + 2 H) * Dh]: queries of all heads, then keys, then values.
        add_attention_output: (attention, residual) -> residual + its projection.
        add_mlp: (x, residual) -> residual + feed-forward network of x.
    """

    attention_norm: Map
    mlp_norm: Map | None
    query_key_norms: tuple[Map, Map] | None
    query_key_value: Map
    add_attention_output: Callable[[Tensor, Tensor], Tensor]
    add_mlp: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Maps:
    """`BlockMaps` of every block, and the output head."""

    blocks: tuple[BlockMaps, ...]
    head: Map


class _Reader:
    """Finds parts by the paths of the family's table and notes the parameters that it hands out."""

    def __init__(self) -> None:
        self.sources: list[Tensor] = []

    def matrix(self, parent: nn.Module, path: str) -> Matrix:
        return self.note(read_matrix(parent.get_submodule(path), path))

    def note(self, matrix: Matrix) -> Matrix:
        self.sources += matrix.tensors()
        return matrix

    def optional_matrix(self, parent: nn.Module, path: str | None) -> Matrix | None:
        return self.matrix(parent, path) if path and getattr(parent, path) is not None else None

    def norm(self, parent: nn.Module, path: str) -> Norm:
        norm = read_norm(parent.get_submodule(path), path)
        self.sources += norm.tensors()
        return norm

    def optional_norm(self, parent: nn.Module, path: str | None) -> Norm | None:
        return self.norm(parent, path) if path and getattr(parent, path) is not None else None

    def embedding(self, parent: nn.Module, path: str) -> Tensor:
        module = parent.get_submodule(path)
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            raise NotCoveredError(f"{path} is a {type(module).__name__}")
        self.sources.append(module.weight)
        return module.weight


def read_weights(model: PreTrainedModel, architecture: Architecture) -> Weights:
    """Look every weight up in the modules as they are now.

    Raises:
        NotCoveredError: a module is not what the table expects, or matrices are packed.
    """
    if has_packed(model):
        raise NotCoveredError("its matrices are packed in 4 bits")
    reader = _Reader()
    rest = _read_rest(reader, model, architecture)
    blocks = tuple(_read_block(reader, block, architecture) for block in blocks_of(model, architecture))
    return replace(rest, blocks=blocks, sources=tuple(reader.sources))


def blocks_of(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The modules of the blocks.

    Raises:
        NotCoveredError: they are not what the table expects.
    """
    family = architecture.family
    blocks = model.get_submodule(family.trunk).get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != architecture.num_layers:
        raise NotCoveredError(f"{family.blocks} of another length than its config says")
    return blocks


def read_rest(model: PreTrainedModel, architecture: Architecture) -> Weights:
    """What is outside the blocks: `read_weights` without them."""
    return _read_rest(_Reader(), model, architecture)


def read_block(block: nn.Module, architecture: Architecture) -> Block:
    """One block's weights, looked up in its modules as they are now."""
    return _read_block(_Reader(), block, architecture)


def _read_rest(reader: _Reader, model: PreTrainedModel, architecture: Architecture) -> Weights:
    family = architecture.family
    trunk = model.get_submodule(family.trunk)
    head = reader.note(read_matrix(model.get_output_embeddings(), "the output head"))
    return Weights(
        token_embedding=reader.embedding(trunk, family.token_embedding),
        position_embedding=reader.embedding(trunk, family.position_embedding) if family.position_embedding else None,
        embedding_norm=reader.optional_norm(trunk, family.embedding_norm),
        project_in=reader.optional_matrix(trunk, family.project_in),
        project_out=reader.optional_matrix(trunk, family.project_out),
        blocks=(),
        final_norm=reader.optional_norm(trunk, family.final_norm),
        head=head,
        vocab_size=len(head.weight),
    )


def _read_block(reader: _Reader, block: nn.Module, architecture: Architecture) -> Block:
    family = architecture.family
    norms = family.query_key_norms
    *gate_up, down = (reader.matrix(block, path) for path in family.mlp)
    return Block(
        attention_norm=reader.norm(block, family.attention_norm),
        mlp_norm=None if family.mlp_norm is None else reader.norm(block, family.mlp_norm),
        query_key_norms=None if norms is None else (reader.norm(block, norms[0]), reader.norm(block, norms[1])),
        query_key_value=tuple(reader.matrix(block, path) for path in family.query_key_value),
        attention_output=reader.matrix(block, family.attention_output),
        gate_up=tuple(gate_up),
        down=down,
    )


def in_order(features: Tensor, fused: Fused, head_dim: int) -> Tensor:
    """The features [N, out] of a fused query-key-value projection as queries, keys, values of all heads."""
    n, out = features.shape
    if fused is Fused.BY_HEAD:
        return features.view(n, -1, 3, head_dim).transpose(1, 2).reshape(n, out)
    if fused is Fused.CODEGEN:
        query, value, key = features.view(n, CODEGEN_BLOCKS, 3, -1).unbind(2)
        return torch.stack([query, key, value], dim=1).view(n, out)
    return features


def reference_maps(weights: Weights, architecture: Architecture) -> Maps:
    """Maps that read the weights where they are."""
    return Maps(
        tuple(_reference_block(block, architecture, weights.group) for block in weights.blocks),
        gathered(weights.head.projection(), weights.vocab_size, weights.group),
    )


def _reference_block(block: Block, architecture: Architecture, group: TensorGroup | None) -> BlockMaps:
    fused, head_dim = architecture.family.fused, architecture.head_dim
    projections = [matrix.projection() for matrix in block.query_key_value]

    def query_key_value(x: Tensor) -> Tensor:
        if len(projections) == 1:
            return in_order(projections[0](x), fused, head_dim)
        return torch.cat([projection(x) for projection in projections], dim=-1)

    gate_up = [matrix.projection() for matrix in block.gate_up]
    down = summed(Matrix.projection, block.down, group)

    def add_gated(x: Tensor, residual: Tensor) -> Tensor:
        gate, up = gate_up[0](x).chunk(2, dim=-1) if len(gate_up) == 1 else (part(x) for part in gate_up)
        return down.add(activation(gate) * up, residual)

    activation = architecture.activation
    return BlockMaps(
        attention_norm=block.attention_norm,
        mlp_norm=block.mlp_norm,
        query_key_norms=block.query_key_norms,
        query_key_value=query_key_value,
        add_attention_output=summed(Matrix.projection, block.attention_output, group).add,
        add_mlp=add_gated if architecture.gated else _plain_mlp(gate_up[0], down, activation),
    )


def _plain_mlp(up: Projection, down: Projection, activation: Map) -> Callable[[Tensor, Tensor], Tensor]:
    if activation is F.relu:
        return lambda x, residual: down.add(up.relu(x), residual)
    return lambda x, residual: down.add(activation(up(x)), residual)


class Images:
    """Packed images of a model's matrices: query-key-value and gate-up as one matrix each, adapters merged.

    On the CPU in the layout of its kernel, made anew by each `write`; on a GPU in `dtype` at fixed addresses, which
    `write` refreshes.

    Attributes:
        stay_in_place: whether all of them are of the second kind.
    """

    def __init__(self, architecture: Architecture, rows: int, dtype: torch.dtype) -> None:
        self._architecture, self._rows, self._dtype = architecture, rows, dtype
        self.stay_in_place = True
        self._dense: dict[str, DenseImage] = {}

    def write(self, weights: Weights) -> Maps:
        """Maps that read images of the weights as they are now."""
        return Maps(
            tuple(self._block(block, f"block {i}", weights.group) for i, block in enumerate(weights.blocks)),
            gathered(self._image("head", weights.head), weights.vocab_size, weights.group),
        )

    def _image(self, name: str, *matrices: Matrix, order: Tensor | None = None) -> Projection:
        weight, bias = (None if t is None else t.detach() for t in joined(matrices, order))
        assert weight is not None
        if PackedLinear.suits(weight):
            self.stay_in_place = False
            return PackedProjection(weight, bias, self._rows)
        if name not in self._dense:
            self._dense[name] = DenseImage(weight, bias, self._dtype)
        self._dense[name].write(weight, bias)
        return self._dense[name]

    def _block(self, block: Block, name: str, group: TensorGroup | None) -> BlockMaps:
        architecture = self._architecture
        order = None
        if architecture.family.fused in (Fused.BY_HEAD, Fused.CODEGEN):
            numbers = torch.arange(len(block.query_key_value[0].weight), device=block.down.weight.device)
            order = in_order(numbers[None], architecture.family.fused, architecture.head_dim)[0]
        output = summed(partial(self._image, f"{name} attention output"), block.attention_output, group)
        down = summed(partial(self._image, f"{name} down"), block.down, group)
        gate_up = self._image(f"{name} gate and up", *block.gate_up)

        def add_gated(x: Tensor, residual: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2, dim=-1)
            return down.add(activation(gate) * up, residual)

        activation = architecture.activation
        return BlockMaps(
            attention_norm=block.attention_norm,
            mlp_norm=block.mlp_norm,
            query_key_norms=block.query_key_norms,
            query_key_value=self._image(f"{name} query-key-value", *block.query_key_value, order=order),
            add_attention_output=output.add,
            add_mlp=add_gated if architecture.gated else _plain_mlp(gate_up, down, activation),
        )

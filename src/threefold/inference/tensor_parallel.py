"""Tensor parallelism of the decoder (Shoeybi et al. 2019, "Megatron-LM", section 3): several processes decode the same
answers, each with its part of every matrix.

Queries, keys, values and the feed-forward network's first matrices are cut by their output features, by whole heads;
attention's output and the feed-forward network's last matrix by their input features, so each process has a summand
of the block's output, and one all-reduce after each makes the sum. The output head is cut by the vocabulary, and the
logits are gathered: every process of the group has the very same bits of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from threefold.errors import ConfigError
from threefold.inference.families import Architecture, Fused, NotCoveredError, architecture_of
from threefold.inference.projections import Map, Matrix, Projection, read_matrix

FIELD = "generation.inference_tp_size"


@dataclass(frozen=True)
class TensorGroup:
    """The processes that decode together.

    Attributes:
        rank, size: this process, and how many there are; at least 2.
        process_group: of torch.distributed; None for all processes of the run.
    """

    rank: int
    size: int
    process_group: Any = None

    def sum_(self, x: Tensor) -> Tensor:
        """Add up what each process has, in place."""
        dist.all_reduce(x, group=self.process_group)
        return x

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.process_group)
        return int(numbers)

    def joined(self, part: Tensor, width: int) -> Tensor:
        """[N, width] of each process's columns [N, w]; all have the same w, but for the last ones, which may have
        less."""
        most = part_of_vocabulary(width, 0, self.size).stop
        columns = part.contiguous()
        if part.shape[1] < most:
            columns = part.new_zeros(len(part), most)
            columns[:, : part.shape[1]] = part
        every = part.new_empty(self.size * len(part), most)
        dist.all_gather_into_tensor(every, columns, group=self.process_group)
        return every.view(self.size, len(part), most).transpose(0, 1).flatten(1)[:, :width]

    def agree(self, drawn: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the first process has drawn: tokens and their two log-probabilities.

        The logits are the same everywhere, but a GPU may add up one row's probabilities in another order each time,
        and a token that differs by that would leave one process waiting for the others.
        """
        tokens, logprobs, sampled = drawn
        numbers = torch.stack([tokens.double(), logprobs.double(), sampled.double()])  # exact: tokens are below 2^53
        dist.broadcast(numbers, group=self.process_group, group_src=0)
        return numbers[0].to(tokens.dtype), numbers[1].to(logprobs.dtype), numbers[2].to(sampled.dtype)


class _Summed:
    """A projection of which this process has the summand of its input features; the bias is added once, to the sum."""

    def __init__(self, part: Projection, bias: Tensor | None, group: TensorGroup) -> None:
        self._part, self._bias, self._group = part, bias, group

    def __call__(self, x: Tensor) -> Tensor:
        total = self._group.sum_(self._part(x))
        return total if self._bias is None else total + self._bias

    def relu(self, x: Tensor) -> Tensor:
        return self(x).relu_()

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


def summed(projection_of: Callable[[Matrix], Projection], matrix: Matrix, group: TensorGroup | None) -> Projection:
    """How to multiply with a matrix that is cut by its input features; not cut without a group."""
    if group is None:
        return projection_of(matrix)
    assert not matrix.adapters
    return _Summed(projection_of(Matrix(matrix.weight, None)), matrix.bias, group)


def gathered(head: Map, vocab_size: int, group: TensorGroup | None) -> Map:
    """The output head, [N, D] -> [N, V], of which this process has the part `part_of_vocabulary`."""
    if group is None:
        return head
    return lambda x: group.joined(head(x), vocab_size)


def part_of_vocabulary(vocab_size: int, rank: int, size: int) -> slice:
    """Tokens whose logits a process computes: equal parts, the last ones shorter where that does not work out."""
    most = -(-vocab_size // size)
    return slice(min(rank * most, vocab_size), min((rank + 1) * most, vocab_size))


def part_of_architecture(whole: Architecture, rank: int, size: int) -> Architecture:
    """What a process has of it once the weights are cut; queries, keys and values then are one matrix, in order."""
    assert whole.num_heads % size == 0
    assert whole.num_kv_heads % size == 0
    return replace(
        whole,
        family=replace(whole.family, fused=Fused.WHOLE),
        num_heads=whole.num_heads // size,
        num_kv_heads=whole.num_kv_heads // size,
        group_rank=rank,
        group_size=size,
    )


def meta_model(config: Any) -> PreTrainedModel:
    """The causal model of a config, float32, without the memory of its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def check_tensor_parallel(config: Any, size: int) -> None:
    """Refuse a number of processes that a model cannot be cut for; needs the config only.

    Raises:
        ConfigError: the family has no decoder here, or its heads or its feed-forward width do not divide.
    """
    if size > 1:
        check_divides(meta_model(config), size)


def check_divides(model: PreTrainedModel, size: int) -> Architecture:
    """`check_tensor_parallel` of a model; returns what it is."""
    try:
        architecture = architecture_of(model)
    except NotCoveredError as error:
        raise not_cut(model.config, size, error) from error
    parts = {
        "attention heads": architecture.num_heads,
        "key-value heads": architecture.num_kv_heads,
        "features of the feed-forward network": _feed_forward_width(model, architecture),
    }
    wrong = [f"{count} {name}" for name, count in parts.items() if count % size]
    if wrong:
        fitting = [
            n for n in range(1, architecture.num_kv_heads + 1) if all(count % n == 0 for count in parts.values())
        ]
        raise ConfigError(
            f"{FIELD} = {size} does not divide the actor's {' and '.join(wrong)}; "
            f"choose from {', '.join(map(str, fitting))}"
        )
    return architecture


def not_cut(config: Any, size: int, reason: NotCoveredError) -> ConfigError:
    """The refusal of a model that has no decoder here."""
    return ConfigError(
        f"{FIELD} = {size}: {config.model_type} generates on the forward of transformers ({reason}), which is not cut; "
        "set it to 1"
    )


def _feed_forward_width(model: PreTrainedModel, architecture: Architecture) -> int:
    family = architecture.family
    first_block = model.get_submodule(f"{family.trunk}.{family.blocks}.0")
    return len(read_matrix(first_block.get_submodule(family.mlp[0]), family.mlp[0]).weight)

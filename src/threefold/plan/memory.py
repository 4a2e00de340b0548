"""Bytes that one rank holds of a model, by what they are for: formulas, each with its source.

W ranks share a model; Ψ is the number of its weights, Φ that of those that learn (Ψ without adapters). All are float32.

    bytes per rank       stage 0     1               2                  3
    weights              4 Ψ         4 Ψ             4 Ψ / W            4 Ψ / W
    gradients            4 Φ         4 Φ             4 Φ / W            4 Φ / W
    Adam's moments       8 Φ         8 Φ / W         8 Φ / W            8 Φ / W
    moving average       4 Φ         4 Φ             4 Φ / W            4 Φ / W
    gathered in a pass   0           0               4 Ψ                4 (root + 2 blocks)

(Rajbhandari et al. 2020, "ZeRO", section 3 and figure 1, whose K = 12 is 8 for us: our weights are the masters
themselves. Its stage 2 holds 4 Ψ always; ours holds shards and gathers them for the time of a pass, so that between
the update phases that memory is free.)

Shares are those of the fullest rank: stage 1 gives whole tensors to ranks, stages 2 and 3 cut along the first
dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from threefold.config.scale import FrozenModelSection, TrainedModelSection
from threefold.inference.arena import arena_bytes
from threefold.inference.kv_cache import CacheLayout
from threefold.machine.attention import BLOCK, LONGEST, SHORTEST
from threefold.plan.sizes import FLOAT_BYTES, ModelSizes, Weight

MOMENTS = 2
"""Adam keeps a mean and a mean square of each gradient (Kingma & Ba 2015)."""


@dataclass(frozen=True)
class Bytes:
    """On the device that computes, and in the memory of the host. On a CPU run both are the same memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.host + other.host)

    @property
    def total(self) -> int:
        """Both."""
        return self.device + self.host


@dataclass(frozen=True)
class ModelMemory:
    """What one model takes of a rank.

    Attributes:
        weights, optimizer, average: held all the time.
        saved: what a checkpoint holds of it: the weights that learn, the moments, the average.
        gradients: held from its first backward pass of an optimizer step to the step.
        gathered: weights that are whole for the time of a forward pass without gradients.
        gathered_in_training: weights and gradients that are whole for the time of a training pass.
    """

    weights: Bytes = field(default_factory=Bytes)
    gradients: Bytes = field(default_factory=Bytes)
    optimizer: Bytes = field(default_factory=Bytes)
    average: Bytes = field(default_factory=Bytes)
    saved: int = 0
    gathered: int = 0
    gathered_in_training: int = 0

    @property
    def held(self) -> Bytes:
        """What is there in every phase."""
        return self.weights + self.optimizer + self.average


def numbers(weights: Iterable[Weight]) -> int:
    """How many numbers they are."""
    return sum(weight.numel for weight in weights)


def nbytes(weights: Iterable[Weight]) -> int:
    """Their bytes."""
    return sum(weight.nbytes for weight in weights)


def sharded(weights: Iterable[Weight], ranks: int) -> int:
    """Bytes on the fullest rank where each is cut along its first dimension (ZeRO stages 2 and 3)."""
    return sum(weight.share(ranks) for weight in weights)


def fullest_partition(weights: Sequence[Weight], ranks: int) -> int:
    """Bytes on the fullest rank where whole tensors go to ranks (ZeRO stage 1): matrices first, then the rest, each
    group from its largest tensor down, always to the rank that has least. It is how torch's ZeroRedundancyOptimizer
    divides the two groups of our optimizer, weights that decay and weights that do not."""
    loads = [0] * ranks
    for matrices in (True, False):
        group = [weight for weight in weights if (len(weight.shape) >= 2) == matrices]
        for weight in sorted(group, key=lambda w: -w.numel):
            loads[loads.index(min(loads))] += weight.nbytes
    return max(loads)


def in_units(weights: Iterable[Weight]) -> tuple[int, int]:
    """Bytes outside the blocks, and of the largest block: what is gathered at a time."""
    root, blocks = 0, dict[int, int]()
    for weight in weights:
        if weight.block < 0:
            root += weight.nbytes
        else:
            blocks[weight.block] = blocks.get(weight.block, 0) + weight.nbytes
    return root, max(blocks.values(), default=0)


def shards_weights(section: TrainedModelSection, ranks: int) -> bool:
    """Whether weights are cut and gathered (a single process does so only to keep them in host memory)."""
    return section.zero_stage >= 2 and (ranks > 1 or section.offload == "all")


def trained_model_memory(
    sizes: ModelSizes,
    section: TrainedModelSection,
    ranks: int,
    frozen_whole: bool,
    average: bool = False,
    average_on_host: bool = False,
    on_gpu: bool = True,
) -> ModelMemory:
    """A model that learns.

    Args:
        section: its ZeRO stage and what it offloads.
        frozen_whole: every rank holds what is frozen beside adapters whole (parallel.frozen_base).
        average: it has a moving average.
        on_gpu: host memory is another memory than the device's.
    """
    shards = shards_weights(section, ranks)
    cut = (list(sizes.trained) if frozen_whole else list(sizes.weights)) if shards else []
    whole = [weight for weight in sizes.weights if weight not in set(cut)]
    trained = sizes.trained
    learning = sharded(trained, ranks) if shards else nbytes(trained)
    stepped = fullest_partition(trained, ranks) if section.zero_stage == 1 else learning
    on_host = shards and section.offload == "all"
    offloaded = section.offload == "optimizer"
    gathered, in_training = _gathered(cut, trained, section.zero_stage, ranks, on_host)
    return ModelMemory(
        weights=_placed(sharded(cut, ranks), on_host, on_gpu) + Bytes(nbytes(whole)),
        gradients=_placed(learning, on_host, on_gpu)
        + _placed(stepped if offloaded else 0, True, on_gpu),  # their copy, for the step
        # offloaded: with the copy of the weights that it steps
        optimizer=_placed(stepped * (MOMENTS + offloaded), on_host or offloaded, on_gpu),
        average=_placed(learning if average else 0, average_on_host or on_host, on_gpu),
        saved=learning * (1 + average) + stepped * MOMENTS,
        gathered=gathered,
        gathered_in_training=in_training,
    )


def frozen_model_memory(sizes: ModelSizes, section: FrozenModelSection, ranks: int, on_gpu: bool = True) -> ModelMemory:
    """A model that is only read."""
    shards = section.zero_stage == 3 and (ranks > 1 or section.offload)
    cut = list(sizes.weights) if shards else []
    held = sharded(cut, ranks) if shards else nbytes(sizes.weights)
    gathered, _ = _gathered(cut, (), section.zero_stage, ranks, section.offload)
    if section.offload and not shards:
        gathered = held if on_gpu else 0  # all of it comes to the device while it is read
    return ModelMemory(weights=_placed(held, section.offload, on_gpu), gathered=gathered)


def _placed(size: int, on_host: bool, on_gpu: bool) -> Bytes:
    return Bytes(host=size) if on_host and on_gpu else Bytes(device=size)


def _gathered(
    cut: Sequence[Weight], trained: Sequence[Weight], zero_stage: int, ranks: int, on_host: bool
) -> tuple[int, int]:
    """Bytes that are whole during a pass without gradients, and during a training pass.

    Stage 3: what is outside the blocks, the block in use and the next one, which is fetched meanwhile (PyTorch FSDP,
    Zhao et al. 2023, section 3.3). Stage 2: in a training pass all of it, from the forward to the backward. In the
    backward pass, their gradients beside them until they are summed: outside the blocks, of a block and of its sum.
    """
    if not cut or (ranks == 1 and not on_host):
        return 0, 0
    root, block = in_units(cut)
    forward = root + 2 * block
    held = nbytes(cut) if zero_stage == 2 else forward
    learning = {weight.name for weight in trained}
    trained_root, trained_block = in_units(weight for weight in cut if weight.name in learning)
    return forward, held + trained_root + 2 * trained_block


def key_value_bytes(sizes: ModelSizes, rows: int, positions: int, tensor_parallel: int, dtype: torch.dtype) -> int:
    """Keys and values of `rows` sequences of `positions` tokens on one rank of a tensor-parallel group:
    2 layers heads Dh positions a row (`CacheLayout`), of which it has the heads / t of its part."""
    layout = CacheLayout(sizes.num_layers, -(-sizes.num_kv_heads // tensor_parallel), sizes.head_dim)
    return rows * layout.bytes_per_row(positions, dtype)


def activation_bytes(
    sizes: ModelSizes, tokens: int, length: int, bfloat16: bool, checkpointing: bool, on_gpu: bool
) -> int:
    """Bytes that a training pass over `tokens` tokens in sequences of `length` keeps for its backward pass, without its
    logits. What each matrix, norm and activation needs for its gradients is counted; small statistics are not.

    Of a block, per token (D width, n numbers a norm keeps, A queries, keys, values and attention's output, F what the
    feed-forward network keeps, H heads, T length):

        float32   4 (2 n + 2 D + A + F): the inputs of the norms, their outputs, and the rest
        bfloat16  4 * 2 n + 2 (r D + A + F): norms stay float32; each of the r matrices that read their outputs keeps
                  a copy of its own
        and on a CPU in float32, at lengths that machine.attention cuts into blocks of 128: 4 H (T + 128) / 2

    With checkpointing only the blocks' inputs stay, and one block at a time is computed again.
    """
    block = sizes.block
    rest = block.query_key_value_output + block.feed_forward
    if bfloat16:
        per_token = 4 * 2 * block.norm + 2 * (block.readers * block.hidden + rest)
    else:
        per_token = 4 * (2 * block.norm + 2 * block.hidden + rest)
        if not on_gpu and SHORTEST <= length <= LONGEST:
            per_token += 4 * block.num_heads * (length + BLOCK) // 2
    if checkpointing:
        return tokens * (per_token + FLOAT_BYTES * block.hidden * sizes.num_layers)
    return tokens * per_token * sizes.num_layers


LOGIT_COPIES = 4
"""Of a chunk: logits, their log softmax, and in the backward pass the gradients of both."""


def logit_bytes(sizes: ModelSizes, positions: int, chunk: int = 1024) -> int:
    """Float32 logits that a pass holds at a time: those of a chunk of positions (algo.logprobs.chunked_logprobs)."""
    return LOGIT_COPIES * FLOAT_BYTES * min(positions, chunk) * sizes.vocab_size


def cast_bytes(sizes: ModelSizes, checkpointing: bool, shards: bool) -> int:
    """Copies of the matrices in bfloat16, which autocast makes in a training pass: each matrix keeps its own for the
    backward pass. With checkpointing those of one block at a time; and those that learn, which autocast keeps to use
    again, but not of a model that is sharded (engine.parallel).
    """
    matrices = [weight for weight in sizes.weights if len(weight.shape) >= 2]
    if not checkpointing:
        return 2 * numbers(matrices)
    kept = [weight for weight in matrices if weight.trained and not shards]
    blocks: dict[int, int] = {}
    for weight in matrices:
        if weight.block >= 0 and (shards or not weight.trained):
            blocks[weight.block] = blocks.get(weight.block, 0) + weight.numel
    return 2 * (max(blocks.values(), default=0) + numbers(kept))


def decode_bytes(
    sizes: ModelSizes, sharded: bool, tensor_parallel: int, dtype: torch.dtype, on_gpu: bool, packed: bool
) -> int:
    """What a rank holds of the actor a second time while it generates. M are the numbers of its blocks' matrices and of
    its output head, b the bytes of one, t the tensor-parallel size.

        whole weights, t = 1   b M if packed (generation.packed_weights), else 0
        arena                  `arena_bytes`; on a CPU, where packed, b M / t more for the kernel's layout
    """
    own = [weight for weight in sizes.weights if "lora_" not in weight.name]
    in_blocks = numbers(weight for weight in own if weight.block >= 0 and len(weight.shape) >= 2)
    head_width = next(w.shape[1] for w in own if w.block < 0 and w.shape[0] == sizes.vocab_size and len(w.shape) == 2)
    head = -(-sizes.vocab_size // tensor_parallel) * head_width
    images = (-(-in_blocks // tensor_parallel) + head) * dtype.itemsize if packed else 0
    if not sharded and tensor_parallel == 1:
        return images
    return arena_bytes(sizes.config, tensor_parallel, dtype) + (0 if on_gpu else images)

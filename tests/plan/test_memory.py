"""Formulas of memory, against hand-worked numbers, against what PyTorch divides and keeps, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from tests.ranks import run_on_ranks
from threefold.config.recipe import LoRASection
from threefold.config.scale import FrozenModelSection, TrainedModelSection
from threefold.engine.device import precision
from threefold.engine.distributed import World
from threefold.inference.kv_cache import CacheLayout, KVCache
from threefold.models.loading import set_dropout, use_fast_kernels
from threefold.models.shapes import find_shape, model_config
from threefold.plan.memory import (
    Bytes,
    activation_bytes,
    cast_bytes,
    decode_bytes,
    frozen_model_memory,
    fullest_partition,
    key_value_bytes,
    logit_bytes,
    trained_model_memory,
)
from threefold.plan.sizes import BlockSizes, ModelSizes, Weight, causal_sizes, model_sizes

CPU = torch.device("cpu")
SMALL = "opt:hidden=8,layers=2,heads=2,ffn=12,vocab=10,positions=6"


def sizes_of(*weights: Weight) -> ModelSizes:
    return ModelSizes(weights, None, BlockSizes(1, 1, 1, 1, 1, 1), 10)


ROOT, FIRST, SECOND = Weight("root", (10, 4), -1, True), Weight("a", (6, 4), 0, True), Weight("b", (5,), 1, True)
FROZEN = Weight("frozen", (4, 4), 0, False)
MODEL = sizes_of(ROOT, FIRST, SECOND)
"""40 + 24 + 5 = 69 numbers, 276 bytes; on 2 ranks at most 20 + 12 + 3 = 35 of them, 140 bytes."""


@pytest.mark.parametrize(
    ("zero_stage", "weights", "gradients", "optimizer", "average", "gathered"),
    [
        (0, 276, 276, 552, 276, 0),
        # whole tensors: root (40) to one rank, a (24) and b (5) to the other
        (1, 276, 276, 320, 276, 0),
        # a pass: all 69, then gradients of root and twice of the largest block, 40 + 2 * 24
        (2, 140, 140, 280, 140, 4 * (69 + 88)),
        # root and two blocks, and their gradients
        (3, 140, 140, 280, 140, 4 * (88 + 88)),
    ],
)
def test_zero_stages_by_hand(
    zero_stage: int, weights: int, gradients: int, optimizer: int, average: int, gathered: int
) -> None:
    memory = trained_model_memory(MODEL, TrainedModelSection(zero_stage=zero_stage), 2, False, average=True)
    assert memory.weights == Bytes(weights)
    assert memory.gradients == Bytes(gradients)
    assert memory.optimizer == Bytes(optimizer)
    assert memory.average == Bytes(average)
    assert memory.gathered_in_training == gathered


def test_one_process_never_shards() -> None:
    stages = [trained_model_memory(MODEL, TrainedModelSection(zero_stage=stage), 1, False) for stage in range(4)]
    assert stages[1:] == stages[:-1]
    assert stages[0].weights == Bytes(276)


def test_the_papers_example() -> None:
    """Rajbhandari et al. 2020, figure 1, counts 2 + 2 + 12 bytes a weight for mixed precision, 7.5 B weights, 64
    ranks; with float32 weights, gradients and two moments ours are 4 + 4 + 8, the same 16, so stage 3 is their 1.9 GB
    and stage 0 their 120 GB."""
    model = sizes_of(Weight("w", (7_500_000, 1000), 0, True))
    whole = trained_model_memory(model, TrainedModelSection(zero_stage=0), 64, False)
    cut = trained_model_memory(model, TrainedModelSection(zero_stage=3), 64, False)
    assert (whole.held + whole.gradients).device == 120_000_000_000
    assert (cut.held + cut.gradients).device == pytest.approx(1.9e9, rel=0.02)


def test_offload_of_the_optimizer_by_hand() -> None:
    section = TrainedModelSection(offload="optimizer")
    memory = trained_model_memory(MODEL, section, 1, False)
    assert memory.weights == Bytes(276)
    assert memory.gradients == Bytes(276, host=276)
    assert memory.optimizer == Bytes(host=3 * 276)  # two moments, and the weights that it steps
    on_cpu = trained_model_memory(MODEL, section, 1, False, on_gpu=False)
    assert on_cpu.optimizer == Bytes(3 * 276)


def test_offload_of_all_leaves_what_is_gathered() -> None:
    section = TrainedModelSection(zero_stage=3, offload="all")
    for ranks, share in ((1, 276), (2, 140)):
        memory = trained_model_memory(MODEL, section, ranks, False, average=True)
        held = memory.held + memory.gradients
        assert held == Bytes(host=5 * share)
        assert memory.gathered_in_training == 4 * (88 + 88)


def test_a_frozen_base_whole_or_cut() -> None:
    model, section = sizes_of(ROOT, FROZEN), TrainedModelSection(zero_stage=3)
    whole = trained_model_memory(model, section, 2, frozen_whole=True)
    cut = trained_model_memory(model, section, 2, frozen_whole=False)
    assert whole.weights == Bytes(80 + 64)
    assert cut.weights == Bytes(80 + 32)
    assert whole.optimizer == cut.optimizer == Bytes(2 * 80)


def test_models_that_are_only_read() -> None:
    assert frozen_model_memory(MODEL, FrozenModelSection(), 2).weights == Bytes(276)
    assert frozen_model_memory(MODEL, FrozenModelSection(zero_stage=3), 2).weights == Bytes(140)
    waiting = frozen_model_memory(MODEL, FrozenModelSection(offload=True), 2)
    assert (waiting.weights, waiting.gathered) == (Bytes(host=276), 276)
    by_block = frozen_model_memory(MODEL, FrozenModelSection(offload=True, zero_stage=3), 2)
    assert (by_block.weights, by_block.gathered) == (Bytes(host=140), 4 * 88)


def _owned_bytes(world: World) -> int:
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(model_config(find_shape(SMALL, "model")))
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2]}, {"params": [p for p in parameters if p.ndim < 2]}]
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, lr=1e-3)
    return sum(p.nbytes for group in optimizer.optim.param_groups for p in group["params"])


def test_stage_1_is_divided_as_torch_divides_it() -> None:
    sizes = causal_sizes(model_config(find_shape(SMALL, "model")), LoRASection(), "lora")
    assert fullest_partition(sizes.weights, 3) == max(run_on_ranks(_owned_bytes, 3))


def test_keys_and_values_are_the_caches() -> None:
    sizes = causal_sizes(model_config(find_shape(SMALL, "model")), LoRASection(), "lora")
    for positions in (5, 256):  # 256 float32 numbers are a stride that the cache avoids
        cache = KVCache(CacheLayout(2, 2, 4), 3, positions, CPU, torch.float32)
        formula = key_value_bytes(sizes, 3, positions, 1, torch.float32)
        spare = 3 * 64 * 2 * 2 * 4  # a cache line for each head dimension, which the layout may need
        assert formula - spare <= cache.nbytes <= formula
    halves = key_value_bytes(sizes, 3, 5, 2, torch.float32)
    assert halves == key_value_bytes(sizes, 3, 5, 1, torch.float32) / 2


FAMILIES: dict[str, Any] = {
    "opt": OPTConfig(
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=512,
    ),
    "llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=512,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=50, n_positions=512),
}


def _saved(
    family: str, batch: int, length: int, dtype: torch.dtype, checkpointing: bool
) -> tuple[int, int, ModelSizes]:
    """Bytes that autograd saves in a forward pass: activations, and copies of weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    set_dropout(model, 0.0)
    use_fast_kernels(model)
    if checkpointing:
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim >= 2}
    shapes |= {shape[::-1] for shape in shapes}
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 50, (batch, length))
    with saved_tensors_hooks(note, lambda tensor: tensor), precision(CPU, dtype):
        model.base_model(input_ids=ids, use_cache=False)
    copies = sum(t.untyped_storage().nbytes() for t in seen.values() if tuple(t.shape) in shapes)
    return sum(t.untyped_storage().nbytes() for t in seen.values()) - copies, copies, model_sizes(model)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("batch", "length"), [(3, 100), (2, 300)])
def test_activations_are_what_autograd_keeps(family: str, batch: int, length: int) -> None:
    kept, _, sizes = _saved(family, batch, length, torch.float32, False)
    formula = activation_bytes(sizes, batch * length, length, bfloat16=False, checkpointing=False, on_gpu=False)
    assert kept == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_activations_in_bfloat16(family: str) -> None:
    kept, copies, sizes = _saved(family, 3, 100, torch.bfloat16, False)
    formula = activation_bytes(sizes, 300, 100, bfloat16=True, checkpointing=False, on_gpu=False)
    assert kept == pytest.approx(formula, rel=0.15)
    in_blocks = 2 * sum(w.numel for w in sizes.weights if len(w.shape) >= 2 and w.block >= 0)
    assert copies == in_blocks
    assert cast_bytes(sizes, checkpointing=False, shards=False) >= in_blocks


def test_checkpointing_keeps_the_blocks_inputs() -> None:
    kept, _, sizes = _saved("opt", 3, 100, torch.float32, True)
    whole = activation_bytes(sizes, 300, 100, bfloat16=False, checkpointing=False, on_gpu=False)
    formula = activation_bytes(sizes, 300, 100, bfloat16=False, checkpointing=True, on_gpu=False)
    one_block = whole // 8  # is computed again, in the backward pass
    final_norm = 4 * 300 * 64  # its input, which the formula leaves out
    assert kept == pytest.approx(formula - one_block + final_norm, rel=0.05)


def test_copies_in_bfloat16_by_hand() -> None:
    """Matrices: root 40 and a 24 that learn, one of 16 that does not."""
    model = sizes_of(ROOT, FIRST, SECOND, FROZEN)
    assert cast_bytes(model, checkpointing=False, shards=True) == 2 * (40 + 24 + 16)
    assert cast_bytes(model, checkpointing=True, shards=True) == 2 * (24 + 16)  # of the first block
    assert cast_bytes(model, checkpointing=True, shards=False) == 2 * (16 + 40 + 24)


def test_logits_are_those_of_a_chunk() -> None:
    assert logit_bytes(sizes_of(), 7) == 4 * 4 * 7 * 10
    assert logit_bytes(sizes_of(), 5000) == 4 * 4 * 1024 * 10


def test_decode_weights_by_hand() -> None:
    sizes = causal_sizes(model_config(find_shape(SMALL, "model")), LoRASection(), "lora")
    matrices, head = 2 * (4 * 64 + 2 * 96), 10 * 8
    whole = {"tensor_parallel": 1, "dtype": torch.float32}
    assert decode_bytes(sizes, False, **whole, on_gpu=False, packed=True) == 4 * (matrices + head)
    assert decode_bytes(sizes, False, **whole, on_gpu=False, packed=False) == 0
    arena = decode_bytes(sizes, True, **whole, on_gpu=True, packed=True)
    assert 4 * sizes.numel <= arena <= 4 * sizes.numel + 64 * len(sizes.weights)  # each tensor at a multiple of 64
    halves = decode_bytes(sizes, True, 2, torch.float32, on_gpu=True, packed=True)
    assert halves < arena

"""The arena: what is in it, how large it is, and that nothing is left of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.inference.test_decoder import COVERED, SPREAD, GreedyRows, tiny_model
from tests.models.families_under_test import CONFIGS, VARIANTS, ragged_ids
from threefold.config.recipe import LoRASection
from threefold.inference.arena import Arena, ModelCopy, arena_bytes
from threefold.inference.decoder import Decoder
from threefold.inference.families import architecture_of
from threefold.inference.tensor_parallel import TensorGroup
from threefold.machine.memory import keep_freed_memory, resident_bytes, return_freed_memory
from threefold.models.adapters import add_lora, merged_state_dict
from threefold.models.loading import use_fast_kernels

CPU = torch.device("cpu")
PROMPTS = ragged_ids(6, [5, 9])


def arena_of(model: PreTrainedModel, group: TensorGroup | None = None, dtype: torch.dtype | None = None) -> Arena:
    return Arena(model, architecture_of(model), dtype, CPU, group)


def over_arena(model: PreTrainedModel) -> tuple[Decoder, Arena]:
    arena = arena_of(model)
    return Decoder(model, arena.architecture, None, arena), arena


def tensors_of(arena: Arena) -> list[Tensor]:
    """Every tensor of the weights; a head that is a view of the embedding is none."""
    weights = arena.weights
    embedding = weights.token_embedding
    found = [embedding, weights.position_embedding]
    tied = 0 <= weights.head.weight.data_ptr() - embedding.data_ptr() < embedding.nbytes
    matrices = [weights.project_in, weights.project_out, None if tied else weights.head]
    norms = [weights.embedding_norm, weights.final_norm]
    for block in weights.blocks:
        matrices += [*block.query_key_value, block.attention_output, *block.gate_up, block.down]
        norms += [block.attention_norm, block.mlp_norm, *(block.query_key_norms or ())]
    for part in [*matrices, *norms]:
        found += [] if part is None else part.tensors()
    return [tensor for tensor in found if tensor is not None]


# ------------------------------------------------------------------------------------------------------------ size


def rounded(*counts: int, itemsize: int = 4) -> int:
    return sum(-(-count * itemsize // 64) * 64 for count in counts)


def test_the_size_by_hand() -> None:
    """Llama: V 40, D 32, I 48, 2 layers, 4 heads of 8, 2 key-value heads; embedding and head are two matrices."""
    config = CONFIGS["llama"]()
    block = (32, 64 * 32, 32 * 32, 32, 96 * 32, 32 * 48)
    assert arena_bytes(config) == rounded(40 * 32, 40 * 32, 32) + 2 * rounded(*block)
    half = (32, 32 * 32, 32 * 16, 32, 48 * 32, 32 * 24)
    assert arena_bytes(config, 2) == rounded(40 * 32, 20 * 32, 32) + 2 * rounded(*half)
    narrow = rounded(20 * 32, itemsize=2) + 2 * rounded(half[1], half[2], half[4], half[5], itemsize=2)
    assert arena_bytes(config, 2, torch.bfloat16) == rounded(40 * 32, 32) + 2 * rounded(32, 32) + narrow


def test_a_tied_head_takes_no_memory_where_the_types_agree() -> None:
    config = CONFIGS["opt"]()
    assert config.tie_word_embeddings
    model = tiny_model("opt")
    arena = arena_of(model, TensorGroup(1, 2))
    arena.fill(None)
    assert arena.weights.head.weight.data_ptr() == arena.weights.token_embedding[20].data_ptr()
    untied = CONFIGS["opt"]()
    untied.tie_word_embeddings = False
    assert arena_bytes(untied, 2) == arena_bytes(config, 2) + rounded(20 * 32)
    assert arena_bytes(config, 2, torch.bfloat16) > arena_bytes(config, 2) // 2 + rounded(20 * 32, itemsize=2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", COVERED)
def test_the_size_is_what_the_config_says(family: str, size: int, dtype: torch.dtype | None) -> None:
    config, model = {**CONFIGS, **VARIANTS}[family](), tiny_model(family)
    for rank in range(size):
        arena = arena_of(model, TensorGroup(rank, size) if size > 1 else None, dtype)
        assert arena.nbytes == arena_bytes(config, size, dtype, rank)
        arena.fill(None)
        assert arena.weights.token_embedding.untyped_storage().nbytes() == arena.nbytes
        assert sum(rounded(tensor.nbytes, itemsize=1) for tensor in tensors_of(arena)) == arena.nbytes
        assert all(
            tensor.data_ptr() % 64 == arena.weights.token_embedding.data_ptr() % 64 for tensor in tensors_of(arena)
        )


def test_the_parts_hold_every_weight() -> None:
    """Sums of squares: a matrix is cut into parts, so each number is in one of them; what is not cut is in both."""
    model = tiny_model("llama-biases")
    parts = []
    for rank in range(2):
        arena = arena_of(model, TensorGroup(rank, 2))
        arena.fill(None)
        parts.append(arena.weights)
    for number, block in enumerate(model.model.layers):
        mine = [part.blocks[number] for part in parts]
        attention, mlp = block.self_attn, block.mlp
        joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        query_key_value = torch.cat([b.query_key_value[0].weight for b in mine])
        assert sorted(map(tuple, query_key_value.tolist())) == sorted(map(tuple, joined.tolist()))
        assert torch.equal(torch.cat([b.attention_output.weight for b in mine], dim=1), attention.o_proj.weight)
        assert torch.equal(torch.cat([b.down.weight for b in mine], dim=1), mlp.down_proj.weight)
        gate, up = (torch.cat(halves) for halves in zip(*(b.gate_up[0].weight.chunk(2) for b in mine), strict=True))
        assert torch.equal(gate, mlp.gate_proj.weight)
        assert torch.equal(up, mlp.up_proj.weight)
        assert all(torch.equal(b.down.bias, mlp.down_proj.bias) for b in mine if b.down.bias is not None)


# -------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "bloom", "codegen"])
def test_adapters_are_merged_in_the_arena_only(family: str, size: int) -> None:
    model = with_adapters(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = tiny_model(family)
    plain.load_state_dict(merged_state_dict(model))
    for rank in range(size):
        group = TensorGroup(rank, size) if size > 1 else None
        adapted, merged = arena_of(model, group), arena_of(plain, group)
        adapted.fill(None)
        merged.fill(None)
        for one, other in zip(tensors_of(adapted), tensors_of(merged), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def with_adapters(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    add_lora(model, LoRASection(rank=3, alpha=7), 0, "a test")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
    return model.eval()


# ------------------------------------------------------------------------------------------------ filled and empty


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_each_filling_takes_the_weights_as_they_are_then(packed: bool) -> None:
    model = tiny_model("llama")
    decoder, arena = over_arena(model)
    bindings = decoder.bindings
    addresses = set()
    for _ in range(3):
        arena.fill(None)
        addresses.add(arena.weights.token_embedding.data_ptr())
        if packed:
            decoder.pack(2)
        rows = GreedyRows(decoder)
        rows.prefill(PROMPTS, 0)
        rows.step(5)
        rows.check(model)
        decoder.release()
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert decoder.bindings >= bindings + len(addresses)
    assert arena.weights.token_embedding.is_meta


@torch.no_grad()
def test_an_empty_arena_is_not_read() -> None:
    decoder, arena = over_arena(tiny_model("opt"))
    assert (decoder.device, decoder.dtype, decoder.vocab_size) == (CPU, torch.float32, 40)
    cache = decoder.new_cache(1, 8)
    with pytest.raises(AssertionError, match="the arena is empty"):
        decoder.prefill(torch.tensor([[5, 6]]), [2], cache, 0)
    arena.fill(None)
    decoder.prefill(torch.tensor([[5, 6]]), [2], cache, 0)
    decoder.release()
    with pytest.raises(AssertionError, match="the arena is empty"):
        decoder.prefill(torch.tensor([[5, 6]]), [2], cache, 0)


def test_a_source_that_leaves_something_out_is_found() -> None:
    class FirstBlockOnly:
        def units(self) -> Iterator[nn.Module]:
            yield model.model.decoder.layers[0]
            yield model

    model = tiny_model("opt")
    with pytest.raises(AssertionError, match="left blocks out"):
        arena_of(model).fill(FirstBlockOnly())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@torch.no_grad()
def test_memory_is_given_back() -> None:
    """An arena of some 70 MB and its images, of which nothing stays; tolerance 10 MB."""
    keep_freed_memory()
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    model = use_fast_kernels(LlamaForCausalLM(config))
    decoder, arena = over_arena(model)
    assert arena.nbytes == arena_bytes(config) > 60 * 2**20

    def rollout() -> int:
        arena.fill(None)
        decoder.pack(2)
        decoder.prefill(torch.tensor([[5, 6]]), [2], decoder.new_cache(1, 8), 0)
        taken = resident_bytes(CPU)
        decoder.release()
        return_freed_memory(CPU)
        return taken

    rollout()
    baseline = resident_bytes(CPU)
    assert rollout() > baseline + arena.nbytes
    assert resident_bytes(CPU) < baseline + 10 * 2**20


# ------------------------------------------------------------------------------------- families without a decoder


@pytest.mark.parametrize("family", ["gemma2", "falcon", "cohere"])
@torch.no_grad()
def test_a_copy_of_a_model_computes_what_the_model_does(family: str) -> None:
    model = with_adapters(family)
    state = torch.get_rng_state()
    copied = ModelCopy(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert copied.nbytes == arena_bytes(CONFIGS[family]())
    ids = torch.tensor([PROMPTS[1]])
    for _ in range(2):
        copied.fill(None)
        torch.testing.assert_close(copied.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        copied.release()
        assert all(parameter.untyped_storage().nbytes() == 0 for parameter in copied.model.parameters())
        for parameter in model.parameters():
            parameter.mul_(1.05)

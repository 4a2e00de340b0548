"""Sizes counted from configs, against published counts and numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedModel

from threefold.config.recipe import EmbeddedModelSection, LoRASection
from threefold.errors import CheckpointError
from threefold.models.shapes import find_shape, model_config
from threefold.plan.sizes import NF4_BITS, Weight, causal_sizes, scalar_sizes, source_config

NO_LORA, EMBEDDED = LoRASection(), EmbeddedModelSection()
OPT = "opt:hidden=8,layers=2,heads=2,ffn=12,vocab=10,positions=6"


def config(name: str) -> Any:
    return model_config(find_shape(name, "model"))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("facebook/opt-1.3b", 1_315_758_080),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
    ],
)
def test_published_counts(name: str, published: int) -> None:
    assert causal_sizes(source_config(name, EMBEDDED), NO_LORA, "lora").numel == published


def test_opt_by_hand() -> None:
    sizes = causal_sizes(config(OPT), NO_LORA, "lora")
    block = 4 * (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * 2 * 8
    assert sum(weight.numel for weight in sizes.weights if weight.block == 1) == block
    assert sizes.numel == 2 * block + 10 * 8 + (6 + 2) * 8 + 2 * 8  # the tied head counts once
    assert (sizes.vocab_size, sizes.num_layers, sizes.num_kv_heads, sizes.head_dim) == (10, 2, 2, 4)


def test_a_scalar_model_has_a_score_instead_of_a_head() -> None:
    sizes = scalar_sizes(config(OPT), NO_LORA, "lora")
    assert sizes.vocab_size == 0
    assert [weight.shape for weight in sizes.weights if weight.name == "score.weight"] == [(1, 8)]


def test_adapters_by_hand() -> None:
    sizes = causal_sizes(config(OPT), LoRASection(rank=3), "lora")
    assert sum(weight.numel for weight in sizes.trained) == 2 * 3 * (4 * (8 + 8) + (8 + 12) + (12 + 8))
    assert sum(weight.numel for weight in sizes.frozen) == causal_sizes(config(OPT), NO_LORA, "lora").numel


def test_a_base_in_four_bits() -> None:
    sizes = causal_sizes(config(OPT), LoRASection(rank=3, quantise_base="nf4"), "lora")
    packed = [weight for weight in sizes.weights if weight.bits == NF4_BITS]
    assert sum(weight.numel for weight in packed) == 2 * (4 * 64 + 2 * 96)
    assert not any(weight.trained for weight in packed)


def test_nothing_of_a_reader_is_trained() -> None:
    assert causal_sizes(config(OPT), NO_LORA, "lora", trained=False).trained == ()


def test_the_fullest_share_is_the_first_chunk() -> None:
    for rows in (1, 2, 7, 8, 9, 100):
        for parts in (1, 2, 3, 8, 16):
            chunk = torch.chunk(torch.empty(rows, 5), parts)[0]
            assert Weight("w", (rows, 5), 0, True).share(parts) == 4 * chunk.numel()


def test_the_embedded_model() -> None:
    sizes = causal_sizes(source_config("embedded", EMBEDDED), NO_LORA, "lora")
    assert sizes.config.vocab_size == EMBEDDED.vocab_size
    assert sizes.num_layers == EMBEDDED.num_layers


def test_a_directory_goes_before_a_published_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config(OPT).save_pretrained(tmp_path / "opt-1.3b")
    monkeypatch.chdir(tmp_path)
    assert source_config("opt-1.3b", EMBEDDED).hidden_size == 8


def test_an_unknown_directory_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        source_config("./nothing/there", EMBEDDED)


@pytest.mark.parametrize("config_class", [OPTConfig, LlamaConfig, GPT2Config])
def test_families_have_blocks(config_class: Any) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
    sizes = causal_sizes(config_class(**small), NO_LORA, "lora")
    assert {weight.block for weight in sizes.weights} == {-1, 0, 1}
    assert not issubclass(config_class, PreTrainedModel)

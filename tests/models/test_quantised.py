"""Matrices in 4 bits against a naive NF4 written from the paper; adapters on them, trained, switched off and saved.

Where bitsandbytes is not installed (it is an extra) the tests of what it computes are skipped.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.families_under_test import (
    CONFIGS,
    EOS,
    PAD,
    ragged_ids,
    tiny_causal_lm,
    tiny_scalar_model,
    tiny_tokenizer,
)
from threefold.config.recipe import LoRASection
from threefold.errors import ConfigError
from threefold.models import quantised
from threefold.models.adapters import adapters_off, add_lora, merged_part, merged_state_dict
from threefold.models.loading import load_causal_lm, save_model
from threefold.models.quantised import dequantised, is_quantised, quantise

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra qlora)"
)

# Dettmers et al. 2023, appendix E.
LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
SECTION = LoRASection(rank=2, quantise_base="nf4")
IDS = torch.tensor(ragged_ids(8, [9, 9]))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def naive_nf4(weight: Tensor) -> Tensor:
    """Every number to the nearest level of its block of 64; the blocks' scales as they are, not rounded."""
    flat, rounded = weight.flatten(), torch.empty(weight.numel())
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        nearest = (block[:, None] / scale - LEVELS).abs().argmin(dim=1)
        rounded[start : start + 64] = LEVELS[nearest] * scale
    return rounded.view_as(weight)


def with_adapters(family: str, section: LoRASection = SECTION, make: Any = tiny_causal_lm) -> PreTrainedModel:
    model: PreTrainedModel = make(family)
    add_lora(model, section, 7, "sft.lora")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def rounded_base(model: PreTrainedModel, family: str, make: Any = tiny_causal_lm) -> PreTrainedModel:
    """A plain model that has the rounded matrices of `model`, by name."""
    plain: PreTrainedModel = make(family)
    layers = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if is_quantised(m)}
    assert layers
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_parameter(f"{name}.weight").copy_(dequantised(layer, torch.float32))
    return plain


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(32, 48), (33, 7), (130, 96)])
def test_a_packed_matrix_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    """To the 8 bits of the blocks' scales: 1 % of the largest number. And it takes the bits that the module says."""
    layer = nn.Linear(shape[1], shape[0])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer.weight = nn.Parameter(weight.clone())
    quantise(layer)
    found = dequantised(layer, torch.float32)
    assert (found.shape, found.dtype) == (shape, torch.float32)
    torch.testing.assert_close(found, naive_nf4(weight), atol=0.01 * float(weight.abs().max()), rtol=0)
    assert layer.weight.numel() == (weight.numel() + 1) // 2
    assert layer.weight.dtype == layer.scales.dtype == torch.uint8
    assert layer.scales.numel() == -(-weight.numel() // 64)
    assert torch.equal(dequantised(layer, torch.float32), found)
    assert torch.equal(dequantised(layer, torch.bfloat16), found.bfloat16())


@needs_bitsandbytes
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gradient_are_those_of_the_matrix(bias: bool, autocast: bool) -> None:
    """Of torch's own layer with that matrix: to 1e-5, and bit for bit under autocast."""
    layer, twin = (nn.Linear(48, 32, bias=bias) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    quantise(layer)
    twin.weight = nn.Parameter(dequantised(layer, torch.float32))
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    found = []
    for module in (layer, twin):
        mine = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = module(mine)
        y.square().sum().backward()
        assert mine.grad is not None
        found.append((y.detach(), mine.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        if not autocast:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    assert layer.weight.grad is None


@needs_bitsandbytes
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_computes_what_its_rounded_matrices_and_adapters_say(family: str) -> None:
    """1e-5 relative to the plain model with those matrices and the same adapters; off, to that model itself."""
    model = with_adapters(family)
    plain = rounded_base(model, family)
    size = float(logits(plain).abs().max())
    with adapters_off(model):
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-5 * size, rtol=0)
    add_lora(plain, LoRASection(rank=2), 7, "sft.lora")
    for (name, ours), theirs in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad),
        (p for p in plain.parameters() if p.requires_grad),
        strict=True,
    ):
        assert ".lora_" in name
        theirs.data.copy_(ours.data)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5 * size, rtol=0)
    for twin in (model, plain):
        twin(input_ids=IDS, labels=IDS).loss.backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[name], gradient, atol=1e-5 * largest, rtol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize(("family", "make"), [("opt", tiny_causal_lm), ("gpt2", tiny_scalar_model)])
def test_all_linear_layers_of_the_blocks_are_packed_adapted_or_not(family: str, make: Any) -> None:
    names = {"opt": ["q_proj"], "gpt2": ["c_attn"]}[family]
    model = with_adapters(family, LoRASection(rank=2, quantise_base="nf4", target_modules=names), make)
    plain = make(family)
    packed = {name.replace(".base_layer", "") for name, module in model.named_modules() if is_quantised(module)}
    kinds = ("fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj", "c_attn", "c_proj", "c_fc")
    assert packed == {name for name, _ in plain.named_modules() if name.endswith(kinds)}
    merged, start = merged_state_dict(model), rounded_base(model, family, make).state_dict()
    changed = {name for name in start if not torch.equal(merged[name], start[name])}
    assert changed == {f"{name}.weight" for name in packed if name.endswith(tuple(names))}


@needs_bitsandbytes
def test_one_seed_gives_the_same_adapters_packed_or_not() -> None:
    packed, plain = with_adapters("opt"), with_adapters("opt", LoRASection(rank=2))
    ours, theirs = ({n: p for n, p in m.named_parameters() if ".lora_" in n} for m in (packed, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_bitsandbytes
def test_training_moves_the_adapters_alone_and_lowers_the_loss() -> None:
    model = with_adapters("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".lora_" not in name)


@needs_bitsandbytes
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("train_heads", [False, True])
def test_what_is_saved_is_a_plain_model_in_full_precision(family: str, train_heads: bool, tmp_path: Path) -> None:
    model = with_adapters(family, LoRASection(rank=2, quantise_base="nf4", train_heads=train_heads))
    live = logits(model)
    size = max(1.0, float(live.abs().max()))
    merged = merged_state_dict(model)
    assert list(merged) == list(tiny_causal_lm(family).state_dict())
    part = merged_part(model)
    assert all(torch.equal(part[name], tensor) for name, tensor in merged.items())
    save_model(model, tiny_tokenizer(), tmp_path, frozenset({EOS}), PAD)
    assert "quant" not in (tmp_path / "config.json").read_text()
    for load in (AutoModelForCausalLM.from_pretrained, load_causal_lm):
        loaded = load(str(tmp_path))
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        torch.testing.assert_close(logits(loaded), live, atol=1e-5 * size, rtol=0)
    theirs = peft.PeftModel.from_pretrained(rounded_base(model, family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), live, atol=1e-5 * size, rtol=0)


@needs_bitsandbytes
def test_it_goes_into_a_state_dict_and_back() -> None:
    model, other = with_adapters("llama"), tiny_causal_lm("llama", seed=3)
    add_lora(other, SECTION, 8, "sft.lora")
    assert not torch.allclose(logits(other), logits(model), atol=1e-2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_where_bitsandbytes_is_missing_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantised._bitsandbytes.cache_clear()
    model = tiny_causal_lm("llama")
    before = model.state_dict().keys()
    with pytest.raises(ConfigError) as caught:
        add_lora(model, SECTION, 7, "ppo.actor_lora")
    message = str(caught.value)
    assert message.startswith('ppo.actor_lora.quantise_base = "nf4" needs bitsandbytes, which is not installed')
    assert 'pip install "threefold[qlora]"' in message
    assert "\n" not in message
    assert model.state_dict().keys() == before
    monkeypatch.undo()
    quantised._bitsandbytes.cache_clear()

"""Weights of a sharded model, merged: module after module, or from a whole state dict."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tests.models.families_under_test import CONFIGS, EOS, PAD, tiny_causal_lm, tiny_scalar_model, tiny_tokenizer
from tests.ranks import run_on_ranks
from threefold.config.recipe import LoRASection
from threefold.engine.distributed import World
from threefold.models.adapters import add_lora, merged_part, merged_state_dict
from threefold.models.loading import save_model

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def with_adapters(family: str, kind: str = "") -> PreTrainedModel:
    """A model whose adapters (and head) are not what they were at first. `kind`: "heads", "scalar", "nf4" or none."""
    model = (tiny_scalar_model if kind == "scalar" else tiny_causal_lm)(family)
    packed = "nf4" if kind == "nf4" else "none"
    section = LoRASection.model_validate({"rank": 2, "train_heads": kind == "heads", "quantise_base": packed})
    add_lora(model, section, 7, "sft.lora")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By hand: the children of every list of modules."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {f"{name}.{i}": block for name, held in lists.items() for i, block in enumerate(held)}


def in_parts(model: PreTrainedModel) -> dict[str, Tensor]:
    units = blocks(model)
    parts = [merged_part(block, name) for name, block in units.items()]
    parts.append(merged_part(model, apart=units.values()))
    together = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(together) == sum(len(part) for part in parts), "a name is in two parts"
    return together


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_parts_together_are_the_whole(family: str) -> None:
    model = with_adapters(family)
    expected = merged_state_dict(model)
    same(in_parts(model), expected)
    assert list(merged_part(model)) == list(expected) == list(tiny_causal_lm(family).state_dict())
    same(merged_state_dict(model, model.state_dict()), expected)


def test_without_adapters_a_part_is_a_copy() -> None:
    model = tiny_causal_lm("llama")
    part = merged_part(model.model.layers[1], "model.layers.1")
    assert all(name.startswith("model.layers.1.") for name in part)
    expected = {name: t.clone() for name, t in model.state_dict().items() if name in part}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(part, expected)


def test_tied_weights_stay_tied() -> None:
    part = merged_part(with_adapters("opt"))
    assert part["lm_head.weight"].data_ptr() == part["model.decoder.embed_tokens.weight"].data_ptr()


def sharded_parts(world: World, family: str, kind: str, directory: Path) -> dict[str, bool]:
    """Compares on every rank; rank 0 saves what it gathered under `directory`."""
    expected = merged_state_dict(with_adapters(family, kind))
    model = with_adapters(family, kind)
    units: dict[str, nn.Module] = {**blocks(model), "": model}
    for module in units.values():
        fully_shard(module, mesh=world.mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    gathered: dict[str, Tensor] = {}
    inner = [module for name, module in units.items() if name]
    for name, module in units.items():
        assert isinstance(module, FSDPModule)
        module.unshard()
        gathered |= merged_part(module, name, inner if not name else ())
        module.reshard()
    by_shards = in_parts(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    whole = {id(tensor): cast(DTensor, tensor).full_tensor() for tensor in named.values()}
    state = {name: whole[id(tensor)] for name, tensor in named.items()}
    from_state = merged_state_dict(model, state)
    if world.is_first:
        save_model(model, tiny_tokenizer(), directory, frozenset({EOS}), PAD, state)

    def equal(found: dict[str, Tensor]) -> bool:
        return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())

    return {"gathered": equal(gathered), "by shards": equal(by_shards), "from a state": equal(from_state)}


def all_sharded_parts(
    world: World, cases: list[tuple[str, str]], directory: Path
) -> dict[tuple[str, str], dict[str, bool]]:
    return {case: sharded_parts(world, *case, directory / "-".join(case)) for case in cases}


def test_of_a_sharded_model_they_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    """While a module is gathered, from its shards, and from a whole state dict; the files too."""
    cases = [("opt", ""), ("opt", "heads"), ("gpt2", ""), ("llama", "heads"), ("opt", "scalar")]
    if HAS_BITSANDBYTES:
        cases.append(("gpt2", "nf4"))
    expected = {"gathered": True, "by shards": True, "from a state": True}
    for found in run_on_ranks(all_sharded_parts, 2, cases, tmp_path):
        assert found == dict.fromkeys(cases, expected)
    for case in cases:
        sharded, whole = tmp_path / "-".join(case), tmp_path / "whole" / "-".join(case)
        save_model(with_adapters(*case), tiny_tokenizer(), whole, frozenset({EOS}), PAD)
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            same(load_file(sharded / name), load_file(whole / name))
        written = sorted(path.relative_to(whole) for path in whole.rglob("*.json"))
        assert written == sorted(path.relative_to(sharded) for path in sharded.rglob("*.json"))
        for file in written:
            assert (sharded / file).read_text() == (whole / file).read_text()

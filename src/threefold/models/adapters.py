"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1): peft's layers inside a Hugging Face model.

Each chosen matrix W [out, in] acts as W + scaling * B A, with A [rank, in], B [out, rank] and scaling = alpha / rank;
W is frozen. B starts at zero, so a model with new adapters computes what it computed before. The model keeps its class,
its base model and its head: only the chosen layers are replaced, each by one that holds the former as `base_layer`.
Whoever reads weights past the layers' own forward has to mind them, for `layer.weight` is the frozen matrix alone;
`merged_weight` is what the layer stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from threefold.config.recipe import LoRASection
from threefold.errors import ConfigError
from threefold.machine.linear import route_linears

ALL_LINEAR = "all-linear"
NAME = "default"
"""peft's name for the only adapter of a model."""


def add_lora(model: PreTrainedModel, section: LoRASection, seed: int, field: str) -> None:
    """Give the model adapters, float32, in place, and freeze all else but a score head; with rank 0 do nothing.

    To be called after `set_dropout`, which would set the adapters' dropout too, and before anything that keeps the
    model's parameters or layers (an optimizer, an average).

    Args:
        seed: A is drawn from it, uniform in +-1 / sqrt(in); the global generator is left as it was.
        field: the section's dotted path in the recipe, for messages.

    Raises:
        ConfigError: if an entry of target_modules is the name of no linear layer in the model's blocks, or they have
            none.
    """
    if section.rank == 0:
        return
    assert not has_lora(model), "the model has adapters already"
    targets = lora_targets(model, section, field)
    head = getattr(model, "score", None)
    config = LoraConfig(
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        base_model_name_or_path=model.name_or_path or None,
        r=section.rank,
        lora_alpha=section.effective_alpha(),
        lora_dropout=section.dropout,
        target_modules=_shortest_names(model, targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws on the CPU, so one seed gives one A on every device
        inject_adapter_in_model(config, model, NAME)
    for _, layer in _adapted_layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            factor.float()  # peft gives them the type of the frozen weight, in which small updates are rounded away
            route_linears(factor)
    model.train(model.training)  # the new layers are in training mode, whatever the model is in
    if head is not None:
        head.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(True for _ in _adapted_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """For the time of the block the model computes what it did before it had adapters, bit for bit; a score head that
    has been trained since stays as it is. May be nested; of a model without adapters it changes nothing.
    """
    layers = [layer for _, layer in _adapted_layers(model) if not layer.disable_adapters]
    # peft's switch sets requires_grad of the adapters too, to False and then to True whatever it was
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The matrix that a linear layer stands for: W + scaling * B A, or, where it has no adapter, its own weight.

    Laid out as the layer's own ([out, in]; GPT-2's Conv1D: [in, out]), on its device. The sum is taken in float32 in a
    new tensor and rounded once, to the weight's own type. Adapters that are off at the moment count all the same.
    """
    if not isinstance(layer, AdaptedLinear):
        own: Tensor = layer.weight.detach()
        return own
    weight = cast(Tensor, layer.get_base_layer().weight)
    a, b = (cast(Tensor, factors[NAME].weight).float() for factors in (layer.lora_A, layer.lora_B))
    with torch.autocast(weight.device.type, enabled=False):
        product = b @ a
    if layer.fan_in_fan_out:
        product = product.T
    return torch.add(weight.float(), product, alpha=layer.scaling[NAME]).to(weight.dtype)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a plain model that computes what this one does: the names from before it had adapters.

    Adapted matrices are new tensors on the CPU; all others are the model's own, tied ones still tied. Nothing of the
    model is written to.
    """
    layers = dict(_adapted_layers(model))
    merged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, of_base, own_name = name.partition(".base_layer.")
        if of_base and owner in layers:
            merged[f"{owner}.{own_name}"] = merged_weight(layers[owner]).cpu() if own_name == "weight" else tensor
        elif name.partition(".lora_")[0] not in layers:
            merged[name] = tensor
    return merged


def save_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Write the adapters alone, in peft's format: `PeftModel.from_pretrained(base, directory)` loads them.

    A score head is written with them, as peft does. Embeddings are not: where the vocabulary has grown since the base
    model was loaded, it has to grow there in the same way first.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    head = getattr(model, "score", None)
    if head is not None:
        tensors |= {f"score.{name}": tensor for name, tensor in head.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    config = copy(model.peft_config[NAME])
    config.target_modules = sorted(config.target_modules)  # a set, whose order changes from process to process
    config.save_pretrained(directory)
    # the prefix is that of peft's wrapper around a whole model
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def lora_targets(model: PreTrainedModel, section: LoRASection, field: str) -> dict[str, nn.Module]:
    """The layers to adapt, by full name.

    A transformer's blocks are what its base model holds in lists; what stands beside the lists (projections of
    embeddings, say) belongs to the vocabulary and is left alone.
    """
    in_blocks = {
        name: module
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdecimal() for part in name.split("."))
    }
    if not in_blocks:
        raise ConfigError(
            f"{field}.rank = {section.rank}: {type(model).__name__} has no linear layers in blocks to adapt; set 0"
        )
    wanted = section.target_modules
    known = ", ".join(sorted({_last_part(name) for name in in_blocks}))
    if wanted == [ALL_LINEAR]:
        return in_blocks
    for ending in wanted:
        if not any(_ends(name, ending) for name in in_blocks):
            raise ConfigError(
                f"{field}.target_modules = {wanted}: no linear layer in the blocks of {type(model).__name__} is named "
                f'{ending!r}; choose from {known}, or set "{ALL_LINEAR}"'
            )
    return {name: module for name, module in in_blocks.items() if any(_ends(name, ending) for ending in wanted)}


def _shortest_names(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> list[str]:
    """What peft calls target_modules: the last parts of the names, if they are those of no other layer."""
    short = {_last_part(name) for name in targets}
    meant = {name for name, _ in model.named_modules() if _last_part(name) in short}
    return sorted(short if meant == targets.keys() else targets)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")

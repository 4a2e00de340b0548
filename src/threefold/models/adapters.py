"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1): peft's layers inside a Hugging Face model.

Each chosen matrix W [out, in] acts as W + scaling * B A, with A [rank, in], B [out, rank] and scaling = alpha / rank;
W is frozen. B starts at zero, so a model with new adapters computes what it computed before. The model keeps its class,
its base model and its head: only the chosen layers are replaced, each by one that holds the former as `base_layer`.
Whoever reads weights past the layers' own forward has to mind them, for `layer.weight` is the frozen matrix alone, and
may be packed in 4 bits (models.quantised); `merged_weight` is what the layer stands for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from threefold.config.recipe import LoRASection
from threefold.errors import ConfigError
from threefold.machine.linear import route_linears
from threefold.models.heads import TrainedHead, check_head, train_head
from threefold.models.quantised import check_quantisation, dequantised, is_quantised, quantise

ALL_LINEAR = "all-linear"
NAME = "default"
"""peft's name for the only adapter of a model."""


def add_lora(model: PreTrainedModel, section: LoRASection, seed: int, field: str) -> None:
    """Give the model adapters, float32, in place, and freeze all else but a score head; with rank 0 do nothing.

    Where the section says so, the language-model head is trained too, and the linear layers of the blocks, adapted or
    not, are packed in 4 bits, on the device that they are on.

    To be called after `set_dropout`, which would set the adapters' dropout too, and before anything that keeps the
    model's parameters or layers (an optimizer, an average).

    Args:
        seed: A is drawn from it, uniform in +-1 / sqrt(in); the global generator is left as it was.
        field: the section's dotted path in the recipe, for messages.

    Raises:
        ConfigError: see `check_lora`.
    """
    if section.rank == 0:
        return
    assert not has_lora(model), "the model has adapters already"
    check_lora(model, section, field)
    in_blocks = _linear_layers_of_blocks(model)
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
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU, so one seed gives one A on every device
        inject_adapter_in_model(config, model, NAME)
    for _, layer in _adapted_layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            factor.float()  # peft gives them the type of the frozen weight, in which small updates are rounded away
            route_linears(factor)
    model.train(model.training)  # the new layers are in training mode, whatever the model is in
    if head is not None:
        head.requires_grad_(True)
    elif section.train_heads:
        train_head(model, field)
    if section.quantise_base == "nf4":
        for linear_layer in in_blocks.values():  # after peft, which reads a Conv1D's sizes off its weight
            quantise(linear_layer)


def check_lora(model: PreTrainedModel, section: LoRASection, field: str) -> None:
    """What `add_lora` would refuse, of a model that may be without weights (on the meta device).

    Raises:
        ConfigError: if an entry of target_modules fits no linear layer in the model's blocks, or they have none; if
            a causal model has no head to train; if bitsandbytes is needed and missing.
    """
    if section.rank == 0:
        return
    lora_targets(model, section, field)
    if section.train_heads and not hasattr(model, "score"):
        check_head(model, field)
    if section.quantise_base == "nf4":
        check_quantisation(field)


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(True for _ in _adapted_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """For the time of the block the model computes what it did before it had adapters, bit for bit, with the base as it
    is (packed, if it is packed); a score head that has been trained since stays as it is. May be nested; of a model
    without adapters it changes nothing.
    """
    heads = [module for module in model.modules() if isinstance(module, TrainedHead) and not module.off]
    layers = [layer for _, layer in _adapted_layers(model) if not layer.disable_adapters]
    # peft's switch sets requires_grad of the adapters too, to False and then to True whatever it was
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        for head in heads:
            head.off = True
        yield
    finally:
        for head in heads:
            head.off = False
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The matrix that a linear layer stands for: W + scaling * B A, or, where it has no adapter, its own weight.

    Laid out as the layer's own ([out, in]; GPT-2's Conv1D: [in, out]), on its device. The sum is taken in float32 in a
    new tensor and rounded once, to the weight's own type; a packed weight is a float32 one here. Adapters that are off
    at the moment count all the same.
    """
    return _merged(layer, "", None)


def merged_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of a plain model that computes what this one does: the names from before it had adapters.

    Adapted and packed matrices are new tensors on the CPU; all others are the given ones, tied ones still tied. Nothing
    of the model is written to.

    Args:
        state: the model's state dict with all its tensors whole, tied ones sharing memory, where the model has shards
            of them; None takes the model's own tensors.
    """
    merged: dict[str, Tensor] = {}
    for plain_name, name, owner, tensor in _plain_weights(model, "", "", frozenset()):
        if owner is not None:
            merged[plain_name] = _merged(owner, name, state).cpu()
        else:
            merged[plain_name] = tensor.detach() if state is None else state[name]
    return merged


@torch.no_grad()
def merged_part(module: nn.Module, prefix: str = "", apart: Collection[nn.Module] = ()) -> dict[str, Tensor]:
    """What `merged_state_dict` of the whole model has of one of its modules, as copies on the CPU.

    For models whose weights are whole one module after the other. The copies outlive the gathering; tied weights are
    copied once, and stay tied. Weights that are shards (DTensors) are gathered one by one: then every process has to
    call this for the same modules in the same order.

    Args:
        module: a block, say, or the model.
        prefix: its name in the model, without a dot at the end; "" is the model itself.
        apart: modules within it that are left out, for they have a turn of their own.
    """
    copies: dict[int, Tensor] = {}
    part: dict[str, Tensor] = {}
    for plain_name, _, owner, tensor in _plain_weights(module, prefix, prefix, frozenset(map(id, apart))):
        if owner is not None:
            part[plain_name] = merged_weight(owner).cpu()
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = _whole(tensor.detach()).to("cpu", copy=True)
        part[plain_name] = copies[id(tensor)]
    return part


def _merged(layer: Any, name: str, state: Mapping[str, Tensor] | None) -> Tensor:
    """`merged_weight` of a layer of that name, of its own tensors or of those in `state`."""
    base: Any = layer.get_base_layer() if isinstance(layer, AdaptedLinear) else layer

    def whole(own_name: str, tensor: Tensor) -> Tensor:
        return _whole(tensor.detach()) if state is None else state[f"{name}.{own_name}"]

    weight = whole("base_layer.weight" if base is not layer else "weight", base.weight)
    if is_quantised(base):
        weight = dequantised(base, torch.float32, weight)
    if base is layer:
        return weight
    a, b = (
        whole(f"{factor}.{NAME}.weight", getattr(layer, factor)[NAME].weight).float() for factor in ("lora_A", "lora_B")
    )
    with torch.autocast(weight.device.type, enabled=False):
        product = b @ a
    if layer.fan_in_fan_out:
        product = product.T
    return torch.add(weight.float(), product, alpha=layer.scaling[NAME]).to(weight.dtype)


def _plain_weights(
    module: nn.Module, plain_name: str, name: str, apart: frozenset[int]
) -> Iterator[tuple[str, str, nn.Module | None, Tensor]]:
    """Of all that the state dict of the plain model holds, in its order: the name there; the name in this model, of the
    tensor or, where a `merged_weight` stands in its place, of the layer; that layer, or None; the tensor.

    Not by state_dict(), for which a sharded model takes its gathered weights apart again. `apart`: ids of modules that
    are left out.
    """
    adapted = isinstance(module, AdaptedLinear)
    layer: nn.Module = cast(Any, module).get_base_layer() if adapted else module
    for own_name, tensor in _own_tensors(layer):
        if own_name == "weight" and (adapted or is_quantised(layer)):
            yield _joined(plain_name, own_name), name, module, tensor
        else:
            where = _joined(name, "base_layer") if adapted else name
            yield _joined(plain_name, own_name), _joined(where, own_name), None, tensor
    for child_name, child in layer._modules.items() if not adapted else ():
        if child is not None and id(child) not in apart:
            yield from _plain_weights(child, _joined(plain_name, child_name), _joined(name, child_name), apart)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers, but for those that models.heads and models.quantised add."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if not isinstance(module, TrainedHead) or not name.startswith("untrained_"):
            yield name, parameter
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set and not is_quantised(module):
            yield name, buffer


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process has a shard, or has all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_adapter(model: PreTrainedModel, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapters alone, in peft's format: `PeftModel.from_pretrained(base, directory)` loads them.

    A head that was trained is written with them, as peft does. Embeddings are not: where the vocabulary has grown since
    the base model was loaded, it has to grow there in the same way first.

    Args:
        state: as in `merged_state_dict`.
    """
    own = model.state_dict() if state is None else dict(state)
    tensors = get_peft_model_state_dict(model, state_dict=own, adapter_name=NAME, save_embedding_layers=False)
    config = copy(model.peft_config[NAME])
    head_name, head = "score", getattr(model, "score", None)
    for name, module in model.named_modules():
        if isinstance(module, TrainedHead):
            head_name, head = name, module
            config.modules_to_save = [_last_part(name)]
    if head is not None:
        tensors |= {f"{head_name}.{own_name}": own[f"{head_name}.{own_name}"] for own_name, _ in _own_tensors(head)}
    directory.mkdir(parents=True, exist_ok=True)
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
    """The layers to adapt, by full name."""
    in_blocks = _linear_layers_of_blocks(model)
    if not in_blocks:
        raise ConfigError(
            f"{field}.rank = {section.rank}: {type(model).__name__} has no linear layers in blocks to adapt; set 0"
        )
    wanted = section.target_modules
    known = ", ".join(sorted({_last_part(name) for name in in_blocks}))
    if wanted == [ALL_LINEAR]:
        return in_blocks
    for pattern in wanted:
        if not any(_fits(name, pattern) for name in in_blocks):
            raise ConfigError(
                f"{field}.target_modules = {wanted}: no linear layer in the blocks of {type(model).__name__} is named "
                f'{pattern!r}; choose from {known}, or set "{ALL_LINEAR}"'
            )
    return {name: module for name, module in in_blocks.items() if any(_fits(name, pattern) for pattern in wanted)}


def _linear_layers_of_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By full name. A transformer's blocks are what its base model holds in lists; what stands beside the lists
    (projections of embeddings, say) belongs to the vocabulary and is left alone.
    """
    return {
        name: module
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdecimal() for part in name.split("."))
    }


def _shortest_names(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> list[str]:
    """What peft calls target_modules: the last parts of the names, if they are those of no other layer."""
    short = {_last_part(name) for name in targets}
    meant = {name for name, _ in model.named_modules() if _last_part(name) in short}
    return sorted(short if meant == targets.keys() else targets)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _fits(name: str, pattern: str) -> bool:
    """Whether a shell pattern, or a plain name, is the whole name or an end of it that begins a part: `layers.*.q_proj`
    fits model.layers.0.self_attn.q_proj. A star takes in dots."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[first:]), pattern) for first in range(len(parts)))

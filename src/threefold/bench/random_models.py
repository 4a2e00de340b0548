"""Models of a shape with random weights, made where they will run, and what they will need of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.initialization import no_init_weights

from threefold.config.recipe import LoRASection
from threefold.errors import ConfigError
from threefold.models.adapters import add_lora
from threefold.models.loading import use_fast_kernels
from threefold.models.shapes import Shape, model_config

WEIGHT_STD = 0.02
FLOAT_BYTES = 4
OPTIMIZER_FLOATS = 3
"""Of each weight that learns: its gradient and Adam's two moments."""


def random_causal_lm(shape: Shape, device: torch.device, seed: int) -> PreTrainedModel:
    """A causal language model, float32, in eval mode."""
    return _random_model(AutoModelForCausalLM, shape, device, seed)


def random_scalar_model(shape: Shape, device: torch.device, seed: int) -> PreTrainedModel:
    """A model with one score per position, float32, in eval mode."""
    return _random_model(AutoModelForSequenceClassification, shape, device, seed, num_labels=1)


def _random_model(auto_class: Any, shape: Shape, device: torch.device, seed: int, **settings: int) -> PreTrainedModel:
    """Matrices normal with standard deviation 0.02, norms 1, biases 0; every number is drawn once, on the device."""
    config = model_config(shape)
    for name, value in settings.items():
        setattr(config, name, value)
    with no_init_weights(), device:
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, WEIGHT_STD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return use_fast_kernels(model)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that the models of step 3 take at least, by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory_need(actor: PreTrainedModel, critic: PreTrainedModel, activations: int) -> MemoryNeed:
    """What step 3 needs at least, in the update: float32 weights; gradients and Adam's moments of what learns; the
    reference, which is the actor itself under adapters; the reward model, of the critic's shape; activations.

    Args:
        actor, critic: as they will be trained; on the meta device, say.
        activations: of a forward pass, from `activation_bytes`.
    """
    weights = {name: _numel(model, False) for name, model in (("actor", actor), ("critic", critic))}
    learning = {name: _numel(model, True) for name, model in (("actor", actor), ("critic", critic))}
    has_adapters = learning["actor"] < weights["actor"]
    return MemoryNeed(
        {
            "weights of actor and critic": FLOAT_BYTES * sum(weights.values()),
            "their gradients and Adam moments": FLOAT_BYTES * OPTIMIZER_FLOATS * sum(learning.values()),
            "reference": 0 if has_adapters else FLOAT_BYTES * weights["actor"],
            "reward model": FLOAT_BYTES * weights["critic"],
            "activations": activations,
        }
    )


def activation_bytes(shape: Shape, tokens: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that a forward pass over `tokens` tokens keeps for its backward pass, at least.

    Of each block, in the type of the products: its input; the two normed ones and the sum between them; queries, keys,
    values and the output of attention; the hidden layer of the feed-forward network. With checkpointing the input
    alone. Kernels keep more: masks, statistics, float32 copies.
    """
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    numbers = shape.hidden_size if checkpointing else 4 * shape.hidden_size + attention + shape.ffn_size
    return tokens * shape.num_layers * numbers * dtype.itemsize


def _numel(model: PreTrainedModel, only_trained: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trained)


def plan_models(actor: Shape, critic: Shape, lora: LoRASection) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Actor, with its adapters, and critic without memory, to be counted."""
    meta = torch.device("meta")
    models = random_causal_lm(actor, meta, seed=0), random_scalar_model(critic, meta, seed=0)
    add_lora(models[0], lora, seed=0, field="ppo.actor_lora")
    return models


def check_memory(need: MemoryNeed, free: int, device: torch.device, what: str) -> None:
    """Refuse models that cannot fit, before anything is made.

    Args:
        free: bytes that the device has left.
        what: the models, for the message.

    Raises:
        ConfigError: that is less than they need at least.
    """
    if need.total > free:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in need.parts.items() if size)
        raise ConfigError(
            f"{what} need at least {gib(need.total)} ({parts}), and {device.type} has "
            f"{gib(free)} free: take smaller shapes, --lora-rank for a large actor, or fewer --micro-batch-tokens"
        )


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"

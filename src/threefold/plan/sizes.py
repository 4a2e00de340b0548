"""Sizes of a model's weights and of what its passes keep, from its config alone: it is built without memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from threefold.config.recipe import EmbeddedModelSection, LoRASection
from threefold.models.adapters import add_lora
from threefold.models.loading import load_config
from threefold.models.shapes import model_config, published_shape

EMBEDDED = "embedded"
FLOAT_BYTES = 4
"""Weights, gradients, optimizer state and moving average are float32 whatever the matrix products run in."""


NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a number that is packed in 4 bits: itself, and its part of the scale of 64 and of the scale of 256 scales
(Dettmers et al. 2023, "QLoRA", section 3)."""


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        block: number of the transformer block that it is part of; -1 outside the blocks.
        trained: whether it learns.
        bits: of one number.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    trained: bool
    bits: float = 8 * FLOAT_BYTES

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.ceil(self.numel * self.bits / 8)

    def share(self, parts: int) -> int:
        """Bytes that the fullest of `parts` ranks holds of it when it is cut along its first dimension, as
        `fully_shard` does: ranks get whole rows, the last ones fewer or none."""
        rows, *rest = self.shape
        return math.ceil(-(-rows // parts) * torch.Size(rest).numel() * self.bits / 8)


@dataclass(frozen=True)
class BlockSizes:
    """What decides how much one block keeps for its backward pass; widths in numbers per token.

    Attributes:
        hidden: D.
        query_key_value_output: queries, keys, values and the output of attention.
        feed_forward: what the feed-forward network keeps of its hidden layer.
        norm: what a norm keeps, its input included: 1 D for LayerNorm, 2 D for RMSNorm (written out in PyTorch).
        readers: linear layers that read a norm's output. Autocast gives each its own copy in the smaller type.
        num_heads: of the queries.
    """

    hidden: int
    query_key_value_output: int
    feed_forward: int
    norm: int
    readers: int
    num_heads: int


@dataclass(frozen=True)
class ModelSizes:
    """A model as memory sees it.

    Attributes:
        weights: every parameter, tied ones once.
        config: the transformers config.
        block: one of its blocks, which are taken to be alike.
        vocab_size: columns of the language-model head; 0 where there is none.
    """

    weights: tuple[Weight, ...]
    config: Any
    block: BlockSizes
    vocab_size: int

    @property
    def numel(self) -> int:
        """Numbers in all weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def trained(self) -> tuple[Weight, ...]:
        """The weights that learn."""
        return tuple(weight for weight in self.weights if weight.trained)

    @property
    def frozen(self) -> tuple[Weight, ...]:
        """The weights that do not."""
        return tuple(weight for weight in self.weights if not weight.trained)

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def source_config(source: str, embedded: EmbeddedModelSection) -> Any:
    """The config of a recipe's model: of the embedded one, of a directory, of a published shape that is built in, or,
    failing these, of the Hub.

    Raises:
        CheckpointError: it is none of them, or cannot be read.
    """
    if source == EMBEDDED:
        return OPTConfig(
            vocab_size=embedded.vocab_size,
            hidden_size=embedded.hidden_size,
            word_embed_proj_dim=embedded.hidden_size,
            num_hidden_layers=embedded.num_layers,
            num_attention_heads=embedded.num_heads,
            ffn_dim=embedded.ffn_dim,
            max_position_embeddings=embedded.max_positions,
        )
    shape = None if Path(source).exists() else published_shape(source)
    return load_config(source) if shape is None else model_config(shape)


def causal_sizes(config: Any, lora: LoRASection, field: str, trained: bool = True) -> ModelSizes:
    """Sizes of a language model, with the adapters of the section; not `trained`: all of it frozen."""
    return _sizes(AutoModelForCausalLM.from_config, config, lora, field, trained)


def scalar_sizes(config: Any, lora: LoRASection, field: str, trained: bool = True) -> ModelSizes:
    """The same of a model with one score per position (reward model, critic)."""

    def build(config: Any) -> PreTrainedModel:
        config.num_labels = 1
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        return AutoModelForSequenceClassification.from_config(config)

    return _sizes(build, config, lora, field, trained)


def _sizes(
    build: Callable[[Any], PreTrainedModel], config: Any, lora: LoRASection, field: str, trained: bool
) -> ModelSizes:
    with torch.device("meta"):
        model = build(config)
        model.tie_weights()
        if trained:
            add_lora(model, lora.model_copy(update={"quantise_base": "none"}), 0, field)
    sizes = model_sizes(model if trained else model.requires_grad_(False))
    if lora.quantise_base == "none":
        return sizes
    packed = [replace(w, bits=NF4_BITS) if w.name.endswith(".base_layer.weight") else w for w in sizes.weights]
    return replace(sizes, weights=tuple(packed))


def model_sizes(model: PreTrainedModel) -> ModelSizes:
    """Count a model that was built already; it may live on the meta device."""
    block = _blocks(model)[0]
    head = model.get_output_embeddings()
    return ModelSizes(
        tuple(
            Weight(name, tuple(parameter.shape), _block_number(name), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ),
        model.config,
        _block_sizes(model.config, block),
        0 if head is None else head.weight.shape[0],
    )


def _block_number(name: str) -> int:
    """A block is an element of a list of the base model: the first number in a parameter's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def _blocks(model: PreTrainedModel) -> Sequence[nn.Module]:
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList):
            return list(module)
    raise AssertionError(f"{type(model).__name__} has no list of blocks")


GELU_KEEPS = {"gelu_new": 5, "gelu_fast": 5, "relu": 1}
"""Times the hidden layer that the activation and what follows it keep: F.gelu its input and its output; the tanh forms
of transformers, written out, five intermediate results; relu's output is what the next matrix reads."""


def _block_sizes(config: Any, block: nn.Module) -> BlockSizes:
    linears = [m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lora_" not in name]
    inputs = [m.in_features if isinstance(m, nn.Linear) else m.nx for m in linears]
    hidden, ffn = int(config.hidden_size), inputs[-1]
    rms = any("RMSNorm" in type(module).__name__ for module in block.modules())
    gated = any("gate" in name for name, _ in block.named_modules())
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    return BlockSizes(
        hidden=hidden,
        query_key_value_output=2 * (heads + kv_heads) * head_dim,
        # gate's input to silu, silu's output, up, and their product
        feed_forward=ffn * (4 if gated else GELU_KEEPS.get(str(activation), 2)),
        norm=hidden * (2 if rms else 1),
        readers=len(linears) - 2,
        num_heads=heads,
    )

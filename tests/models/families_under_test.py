"""Tiny models with random weights, one per architecture family, that several tests share.

Their weights are drawn wide enough for distributions that are neither flat nor settled, and no bias or norm is left at
0 or 1, where a forgotten one would not be seen. Dropout is as high as a family has it: nothing may depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CodeGenConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 40
CONTEXT = 64
PAD, BOS, EOS, SECOND_STOP = 1, 2, 3, 4

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "dropout": 0.3,
    "attention_dropout": 0.3,
    "layerdrop": 0.3,
}
GATED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "attention_dropout": 0.3,
}

UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
"""For some: a random model with tied embeddings mostly repeats its last token, and greedy answers are all alike."""

CONFIGS: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTConfig(**COMMON, **OPT, word_embed_proj_dim=32),
    # As facebook/opt-350m: embeddings narrower than the model, norms after the blocks.
    "opt-350m": lambda: OPTConfig(**COMMON, **OPT, word_embed_proj_dim=16, do_layer_norm_before=False, **UNTIED),
    "gpt2": lambda: GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3
    ),
    "llama": lambda: LlamaConfig(**COMMON, **GATED),  # grouped-query attention: 4 heads, 2 key-value heads
    "gpt-neox": lambda: GPTNeoXConfig(
        **COMMON,
        **{name: value for name, value in GATED.items() if name != "num_key_value_heads"},
        hidden_dropout=0.3,
    ),
    "bloom": lambda: BloomConfig(
        **COMMON, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3, **UNTIED
    ),
    "mistral": lambda: MistralConfig(**COMMON, **GATED, sliding_window=6),  # shorter than the prompts
    "qwen2": lambda: Qwen2Config(**COMMON, **GATED),
    "falcon": lambda: FalconConfig(
        **COMMON,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.3,
        attention_dropout=0.3,
        max_position_embeddings=CONTEXT,
    ),
    # Two whose logits are not the head's output: capped by tanh, scaled by a constant.
    "gemma2": lambda: Gemma2Config(
        **COMMON, **GATED, head_dim=8, sliding_window=6, final_logit_softcapping=2.0, **UNTIED
    ),
    "cohere": lambda: CohereConfig(**COMMON, **GATED, logit_scale=0.25),
}

GPT_J: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "rotary_dim": 4,  # of 8 dimensions of a head
    "resid_pdrop": 0.3,
    "embd_pdrop": 0.3,
    "attn_pdrop": 0.3,
}
NEOX: dict[str, Any] = {name: value for name, value in GATED.items() if name != "num_key_value_heads"}


def scaled_rotary(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """Fields of a config whose positions are scaled, of a model that was trained with 16."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0, "factor": 4.0, **parameters}}


LLAMA3_SCALING = scaled_rotary("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)

VARIANTS: dict[str, Callable[[], Any]] = {
    "gpt-neo": lambda: GPTNeoConfig(
        **COMMON,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=6,
        max_position_embeddings=CONTEXT,
        resid_dropout=0.3,
        embed_dropout=0.3,
        attention_dropout=0.3,
    ),
    "gpt-j": lambda: GPTJConfig(**COMMON, **GPT_J),
    "codegen": lambda: CodeGenConfig(**COMMON, **{**GPT_J, "n_head": 8, "n_embd": 64}),
    "qwen3": lambda: Qwen3Config(**COMMON, **GATED, head_dim=12, attention_bias=True),
    "opt-no-final-norm": lambda: OPTConfig(
        **COMMON,
        **OPT,
        word_embed_proj_dim=32,
        _remove_final_layer_norm=True,
        enable_bias=False,
        activation_function="gelu",
    ),
    "gpt2-unscaled": lambda: GPT2Config(
        **COMMON,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        scale_attn_weights=False,
        activation_function="relu",
    ),
    "gpt-neox-sequential": lambda: GPTNeoXConfig(**COMMON, **NEOX, use_parallel_residual=False, attention_bias=False),
    "gpt-neox-whole-rotary": lambda: GPTNeoXConfig(**COMMON, **NEOX, rotary_pct=1.0),
    "bloom-6-heads": lambda: BloomConfig(**COMMON, hidden_size=48, n_layer=2, n_head=6, **UNTIED),
    "llama-biases": lambda: LlamaConfig(
        **COMMON, **{**GATED, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, head_dim=10
    ),
    "llama-llama3": lambda: LlamaConfig(**COMMON, **GATED, **LLAMA3_SCALING),
    "llama-linear": lambda: LlamaConfig(**COMMON, **GATED, **scaled_rotary("linear")),
    "llama-yarn": lambda: LlamaConfig(**COMMON, **GATED, **scaled_rotary("yarn", original_max_position_embeddings=16)),
    "mistral-without-window": lambda: MistralConfig(**COMMON, **GATED, sliding_window=None),
    "qwen2-window": lambda: Qwen2Config(  # on the last layer only
        **COMMON, **GATED, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3-window": lambda: Qwen3Config(
        **COMMON, **GATED, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
}
"""More families, and forms of those above, for the tests of what computes by its own code."""

NOT_PLAIN = {"gemma2", "cohere"}
"""Families whose logits are more than the output head applied to the hidden states."""


def randomise(model: PreTrainedModel, seed: int, spread: float = 0.3) -> PreTrainedModel:
    """Draw every weight anew, biases and norms too; float32, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # a norm's
            parameter.copy_(start + torch.randn(parameter.shape, generator=generator) * spread)
    return model.float().eval()


def tiny_causal_lm(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal model of the family; `changes` are config fields."""
    config = {**CONFIGS, **VARIANTS}[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return randomise(AutoModelForCausalLM.from_config(config), seed)


def tiny_scalar_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family with one score per position."""
    config = CONFIGS[family]()
    config.num_labels = 1
    return randomise(AutoModelForSequenceClassification.from_config(config), seed)


def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerBase:
    """A tokenizer of `vocab_size` one-word tokens, its special ids as in the configs above."""
    words = ["<unk>", "<pad>", "<s>", "</s>", "<end>"] + [f"w{i}" for i in range(5, vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def ragged_ids(seed: int, lengths: list[int], vocab_size: int = VOCAB) -> list[list[int]]:
    """Random token ids, 0 (which left padding uses) and the special ids among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def right_padded(sequences: list[list[int]], pad_id: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] and attention mask [B, T], written out by hand."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([sequence + [pad_id] * (width - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[True] * len(sequence) + [False] * (width - len(sequence)) for sequence in sequences])
    return ids, mask

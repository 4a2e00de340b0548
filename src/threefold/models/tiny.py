"""The small OPT model of the embedded default, initialised on the spot."""

from __future__ import annotations

import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from threefold.config.recipe import EmbeddedModelSection
from threefold.models.loading import use_fast_kernels


def make_embedded_model(
    settings: EmbeddedModelSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A randomly initialised OPTForCausalLM for `tokenizer`, float32, without dropout; the same seed gives the same
    weights."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        word_embed_proj_dim=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        ffn_dim=settings.ffn_dim,
        max_position_embeddings=settings.max_positions,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=settings.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
    return use_fast_kernels(model)

"""The small OPT model of the embedded default, initialised on the spot."""

from __future__ import annotations

import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from threefold.config.recipe import EmbeddedModelSection
from threefold.models.loading import use_fast_kernels


def embedded_config(settings: EmbeddedModelSection, vocab_size: int = 0, **special_ids: int | None) -> OPTConfig:
    """The config of the embedded model; a vocabulary of 0 is as large as the recipe allows."""
    return OPTConfig(
        vocab_size=vocab_size or settings.vocab_size,
        hidden_size=settings.hidden_size,
        word_embed_proj_dim=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        ffn_dim=settings.ffn_dim,
        max_position_embeddings=settings.max_positions,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=settings.init_std,
        **special_ids,
    )


def make_embedded_model(
    settings: EmbeddedModelSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A randomly initialised OPTForCausalLM for `tokenizer`, float32, without dropout; the same seed gives the same
    weights."""
    config = embedded_config(
        settings,
        len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = OPTForCausalLM(config)
    return use_fast_kernels(model)

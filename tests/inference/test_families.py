"""The table of families: what it covers, and that it never guesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from tests.models.families_under_test import COMMON, CONFIGS, GATED, VARIANTS, scaled_rotary, tiny_causal_lm
from threefold.inference.decoder import make_decoder, why_not_covered
from threefold.inference.families import FAMILIES, HARMLESS_FIELDS, alibi_slopes

NOT_IN_THE_TABLE = {"falcon", "gemma2", "cohere"}


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_the_families_of_the_table_are_covered_and_no_other(family: str) -> None:
    model = tiny_causal_lm(family)
    reason = why_not_covered(model)
    assert (make_decoder(model) is None) == (reason is not None) == (family in NOT_IN_THE_TABLE)
    if reason is not None:
        assert reason == f"model class {type(model).__name__}"


def test_every_family_of_the_table_is_under_test() -> None:
    tested = {type(tiny_causal_lm(family)).__name__ for family in [*CONFIGS, *VARIANTS]}
    assert {family.model_class for family in FAMILIES} <= tested


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"activation_function": "mish"}, "activation 'mish'"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual_connection_post_layernorm = True"),
        ("bloom", {"slow_but_exact": True}, "slow_but_exact = True"),
        ("gpt-j", {"rotary_dim": 0}, "rotary_dim = 0"),
        ("llama", scaled_rotary("dynamic"), "rope_type = 'dynamic'"),
        (
            "llama",
            scaled_rotary("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
            | {"original_max_position_embeddings": 16},
            "rope_type = 'longrope'",
        ),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types ['chunked_attention']"),
    ],
)  # fmt: skip
def test_what_the_table_does_not_cover_is_named(family: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny_causal_lm(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert make_decoder(model) is None
    assert reason in (why_not_covered(model) or "")


def test_a_class_of_somebody_else_is_not_covered_whatever_its_name() -> None:
    class Mine(LlamaForCausalLM):
        pass

    Mine.__name__ = "LlamaForCausalLM"
    assert why_not_covered(Mine(LlamaConfig(**COMMON, **GATED))) == "model class LlamaForCausalLM"


class LaterConfig(LlamaConfig):
    """A config as a later version of transformers might declare it."""

    attention_softcap: float | None = None


def test_a_field_that_the_table_does_not_know_counts_only_while_it_is_on() -> None:
    model = LlamaForCausalLM(LaterConfig(**COMMON, **GATED))
    assert why_not_covered(model) is None
    model.config.attention_softcap = 30.0
    assert why_not_covered(model) == "config field attention_softcap = 30.0"


def test_quantised_or_foreign_layers_are_not_covered() -> None:
    model = tiny_causal_lm("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    assert why_not_covered(model) == "mlp.up_proj is a Identity"
    model = tiny_causal_lm("llama")
    quantised = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(quantised, requires_grad=False)
    assert why_not_covered(model) == "self_attn.o_proj has a weight of torch.int8"


def test_the_table_claims_no_field_that_no_config_has() -> None:
    """A misspelt name would cover nothing, and a field that has gone would stay behind."""
    configs = [config() for config in [*CONFIGS.values(), *VARIANTS.values()]]
    declared = {name for config in configs for name in type(config).__dataclass_fields__}
    claimed = {name for family in FAMILIES for name in family.fields | family.required.keys()}
    assert claimed - declared == set()
    assert not claimed & HARMLESS_FIELDS


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 25, 71, 112])
def test_alibi_slopes_are_those_of_transformers(num_heads: int) -> None:
    # at position 1 the bias is the slope itself
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), num_heads, torch.float32)[:, 0, 1]
    assert torch.equal(alibi_slopes(num_heads), theirs)


def test_the_published_slopes_of_eight_heads() -> None:
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-k for k in range(1, 9)]))

"""The model families that the decoder knows, as a table, and what it takes of a model's config.

One transformer serves all of them: token embedding, blocks of attention and feed-forward network with residuals, output
head. A family says where its weights are and which of a few forms each part has. What the table does not say, the
decoder does not guess: a model of another class, a config field that the table does not know and that is switched on,
or a value that it does not know makes the model uncovered, and it decodes through its own forward instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from threefold.models.loading import context_length


class NotCoveredError(Exception):
    """The decoder cannot serve this model; the message names the field or part, for the note that says so."""


class Residual(Enum):
    """How a block adds attention A and feed-forward network M to its input x, with norms N1, N2."""

    BEFORE = "x += A(N1(x)); x += M(N2(x))"
    AFTER = "x = N1(x + A(x)); x = N2(x + M(x))"
    PARALLEL = "x += A(N1(x)) + M(N2(x))"
    PARALLEL_ONE_NORM = "x += A(N1(x)) + M(N1(x))"


class Positions(Enum):
    """Where positions enter."""

    LEARNED = "a table added to the embeddings"
    ROTARY_HALVES = "rotation of pairs (i, i + d/2)"
    ROTARY_NEIGHBOURS = "rotation of pairs (2i, 2i + 1)"
    ALIBI = "a bias of the attention scores, linear in the key's position"


class Fused(Enum):
    """Order of the output features of a query-key-value projection."""

    SEPARATE = "three projections"
    WHOLE = "q of all heads, k of all heads, v of all heads"
    BY_HEAD = "q, k, v of the first head, then of the second, ..."
    CODEGEN = "four blocks, each q, v, k of a quarter of the heads"


CODEGEN_BLOCKS = 4

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_fast": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}
"""By the names that configs use."""

ROTARY_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Scalings whose frequencies do not depend on the sequence."""


def _fields(*names: str) -> frozenset[str]:
    return frozenset(field_name for text in names for field_name in text.split())


HARMLESS_FIELDS = _fields(
    "vocab_size use_cache bos_token_id eos_token_id pad_token_id tie_word_embeddings initializer_range init_std",
    "dropout attention_dropout hidden_dropout activation_dropout classifier_dropout resid_dropout embed_dropout",
    "resid_pdrop embd_pdrop attn_pdrop layerdrop is_decoder",
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout",
)
"""Config fields that change no logit in eval mode, whatever their value."""

Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class Family:
    """Where the weights of a model class are, and which forms its parts have.

    Attributes:
        trunk: path from the model to the module that holds embeddings, blocks and final norm.
        fields: config fields that the table takes into account, or that only repeat the shapes of the weights.
        required: config fields that must have one of these values.
        query_key_value: names within a block, one (fused) or three.
        mlp: names within a block: (up, down) or (gate, up, down).
        sine_table: path within a block to a buffer [positions, d] of sines and cosines; None: the trunk's rotary_emb.
        residual, windows, query_scale: from the config; defaults below.
    """

    model_class: str
    trunk: str
    fields: frozenset[str]
    blocks: str
    token_embedding: str
    final_norm: str
    attention_norm: str
    query_key_value: tuple[str, ...]
    attention_output: str
    mlp: tuple[str, ...]
    positions: Positions
    activation_field: str | None
    mlp_norm: str | None = None
    fused: Fused = Fused.SEPARATE
    position_embedding: str | None = None
    position_offset: int = 0
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    query_key_norms: tuple[str, str] | None = None
    sine_table: str | None = None
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    residual: Callable[[Any], Residual] = lambda config: Residual.BEFORE
    windows: Callable[[Any], Windows] = lambda config: (None,) * config.num_hidden_layers
    query_scale: Callable[[Any, int], float] = lambda config, head_dim: head_dim**-0.5


def _windows_by_layer_type(config: Any) -> Windows:
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = set(config.layer_types) - known.keys()
    if unknown:
        raise NotCoveredError(f"layer_types {sorted(unknown)}")
    return tuple(known[kind] for kind in config.layer_types)


def _windows_of_gpt_neo(config: Any) -> Windows:
    return tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)


GPT_SHAPE = "n_positions n_ctx n_embd n_layer n_head n_inner activation_function layer_norm_epsilon"
LLAMA_SHAPE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings rms_norm_eps rope_parameters"
)

_GPT_J: dict[str, Any] = {
    "trunk": "transformer",
    "blocks": "h",
    "token_embedding": "wte",
    "final_norm": "ln_f",
    "attention_norm": "ln_1",
    "mlp": ("mlp.fc_in", "mlp.fc_out"),
    "attention_output": "attn.out_proj",
    "positions": Positions.ROTARY_NEIGHBOURS,
    "sine_table": "attn.embed_positions",
    "activation_field": "activation_function",
    "residual": lambda config: Residual.PARALLEL_ONE_NORM,
    "fields": _fields(GPT_SHAPE, "rotary_dim"),
}
_LLAMA: dict[str, Any] = {
    "trunk": "model",
    "blocks": "layers",
    "token_embedding": "embed_tokens",
    "final_norm": "norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": "self_attn.o_proj",
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "positions": Positions.ROTARY_HALVES,
    "activation_field": "hidden_act",
}
QWEN_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"

FAMILIES: tuple[Family, ...] = (
    Family(
        model_class="OPTForCausalLM",
        trunk="model.decoder",
        blocks="layers",
        token_embedding="embed_tokens",
        position_embedding="embed_positions",
        position_offset=2,
        project_in="project_in",
        project_out="project_out",
        final_norm="final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.out_proj",
        mlp=("fc1", "fc2"),
        positions=Positions.LEARNED,
        activation_field="activation_function",
        residual=lambda config: Residual.BEFORE if config.do_layer_norm_before else Residual.AFTER,
        fields=_fields(
            "hidden_size num_hidden_layers ffn_dim max_position_embeddings do_layer_norm_before",
            "_remove_final_layer_norm word_embed_proj_dim num_attention_heads activation_function enable_bias",
            "layer_norm_elementwise_affine",
        ),
    ),
    Family(
        model_class="GPT2LMHeadModel",
        trunk="transformer",
        blocks="h",
        token_embedding="wte",
        position_embedding="wpe",
        final_norm="ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        query_key_value=("attn.c_attn",),
        fused=Fused.WHOLE,
        attention_output="attn.c_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        positions=Positions.LEARNED,
        activation_field="activation_function",
        query_scale=lambda config, head_dim: head_dim**-0.5 if config.scale_attn_weights else 1.0,
        fields=_fields(GPT_SHAPE, "scale_attn_weights"),
    ),
    Family(
        model_class="GPTNeoForCausalLM",
        trunk="transformer",
        blocks="h",
        token_embedding="wte",
        position_embedding="wpe",
        final_norm="ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        query_key_value=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        attention_output="attn.attention.out_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        positions=Positions.LEARNED,
        activation_field="activation_function",
        windows=_windows_of_gpt_neo,
        query_scale=lambda config, head_dim: 1.0,
        fields=_fields(
            "max_position_embeddings hidden_size num_layers attention_types num_heads intermediate_size window_size",
            "activation_function layer_norm_epsilon",
        ),
    ),
    Family(
        model_class="GPTJForCausalLM",
        query_key_value=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        **_GPT_J,
    ),
    Family(
        model_class="CodeGenForCausalLM",
        query_key_value=("attn.qkv_proj",),
        fused=Fused.CODEGEN,
        **_GPT_J,
    ),
    Family(
        model_class="GPTNeoXForCausalLM",
        trunk="gpt_neox",
        blocks="layers",
        token_embedding="embed_in",
        final_norm="final_layer_norm",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        query_key_value=("attention.query_key_value",),
        fused=Fused.BY_HEAD,
        attention_output="attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        positions=Positions.ROTARY_HALVES,
        activation_field="hidden_act",
        residual=lambda config: Residual.PARALLEL if config.use_parallel_residual else Residual.BEFORE,
        fields=_fields(
            "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act max_position_embeddings",
            "layer_norm_eps use_parallel_residual rope_parameters attention_bias",
        ),
    ),
    Family(
        model_class="BloomForCausalLM",
        trunk="transformer",
        blocks="h",
        token_embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        final_norm="ln_f",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        query_key_value=("self_attention.query_key_value",),
        fused=Fused.BY_HEAD,
        attention_output="self_attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        positions=Positions.ALIBI,
        activation_field=None,
        fields=_fields("hidden_size n_layer n_head layer_norm_epsilon pretraining_tp"),
        required={"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)},
    ),
    Family(
        model_class="LlamaForCausalLM",
        **_LLAMA,
        fields=_fields(LLAMA_SHAPE, "pretraining_tp attention_bias mlp_bias"),
    ),
    Family(
        model_class="MistralForCausalLM",
        **_LLAMA,
        windows=lambda config: (config.sliding_window,) * config.num_hidden_layers,
        fields=_fields(LLAMA_SHAPE, "sliding_window"),
    ),
    Family(
        model_class="Qwen2ForCausalLM",
        **_LLAMA,
        windows=_windows_by_layer_type,
        fields=_fields(LLAMA_SHAPE, QWEN_WINDOWS),
    ),
    Family(
        model_class="Qwen3ForCausalLM",
        **_LLAMA,
        windows=_windows_by_layer_type,
        query_key_norms=("self_attn.q_norm", "self_attn.k_norm"),
        fields=_fields(LLAMA_SHAPE, QWEN_WINDOWS, "attention_bias"),
    ),
)


@dataclass(frozen=True)
class Architecture:
    """What the decoder needs to know of one model beside its weights.

    Attributes:
        windows: per layer, the number of last positions that attention sees, itself included; None for all.
        query_scale: factor of query . key.
        context_length: positions that the model has, None without a limit.
        group_rank, group_size: which of how many equal parts of the heads this is. (The widths of all parts make the
            model's; `num_heads` and `num_kv_heads` are those of the part.)
    """

    family: Family
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    residual: Residual
    windows: Windows
    query_scale: float
    activation: Callable[[Tensor], Tensor]
    context_length: int | None
    group_rank: int = 0
    group_size: int = 1

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return len(self.family.mlp) == 3

    @property
    def slopes(self) -> Tensor:
        """`alibi_slopes` of the heads, [Hq]."""
        slopes = alibi_slopes(self.num_heads * self.group_size)
        return slopes[self.group_rank * self.num_heads :][: self.num_heads]

    @property
    def head_counts(self) -> tuple[int, int, int]:
        """Heads of queries, keys and values."""
        return self.num_heads, self.num_kv_heads, self.num_kv_heads


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Look the model up in the table.

    Raises:
        NotCoveredError: the class is not in the table, or its config uses what the table does not cover.
    """
    config = model.config
    family = _family_of(model)
    _check_fields(family, config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        residual=family.residual(config),
        windows=family.windows(config),
        query_scale=family.query_scale(config, head_dim),
        activation=_activation(family, config),
        context_length=context_length(model),
    )


def _family_of(model: PreTrainedModel) -> Family:
    model_type = type(model)
    if isinstance(model, FSDPModule):  # a class that `fully_shard` has made of the model's own
        model_type = model_type.__bases__[1]
    if model_type.__module__.startswith("transformers.models."):
        for family in FAMILIES:
            if family.model_class == model_type.__name__:
                return family
    raise NotCoveredError(f"model class {model_type.__name__}")


def _check_fields(family: Family, config: Any) -> None:
    declared = type(config).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    for name in sorted(declared - HARMLESS_FIELDS - family.fields - family.required.keys()):
        # A field that is not known may do no harm while it is off.
        if getattr(config, name) not in (None, False):
            raise NotCoveredError(f"config field {name} = {getattr(config, name)!r}")
    for name, allowed in family.required.items():
        if getattr(config, name) not in allowed:
            raise NotCoveredError(f"config field {name} = {getattr(config, name)!r}")
    rotary = getattr(config, "rope_parameters", None)
    if "rope_parameters" in family.fields and (rotary or {}).get("rope_type") not in ROTARY_TYPES:
        raise NotCoveredError(f"rope_type = {(rotary or {}).get('rope_type')!r}")
    if "rotary_dim" in family.fields and not config.rotary_dim:
        raise NotCoveredError(f"config field rotary_dim = {config.rotary_dim!r}")


def _activation(family: Family, config: Any) -> Callable[[Tensor], Tensor]:
    name = "gelu_new" if family.activation_field is None else getattr(config, family.activation_field)
    if name not in ACTIVATIONS:
        raise NotCoveredError(f"activation {name!r}")
    return ACTIVATIONS[name]


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head's bias, [H] float32 (Press et al. 2022, section 3).

    A geometric sequence that starts at 2^(-8/n) with that ratio, n the largest power of two up to H; the heads beyond n
    take every other term of the sequence for 2 n. Powers of a rounded base, as transformers computes them.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = torch.tensor(2.0 ** (-8.0 / power)) ** torch.arange(1, power + 1)
    more = torch.tensor(2.0 ** (-4.0 / power)) ** torch.arange(1, 2 * (num_heads - power) + 1, 2)
    return torch.cat([slopes, more])

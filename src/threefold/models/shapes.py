"""Shapes of models: the published ones by name, any other by its sizes. Nothing is downloaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from threefold.errors import ConfigError

Family = Literal["opt", "llama", "qwen2", "qwen3"]

_LLAMA_3_2_ROPE: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer.

    Attributes:
        name: as the user gave it, or the published name.
        hidden_size: model width D.
        head_dim: width of one attention head.
        ffn_size: width of the feed-forward layer.
        max_positions: longest sequence, tokens.
        tied: the output head is the input embedding.
        embedding_size: OPT: width of the embeddings where it is not hidden_size (350m); 0 means hidden_size.
        post_norm: OPT: layer norms after the sub-layers (350m).
        rope: Llama and Qwen: rotary positions, as transformers' rope_parameters.
    """

    name: str
    family: Family
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int = 2048
    tied: bool = True
    embedding_size: int = 0
    post_norm: bool = False
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    def with_vocabulary(self, vocab_size: int) -> Shape:
        """The same model for a tokenizer of another size."""
        return replace(self, vocab_size=vocab_size)


def model_config(shape: Shape) -> PreTrainedConfig:
    """The transformers config of a model of this shape, without dropout."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_positions,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if shape.family == "opt":
        return OPTConfig(
            **common,
            word_embed_proj_dim=shape.embedding_size or shape.hidden_size,
            ffn_dim=shape.ffn_size,
            do_layer_norm_before=not shape.post_norm,
            dropout=0.0,
        )
    common |= {
        "intermediate_size": shape.ffn_size,
        "num_key_value_heads": shape.num_kv_heads,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": dict(shape.rope),
    }
    if shape.family == "qwen2":  # its heads are always hidden_size / num_heads wide
        return Qwen2Config(**common)
    config_class = LlamaConfig if shape.family == "llama" else Qwen3Config
    return config_class(**common, head_dim=shape.head_dim)


def _opt(size: str, hidden: int, layers: int, heads: int, embedding: int = 0, post_norm: bool = False) -> Shape:
    """One of Zhang et al. 2022, "OPT", table 1."""
    return Shape(
        f"facebook/opt-{size}",
        "opt",
        hidden,
        layers,
        heads,
        heads,
        hidden // heads,
        ffn_size=4 * hidden,
        vocab_size=50272,
        embedding_size=embedding,
        post_norm=post_norm,
    )


def _llama(
    name: str,
    sizes: tuple[int, int, int, int, int],
    vocab_size: int,
    max_positions: int,
    rope: Mapping[str, Any],
    tied: bool = False,
) -> Shape:
    """One of Touvron et al. 2023, "Llama 2", or Grattafiori et al. 2024, "The Llama 3 Herd of Models"; `sizes` are
    hidden size, layers, heads, key-value heads, feed-forward width."""
    hidden, layers, heads, kv_heads, ffn = sizes
    name = f"meta-llama/{name}"
    head_dim = hidden // heads
    return Shape(
        name, "llama", hidden, layers, heads, kv_heads, head_dim, ffn, vocab_size, max_positions, tied, rope=rope
    )


def _qwen(
    name: str, family: Family, sizes: tuple[int, int, int, int, int], vocab_size: int, tied: bool, head_dim: int = 0
) -> Shape:
    """One of Yang et al. 2024, "Qwen2.5 Technical Report", or Yang et al. 2025, "Qwen3 Technical Report"; `sizes` as
    for `_llama`."""
    hidden, layers, heads, kv_heads, ffn = sizes
    head_dim = head_dim or hidden // heads
    positions = 40960 if family == "qwen3" else 32768
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    name = f"Qwen/{name}"
    return Shape(name, family, hidden, layers, heads, kv_heads, head_dim, ffn, vocab_size, positions, tied, rope=rope)


def _built_in() -> tuple[Shape, ...]:
    llama_2 = {"rope_type": "default", "rope_theta": 10000.0}
    llama_3 = {"rope_type": "default", "rope_theta": 500000.0}
    return (
        _opt("125m", 768, 12, 12),
        _opt("350m", 1024, 24, 16, embedding=512, post_norm=True),
        _opt("1.3b", 2048, 24, 32),
        _opt("2.7b", 2560, 32, 32),
        _opt("6.7b", 4096, 32, 32),
        _opt("13b", 5120, 40, 40),
        _opt("30b", 7168, 48, 56),
        _opt("66b", 9216, 64, 72),
        _opt("175b", 12288, 96, 96),
        _llama("Llama-2-7b", (4096, 32, 32, 32, 11008), 32000, 4096, llama_2),
        _llama("Llama-2-13b", (5120, 40, 40, 40, 13824), 32000, 4096, llama_2),
        _llama("Llama-2-70b", (8192, 80, 64, 8, 28672), 32000, 4096, llama_2),
        _llama("Llama-3-8B", (4096, 32, 32, 8, 14336), 128256, 8192, llama_3),
        _llama("Llama-3-70B", (8192, 80, 64, 8, 28672), 128256, 8192, llama_3),
        _llama("Llama-3.2-1B", (2048, 16, 32, 8, 8192), 128256, 131072, _LLAMA_3_2_ROPE, tied=True),
        _llama("Llama-3.2-3B", (3072, 28, 24, 8, 8192), 128256, 131072, _LLAMA_3_2_ROPE, tied=True),
        _qwen("Qwen2.5-0.5B", "qwen2", (896, 24, 14, 2, 4864), 151936, tied=True),
        _qwen("Qwen2.5-1.5B", "qwen2", (1536, 28, 12, 2, 8960), 151936, tied=True),
        _qwen("Qwen2.5-3B", "qwen2", (2048, 36, 16, 2, 11008), 151936, tied=True),
        _qwen("Qwen2.5-7B", "qwen2", (3584, 28, 28, 4, 18944), 152064, tied=False),
        _qwen("Qwen2.5-14B", "qwen2", (5120, 48, 40, 8, 13824), 152064, tied=False),
        _qwen("Qwen2.5-32B", "qwen2", (5120, 64, 40, 8, 27648), 152064, tied=False),
        _qwen("Qwen2.5-72B", "qwen2", (8192, 80, 64, 8, 29568), 152064, tied=False),
        _qwen("Qwen3-0.6B", "qwen3", (1024, 28, 16, 8, 3072), 151936, tied=True, head_dim=128),
        _qwen("Qwen3-1.7B", "qwen3", (2048, 28, 16, 8, 6144), 151936, tied=True, head_dim=128),
        _qwen("Qwen3-4B", "qwen3", (2560, 36, 32, 8, 9728), 151936, tied=True, head_dim=128),
        _qwen("Qwen3-8B", "qwen3", (4096, 36, 32, 8, 12288), 151936, tied=False, head_dim=128),
        _qwen("Qwen3-14B", "qwen3", (5120, 40, 40, 8, 17408), 151936, tied=False, head_dim=128),
        _qwen("Qwen3-32B", "qwen3", (5120, 64, 64, 8, 25600), 151936, tied=False, head_dim=128),
    )


BUILT_IN: Mapping[str, Shape] = MappingProxyType({shape.name.lower(): shape for shape in _built_in()})
"""The published shapes, by their name in small letters."""

_SHORT = MappingProxyType({name.partition("/")[2]: shape for name, shape in BUILT_IN.items()})


def published_shape(name: str) -> Shape | None:
    """The built-in shape of that name, with or without its owner; None if there is none."""
    name = re.sub(r"-hf$", "", name.strip().lower()).replace("meta-llama-3", "llama-3")
    return BUILT_IN.get(name) or _SHORT.get(name)


def find_shape(text: str, flag: str) -> Shape:
    """The shape that a user means: a published name with or without its owner (facebook/opt-1.3b, opt-1.3b,
    Llama-2-7b-hf), or `FAMILY:hidden=512,layers=8,heads=8,ffn=2048,vocab=8000` with the family's further sizes.

    Args:
        flag: where the text came from, for the message.

    Raises:
        ConfigError: no such name (with the nearest one), or sizes that make no model.
    """
    if ":" in text:
        return _custom_shape(text, flag)
    shape = published_shape(text)
    if shape is None:
        name = text.strip().lower()
        nearest = difflib.get_close_matches(name.rpartition("/")[2], _SHORT, n=1)
        hint = f"did you mean {_SHORT[nearest[0]].name}?" if nearest else f"built in are {', '.join(_SHORT)};"
        sizes = "or give sizes: opt:hidden=512,layers=8,heads=8,ffn=2048,vocab=8000"
        raise ConfigError(f"{flag} {text}: no built-in shape has that name: {hint} {sizes}")
    return shape


_REQUIRED = ("hidden", "layers", "heads", "ffn", "vocab")
_FURTHER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "opt": ("positions", "embedding", "post_norm"),
        "llama": ("positions", "kv_heads", "head_dim", "tied"),
        "qwen2": ("positions", "kv_heads", "tied"),
        "qwen3": ("positions", "kv_heads", "head_dim", "tied"),
    }
)


def _custom_shape(text: str, flag: str) -> Shape:
    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"{flag} {text}: {reason}")

    family, _, rest = text.partition(":")
    family = family.strip().lower()
    if family not in _FURTHER:
        raise refuse(f"{family!r} is no family with shapes: use one of {', '.join(_FURTHER)}")
    sizes = _read_sizes(rest, (*_REQUIRED, *_FURTHER[family]), refuse)
    missing = [name for name in _REQUIRED if name not in sizes]
    if missing:
        raise refuse(f"{missing[0]} is missing: write {missing[0]}=NUMBER")
    hidden, heads = sizes["hidden"], sizes["heads"]
    kv_heads, head_dim = sizes.get("kv_heads", heads), sizes.get("head_dim", hidden // heads)
    if "head_dim" not in sizes and hidden % heads:
        raise refuse(f"heads {heads} does not divide hidden {hidden}")
    if heads % kv_heads:
        raise refuse(f"kv_heads {kv_heads} does not divide heads {heads}")
    if family != "opt" and head_dim % 2:
        raise refuse(f"heads {head_dim} wide cannot turn for rotary positions: make hidden / heads even")
    if sizes["vocab"] < 2:
        raise refuse("vocab must be at least 2")
    return Shape(
        text,
        family,  # type: ignore[arg-type]
        hidden,
        sizes["layers"],
        heads,
        kv_heads,
        head_dim,
        sizes["ffn"],
        sizes["vocab"],
        sizes.get("positions", 2048),
        bool(sizes.get("tied", 1)),
        sizes.get("embedding", 0),
        bool(sizes.get("post_norm", 0)),
    )


def _read_sizes(text: str, known: tuple[str, ...], refuse: Callable[[str], ConfigError]) -> dict[str, int]:
    """`name=number,...`; flags (tied, post_norm) may be 0, sizes not."""
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise refuse(f"unknown size {name!r}: " + (f"did you mean {nearest[0]}?" if nearest else ", ".join(known)))
        least = 0 if name in ("tied", "post_norm", "embedding") else 1
        if not equals or not re.fullmatch(r"[0-9]+", value) or int(value) < least:
            raise refuse(f"{name} must be a whole number of {least} or more, not {value!r}")
        if name in sizes:
            raise refuse(f"{name} is given twice")
        sizes[name] = int(value)
    return sizes

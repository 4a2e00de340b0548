"""Hugging Face checkpoints in and out: every load is checked, every save is complete.

A load that leaves a weight at its random initialisation, or a tokenizer that is not there, is an error here, never a
warning.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from threefold.errors import CheckpointError
from threefold.machine.attention import route_attention
from threefold.machine.linear import route_linears
from threefold.models.adapters import has_lora, merged_state_dict, save_adapter

# transformers' own bars would break ours, and say nothing at these sizes.
disable_progress_bar()
# Its load reports are warnings; the loads below are checked and raise.
set_verbosity_error()

# What transformers raises on a directory that is damaged or of another kind.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)

ADAPTER_DIRECTORY, ADAPTER_CONFIG = "adapter", "adapter_config.json"
HOLDS_ADAPTERS = "holds adapters (LoRA); merge them into their base model first, and give the merged model"
SCORE_MEAN = "threefold_score_mean"
SCORE_SCALE = "threefold_score_scale"


def check_source(source: str) -> str:
    """Return `source` if it is a checkpoint directory or can be a Hub id; raise CheckpointError otherwise."""
    path = Path(source)
    if source and path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{source}: {HOLDS_ADAPTERS}")
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{source}: no config.json in this directory, so it is not a Hugging Face checkpoint; "
                "give the directory that save_pretrained wrote"
            )
        return source
    if source and path.exists():
        raise CheckpointError(f"{source}: is a file; give the checkpoint's directory or a Hub id")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or not source
    if looks_like_path:
        raise CheckpointError(
            f"{source or '(empty)'}: no such directory; "
            "give a checkpoint's directory or a Hub id such as facebook/opt-125m"
        )
    return source


def _from_pretrained(auto_class: Any, source: str, what: str, **arguments: Any) -> Any:
    """Call auto_class.from_pretrained, turning what a user can get wrong into one line."""
    check_source(source)
    try:
        return auto_class.from_pretrained(source, **arguments)
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if Path(source).is_dir():
            raise CheckpointError(f"{source}: cannot load the {what}: {reason}") from error
        raise CheckpointError(
            f"{source}: no such directory, and the Hub gave no {what} of that name "
            f"(offline, or a misspelt id?): {reason[:200]}"
        ) from error


def load_config(source: str) -> Any:
    """The checkpoint's config."""
    return _from_pretrained(AutoConfig, source, "config")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, right-padding (generation pads on its own)."""
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, "tokenizer")
    if len(tokenizer) == 0:
        raise CheckpointError(f"{source}: has no tokenizer files (tokenizer.json); copy them from the model's origin")
    tokenizer.padding_side = "right"
    return tokenizer


def load_causal_lm(source: str) -> PreTrainedModel:
    """A causal language model with float32 weights, in eval mode (no dropout)."""
    model, missing = _load_model(AutoModelForCausalLM, source, "causal language model")
    _refuse_random_weights(source, missing)
    return use_fast_kernels(model)


def use_fast_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode, its matrix products and attention by this machine's fastest kernels."""
    route_linears(model)
    route_attention(model)
    return model.eval()


def _load_model(auto_class: Any, source: str, what: str, **arguments: Any) -> tuple[Any, set[str]]:
    """The model in float32 and the names of its weights that the checkpoint lacks; refuses weights of another shape."""
    # transformers' own error about shapes points at a report that is switched off, so the shapes are checked here.
    arguments |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _from_pretrained(auto_class, source, what, **arguments)
    if has_lora(model):  # from the Hub: transformers has loaded the base model and put the adapters on it
        raise CheckpointError(f"{source}: {HOLDS_ADAPTERS}")
    for name, saved, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{source}: weight {name} has shape {tuple(saved)}, and its config.json asks for {tuple(expected)}; "
            f"it is damaged, or no {what}"
        )
    return model, set(info["missing_keys"])


def load_scalar_model(source: str, new_head_seed: int | None = None) -> PreTrainedModel:
    """A model with one score per position (AutoModelForSequenceClassification, num_labels=1), float32, in eval mode.

    Args:
        source: a reward model's or critic's checkpoint; with `new_head_seed`, any checkpoint of the architecture.
        new_head_seed: give the model a new score head, normal with standard deviation 1 / sqrt(D + 1)
            (Stiennon et al. 2020, appendix B.1), drawn from this seed. None demands the saved head.
    """
    model, missing = _load_model(AutoModelForSequenceClassification, source, "reward model", num_labels=1)
    if not hasattr(model, "score"):
        raise CheckpointError(
            f"{source}: {type(model).__name__} has no `score` head; "
            "threefold's reward models are decoder models (OPT, GPT-2, Llama, Qwen, …)"
        )
    if new_head_seed is None:
        _refuse_random_weights(source, missing)
    else:
        _refuse_random_weights(source, {name for name in missing if not name.startswith("score.")})
        generator = torch.Generator().manual_seed(new_head_seed)
        weight = model.score.weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))
        set_score_statistics(model, 0.0, 1.0)
    return use_fast_kernels(model)


def _refuse_random_weights(source: str, missing: set[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise CheckpointError(
            f"{source}: {len(missing)} weights are not in the checkpoint and would stay random (first: {names}); "
            "it is damaged, or made for another kind of model"
        )


def generation_stop_ids(source: str) -> tuple[int, ...]:
    """The stop ids of the checkpoint's generation_config (a single id or a list), else of its config; possibly none."""
    check_source(source)
    file = "generation_config.json"
    values: Any = None
    try:
        values = GenerationConfig.from_pretrained(source).eos_token_id
    except (*UNREADABLE, TypeError) as error:
        # The file is optional, and many checkpoints have none; but one that is there has to be readable.
        if (Path(source) / file).is_file() or not isinstance(error, OSError):
            raise CheckpointError(f"{source}: cannot read its {file}: {' '.join(str(error).split())}") from error
    if values is None:
        file, values = "config.json", getattr(load_config(source), "eos_token_id", None)
    ids = tuple(values) if isinstance(values, list | tuple) else (values,)
    if ids == (None,):
        return ()
    if not all(isinstance(token_id, int) for token_id in ids):
        raise CheckpointError(
            f"{source}: eos_token_id in its {file} is {values!r}; it must be a token id or a list of them"
        )
    return ids


def score_statistics(model: PreTrainedModel) -> tuple[float, float]:
    """Mean and scale of a reward model's scores on held-out answers, as saved with it; (0, 1) if it has none."""
    config = model.config
    return float(getattr(config, SCORE_MEAN, 0.0)), float(getattr(config, SCORE_SCALE, 1.0))


def set_score_statistics(model: PreTrainedModel, mean: float, scale: float) -> None:
    """Store the mean and the scale of the scores in the model's config, which save_pretrained writes."""
    if not scale > 0:
        raise ValueError(f"score scale must be positive, not {scale}")
    setattr(model.config, SCORE_MEAN, mean)
    setattr(model.config, SCORE_SCALE, scale)


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence that the model has positions for, tokens; None if its config sets no limit (ALiBi, say)."""
    return config_context_length(model.config)


def config_context_length(config: Any) -> int | None:
    """`context_length` of a model that is not loaded."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Set every dropout of the model to `probability`: modules, and the numbers that functional dropout reads, which
    are attributes of modules or, in some families (Falcon), of the config. Layers are never dropped whole."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
    for holder in (model.config, *model.modules()):
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(holder, name, 0.0 if name == "layerdrop" else probability)


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make room for tokens that were added to the tokenizer; the new rows start at the mean of the old ones."""
    old_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= old_size:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for embedding in embeddings:
            for weight in embedding.parameters() if embedding is not None else ():  # an output may have a bias, too
                weight[old_size:] = weight[:old_size].mean(dim=0)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    stop_ids: frozenset[int] = frozenset(),
    pad_id: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a complete Hugging Face checkpoint: safetensors, config, tokenizer, chat template, generation config.

    Of a model with adapters that is the merged model, as plain as any other; in "adapter" below it are the adapters
    alone, in peft's format.

    Args:
        stop_ids: written to generation_config.eos_token_id of a causal model, so that any software stops where we do.
        pad_id: written to the config; sequence classification needs it to find the last real token.
        state: the model's state dict with all its tensors whole, tied ones sharing memory, where the model has shards
            of them.
    """
    if pad_id is not None:
        model.config.pad_token_id = pad_id
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None and model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(stop_ids) or None, pad_token_id=pad_id
        )
    if has_lora(model):
        model.save_pretrained(directory, state_dict=merged_state_dict(model, state))
        save_adapter(model, directory / ADAPTER_DIRECTORY, state)
    else:
        model.save_pretrained(directory, state_dict=None if state is None else dict(state))
    tokenizer.save_pretrained(directory)

"""What every contestant works on: models saved once as Hugging Face checkpoints, and prompts as token ids.

    actor/        OPT shape, random weights from one seed; never stops by itself in workload A
    actor_stops/  the same weights, made to stop with probability 1/40 at every step (workload B)
    critic/, reward/  OPT shape with a score head, two different seeds; all four share one tokenizer
    A.json, B.json, ...  a workload: where its models are, its batches of prompts, its numbers

How a random model is made to stop. Give the final layer norm a bias b of norm 30 in a random direction, and set the
(tied) embedding row of the stop token to alpha * b / |b|^2. A final state is b plus a vector of norm sqrt(hidden) in a
direction of its own, so the stop token's logit is alpha * (1 + noise of about 1/30) whatever was generated. alpha is
found by bisection such that the mean stop probability over sampled positions is 1/40; lengths are then geometric with
mean 40.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD_ID, STOP_ID, NUM_SPECIAL = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "</s>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MEAN_ANSWER_LENGTH = 40
STOP_BIAS_NORM = 30.0
STOP_MARK = "\n\nAssistant:"
MAX_PROMPT_LENGTH = 256
MAX_POSITIONS = 2048


@dataclass(frozen=True)
class Shape:
    """Sizes of an OPT model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    vocab_size: int


@dataclass(frozen=True)
class Sizes:
    """Everything that scales: the issue's sizes, or small ones for a trial of the machinery."""

    actor: Shape
    scorer: Shape
    prompt_length: int
    answer_length: int
    batch: int
    batch_of_b: int


FULL = Sizes(Shape(512, 8, 8, 2048, 8000), Shape(384, 6, 6, 1536, 8000), 256, 256, 8, 32)
SMALL = Sizes(Shape(64, 2, 2, 128, 1000), Shape(32, 2, 2, 64, 1000), 32, 32, 8, 32)


def train_tokenizer(text_file: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the dialogues of an hh_rlhf file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row[key] for row in read_rows(text_file) for key in ("chosen", "rejected")), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL_TOKENS[PAD_ID], eos_token=SPECIAL_TOKENS[STOP_ID]
    )
    fast.chat_template = CHAT_TEMPLATE
    if len(fast) != vocab_size:
        raise SystemExit(f"{text_file}: gives a vocabulary of {len(fast)} tokens only, the workloads need {vocab_size}")
    return fast


def read_rows(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def hh_prompts(file: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], int]:
    """The distinct prompts (dialogue up to and with the last "Assistant:") of an hh_rlhf file as ids, in the file's
    order; and how many were left out for being longer than MAX_PROMPT_LENGTH."""
    texts = dict.fromkeys(row["chosen"][: row["chosen"].rindex(STOP_MARK) + len(STOP_MARK)] for row in read_rows(file))
    prompts = [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    kept = [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT_LENGTH]
    return kept, len(prompts) - len(kept)


def config_of(shape: Shape) -> OPTConfig:
    return OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        word_embed_proj_dim=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        ffn_dim=shape.ffn_dim,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=STOP_ID,
        eos_token_id=STOP_ID,
    )


def make_actor(shape: Shape, seed: int) -> OPTForCausalLM:
    torch.manual_seed(seed)
    model = OPTForCausalLM(config_of(shape)).eval()
    model.generation_config = GenerationConfig(bos_token_id=STOP_ID, eos_token_id=STOP_ID, pad_token_id=PAD_ID)
    return model


def make_scorer(shape: Shape, seed: int) -> OPTForSequenceClassification:
    torch.manual_seed(seed)
    config = config_of(shape)
    config.num_labels = 1
    return OPTForSequenceClassification(config).eval()


@torch.no_grad()
def make_it_stop(model: OPTForCausalLM, prompts: Sequence[Sequence[int]], seed: int) -> float:
    """Change `model` so that its mean stop probability is 1 / MEAN_ANSWER_LENGTH; return the probability achieved."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(model.config.hidden_size, generator=generator)
    bias *= STOP_BIAS_NORM / bias.norm()
    model.model.decoder.final_layer_norm.bias.copy_(bias)
    rows = [torch.tensor(prompt[-16:]) for prompt in prompts if len(prompt) >= 16][:16]
    torch.manual_seed(seed)
    ids = model.generate(
        torch.stack(rows), do_sample=True, top_k=0, min_new_tokens=64, max_new_tokens=64, use_cache=True
    )
    states = model.model(ids).last_hidden_state[:, 15:-1].flatten(0, 1)
    logits = model.lm_head(states)
    logits[:, STOP_ID] = -torch.inf
    others, alignment = logits.logsumexp(dim=1), states @ bias / bias.square().sum()
    low, high = 0.0, 50.0
    for _ in range(60):
        alpha = (low + high) / 2
        probability = float(torch.sigmoid(alpha * alignment - others).mean())
        low, high = (alpha, high) if probability < 1 / MEAN_ANSWER_LENGTH else (low, alpha)
    model.get_input_embeddings().weight[STOP_ID] = alpha * bias / bias.square().sum()
    return probability


def prepare(directory: Path, data: Path, sizes: Sizes, num_batches: int, seed: int = 1234) -> dict[str, Any]:
    """Write models and workloads into `directory`; return what was found out on the way."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(data, sizes.actor.vocab_size)
    prompts_of_b, left_out = hh_prompts(data, tokenizer)
    actor = make_actor(sizes.actor, seed)
    saved: dict[str, Any] = {"actor": actor}
    for number, name in enumerate(("critic", "reward")):
        saved[name] = make_scorer(sizes.scorer, seed + 1 + number)
    for name, model in saved.items():
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    stop_probability = make_it_stop(actor, prompts_of_b, seed)
    actor.save_pretrained(directory / "actor_stops")
    tokenizer.save_pretrained(directory / "actor_stops")
    generator = torch.Generator().manual_seed(seed)

    def random_batches(length: int, batch: int) -> list[list[list[int]]]:
        shape = (num_batches, batch, length)
        return torch.randint(NUM_SPECIAL, sizes.actor.vocab_size, shape, generator=generator).tolist()

    order = torch.randperm(len(prompts_of_b), generator=generator).tolist()
    chosen = [prompts_of_b[index] for index in order]
    size = sizes.batch_of_b
    batches_of_b = [chosen[start : start + size] for start in range(0, num_batches * size, size)]
    common = {"answer_length": sizes.answer_length, "directory": str(directory.resolve()), "sizes": asdict(sizes)}
    workloads = {
        "A": {"actor": "actor", "stops": False, "batches": random_batches(sizes.prompt_length, sizes.batch)},
        "B": {"actor": "actor_stops", "stops": True, "batches": batches_of_b},
    }
    for name, workload in workloads.items():
        (directory / f"{name}.json").write_text(json.dumps({"name": name, **common, **workload}), encoding="utf-8")
    lengths = [len(prompt) for batch in batches_of_b for prompt in batch]
    return {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in saved.items()},
        "hh_prompts": len(prompts_of_b),
        "hh_prompts_left_out": left_out,
        "hh_mean_prompt_length": sum(lengths) / len(lengths),
        "stop_probability": stop_probability,
    }

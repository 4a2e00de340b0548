"""Pretraining text: every chunk once per pass, and a loss that is the coefficient times transformers' own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_recipe
from threefold.data.chat import ChatFormat, build_chat_format
from threefold.engine.sharing import MicroBatching
from threefold.models.forward import CausalForward
from threefold.models.loading import load_causal_lm, load_tokenizer
from threefold.stages.mixture import PretrainingText

CPU = torch.device("cpu")


@pytest.fixture
def chat(tiny_run: Path) -> ChatFormat:
    return build_chat_format(load_tokenizer(str(tiny_run / "sft")), "tokenizer")


@pytest.fixture
def text(chat: ChatFormat, tmp_path: Path) -> PretrainingText:
    """Batches of 3 chunks of 10 tokens, with a coefficient of 0.5."""
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"Document {n} says number {n * 7}, and then it ends." for n in range(12)))
    settings = tiny_recipe(
        f"--ppo.mixture.source={path}", "--ppo.mixture.chunk_length=10", "--ppo.mixture.batch_size=3",
        "--ppo.mixture.eval_documents=2", "--ppo.mixture.coef=0.5",
    ).ppo.mixture  # fmt: skip
    return PretrainingText(settings, chat, 288, seed=1)


def test_passes_follow_each_other_and_each_takes_every_chunk_once(text: PretrainingText) -> None:
    count = len(text)
    assert count > 4
    drawn = [chunk.ids for _ in range(count) for chunk in text._next_batch()]
    passes = [drawn[start : start + count] for start in range(0, 3 * count, count)]
    assert len(passes) == 3
    assert all(Counter(one) == Counter(passes[0]) for one in passes)
    assert len({tuple(one) for one in passes}) == 3, "each in its own order"


@pytest.mark.parametrize("max_sequences", [0, 2])
def test_the_losses_are_the_coefficient_times_transformers_loss(
    text: PretrainingText, chat: ChatFormat, tiny_run: Path, max_sequences: int, tmp_path: Path
) -> None:
    """Chunks are equally long, so transformers' mean over the batch is the mean per token; tolerance 1e-6."""
    forward = CausalForward(load_causal_lm(str(tiny_run / "sft")))
    closures = text.losses(forward, MicroBatching(max_sequences), CPU)
    assert len(closures) == (2 if max_sequences else 1)
    assert all(counts for _, counts in closures)
    with torch.no_grad():
        ours = sum(float(closure()) for closure, _ in closures)
    text.num_batches = 0
    ids = torch.tensor([chunk.ids for chunk in text._next_batch()])
    with torch.no_grad():
        theirs = float(AutoModelForCausalLM.from_pretrained(tiny_run / "sft")(input_ids=ids, labels=ids).loss)
    assert ours == pytest.approx(0.5 * theirs, abs=1e-6)

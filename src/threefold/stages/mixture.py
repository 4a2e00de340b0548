"""Pretraining text mixed into PPO (Ouyang et al. 2022, equation 2, last term), and the perplexity that shows what it
keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from threefold.algo.losses import lm_loss_sum
from threefold.config.recipe import MixtureSection
from threefold.data.chat import ChatFormat
from threefold.data.collate import collate_sequences, epoch_order, num_targets
from threefold.data.text import chunk_documents, document_sequences, read_documents, split_documents
from threefold.engine.device import precision
from threefold.engine.sharing import MicroBatching
from threefold.models.forward import CausalForward
from threefold.types import TokenSequence

EVAL_TOKENS = 4096


class PretrainingText:
    """Chunks to train on, in a seeded order without end, and held-out documents to measure on.

    Attributes:
        num_batches: how many have been taken; may be set, to go on from there.
    """

    def __init__(self, settings: MixtureSection, chat: ChatFormat, context_length: int, seed: int) -> None:
        documents, held_out = split_documents(read_documents(settings.source), settings.eval_documents)
        self._chunks = chunk_documents(documents, chat.tokenizer, settings.chunk_length, chat.stop_ids)
        self._held_out = document_sequences(held_out, chat.tokenizer, context_length, chat.stop_ids)
        self._settings, self._pad_id, self._seed = settings, chat.pad_id, seed
        self.num_batches = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def _next_batch(self) -> list[TokenSequence]:
        """The next chunks; passes over the text follow each other, each in its own order."""
        size, count = self._settings.batch_size, len(self._chunks)
        start = self.num_batches * size
        self.num_batches += 1
        picked = range(start, start + size)
        orders = {epoch: epoch_order(count, self._seed, epoch) for epoch in {index // count for index in picked}}
        return [self._chunks[orders[index // count][index % count]] for index in picked]

    def losses(
        self, forward: CausalForward, passes: MicroBatching, device: torch.device
    ) -> tuple[tuple[Callable[[], Tensor], bool], ...]:
        """This process's micro-batches of the next batch: closures, and whether they count. Over all processes, those
        that count are together coef * mean LM loss per token."""
        batch = self._next_batch()
        count = num_targets(batch)
        return tuple(
            (
                lambda part=part: self._settings.coef / count * _loss_sum(forward, part.items, self._pad_id, device),
                part.counts,
            )
            for part in passes.of(batch, len)
        )

    @torch.no_grad()
    def perplexity(
        self, forward: CausalForward, passes: MicroBatching, device: torch.device, dtype: torch.dtype
    ) -> float:
        """exp(mean negative log-likelihood per token) of the held-out documents. Collective."""
        total = 0.0
        for part in replace(passes, max_sequences=0, max_tokens=EVAL_TOKENS).of(self._held_out, len):
            with precision(device, dtype):
                loss = float(_loss_sum(forward, part.items, self._pad_id, device))
            total += loss if part.counts else 0.0
        return math.exp(passes.world.sum([total])[0] / num_targets(self._held_out))


def _loss_sum(forward: CausalForward, sequences: Sequence[TokenSequence], pad_id: int, device: torch.device) -> Tensor:
    batch = collate_sequences(sequences, pad_id).to(device)
    logprobs, _ = forward.target_logprobs(batch.input_ids, batch.target_mask, entropy="none")
    return lm_loss_sum(logprobs, torch.ones_like(logprobs, dtype=torch.bool))

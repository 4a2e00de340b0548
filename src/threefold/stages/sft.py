"""Step 1, supervised fine-tuning: imitate demonstrations (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.losses import lm_loss_sum
from threefold.data.chat import ChatFormat
from threefold.data.collate import collate_sequences, num_targets
from threefold.engine.device import precision
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import micro_batching
from threefold.engine.train import TrainEngine
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.loading import set_dropout
from threefold.stages.context import StageContext
from threefold.stages.supervised import SupervisedTask, num_optimizer_steps, train_supervised
from threefold.types import Example, TokenSequence


def run(context: StageContext) -> dict[str, float]:
    """Fill `context.output` with the fine-tuned model; return its held-out loss and perplexity, before and after."""
    recipe, settings = context.recipe, context.recipe.sft
    parallel, forward, chat = _model(context, context.library.examples("sft", "train"))
    model = parallel.model
    items = context.items("sft", chat)
    context.record_items(items)
    held_out = items.eval[: settings.max_eval_examples]
    context.log.note(
        f"step 1, sft: {len(items.train)} conversations to train on, {len(held_out)} held out" + items.note()
    )
    limits_of_pass = (settings.micro_batch_size, settings.micro_batch_tokens)
    passes = micro_batching(*limits_of_pass, context.device, context.world, parallel.sharded)

    def loss_sum(sequences: Sequence[TokenSequence]) -> Tensor:
        batch = collate_sequences(sequences, chat.pad_id).to(context.device)
        logprobs, _ = forward.target_logprobs(batch.input_ids, batch.target_mask, entropy="none")
        return lm_loss_sum(logprobs, torch.ones_like(logprobs, dtype=torch.bool))

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        total = 0.0
        for part in passes.of(held_out, len):
            with precision(context.device, context.dtype):
                loss = float(loss_sum(part.items))
            total += loss if part.counts else 0.0
        model.train()
        loss = context.world.sum([total])[0] / num_targets(held_out)
        return {"sft/eval_loss": loss, "sft/eval_perplexity": math.exp(min(loss, 700.0))}

    total_steps = num_optimizer_steps(len(items.blend), settings)
    where = (context.device, context.dtype, "step 1, sft")
    checkpointing, offload = settings.gradient_checkpointing, recipe.parallel.actor.offload
    engine = TrainEngine(parallel, settings, total_steps, *where, gradient_checkpointing=checkpointing, offload=offload)
    task = SupervisedTask[TokenSequence](
        "sft",
        loss_sum,
        num_targets,
        evaluate,
        lambda _: context.save_model(parallel, chat, context.output),
        passes,
        len,
    )
    return train_supervised(task, engine, items, settings, context)


def _model(context: StageContext, examples: Sequence[Example]) -> tuple[ParallelModel, CausalForward, ChatFormat]:
    """The model to train, on its device."""
    recipe, formats = context.recipe, list[ChatFormat]()

    def load() -> PreTrainedModel:
        model, chat = context.actor(examples)
        set_dropout(model, recipe.sft.dropout)
        add_lora(model, recipe.sft.lora, recipe.run.seed, "sft.lora")
        formats.append(chat)
        return model

    parallel, forward = context.parallel_causal(load, recipe.parallel.actor)
    return parallel, forward, formats[0]

"""Step 2, reward model: a score per answer from human comparisons (Ouyang et al. 2022, section 3.5, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.losses import pairwise_reward_loss_sum
from threefold.algo.statistics import pairwise_wins, wilson_interval
from threefold.data.chat import ChatFormat
from threefold.data.collate import collate_sequences
from threefold.data.prepare import reward_pairs
from threefold.engine.device import precision
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import micro_batching
from threefold.engine.train import TrainEngine
from threefold.errors import TrainingError
from threefold.models.adapters import add_lora
from threefold.models.forward import answer_scores
from threefold.models.loading import grow_embeddings, load_scalar_model, set_dropout, set_score_statistics
from threefold.stages.context import StageContext
from threefold.stages.supervised import SupervisedTask, num_optimizer_steps, train_supervised
from threefold.types import TokenSequence

Pair = tuple[TokenSequence, TokenSequence]


def run(context: StageContext) -> dict[str, float]:
    """Fill `context.output` with the reward model; return its held-out accuracy, interval, margin and score
    statistics."""
    recipe, settings = context.recipe, context.recipe.reward
    source = recipe.model.reward or str(context.inputs["sft"])
    parallel, chat = _model(context, source)
    model = parallel.model
    share = context.shares()["reward"]
    limits = (recipe.data.max_length, recipe.data.long_rows, context.log.note)
    train = reward_pairs(share.train, chat, *limits)
    held_out = reward_pairs(share.eval, chat, *limits)[: settings.max_eval_examples]
    context.log.note(f"step 2, reward: {len(train)} pairs to train on, {len(held_out)} held out")

    limits_of_pass = (settings.micro_batch_size, settings.micro_batch_tokens)
    passes = micro_batching(*limits_of_pass, context.device, context.world, parallel.sharded)

    def scores(sequences: Sequence[TokenSequence]) -> Tensor:
        batch = collate_sequences(sequences, chat.pad_id).to(context.device)
        return parallel.run(lambda: answer_scores(model, batch.input_ids, batch.lengths))

    def loss_sum(pairs: Sequence[Pair]) -> Tensor:
        both = scores([better for better, _ in pairs] + [worse for _, worse in pairs])
        return pairwise_reward_loss_sum(both[: len(pairs)], both[len(pairs) :])

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        found: dict[int, tuple[float, float]] = {}
        for part in passes.of(held_out, pair_length):
            with precision(context.device, context.dtype):
                better, worse = (scores([pair[side] for pair in part.items]).tolist() for side in (0, 1))
            found |= dict(zip(part.rows, zip(better, worse, strict=True), strict=True)) if part.counts else {}
        model.train()
        both = torch.tensor(context.world.assemble(found, len(held_out)))
        if not bool(torch.isfinite(both).all()):
            raise TrainingError(
                "step 2, reward: scores of held-out answers are not finite; lower reward.learning_rate "
                f"({settings.learning_rate:g}), or look for damaged weights in {source}"
            )
        return score_metrics(both[:, 0], both[:, 1])

    def save(metrics: Mapping[str, float]) -> None:
        set_score_statistics(model, metrics["reward/score_mean"], metrics["reward/score_scale"])
        context.save_model(parallel, chat, context.output)

    total_steps = num_optimizer_steps(len(train), settings)
    where = (context.device, context.dtype, "step 2, reward")
    checkpointing, offload = settings.gradient_checkpointing, recipe.parallel.reward.offload
    engine = TrainEngine(parallel, settings, total_steps, *where, gradient_checkpointing=checkpointing, offload=offload)
    task = SupervisedTask[Pair]("reward", loss_sum, len, evaluate, save, passes, pair_length)
    return train_supervised(task, engine, train, settings, context)


def _model(context: StageContext, source: str) -> tuple[ParallelModel, ChatFormat]:
    """The model to train, with a new head, on its device."""
    recipe = context.recipe
    chat, added = context.chat_format(source)

    def load() -> PreTrainedModel:
        model = load_scalar_model(source, new_head_seed=recipe.run.seed)
        if added:
            grow_embeddings(model, chat.tokenizer)
        model.config.pad_token_id = chat.pad_id
        context.check_length("data.max_length", recipe.data.max_length, model)
        set_dropout(model, recipe.reward.dropout)
        add_lora(model, recipe.reward.lora, recipe.run.seed, "reward.lora")
        return model

    return context.parallel(load, recipe.parallel.reward), chat


def pair_length(pair: Pair) -> int:
    """Tokens that a pair fills in a forward pass, which holds both of its sequences at one length."""
    return 2 * max(len(sequence) for sequence in pair)


def score_metrics(better: Tensor, worse: Tensor) -> dict[str, float]:
    """Held-out metrics of a reward model from its scores [B] of preferred and other answers.

    Accuracy counts a tie as one half; its interval is Wilson's. The mean and the scale (population standard
    deviation) are over all answers, preferred and other.
    """
    wins = pairwise_wins(better.tolist(), worse.tolist())
    accuracy = wilson_interval(sum(wins), len(wins))
    both = torch.cat([better, worse])
    return {
        "reward/eval_loss": float(pairwise_reward_loss_sum(better, worse)) / len(wins),
        "reward/eval_accuracy": accuracy.mean,
        "reward/eval_accuracy_low": accuracy.low,
        "reward/eval_accuracy_high": accuracy.high,
        "reward/eval_margin": float((better - worse).mean()),
        "reward/score_mean": float(both.mean()),
        # Scores that are all alike say nothing; a scale of 1 then leaves them alone instead of dividing by nothing.
        "reward/score_scale": float(both.std(correction=0)) or 1.0,
    }

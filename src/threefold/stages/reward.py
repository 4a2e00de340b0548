"""Step 2, reward model: a score per answer from human comparisons (Ouyang et al. 2022, section 3.5, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from threefold.algo.losses import pairwise_reward_loss_sum
from threefold.algo.statistics import pairwise_wins, wilson_interval
from threefold.data.collate import collate_sequences
from threefold.data.prepare import reward_pairs
from threefold.engine.device import precision
from threefold.engine.train import TrainEngine, micro_batching
from threefold.errors import TrainingError
from threefold.models.adapters import add_lora
from threefold.models.forward import answer_scores
from threefold.models.loading import grow_embeddings, load_scalar_model, save_model, set_dropout, set_score_statistics
from threefold.stages.context import StageContext
from threefold.stages.supervised import SupervisedTask, num_optimizer_steps, train_supervised
from threefold.types import TokenSequence

Pair = tuple[TokenSequence, TokenSequence]


def run(context: StageContext) -> dict[str, float]:
    """Fill `context.output` with the reward model; return its held-out accuracy, interval, margin and score
    statistics."""
    recipe, settings = context.recipe, context.recipe.reward
    source = recipe.model.reward or str(context.inputs["sft"])
    chat, added = context.chat_format(source)
    model = load_scalar_model(source, new_head_seed=recipe.run.seed).to(context.device)
    if added:
        grow_embeddings(model, chat.tokenizer)
    model.config.pad_token_id = chat.pad_id
    context.check_length("data.max_length", recipe.data.max_length, model)
    set_dropout(model, settings.dropout)
    add_lora(model, settings.lora, recipe.run.seed, "reward.lora")
    share = context.shares()["reward"]
    limits = (recipe.data.max_length, recipe.data.long_rows, context.log.note)
    train = reward_pairs(share.train, chat, *limits)
    held_out = reward_pairs(share.eval, chat, *limits)[: settings.max_eval_examples]
    context.log.note(f"step 2, reward: {len(train)} pairs to train on, {len(held_out)} held out")

    passes = micro_batching(settings.micro_batch_size, settings.micro_batch_tokens, context.device)

    def scores(sequences: Sequence[TokenSequence]) -> Tensor:
        batch = collate_sequences(sequences, chat.pad_id).to(context.device)
        return answer_scores(model, batch.input_ids, batch.lengths)

    def loss_sum(pairs: Sequence[Pair]) -> Tensor:
        both = scores([better for better, _ in pairs] + [worse for _, worse in pairs])
        return pairwise_reward_loss_sum(both[: len(pairs)], both[len(pairs) :])

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        better, worse = [], []
        for micro in passes.of(held_out, pair_length):
            with precision(context.device, context.dtype):
                better.append(scores([pair[0] for pair in micro]))
                worse.append(scores([pair[1] for pair in micro]))
        model.train()
        if not bool(torch.isfinite(torch.cat(better + worse)).all()):
            raise TrainingError(
                "step 2, reward: scores of held-out answers are not finite; lower reward.learning_rate "
                f"({settings.learning_rate:g}), or look for damaged weights in {source}"
            )
        metrics = score_metrics(torch.cat(better), torch.cat(worse))
        set_score_statistics(model, metrics["reward/score_mean"], metrics["reward/score_scale"])
        return metrics

    total_steps = num_optimizer_steps(len(train), settings)
    engine = TrainEngine(model, settings, total_steps, context.device, context.dtype, "step 2, reward")
    task = SupervisedTask[Pair](
        "reward",
        loss_sum,
        len,
        evaluate,
        lambda: save_model(model, chat.tokenizer, context.output, chat.stop_ids, chat.pad_id),
        passes,
        pair_length,
    )
    return train_supervised(task, engine, train, settings, recipe.run.seed, context.log, recipe.run.log_every)


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

"""Step 2, reward model: a score per answer from human comparisons (Ouyang et al. 2022, section 3.5, equation 1).

All answers to one prompt are scored in one forward pass, and all its pairs count in one batch: as mean over the prompt,
so that a prompt with nine ranked answers weighs no more than one with two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from math import fsum
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.algo.losses import pairwise_reward_loss_sum, plackett_luce_loss_sum
from threefold.algo.statistics import pairwise_wins, wilson_interval
from threefold.data.chat import ChatFormat
from threefold.data.collate import collate_sequences, pad_ragged
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
from threefold.types import RankedAnswers

RewardLoss = Literal["pairwise", "plackett_luce"]


def run(context: StageContext) -> dict[str, float]:
    """Fill `context.output` with the reward model; return its held-out accuracy, interval, margin and score
    statistics."""
    recipe, settings = context.recipe, context.recipe.reward
    source = recipe.model.reward or str(context.inputs["sft"])
    parallel, chat = _model(context, source)
    model = parallel.model
    items = context.items("reward", chat)
    context.record_items(items)
    held_out = items.eval[: settings.max_eval_examples]
    context.log.note(
        f"step 2, reward: {len(items.train)} prompts with ranked answers to train on, {len(held_out)} held out "
        f"({sum(len(item.pairs()) for item in held_out)} pairs)" + items.note()
    )

    limits_of_pass = (settings.micro_batch_size, settings.micro_batch_tokens)
    passes = micro_batching(*limits_of_pass, context.device, context.world, parallel.sharded)

    def scores(prompts: Sequence[RankedAnswers]) -> Tensor:
        batch = collate_sequences([sequence for item in prompts for sequence in item.sequences], chat.pad_id)
        batch = batch.to(context.device)
        return parallel.run(lambda: answer_scores(model, batch.input_ids, batch.lengths))

    def loss_sum(prompts: Sequence[RankedAnswers]) -> Tensor:
        return ranking_loss_sum(prompts, scores(prompts), settings.loss)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        found: dict[int, Sequence[float]] = {}
        for part in passes.of(held_out, answers_length):
            with precision(context.device, context.dtype):
                of_answers = scores(part.items).tolist()
            if part.counts:
                found |= dict(zip(part.rows, _by_prompt(of_answers, part.items), strict=True))
        model.train()
        all_scores = torch.tensor(list(chain.from_iterable(context.world.assemble(found, len(held_out)))))
        if not bool(torch.isfinite(all_scores).all()):
            raise TrainingError(
                "step 2, reward: scores of held-out answers are not finite; lower reward.learning_rate "
                f"({settings.learning_rate:g}), or look for damaged weights in {source}"
            )
        return score_metrics(held_out, all_scores, settings.loss)

    def save(metrics: Mapping[str, float]) -> None:
        set_score_statistics(model, metrics["reward/score_mean"], metrics["reward/score_scale"])
        context.save_model(parallel, chat, context.output)

    total_steps = num_optimizer_steps(len(items.blend), settings)
    where = (context.device, context.dtype, "step 2, reward")
    checkpointing, offload = settings.gradient_checkpointing, recipe.parallel.reward.offload
    engine = TrainEngine(parallel, settings, total_steps, *where, gradient_checkpointing=checkpointing, offload=offload)
    task = SupervisedTask[RankedAnswers]("reward", loss_sum, len, evaluate, save, passes, answers_length)
    return train_supervised(task, engine, items, settings, context)


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


def answers_length(item: RankedAnswers) -> int:
    """Tokens that a prompt's answers fill in a forward pass, which holds all of its sequences at one length."""
    return len(item.sequences) * max(len(sequence) for sequence in item.sequences)


def ranking_loss_sum(items: Sequence[RankedAnswers], scores: Tensor, loss: RewardLoss) -> Tensor:
    """Sum over prompts of the loss of their rankings; that of a single pair is -log sigmoid of its margin either way.

    Args:
        items: prompts, each with at least one pair.
        scores: of all sequences of all items, in their order.
        loss: "pairwise" is the mean over all pairs of a prompt; "plackett_luce" the mean over the choices of a ranking,
            then over the prompt's rankings.
    """

    def on_device(values: Sequence[int] | Sequence[float]) -> Tensor:
        return torch.tensor(values, device=scores.device)

    if loss == "plackett_luce":
        chosen, among, weights = _choices(items)
        left, mask = (each.to(scores.device) for each in pad_ragged([torch.tensor(places) for places in among]))
        return plackett_luce_loss_sum(scores[on_device(chosen)], scores[left], mask, on_device(weights))
    better, worse, weights = _pairs(items)
    return pairwise_reward_loss_sum(scores[on_device(better)], scores[on_device(worse)], on_device(weights))


def score_metrics(items: Sequence[RankedAnswers], scores: Tensor, loss: RewardLoss) -> dict[str, float]:
    """Held-out metrics of a reward model from its scores of all sequences of all items.

    Accuracy is the mean over prompts of the share of their pairs that the scores put in order, a tie counted as one
    half; its interval is Wilson's, with prompts as the observations, because the pairs of one prompt share their
    answers. The margin is such a mean too. The mean and the scale (population standard deviation) are over all answers.
    """
    better, worse, _ = _pairs(items)
    listed = scores.tolist()
    wins = pairwise_wins([listed[place] for place in better], [listed[place] for place in worse])
    accuracy = wilson_interval(fsum(_means_of_prompts(wins, items)), len(items))
    margins = [listed[first] - listed[second] for first, second in zip(better, worse, strict=True)]
    return {
        "reward/eval_loss": float(ranking_loss_sum(items, scores, loss)) / len(items),
        "reward/eval_accuracy": accuracy.mean,
        "reward/eval_accuracy_low": accuracy.low,
        "reward/eval_accuracy_high": accuracy.high,
        "reward/eval_margin": fsum(_means_of_prompts(margins, items)) / len(items),
        "reward/score_mean": float(scores.mean()),
        # Scores that are all alike say nothing; a scale of 1 then leaves them alone instead of dividing by nothing.
        "reward/score_scale": float(scores.std(correction=0)) or 1.0,
    }


def _pairs(items: Sequence[RankedAnswers]) -> tuple[list[int], list[int], list[float]]:
    """Of all pairs of all items: places of the better and of the worse among all sequences, and 1 / (pairs of the
    prompt)."""
    better: list[int] = []
    worse: list[int] = []
    weights: list[float] = []
    start = 0
    for item in items:
        pairs = item.pairs()
        assert pairs, "a prompt without a pair has nothing to learn from"
        better += [start + first for first, _ in pairs]
        worse += [start + second for _, second in pairs]
        weights += [1 / len(pairs)] * len(pairs)
        start += len(item.sequences)
    return better, worse, weights


def _choices(items: Sequence[RankedAnswers]) -> tuple[list[int], list[list[int]], list[float]]:
    """Of all choices of all rankings: the place of the chosen among all sequences, those of all that were left, and
    the weight."""
    chosen: list[int] = []
    among: list[list[int]] = []
    weights: list[float] = []
    start = 0
    for item in items:
        rankings = [tiers for tiers in item.rankings if len(tiers) > 1]
        assert rankings, "a prompt without a choice has nothing to learn from"
        for tiers in rankings:
            num_choices = sum(len(tier) for tier in tiers[:-1])
            for index, tier in enumerate(tiers[:-1]):
                left = [start + place for lower in tiers[index:] for place in lower]
                chosen += [start + place for place in tier]
                among += [left] * len(tier)
                weights += [1 / (num_choices * len(rankings))] * len(tier)
        start += len(item.sequences)
    return chosen, among, weights


def _by_prompt(scores: Sequence[float], items: Sequence[RankedAnswers]) -> list[Sequence[float]]:
    """The scores of all sequences, cut into those of each item."""
    bounds = accumulate((len(item.sequences) for item in items), initial=0)
    return [scores[start:stop] for start, stop in pairwise(bounds)]


def _means_of_prompts(values: Sequence[float], items: Sequence[RankedAnswers]) -> list[float]:
    """Values of all pairs of all items, as the mean of each item's."""
    bounds = accumulate((len(item.pairs()) for item in items), initial=0)
    return [fsum(values[start:stop]) / (stop - start) for start, stop in pairwise(bounds)]

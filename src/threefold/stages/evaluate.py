"""What the run achieved: answers of step 1, PPO and its average to held-out prompts, compared.

Score, win rate and KL by the reward model always; where the data come with a gold score that training never saw, by
that too; where they come with final answers that can be checked, by the share of right ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from threefold.algo.statistics import Estimate, distinct_n, mean_interval, pairwise_wins, wilson_interval
from threefold.config.data import DEMO
from threefold.config.scale import FrozenModelSection
from threefold.data.chat import ChatFormat
from threefold.data.demo import clean_comparison, gold_score
from threefold.engine.parallel import ParallelModel
from threefold.engine.sharing import MicroBatching, micro_batching
from threefold.models.forward import CausalForward
from threefold.models.loading import load_causal_lm, load_scalar_model
from threefold.stages.answering import Answering
from threefold.stages.context import StageContext, stop_if_asked
from threefold.stages.rollout import Reference, RewardScorer, Scorers, per_rollout, right_answers
from threefold.types import PreparedPrompt, Rollout, TokenSequence


@dataclass(frozen=True)
class Answers:
    """One model's answers to the evaluation prompts, answers_per_prompt in a row for each.

    Attributes:
        right: 1 or 0 for each answer to a prompt that has a final answer to compare with.
    """

    rollouts: list[Rollout]
    texts: list[str]
    scores: list[float]
    gold: list[float]
    right: list[float]


def run(context: StageContext) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The comparison, and samples: prompts with each model's first answer."""
    settings = context.recipe.evaluate
    chat, _ = context.chat_format(str(context.inputs["sft"]))
    scorer = _scorer(context, chat)
    prompts = context.items("ppo", chat).eval[: settings.num_prompts]
    repeated = [prompt for prompt in prompts for _ in range(settings.answers_per_prompt)]
    models = {"sft": context.inputs["sft"], "ppo": context.inputs["ppo"] / "actor"}
    if (context.inputs["ppo"] / "actor_ema").is_dir():
        models["ema"] = context.inputs["ppo"] / "actor_ema"
    answers: dict[str, Answers] = {}
    result: dict[str, Any] = {
        "num_prompts": len(prompts),
        "answers_per_prompt": settings.answers_per_prompt,
        "models": {},
    }
    reference = _model(context, models["sft"])
    with context.log.progress("compare", len(models)) as bar:
        for name, directory in models.items():
            stop_if_asked(context.world)
            model = reference if name == "sft" else _model(context, directory)
            answers[name] = _answer(context, model, chat, scorer, repeated)
            kl = _kl(context, chat, reference, scorer, answers[name].rollouts)
            result["models"][name] = _describe(answers[name], answers["sft"], kl, settings.answers_per_prompt)
            bar.advance()
    if _has_gold(context):
        accuracy = _clean_accuracy(context, scorer)
        result["reward_clean_accuracy"] = _as_json(accuracy)
    return result, _samples(prompts, answers, settings.answers_per_prompt, settings.num_samples)


def _has_gold(context: StageContext) -> bool:
    return all(source.path == [DEMO] for source in context.recipe.data.sources)


Model = tuple[ParallelModel, CausalForward]


def _model(context: StageContext, directory: Path) -> Model:
    """A model that answers, spread as the actor is."""
    stage = 3 if context.recipe.parallel.actor.zero_stage >= 2 else 0
    section = FrozenModelSection(zero_stage=stage)
    return context.parallel_causal(lambda: load_causal_lm(str(directory)).requires_grad_(False), section)


def _scorer(context: StageContext, chat: ChatFormat) -> RewardScorer:
    source = str(context.inputs["reward"])
    reward_chat, _ = context.chat_format(source)
    model = context.parallel(lambda: load_scalar_model(source).requires_grad_(False), context.recipe.parallel.scorer)
    allow = context.recipe.model.retokenise_for_reward
    where = (context.device, context.dtype, _passes(context, model))
    return RewardScorer(model.model, reward_chat, chat, allow, *where, model)


def _passes(context: StageContext, model: ParallelModel) -> MicroBatching:
    return micro_batching(0, context.recipe.ppo.micro_batch_tokens, context.device, context.world, model.sharded)


def _answer(
    context: StageContext, model: Model, chat: ChatFormat, scorer: RewardScorer, prompts: Sequence[PreparedPrompt]
) -> Answers:
    """Sample as step 3 does, every model from the same random numbers."""
    generator = torch.Generator(context.device).manual_seed(context.recipe.run.seed + 2)
    per_prompt = context.recipe.evaluate.answers_per_prompt
    answering = Answering(context, *model)
    rollouts = answering(prompts, context.recipe.ppo.sampling, chat.stop_ids, generator, per_prompt)
    texts = [chat.decode_exactly(rollout.response_ids.tolist()) for rollout in rollouts]
    scores = scorer([p.prompt.messages for p in prompts], rollouts).tolist()
    gold = []
    if _has_gold(context):
        gold = [
            gold_score(p.prompt, text, rollout.finish_reason == "stop")
            for p, text, rollout in zip(prompts, texts, rollouts, strict=True)
        ]
    right = [one for one in right_answers(prompts, rollouts, chat) if one is not None]
    return Answers(rollouts, texts, scores, gold, right)


def _kl(
    context: StageContext, chat: ChatFormat, reference: Model, scorer: RewardScorer, rollouts: Sequence[Rollout]
) -> list[float]:
    """KL(model || step 1) of each answer, nats, from its own samples."""
    parallel, forward = reference
    judge = Reference(forward, parallel=parallel)
    where = (context.device, context.dtype, _passes(context, parallel))
    scorers = Scorers(judge, scorer.model, scorer, chat.pad_id, *where)
    temperature = context.recipe.ppo.sampling.temperature
    ref = per_rollout(rollouts, scorers, lambda batch: judge.logprobs(batch, temperature))
    return [float((rollout.logprobs - other).sum()) for rollout, other in zip(rollouts, ref, strict=True)]


def _describe(model: Answers, sft: Answers, kl: Sequence[float], per_prompt: int) -> dict[str, Any]:
    ids = [rollout.response_ids.tolist() for rollout in model.rollouts]
    lengths = [len(answer) for answer in ids]
    by_prompt = [ids[start : start + per_prompt] for start in range(0, len(ids), per_prompt)]
    described = {
        "score": _as_json(mean_interval(_by_prompt(model.scores, per_prompt))),
        "win_rate_by_score": _as_json(_win_rate(model.scores, sft.scores, per_prompt)),
        "kl_per_answer": math.fsum(kl) / len(kl),
        "distinct_2": distinct_n(ids, 2),
        "distinct_2_per_prompt": math.fsum(distinct_n(answers, 2) for answers in by_prompt) / len(by_prompt),
        "distinct_answers_per_prompt": math.fsum(_share_distinct(answers) for answers in by_prompt) / len(by_prompt),
        "mean_length_tokens": sum(lengths) / len(lengths),
        "stopped": sum(rollout.finish_reason == "stop" for rollout in model.rollouts) / len(lengths),
    }
    if model.gold:
        described["gold"] = _as_json(mean_interval(_by_prompt(model.gold, per_prompt)))
        described["win_rate_by_gold"] = _as_json(_win_rate(model.gold, sft.gold, per_prompt))
    if model.right:
        shares = _by_prompt(model.right, per_prompt)
        described["final_answer_accuracy"] = _as_json(wilson_interval(math.fsum(shares), len(shares)))
    return described


def _share_distinct(answers: Sequence[Sequence[int]]) -> float:
    return len(set(map(tuple, answers))) / len(answers)


def _by_prompt(values: Sequence[float], per_prompt: int) -> list[float]:
    """Mean over each prompt's answers: prompts, not answers, are the independent observations."""
    return [math.fsum(values[start : start + per_prompt]) / per_prompt for start in range(0, len(values), per_prompt)]


def _win_rate(model: Sequence[float], sft: Sequence[float], per_prompt: int) -> Estimate:
    """Share of answers that beat step 1's answer to the same prompt, ties one half.

    The interval is Wilson's with prompts as observations: wider than the data's own spread, for ties have less, and
    never
    of width 0.
    """
    wins = _by_prompt(pairwise_wins(model, sft), per_prompt)
    return wilson_interval(math.fsum(wins), len(wins))


def _as_json(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "count": estimate.count}


@torch.no_grad()
def _clean_accuracy(context: StageContext, scorer: RewardScorer) -> Estimate:
    """The reward model's accuracy on held-out pairs in their true order, without the labels' noise; ties one half."""
    chat, _ = context.chat_format(str(context.inputs["reward"]))
    clean = [clean_comparison(example) for example in context.library.examples("reward", "eval")]
    limit = context.recipe.data.max_length
    pairs = [pair for pair in (chat.comparison(each.prompt, each.answers) for each in clean) if _fits(pair, limit)]
    sides = [scorer.scores([pair[side] for pair in pairs]).tolist() for side in (0, 1)]
    wins = pairwise_wins(*sides)
    return wilson_interval(sum(wins), len(wins))


def _fits(pair: Sequence[TokenSequence], limit: int) -> bool:
    return max(map(len, pair)) <= limit


def _samples(
    prompts: Sequence[PreparedPrompt], answers: dict[str, Answers], per_prompt: int, count: int
) -> list[dict[str, Any]]:
    samples = []
    for index, prompt in enumerate(prompts[:count]):
        first = index * per_prompt
        sample: dict[str, Any] = {"prompt": [{"role": m.role, "content": m.content} for m in prompt.prompt.messages]}
        for name, given in answers.items():
            sample[name] = {"answer": given.texts[first], "score": given.scores[first]}
            if given.gold:
                sample[name]["gold"] = given.gold[first]
        samples.append(sample)
    return samples

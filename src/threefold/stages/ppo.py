"""Step 3, PPO: sample answers, score them, improve the policy (Ouyang et al. 2022, section 3.5; Ziegler et al.
2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from threefold.algo.kl import adapt_kl_coef
from threefold.algo.statistics import standard_error
from threefold.config.recipe import PPOSection
from threefold.data.blend import Blend
from threefold.engine.phases import PhaseMeter
from threefold.stages.context import StageContext
from threefold.stages.diagnosis import state_kept_if_broken, unused
from threefold.stages.overlap import ScoringBeside
from threefold.stages.ppo_progress import Progress
from threefold.stages.ppo_setup import Setup, save, set_up
from threefold.stages.ppo_update import CriticPass, UpdateProgress, critic_pass_of, update
from threefold.stages.rollout import ScoredBatch, check_references, final_answer_accuracy, make_experience
from threefold.types import PreparedPrompt, Rollout

AUTO_PARITY_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.5}


def run(context: StageContext) -> dict[str, float]:
    """Fill `context.output` with actor/, actor_ema/ and critic/; return what changed on held-out prompts."""
    setup = set_up(context)
    check_references(setup.prompts, context.recipe.ppo)
    actor = setup.learners.actor
    with state_kept_if_broken(
        lambda: f"step 3, ppo, after {actor.num_steps} optimizer steps of the actor",
        actor.parallel,
        lambda: unused(context.output.parent / "failed" / f"ppo-{actor.num_steps}-steps"),
        lambda directory: save(context, setup, directory),
    ):
        result = _train(context, setup)
    save(context, setup, context.output)
    return result


def _train(context: StageContext, setup: Setup) -> dict[str, float]:
    """All iterations."""
    settings, log = context.recipe.ppo, context.log
    if context.saved is not None:
        progress = Progress.read(setup, context.saved)
    else:
        progress = Progress(settings.kl_coef, before=evaluate(context, setup))
        log.log(0, progress.before)
    batches = prompt_batches(setup.prompts, setup.blend, settings, progress.iteration)
    with log.progress("ppo   ", setup.num_iterations, progress.iteration) as bar:
        while progress.iteration < setup.num_iterations:
            metrics = _iteration(context, setup, progress, next(batches))
            progress.next_iteration()
            log.log(progress.iteration, metrics)
            bar.advance(score=metrics["objective/scores"], kl=metrics["objective/kl"])
            last = progress.iteration == setup.num_iterations
            if last or (settings.eval_every and progress.iteration % settings.eval_every == 0):
                progress.after = evaluate(context, setup)
                log.log(progress.iteration, progress.after)
            if not last:
                context.safe_point(progress.point(settings), lambda: progress.state(setup))
    return {
        **progress.after,
        **{f"initial/{name}": value for name, value in progress.before.items()},
        "num_iterations": setup.num_iterations,
    }


def _iteration(
    context: StageContext, setup: Setup, progress: Progress, prompts: list[PreparedPrompt]
) -> dict[str, float]:
    """One iteration, or what is left of it; each phase is a line. Its metrics."""
    settings = context.recipe.ppo
    meter = PhaseMeter(context.device, exact=progress.iteration == 0)

    def safe_point(_: UpdateProgress | None = None) -> None:
        context.safe_point(progress.point(settings), lambda: progress.state(setup))

    beside = _scoring_beside(setup, prompts, settings)
    if progress.rollouts is None:
        with meter.phase("generate"):
            finished = beside.add if beside else None
            progress.rollouts = sample(context, setup, prompts, settings.answers_per_prompt, on_finished=finished)
        safe_point()
    rollouts, kl_coef, critic_pass = progress.rollouts, progress.kl_coef, None
    if progress.batch is None:
        with meter.phase("score"):
            critic_pass = critic_pass_of(setup.learners, settings)
            judgement = beside.finish(rollouts) if beside else None
            scored = make_experience(prompts, rollouts, setup.scorers, settings, kl_coef, critic_pass, judgement)
        progress.batch = scored
        if critic_pass is None:  # otherwise the critic's gradient is pending too
            safe_point()
    with meter.phase("update"):
        losses = _update(context, setup, progress, critic_pass, safe_point)
    metrics = _metrics(progress.batch, rollouts, kl_coef) | losses | _speed(meter, rollouts)
    if (accuracy := final_answer_accuracy(prompts, rollouts, setup.chat)) is not None:
        metrics["objective/final_answer_accuracy"] = accuracy
    if settings.kl_controller == "adaptive" and progress.iteration >= settings.critic_warmup_iterations:
        observed, target, horizon = metrics["objective/kl"], settings.kl_target, settings.kl_horizon
        progress.kl_coef = adapt_kl_coef(kl_coef, observed, target, len(rollouts), horizon)
    return metrics


def prompt_batches(
    prompts: Sequence[PreparedPrompt], blend: Blend, settings: PPOSection, iteration: int = 0
) -> Iterator[list[PreparedPrompt]]:
    """Batches of prompts without end, from that of `iteration` on, each prompt repeated answers_per_prompt times; every
    pass has its own order."""
    size, position = settings.prompts_per_iteration, iteration * settings.prompts_per_iteration
    orders: dict[int, list[int]] = {}
    while True:
        picked = [divmod(place, len(blend)) for place in range(position, position + size)]
        orders = {epoch: orders.get(epoch) or blend.order(epoch) for epoch in {epoch for epoch, _ in picked}}
        batch = [prompts[orders[epoch][within]] for epoch, within in picked]
        yield [prompt for prompt in batch for _ in range(settings.answers_per_prompt)]
        position += size


def sample(
    context: StageContext,
    setup: Setup,
    prompts: list[PreparedPrompt],
    answers_per_prompt: int = 1,
    sampler: torch.Generator | None = None,
    on_finished: Callable[[int, Rollout], None] | None = None,
) -> list[Rollout]:
    """One answer to each prompt, from the weights as they are now; `prompts` has each one answers_per_prompt times.
    Collective.

    `on_finished` is told of each answer, with its place, as soon as it is finished; with one process only.
    """
    return setup.answering(
        prompts,
        context.recipe.ppo.sampling,
        setup.chat.stop_ids,
        sampler or setup.sampler,
        answers_per_prompt,
        policy_version=setup.learners.actor.num_steps,
        on_finished=on_finished,
    )


def _scoring_beside(setup: Setup, prompts: list[PreparedPrompt], settings: PPOSection) -> ScoringBeside | None:
    if setup.scoring_stream is None:
        return None
    return ScoringBeside(setup.scorers, prompts, settings.sampling.temperature, setup.scoring_stream)


def evaluate(context: StageContext, setup: Setup) -> dict[str, float]:
    """Score and KL of fresh answers to held-out prompts (always from the same random numbers), and the text's
    perplexity."""
    settings = context.recipe.ppo
    sampler = torch.Generator(context.device).manual_seed(context.recipe.run.seed + 1)
    rollouts = sample(context, setup, setup.eval_prompts, sampler=sampler)
    batch = make_experience(setup.eval_prompts, rollouts, setup.scorers, settings, 0.0)
    scores = [experience.score for experience in batch.experiences]
    kl = batch.kl.tolist()
    metrics = {
        "ppo/eval_score": math.fsum(scores) / len(scores),
        "ppo/eval_score_standard_error": standard_error(scores),
        "ppo/eval_kl": math.fsum(kl) / len(kl),
    }
    if (accuracy := final_answer_accuracy(setup.eval_prompts, rollouts, setup.chat)) is not None:
        metrics["ppo/eval_final_answer_accuracy"] = accuracy
    if setup.text is not None:
        metrics["ppo/eval_text_perplexity"] = setup.text.perplexity(
            setup.learners.actor_forward, setup.learners.passes, context.device, context.dtype
        )
    return metrics


def _update(
    context: StageContext,
    setup: Setup,
    progress: Progress,
    critic_pass: CriticPass | None,
    safe_point: Callable[[UpdateProgress], None],
) -> dict[str, float]:
    settings, text = context.recipe.ppo, setup.text
    assert progress.batch is not None
    mixture = None
    if text is not None and settings.mixture.coef > 0:

        def mixture() -> tuple[tuple[Callable[[], Tensor], bool], ...]:
            return text.losses(setup.learners.actor_forward, setup.learners.passes, context.device)

    return update(
        progress.batch.experiences,
        setup.learners,
        settings,
        seed=context.recipe.run.seed,
        iteration=progress.iteration,
        train_actor=progress.iteration >= settings.critic_warmup_iterations,
        parity_bound=settings.parity_bound or AUTO_PARITY_BOUND[context.dtype],
        mixture=mixture,
        critic_pass=critic_pass,
        progress=progress.update,
        safe_point=safe_point,
    )


def _metrics(batch: ScoredBatch, rollouts: list[Rollout], kl_coef: float) -> dict[str, float]:
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    stopped = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    surprisal = math.fsum(-float(rollout.logprobs.sum()) for rollout in rollouts)
    restricted = [float((r.sampled_logprobs - r.logprobs).mean()) for r in rollouts]
    return {
        "objective/scores": math.fsum(experience.score for experience in batch.experiences) / len(rollouts),
        "objective/shaped_scores": float(batch.shaped_scores.mean()),
        "objective/kl": float(batch.kl.mean()),
        "objective/rlhf_reward": float(batch.rlhf_reward.mean()),
        "objective/entropy": surprisal / len(rollouts),
        "objective/kl_coef": kl_coef,
        "sampling/restriction_logprob": math.fsum(restricted) / len(restricted),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": max(lengths),
        "response_length/stopped": stopped / len(rollouts),
    }


def _speed(meter: PhaseMeter, rollouts: list[Rollout]) -> dict[str, float]:
    tokens = sum(len(rollout) for rollout in rollouts)
    return {**meter.metrics(), "perf/tokens_per_s": tokens / sum(meter.seconds.values())}

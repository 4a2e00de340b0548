"""Step 3 on models in memory: the same engines, scorers and update as stages/ppo.py puts together, on random weights.

This is the only file of the package that touches them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from threefold.bench.options import BenchOptions
from threefold.bench.random_models import random_causal_lm, random_scalar_model
from threefold.bench.results import Measurement
from threefold.bench.workload import Workload
from threefold.config.recipe import EMASection, GenerationSection, LoRASection, PPOSection, SamplingSection
from threefold.data.chat import ChatFormat
from threefold.engine.device import precision
from threefold.engine.hybrid import HybridEngine
from threefold.engine.phases import PhaseMeter
from threefold.engine.sharing import micro_batching
from threefold.engine.train import TrainEngine
from threefold.inference.generate import PREFILL_TOKENS, PREFILL_TOKENS_OF_GPU, GenerationLimits, num_slots
from threefold.inference.sampling import draw_uniforms
from threefold.inference.scheduler import ContinuousBatch
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.shapes import Shape
from threefold.stages.ppo import AUTO_PARITY_BOUND
from threefold.stages.ppo_update import Learners, critic_pass_of, update
from threefold.stages.rollout import Reference, RewardScorer, Scorers, make_experience
from threefold.types import PreparedPrompt, Prompt, Rollout

PAD_ID = FIRST_TOKEN = 0


@dataclass(frozen=True)
class Step3:
    """Everything that an iteration uses."""

    settings: PPOSection
    learners: Learners
    hybrid: HybridEngine
    scorers: Scorers
    sampler: torch.Generator
    device: torch.device
    dtype: torch.dtype
    seed: int


def ppo_settings(options: BenchOptions, longest_answer: int) -> PPOSection:
    """The recipe's section that the options stand for: its defaults, without moving average and warm-up."""
    return PPOSection(
        prompts_per_iteration=options.batch,
        answers_per_prompt=options.answers_per_prompt,
        minibatches=options.minibatches,
        micro_batch_tokens=options.micro_batch_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
        offload_optimizer=options.offload_optimizer,
        warmup_steps=0,
        ema=EMASection(enabled=False),
        actor_lora=actor_lora(options),
        sampling=SamplingSection(max_new_tokens=longest_answer),
    )


def actor_lora(options: BenchOptions) -> LoRASection:
    """The actor's adapters; rank 0 is none."""
    return LoRASection(rank=options.lora_rank)


def set_up(
    options: BenchOptions,
    actor_shape: Shape,
    critic_shape: Shape,
    longest_answer: int,
    device: torch.device,
    dtype: torch.dtype,
    note: Callable[[str], None],
) -> Step3:
    """Make the four models and what trains, generates and scores with them."""
    settings = ppo_settings(options, longest_answer)
    passes = micro_batching(settings.micro_batch_size, settings.micro_batch_tokens, device)
    actor = random_causal_lm(actor_shape, device, options.seed)
    critic = random_scalar_model(critic_shape, device, options.seed + 1)
    reward_model = copy.deepcopy(critic).requires_grad_(False)
    if settings.actor_lora.rank:
        add_lora(actor, settings.actor_lora, options.seed, "ppo.actor_lora")
        actor_forward = CausalForward(actor)
        reference = Reference(actor_forward, is_actor=True)
    else:
        actor_forward = CausalForward(actor)
        reference = Reference(CausalForward(copy.deepcopy(actor).requires_grad_(False)))
    num_steps = (options.warmup + options.iterations) * settings.ppo_epochs * settings.minibatches
    checkpointing = settings.gradient_checkpointing

    def engine(model: PreTrainedModel, which: str) -> TrainEngine:
        optimizer = settings.optimizer("actor" if which == "actor" else "critic")
        return TrainEngine(model, optimizer, num_steps, device, dtype, f"bench, {which}", None, checkpointing)

    learners = Learners(
        actor=engine(actor, "actor"),
        actor_forward=actor_forward,
        critic=engine(critic, "critic"),
        critic_model=critic,
        pad_id=PAD_ID,
        device=device,
        passes=passes,
    )
    offloaded = (learners.actor, learners.critic) if settings.offload_optimizer else ()
    chat = _no_text()
    return Step3(
        settings=settings,
        learners=learners,
        hybrid=HybridEngine(actor_forward, GenerationSection(), device, dtype, note, offloaded),
        scorers=Scorers(
            reference,
            critic,
            RewardScorer(reward_model, chat, chat, False, device, dtype, passes),
            PAD_ID,
            device,
            dtype,
            passes,
        ),
        sampler=torch.Generator(device).manual_seed(options.seed),
        device=device,
        dtype=dtype,
        seed=options.seed,
    )


def _no_text() -> ChatFormat:
    """A chat format for ids that are never rendered: it only says that actor and reward model read the same tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": PAD_ID}, "<pad>")))
    return ChatFormat(tokenizer, frozenset(), PAD_ID)


def run_iteration(step3: Step3, work: Workload, iteration: int) -> Measurement:
    """Generate, score, update: one iteration on `work`, measured.

    Before it, one token is generated for every answer, from the same weights: the time that lies before decoding.
    """
    per_prompt = step3.settings.answers_per_prompt
    together = _slots(step3, work) == len(work.sequences())
    before = PhaseMeter(step3.device)
    with before.phase("prefill"):
        _generate(step3, work, torch.Generator(step3.device).manual_seed(step3.seed), max_new_tokens=1)
    meter = PhaseMeter(step3.device)
    with meter.phase("generate"):
        rollouts = _rollouts(step3, work)
    prompts = [PreparedPrompt(Prompt(()), work.prompts[n // per_prompt], "bench") for n in range(len(rollouts))]
    critic_pass = critic_pass_of(step3.learners, step3.settings)
    with meter.phase("score"):
        batch = make_experience(prompts, rollouts, step3.scorers, step3.settings, step3.settings.kl_coef, critic_pass)
    with meter.phase("update"):
        losses = update(
            batch.experiences,
            step3.learners,
            step3.settings,
            seed=step3.seed,
            iteration=iteration,
            train_actor=True,
            parity_bound=AUTO_PARITY_BOUND[step3.dtype],
            mixture=None,
            critic_pass=critic_pass,
        )
    generated = [len(rollout.response_ids) for rollout in rollouts]
    assert generated == [answer for _, answer in work.sequences()], "an answer has not the length that was asked for"
    return Measurement(
        lengths=tuple(work.lengths()),
        seconds=meter.seconds,
        prefill_seconds=before.seconds["prefill"],
        peak_bytes=meter.peak_bytes,
        decodes_together=together,
        losses=losses,
    )


def _rollouts(step3: Step3, work: Workload) -> list[Rollout]:
    """Answers of exactly the lengths of `work`."""
    lengths = [answer for _, answer in work.sequences()]
    longest = step3.settings.sampling.max_new_tokens
    if set(lengths) == {longest}:
        return _generate(step3, work, step3.sampler, longest)
    return _generate_lengths(step3, work, lengths)


def _generate_lengths(step3: Step3, work: Workload, lengths: Sequence[int]) -> list[Rollout]:
    """Answers that stop by themselves at `lengths`, through the same scheduler, decoder and sampler.

    The first token of the vocabulary is the stop token. A uniform number of 0 always draws it, and one above its
    probability never does: the numbers are 0 or at least 1/2. So answers hold tokens of the second half of the
    probability only; their log-probs are the model's own.
    """
    hybrid, sampling = step3.hybrid, step3.settings.sampling
    longest_prompt = max(len(prompt) for prompt in work.prompts)
    uniforms = draw_uniforms(len(lengths), sampling.max_new_tokens, step3.sampler) / 2 + 0.5
    for answer, length in enumerate(lengths):
        uniforms[answer, length - 1] = 0.0
    with torch.no_grad(), hybrid.generating(len(lengths)), precision(step3.device, step3.dtype):
        slots = _slots(step3, work)
        batch = ContinuousBatch(
            hybrid.decoder,
            hybrid.decoder.new_cache(slots, longest_prompt + sampling.max_new_tokens),
            slots,
            work.prompts,
            sampling,
            frozenset({FIRST_TOKEN}),
            uniforms,
            answers_per_prompt=step3.settings.answers_per_prompt,
            prefill_tokens=PREFILL_TOKENS.get(step3.device.type, PREFILL_TOKENS_OF_GPU),
        )
        finished = {answer.answer: answer for answer in batch.run()}
    return [
        Rollout(
            prompt_ids=torch.tensor(work.prompts[number // step3.settings.answers_per_prompt]),
            response_ids=finished[number].tokens,
            logprobs=finished[number].logprobs,
            sampled_logprobs=finished[number].sampled_logprobs,
            finish_reason="stop",
            policy_version=step3.learners.actor.num_steps,
        )
        for number in range(len(lengths))
    ]


def _generate(step3: Step3, work: Workload, sampler: torch.Generator, max_new_tokens: int) -> list[Rollout]:
    """Answers of exactly `max_new_tokens`: there is no stop token."""
    return step3.hybrid.generate(
        work.prompts,
        step3.settings.sampling.model_copy(update={"max_new_tokens": max_new_tokens}),
        frozenset(),
        sampler,
        policy_version=step3.learners.actor.num_steps,
        answers_per_prompt=step3.settings.answers_per_prompt,
    )


def _slots(step3: Step3, work: Workload) -> int:
    """Answers that the memory for keys and values lets decode at once."""
    longest = max(len(prompt) for prompt in work.prompts)
    max_new_tokens = step3.settings.sampling.max_new_tokens
    return num_slots(step3.hybrid.decoder, longest, max_new_tokens, len(work.sequences()), GenerationLimits())

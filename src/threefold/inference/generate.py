"""Answers to prompts: how many are worked on at once, and the answers as records.

The loop is scheduler.py's, the model that goes on with the sequences a `Decoder` or, where the family is not in its
table, a `FallbackDecoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threefold.config.recipe import SamplingSection
from threefold.errors import ConfigError, DataError
from threefold.inference.decoder import make_decoder, why_not_covered
from threefold.inference.fallback import FallbackDecoder
from threefold.inference.sampling import draw_tokens, draw_uniforms
from threefold.inference.scheduler import Agree, ContinuousBatch, Finished, NonFiniteLogits, TokenDecoder
from threefold.machine.memory import free_bytes, return_freed_memory
from threefold.models.forward import CausalForward
from threefold.types import Rollout

KV_SHARE_OF_FREE = 0.8
"""Of the memory that is free when generation begins; the rest is for activations of the prefill and for logits."""
PREFILL_TOKENS = {"cpu": 2048}
PREFILL_TOKENS_OF_GPU = 16384
"""Enough to keep the matrix kernels busy; more only takes memory."""
GIB = 2**30


@dataclass(frozen=True)
class GenerationLimits:
    """How much is worked on at once; it changes no answer.

    Attributes:
        max_rows: most answers that are decoded together; 0: as many as the memory holds.
        kv_bytes: most memory for keys and values (generation.kv_memory_gib); 0: a share of what is free.
        free_bytes: memory that is free on the device; 0: measured when generation begins.
        prefill_tokens: most prompt tokens, padding included, in one prefill; 0: PREFILL_TOKENS of the device.
    """

    max_rows: int = 0
    kv_bytes: int = 0
    free_bytes: int = 0
    prefill_tokens: int = 0


@dataclass(frozen=True)
class Part:
    """Which prompts of a batch a process answers: each answer is the one that it would be in the whole batch.

    Attributes:
        prompt_numbers: of each prompt in the batch, from 0.
        total_prompts: of the batch. All of its random numbers are drawn, also for a part without a prompt, so that
            the generators of all processes go on alike.
    """

    prompt_numbers: Sequence[int]
    total_prompts: int

    def answer_numbers(self, answers_per_prompt: int) -> list[int]:
        """Numbers of the answers in the batch."""
        return [n * answers_per_prompt + answer for n in self.prompt_numbers for answer in range(answers_per_prompt)]


def decoder_for(
    model: PreTrainedModel, note: Callable[[str], None], cache_dtype: torch.dtype | None = None
) -> TokenDecoder:
    """The decoder of a model; where it has to be the slower one, `note` gets a line that says so.

    Args:
        cache_dtype: of keys, values, attention and packed weights, None for the weights'.
    """
    decoder = make_decoder(model, cache_dtype)
    if decoder is not None:
        return decoder
    fallback = FallbackDecoder(CausalForward(model))
    note(
        f"{model.config.model_type} generates on the slower forward of transformers, {fallback.past.value} "
        f"({why_not_covered(model)})"
    )
    return fallback


def _check_room(
    limit: int | None, prompts: Sequence[Sequence[int]], max_new_tokens: int, numbers: Sequence[int]
) -> None:
    for index, prompt in zip(numbers, prompts, strict=True):
        if not prompt:
            raise DataError(f"prompt {index + 1} of the batch is empty; a model needs at least one token to go on from")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise DataError(
                f"prompt {index + 1} of the batch: a prompt of {len(prompt)} tokens leaves no room for an answer of "
                f"{max_new_tokens} in a context of {limit}; lower data.max_prompt_length or ppo.sampling.max_new_tokens"
            )


def num_slots(
    decoder: TokenDecoder, longest_prompt: int, max_new_tokens: int, num_answers: int, limits: GenerationLimits
) -> int:
    """Sequences that the cache has room for: what the memory holds of the longest there can be, at most one each.

    Raises:
        ConfigError: if the memory does not hold one.
    """
    one = decoder.bytes_per_row(longest_prompt + max_new_tokens)
    wanted = min(num_answers, limits.max_rows or num_answers)
    free = limits.free_bytes or free_bytes(decoder.device)
    if not limits.free_bytes and one * wanted > free * KV_SHARE_OF_FREE:
        return_freed_memory(decoder.device)  # what this process has kept of earlier phases counts as taken until then
        free = free_bytes(decoder.device)
    share = int(free * KV_SHARE_OF_FREE)
    room = min(limits.kv_bytes, share) if limits.kv_bytes else share
    if one > room:
        remedy = "raise it" if room < share else "free memory on the device"
        raise ConfigError(
            f"generation.kv_memory_gib = {limits.kv_bytes / GIB:.3g}: a prompt of {longest_prompt} tokens and an "
            f"answer of {max_new_tokens} need {one / GIB:.3g} GiB for keys and values, and {room / GIB:.3g} GiB may be "
            f"used ({free / GIB:.3g} GiB are free); {remedy}, or lower data.max_prompt_length or "
            "ppo.sampling.max_new_tokens"
        )
    return min(wanted, room // max(one, 1))


@torch.no_grad()
def finished_answers(
    decoder: TokenDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSection,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    policy_version: int = 0,
    answers_per_prompt: int = 1,
    limits: GenerationLimits = GenerationLimits(),
    part: Part | None = None,
    agree: Agree | None = None,
) -> Iterator[tuple[int, Rollout]]:
    """`generate`, each answer handed out as soon as it is finished, with its number: that of its prompt times
    answers_per_prompt, plus its own.

    Args:
        part: which of the prompts of a larger batch these are; None: all of them.
        agree: makes what was drawn the same on every process of a tensor-parallel group.
    """
    part = part or Part(range(len(prompts)), len(prompts))
    assert len(part.prompt_numbers) == len(prompts)
    _check_room(decoder.context_length, prompts, sampling.max_new_tokens, part.prompt_numbers)
    if not part.total_prompts:
        return
    uniforms = draw_uniforms(part.total_prompts * answers_per_prompt, sampling.max_new_tokens, generator)
    if not prompts:
        return
    if len(prompts) < part.total_prompts:
        uniforms = uniforms[part.answer_numbers(answers_per_prompt)]
    longest = max(len(prompt) for prompt in prompts)
    num_answers = len(prompts) * answers_per_prompt
    slots = num_slots(decoder, longest, sampling.max_new_tokens, num_answers, limits)
    batch = ContinuousBatch(
        decoder,
        decoder.new_cache(slots, longest + sampling.max_new_tokens),
        slots,
        prompts,
        sampling,
        stop_ids,
        uniforms,
        answers_per_prompt,
        limits.prefill_tokens or PREFILL_TOKENS.get(decoder.device.type, PREFILL_TOKENS_OF_GPU),
        agree,
    )
    for finished in batch.run():
        yield finished.answer, _rollout(prompts[finished.answer // answers_per_prompt], finished, policy_version)


def generate(
    decoder: TokenDecoder | CausalForward,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSection,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    policy_version: int = 0,
    answers_per_prompt: int = 1,
    limits: GenerationLimits = GenerationLimits(),
) -> list[Rollout]:
    """Sample answers to prompts.

    Args:
        prompts: token ids, ragged.
        stop_ids: an answer ends with the first of these, which is part of it.
        generator: source of randomness. All of it is drawn at once, so `limits` changes no answer
            but by rounding, and n prompts with
            m answers each are answered as n * m prompts that repeat would be.
        policy_version: recorded in the rollouts.
        answers_per_prompt: they share the prompt's prefill.

    Returns:
        all answers to the first prompt, then to the second, ...

    Raises:
        DataError: if a prompt and the longest answer do not fit the model's context.
        ConfigError: if the memory for keys and values does not hold one sequence.
        NonFiniteLogits: if the logits are not finite.
    """
    if isinstance(decoder, CausalForward):
        decoder = FallbackDecoder(decoder)
    answers = dict(
        finished_answers(decoder, prompts, sampling, stop_ids, generator, policy_version, answers_per_prompt, limits)
    )
    return [answers[number] for number in range(len(prompts) * answers_per_prompt)]


def _rollout(prompt: Sequence[int], finished: Finished, policy_version: int) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        response_ids=finished.tokens,
        logprobs=finished.logprobs,
        sampled_logprobs=finished.sampled_logprobs,
        finish_reason="stop" if finished.stopped else "length",
        policy_version=policy_version,
    )


@torch.no_grad()
def stream_tokens(
    decoder: TokenDecoder | CausalForward,
    prompt: Sequence[int],
    sampling: SamplingSection,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """Decode one answer token by token; the stop token ends the stream and is not yielded."""
    if isinstance(decoder, CausalForward):
        decoder = FallbackDecoder(decoder)
    _check_room(decoder.context_length, [prompt], sampling.max_new_tokens, [0])
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=decoder.device)
    uniforms = draw_uniforms(1, sampling.max_new_tokens, generator).to(decoder.device)
    cache = decoder.new_cache(1, len(prompt) + sampling.max_new_tokens)
    ids = torch.tensor([list(prompt)], dtype=torch.int64, device=decoder.device)
    logits = decoder.prefill(ids, [len(prompt)], cache, 0)
    cache.num_rows = 1
    for step in range(sampling.max_new_tokens):
        banned: Tensor | None = None
        if step < sampling.min_new_tokens:
            banned = torch.ones(1, dtype=torch.bool, device=decoder.device)
        tokens, logprobs, sampled = draw_tokens(logits, sampling, uniforms[:, step], stops, banned)
        if not bool((logprobs + sampled).isfinite()):
            raise NonFiniteLogits(step + 1, [0])
        token = int(tokens)
        if token in stop_ids:
            return
        yield token
        if step + 1 < sampling.max_new_tokens:
            logits = decoder.step(tokens, cache)

"""Whole answers: greedy ones against transformers' own `generate`, and what may not change an answer.

Everything is tested on the decoder of the family, where it has one, and on the fallback. Log-probabilities are the
business of invariants/test_parity.py, the order of work that of test_scheduler.py.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tests.models.families_under_test import (
    BOS,
    CONFIGS,
    CONTEXT,
    EOS,
    PAD,
    SECOND_STOP,
    VOCAB,
    ragged_ids,
    tiny_causal_lm,
)
from threefold.config.recipe import SamplingSection
from threefold.errors import ConfigError, DataError
from threefold.inference.decoder import Decoder
from threefold.inference.fallback import FallbackDecoder
from threefold.inference.generate import (
    KV_SHARE_OF_FREE,
    GenerationLimits,
    Part,
    decoder_for,
    finished_answers,
    generate,
    num_slots,
    stream_tokens,
)
from threefold.inference.scheduler import NonFiniteLogits, TokenDecoder
from threefold.models.forward import CausalForward
from threefold.models.loading import generation_stop_ids, load_causal_lm, load_tokenizer
from threefold.types import Rollout

GREEDY = SamplingSection(temperature=0, max_new_tokens=16)
LENGTHS = [3, 17, 1, 9, 12, 5, 2, 20]


def answers(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in rollouts]


Make = Callable[[PreTrainedModel], TokenDecoder]


@pytest.fixture(params=["decoder", "fallback"])
def make(request: pytest.FixtureRequest) -> Make:
    """Turns a model into what goes on with sequences."""
    if request.param == "fallback":
        return lambda model: FallbackDecoder(CausalForward(model))
    return lambda model: decoder_for(model, lambda _: None)


@pytest.fixture
def sample(make: Make) -> Callable[..., list[Rollout]]:
    """`generate` on a model with the defaults of these tests."""

    def sample_from(
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSection,
        stops: Iterable[int] = (),
        seed: int = 0,
        max_rows: int = 0,
        **arguments: int,
    ) -> list[Rollout]:
        generator = torch.Generator().manual_seed(seed)
        limits = GenerationLimits(max_rows=max_rows)
        return generate(make(model), prompts, sampling, frozenset(stops), generator, limits=limits, **arguments)

    return sample_from


Sample = Callable[..., list[Rollout]]


def answer_of_transformers(
    model: PreTrainedModel, prompt: list[int], stops: set[int], max_new_tokens: int
) -> list[int]:
    """Greedy, one row, nothing padded."""
    ids = torch.tensor([prompt])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops) or None, pad_token_id=PAD
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def stops_that_are_met(model: PreTrainedModel, prompts: list[list[int]]) -> set[int]:
    """Three stop ids that end greedy answers to these prompts at as many different lengths as possible."""
    free = [answer_of_transformers(model, prompt, set(), GREEDY.max_new_tokens) for prompt in prompts]

    def different_lengths(stops: Iterable[int]) -> int:
        chosen = set(stops)
        return len({next((i for i, token in enumerate(answer) if token in chosen), None) for answer in free})

    return set(max(itertools.combinations(sorted({t for answer in free for t in answer}), 3), key=different_lengths))


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_answers_are_those_of_transformers(sample: Sample, family: str) -> None:
    model = tiny_causal_lm(family)
    prompts = ragged_ids(2, LENGTHS)
    stops = stops_that_are_met(model, prompts)
    ours = sample(model, prompts, GREEDY, stops)
    assert len({len(answer) for answer in answers(ours)}) >= 4  # some rows stop early, some late
    for prompt, rollout in zip(prompts, ours, strict=True):
        expected = answer_of_transformers(model, prompt, stops, 16)
        assert rollout.response_ids.tolist() == expected
        assert rollout.finish_reason == ("stop" if expected[-1] in stops else "length")
        assert rollout.prompt_ids.tolist() == prompt


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char-1M"])
def test_greedy_stories_are_those_of_transformers(sample: Sample, shared: Path, name: str) -> None:
    source = str(shared / "models" / name)
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    stops = {*generation_stop_ids(source), tokenizer(".").input_ids[-1]}
    # Every prompt begins with BOS (id 1), which is a stop id as well: only a drawn one ends an answer.
    assert 1 in stops
    texts = [
        "Once upon a time, there was a little",
        "Lily",
        "The cat",
        "One day, Tom and his mom went to the park. Tom",
    ]
    prompts = [tokenizer(text).input_ids for text in texts]
    assert {prompt[0] for prompt in prompts} == {1}
    ours = sample(model, prompts, SamplingSection(temperature=0, max_new_tokens=30), stops)
    for prompt, rollout in zip(prompts, ours, strict=True):
        assert rollout.response_ids.tolist() == answer_of_transformers(model, prompt, stops, 30)


@pytest.mark.real
def test_a_story_ends_with_either_of_its_two_stop_ids(sample: Sample, shared: Path) -> None:
    source = str(shared / "models" / "stories260K")
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    stops = set(generation_stop_ids(source))
    assert stops == {1, 2}
    prompt = tokenizer("They all lived happily ever after. The end.").input_ids
    sampling = SamplingSection(temperature=1.0, max_new_tokens=200)
    rollouts = sample(model, [prompt] * 16, sampling, stops)
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert any(int(rollout.response_ids[-1]) == 1 for rollout in stopped)  # the id that tokenizer.eos_token_id lacks
    assert tokenizer.eos_token_id == 2
    for rollout in rollouts:
        assert not stops & set(rollout.response_ids[:-1].tolist())


def test_any_stop_id_ends_an_answer_and_belongs_to_it(sample: Sample) -> None:
    model = tiny_causal_lm("opt")
    prompts = ragged_ids(0, [4] * 600)
    stops = {EOS, SECOND_STOP, 9, 11}
    rollouts = sample(model, prompts, SamplingSection(max_new_tokens=40, temperature=1.5), stops)
    assert {int(rollout.response_ids[-1]) for rollout in rollouts if rollout.finish_reason == "stop"} == stops
    for rollout in rollouts:
        *before, last = rollout.response_ids.tolist()
        assert not stops & set(before)
        assert (last in stops) == (rollout.finish_reason == "stop")
        assert len(rollout.response_ids) == len(rollout.logprobs) == len(rollout.sampled_logprobs)


def test_a_stop_id_at_the_last_possible_token_is_a_stop(sample: Sample) -> None:
    model = tiny_causal_lm("gpt2")
    prompt = ragged_ids(0, [4])
    (free,) = answers(sample(model, prompt, GREEDY))
    cut = free.index(free[5]) + 1
    (rollout,) = sample(model, prompt, SamplingSection(temperature=0, max_new_tokens=cut), {free[5]})
    assert rollout.response_ids.tolist() == free[:cut]
    assert rollout.finish_reason == "stop"


def test_without_a_stop_every_answer_has_the_greatest_length(sample: Sample) -> None:
    rollouts = sample(tiny_causal_lm("llama"), ragged_ids(0, LENGTHS), SamplingSection(max_new_tokens=7))
    assert [len(rollout.response_ids) for rollout in rollouts] == [7] * len(LENGTHS)
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_before_the_least_length(sample: Sample, temperature: float) -> None:
    model = tiny_causal_lm("llama")
    stops = set(range(5, VOCAB))  # nearly everything: without the ban, answers are one token long
    free = sample(model, ragged_ids(0, [3] * 30), SamplingSection(temperature=temperature, max_new_tokens=9), stops)
    assert sum(len(rollout.response_ids) for rollout in free) < 60
    sampling = SamplingSection(temperature=temperature, min_new_tokens=4, max_new_tokens=9)
    rollouts = sample(model, ragged_ids(0, [3] * 30), sampling, stops)
    for rollout in rollouts:
        assert not stops & set(rollout.response_ids[:4].tolist())
    # The least length is of tokens before the stop may come: the stop is token 5 at the earliest.
    assert min(len(rollout.response_ids) for rollout in rollouts) == 5


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_answers_do_not_depend_on_the_rows_beside(sample: Sample, family: str) -> None:
    model = tiny_causal_lm(family)
    prompts = ragged_ids(4, LENGTHS)
    stops = stops_that_are_met(model, prompts)
    together = answers(sample(model, prompts, GREEDY, stops))
    assert answers(sample(model, prompts[::-1], GREEDY, stops))[::-1] == together
    assert answers(sample(model, prompts, GREEDY, stops, max_rows=3)) == together
    assert [answers(sample(model, [prompt], GREEDY, stops))[0] for prompt in prompts] == together


@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_the_id_that_padding_uses_is_an_ordinary_token_in_a_prompt(sample: Sample, family: str) -> None:
    model = tiny_causal_lm(family)
    prompts = [[0, 7, 0, 0, 9, 0], [9, 9], [0] * 12, [PAD, 5, PAD]]
    ours = answers(sample(model, prompts, GREEDY, {EOS}))
    assert ours == [answer_of_transformers(model, prompt, {EOS}, 16) for prompt in prompts]
    # It does count: without those tokens the answer is another.
    assert ours[0] != answers(sample(model, [[7, 9]], GREEDY, {EOS}))[0]


def test_a_stop_id_inside_the_prompt_changes_nothing(sample: Sample) -> None:
    model = tiny_causal_lm("llama")
    prompt = [BOS, 8, EOS, BOS, 12, 13]
    (rollout,) = sample(model, [prompt], GREEDY, {BOS, EOS})
    assert rollout.response_ids.tolist() == answer_of_transformers(model, prompt, {BOS, EOS}, 16)


def test_one_seed_gives_the_same_answers_and_another_seed_others(sample: Sample) -> None:
    model, prompts = tiny_causal_lm("opt"), ragged_ids(0, LENGTHS)
    sampling = SamplingSection(max_new_tokens=20, top_p=0.9)
    first, second, other = (sample(model, prompts, sampling, {EOS}, seed=seed) for seed in (1, 1, 2))
    assert answers(first) == answers(second) != answers(other)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.logprobs, two.logprobs)
        assert torch.equal(one.sampled_logprobs, two.sampled_logprobs)


def test_decoding_leaves_the_global_generator_and_the_weights_alone(sample: Sample) -> None:
    model = tiny_causal_lm("opt")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    rollouts = sample(model, ragged_ids(0, LENGTHS), SamplingSection(max_new_tokens=5), {EOS})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert not any(rollout.logprobs.requires_grad for rollout in rollouts)


def test_answers_follow_the_weights_as_they_are_now(make: Make, sample: Sample) -> None:
    model = tiny_causal_lm("llama")
    decoder, prompts = make(model), ragged_ids(0, LENGTHS)
    before = generate(decoder, prompts, GREEDY, frozenset(), torch.Generator())
    model.load_state_dict(tiny_causal_lm("llama", seed=9).state_dict())
    after = generate(decoder, prompts, GREEDY, frozenset(), torch.Generator())
    assert answers(before) != answers(after)
    assert answers(after) == answers(sample(tiny_causal_lm("llama", seed=9), prompts, GREEDY))


def test_records_the_policy_version_and_the_types_of_the_record(sample: Sample) -> None:
    rollouts = sample(tiny_causal_lm("opt"), [[5, 6]], SamplingSection(max_new_tokens=3), policy_version=17)
    assert rollouts[0].policy_version == 17
    assert rollouts[0].prompt_ids.dtype == rollouts[0].response_ids.dtype == torch.int64
    assert rollouts[0].logprobs.dtype == rollouts[0].sampled_logprobs.dtype == torch.float32
    assert sample(tiny_causal_lm("opt"), [[5, 6]], SamplingSection(max_new_tokens=3))[0].policy_version == 0


def test_no_prompts_give_no_answers(sample: Sample) -> None:
    assert sample(tiny_causal_lm("opt"), [], GREEDY) == []


def test_a_prompt_that_leaves_no_room_is_refused(sample: Sample) -> None:
    model = tiny_causal_lm("opt")
    sampling = SamplingSection(max_new_tokens=10)
    fits = ragged_ids(0, [3, CONTEXT - 10])
    assert len(sample(model, fits, sampling)[1].response_ids) == 10
    with pytest.raises(DataError, match=f"prompt of {CONTEXT - 9} tokens .* answer of 10 .* context of {CONTEXT}"):
        sample(model, ragged_ids(0, [3, CONTEXT - 9]), sampling)


def test_an_empty_prompt_is_refused(sample: Sample) -> None:
    with pytest.raises(DataError, match="prompt 2 of the batch is empty"):
        sample(tiny_causal_lm("opt"), [[4], []], GREEDY)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_weights_end_the_run(sample: Sample, damage: float) -> None:
    model = tiny_causal_lm("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight[0, 0] = damage
    with pytest.raises(NonFiniteLogits, match="token 1 of an answer") as caught:
        sample(model, [[4, 5], [6]], SamplingSection(max_new_tokens=3))
    assert (caught.value.step, caught.value.prompts) == (1, (0, 1))
    for temperature in (0, 1):
        with pytest.raises(NonFiniteLogits):
            sample(model, [[4, 5], [6]], SamplingSection(temperature=temperature, max_new_tokens=3), {EOS})


def test_a_stream_is_the_answer_without_its_stop_token(make: Make, sample: Sample) -> None:
    model, prompt = tiny_causal_lm("llama"), [5, 6, 7]
    (free,) = answers(sample(model, [prompt], GREEDY))
    stop = free[6]
    expected = free[: free.index(stop)]
    stream = stream_tokens(make(model), prompt, GREEDY, frozenset({stop}), torch.Generator())
    assert list(stream) == expected
    stream = stream_tokens(make(model), prompt, GREEDY, frozenset(), torch.Generator())
    assert list(stream) == free
    sampling = SamplingSection(max_new_tokens=12, temperature=0.9)
    streamed = list(stream_tokens(make(model), prompt, sampling, frozenset(), torch.Generator().manual_seed(3)))
    assert [streamed] == answers(sample(model, [prompt], sampling, seed=3))


def test_a_stream_keeps_gradients_as_the_caller_has_them(make: Make) -> None:
    stream = stream_tokens(make(tiny_causal_lm("opt")), [5], GREEDY, frozenset(), torch.Generator())
    next(stream)
    assert torch.is_grad_enabled()


def test_a_stream_bans_stopping_and_finds_damage_like_whole_answers(make: Make, sample: Sample) -> None:
    model = tiny_causal_lm("llama")
    sampling = SamplingSection(min_new_tokens=4, max_new_tokens=9)
    stops = frozenset(range(5, VOCAB))
    (whole,) = sample(model, [[5, 6]], sampling, stops)
    streamed = list(stream_tokens(make(model), [5, 6], sampling, stops, torch.Generator().manual_seed(0)))
    assert streamed == whole.response_ids.tolist()[:-1]
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    with pytest.raises(NonFiniteLogits, match="token 1 of an answer"):
        next(stream_tokens(make(model), [5, 6], sampling, stops, torch.Generator()))


# --------------------------------------------------------------------------------- what is worked on at once

RAGGED = SamplingSection(max_new_tokens=24, temperature=1.4)
STOPS = range(3, 9)


def assert_same(one: Sequence[Rollout], other: Sequence[Rollout]) -> None:
    assert answers(one) == answers(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.prompt_ids, b.prompt_ids)
        assert a.finish_reason == b.finish_reason
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.sampled_logprobs, b.sampled_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_number_of_rows_changes_no_answer(sample: Sample, family: str) -> None:
    model, prompts = tiny_causal_lm(family), ragged_ids(3, LENGTHS)
    whole = sample(model, prompts, RAGGED, STOPS, answers_per_prompt=2)
    assert len({len(rollout.response_ids) for rollout in whole}) > 4
    for max_rows in (1, 2, 5):
        assert_same(sample(model, prompts, RAGGED, STOPS, max_rows=max_rows, answers_per_prompt=2), whole)


@pytest.mark.parametrize("max_rows", [0, 3])
def test_answers_to_one_prompt_are_those_of_repeated_prompts(sample: Sample, max_rows: int) -> None:
    model, prompts = tiny_causal_lm("opt"), ragged_ids(3, LENGTHS)
    repeated = [prompt for prompt in prompts for _ in range(4)]
    one_by_one = sample(model, repeated, RAGGED, STOPS)
    assert_same(sample(model, prompts, RAGGED, STOPS, max_rows=max_rows, answers_per_prompt=4), one_by_one)
    assert any(answers(one_by_one)[i] != answers(one_by_one)[i + 1] for i in range(0, 32, 4))


def test_an_answer_is_the_same_alone_and_in_company(make: Make) -> None:
    """The first prompt's randomness is the first of the generator's, whoever comes after it."""
    decoder, prompts = make(tiny_causal_lm("gpt2")), ragged_ids(3, LENGTHS)

    def answer(count: int) -> Rollout:
        return generate(decoder, prompts[:count], RAGGED, frozenset(STOPS), torch.Generator().manual_seed(5))[0]

    for count in (2, 5, 8):
        assert_same([answer(count)], [answer(1)])


def test_finished_answers_come_one_by_one_with_their_numbers(make: Make, sample: Sample) -> None:
    model, prompts = tiny_causal_lm("opt"), ragged_ids(3, LENGTHS)
    whole = sample(model, prompts, RAGGED, STOPS, answers_per_prompt=2)
    stream = finished_answers(
        make(model), prompts, RAGGED, frozenset(STOPS), torch.Generator().manual_seed(0), answers_per_prompt=2
    )
    handed_out = list(stream)
    numbers = [number for number, _ in handed_out]
    assert sorted(numbers) == list(range(16)) != numbers
    assert_same([rollout for _, rollout in sorted(handed_out, key=lambda one: one[0])], whole)


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("family", ["opt", "llama", "falcon"])
def test_slots_are_what_the_memory_holds(make: Make, family: str) -> None:
    decoder = make(tiny_causal_lm(family))
    one = decoder.bytes_per_row(30)
    assert one >= 2 * 2 * 4 * 8 * 29  # two layers, keys and values, float32, one head of 8, every token but the last

    def slots(**limits: int) -> int:
        return num_slots(decoder, 20, 10, 50, GenerationLimits(**limits))

    assert slots(kv_bytes=7 * one) == 7
    assert slots(kv_bytes=8 * one - 1) == 7
    assert slots(free_bytes=100 * one) == 50  # never more than answers
    assert slots(free_bytes=10 * one + 10) == int(10 * KV_SHARE_OF_FREE)
    assert slots(kv_bytes=7 * one, free_bytes=5 * one + 5) == int(5 * KV_SHARE_OF_FREE)
    assert slots(kv_bytes=7 * one, max_rows=3) == 3
    assert slots() == 50


def test_memory_for_less_than_one_sequence_is_refused(make: Make) -> None:
    decoder = make(tiny_causal_lm("opt"))
    one = decoder.bytes_per_row(30)
    for limits, remedy in (
        (GenerationLimits(kv_bytes=one - 1), "raise it"),
        (GenerationLimits(free_bytes=one), "free memory on the device"),
    ):
        with pytest.raises(ConfigError, match=r"generation\.kv_memory_gib = .* prompt of 20 .* answer of 10") as caught:
            generate(
                decoder, [[5] * 20], SamplingSection(max_new_tokens=10), frozenset(), torch.Generator(), limits=limits
            )
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)
    enough = GenerationLimits(kv_bytes=one)
    rollouts = generate(
        decoder, [[5] * 20] * 3, SamplingSection(max_new_tokens=10), frozenset(), torch.Generator(), limits=enough
    )
    assert len(rollouts) == 3


def test_the_cache_lives_no_longer_than_the_answers(make: Make) -> None:
    decoder: Any = make(tiny_causal_lm("opt"))
    caches: list[weakref.ref[object]] = []
    new_cache = decoder.new_cache

    def watched(max_rows: int, capacity: int) -> object:
        cache = new_cache(max_rows, capacity)
        caches.append(weakref.ref(cache))
        return cache

    decoder.new_cache = watched
    kept = generate(decoder, [[5, 6]] * 3, SamplingSection(max_new_tokens=4), frozenset(), torch.Generator())
    abandoned = finished_answers(decoder, [[5, 6]] * 3, RAGGED, frozenset(STOPS), torch.Generator())
    next(abandoned)
    abandoned.close()
    gc.collect()
    assert len(kept) == 3
    assert len(caches) == 2
    assert all(cache() is None for cache in caches)


# ------------------------------------------------------------------------------------------------- who goes on with it


def test_a_family_without_a_decoder_is_told() -> None:
    notes: list[str] = []
    assert isinstance(decoder_for(tiny_causal_lm("llama"), notes.append), Decoder)
    assert notes == []
    assert isinstance(decoder_for(tiny_causal_lm("falcon"), notes.append), FallbackDecoder)
    assert len(notes) == 1
    assert "falcon generates on the slower forward of transformers, all rows in one call" in notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_of_a_gpu_are_those_of_the_cpu(make: Make, sample: Sample) -> None:
    """Given the same numbers; the records come back to the host."""
    prompts = ragged_ids(3, LENGTHS)
    expected = sample(tiny_causal_lm("llama"), prompts, GREEDY, STOPS, answers_per_prompt=2)
    found = generate(
        make(tiny_causal_lm("llama").cuda()),
        prompts,
        GREEDY,
        frozenset(STOPS),
        torch.Generator("cuda"),
        answers_per_prompt=2,
        limits=GenerationLimits(max_rows=5),
    )
    assert answers(found) == answers(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs.device.type == one.response_ids.device.type == "cpu"
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_a_part_of_a_batch_is_answered_as_in_the_whole() -> None:
    """Bit by bit the random numbers of the whole batch, whichever prompts a process has; the generators go on alike."""
    model = tiny_causal_lm("llama")
    prompts, sampling = ragged_ids(5, LENGTHS), SamplingSection(max_new_tokens=7)
    arguments: Any = {"sampling": sampling, "stop_ids": frozenset({5, 6, 7}), "answers_per_prompt": 2}

    def answered(decoder: TokenDecoder, part: Part | None) -> tuple[dict[int, Rollout], float]:
        generator = torch.Generator().manual_seed(3)
        mine = prompts if part is None else [prompts[number] for number in part.prompt_numbers]
        found = dict(finished_answers(decoder, mine, generator=generator, part=part, **arguments))
        numbers = range(len(prompts) * 2) if part is None else part.answer_numbers(2)
        return {numbers[n]: rollout for n, rollout in found.items()}, float(torch.rand(1, generator=generator))

    for decoder in (decoder_for(model, lambda _: None), FallbackDecoder(CausalForward(model))):
        whole, next_number = answered(decoder, None)
        seen: set[int] = set()
        for numbers in ([6, 0, 3], [1, 2, 4, 5, 7], []):
            part, after = answered(decoder, Part(numbers, len(prompts)))
            assert after == next_number
            seen |= set(part)
            for number, rollout in part.items():
                assert torch.equal(rollout.response_ids, whole[number].response_ids)
                torch.testing.assert_close(rollout.logprobs, whole[number].logprobs, atol=1e-5, rtol=0)
        assert seen == set(whole)


def test_a_prompt_of_a_part_is_named_by_its_number_in_the_batch() -> None:
    decoder = decoder_for(tiny_causal_lm("llama"), lambda _: None)
    with pytest.raises(DataError, match="prompt 8 of the batch"):
        list(
            finished_answers(
                decoder, [[5], [6] * CONTEXT], GREEDY, frozenset(), torch.Generator(), part=Part([2, 7], 9)
            )
        )

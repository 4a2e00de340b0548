"""The decode loop: greedy answers against transformers' own `generate`, and what may not change an answer.

Log-probabilities are the business of invariants/test_parity.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

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
from threefold.errors import DataError, TrainingError
from threefold.inference.generate import generate, stream_tokens
from threefold.models.forward import CausalForward
from threefold.models.loading import generation_stop_ids, load_causal_lm, load_tokenizer
from threefold.types import Rollout

GREEDY = SamplingSection(temperature=0, max_new_tokens=16)
LENGTHS = [3, 17, 1, 9, 12, 5, 2, 20]


def answers(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in rollouts]


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSection,
    stops: set[int] = frozenset(),  # type: ignore[assignment]
    seed: int = 0,
    **arguments: int,
) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    return generate(CausalForward(model), prompts, sampling, frozenset(stops), generator, **arguments)


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
    free = answers(sample(model, prompts, GREEDY))

    def different_lengths(stops: Iterable[int]) -> int:
        chosen = set(stops)
        return len({next((i for i, token in enumerate(answer) if token in chosen), None) for answer in free})

    return set(max(itertools.combinations(sorted({t for answer in free for t in answer}), 3), key=different_lengths))


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
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
def test_greedy_stories_are_those_of_transformers(shared: Path, name: str) -> None:
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
def test_a_story_ends_with_either_of_its_two_stop_ids(shared: Path) -> None:
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


def test_any_stop_id_ends_an_answer_and_belongs_to_it() -> None:
    model = tiny_causal_lm("opt")
    prompts = ragged_ids(0, [4] * 200)
    stops = {EOS, SECOND_STOP, 9, 11}
    rollouts = sample(model, prompts, SamplingSection(max_new_tokens=40), stops)
    assert {int(rollout.response_ids[-1]) for rollout in rollouts if rollout.finish_reason == "stop"} == stops
    for rollout in rollouts:
        *before, last = rollout.response_ids.tolist()
        assert not stops & set(before)
        assert (last in stops) == (rollout.finish_reason == "stop")
        assert len(rollout.response_ids) == len(rollout.logprobs) == len(rollout.sampled_logprobs)


def test_a_stop_id_at_the_last_possible_token_is_a_stop() -> None:
    model = tiny_causal_lm("gpt2")
    prompt = ragged_ids(0, [4])
    (free,) = answers(sample(model, prompt, GREEDY))
    cut = free.index(free[5]) + 1
    (rollout,) = sample(model, prompt, SamplingSection(temperature=0, max_new_tokens=cut), {free[5]})
    assert rollout.response_ids.tolist() == free[:cut]
    assert rollout.finish_reason == "stop"


def test_without_a_stop_every_answer_has_the_greatest_length() -> None:
    rollouts = sample(tiny_causal_lm("llama"), ragged_ids(0, LENGTHS), SamplingSection(max_new_tokens=7))
    assert [len(rollout.response_ids) for rollout in rollouts] == [7] * len(LENGTHS)
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_before_the_least_length(temperature: float) -> None:
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
def test_greedy_answers_do_not_depend_on_the_rows_beside(family: str) -> None:
    model = tiny_causal_lm(family)
    prompts = ragged_ids(4, LENGTHS)
    stops = stops_that_are_met(model, prompts)
    together = answers(sample(model, prompts, GREEDY, stops))
    assert answers(sample(model, prompts[::-1], GREEDY, stops))[::-1] == together
    assert answers(sample(model, prompts, GREEDY, stops, batch_size=3)) == together
    assert [answers(sample(model, [prompt], GREEDY, stops))[0] for prompt in prompts] == together


@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_the_id_that_padding_uses_is_an_ordinary_token_in_a_prompt(family: str) -> None:
    model = tiny_causal_lm(family)
    prompts = [[0, 7, 0, 0, 9, 0], [9, 9], [0] * 12, [PAD, 5, PAD]]
    ours = answers(sample(model, prompts, GREEDY, {EOS}))
    assert ours == [answer_of_transformers(model, prompt, {EOS}, 16) for prompt in prompts]
    # It does count: without those tokens the answer is another.
    assert ours[0] != answers(sample(model, [[7, 9]], GREEDY, {EOS}))[0]


def test_a_stop_id_inside_the_prompt_changes_nothing() -> None:
    model = tiny_causal_lm("llama")
    prompt = [BOS, 8, EOS, BOS, 12, 13]
    (rollout,) = sample(model, [prompt], GREEDY, {BOS, EOS})
    assert rollout.response_ids.tolist() == answer_of_transformers(model, prompt, {BOS, EOS}, 16)


def test_one_seed_gives_the_same_answers_and_another_seed_others() -> None:
    model, prompts = tiny_causal_lm("opt"), ragged_ids(0, LENGTHS)
    sampling = SamplingSection(max_new_tokens=20, top_p=0.9)
    first, second, other = (sample(model, prompts, sampling, {EOS}, seed=seed) for seed in (1, 1, 2))
    assert answers(first) == answers(second) != answers(other)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.logprobs, two.logprobs)
        assert torch.equal(one.sampled_logprobs, two.sampled_logprobs)


def test_decoding_leaves_the_global_generator_and_the_weights_alone() -> None:
    model = tiny_causal_lm("opt")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    rollouts = sample(model, ragged_ids(0, LENGTHS), SamplingSection(max_new_tokens=5), {EOS})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert not any(rollout.logprobs.requires_grad for rollout in rollouts)


def test_answers_follow_the_weights_as_they_are_now() -> None:
    model = tiny_causal_lm("llama")
    forward, prompts = CausalForward(model), ragged_ids(0, LENGTHS)
    before = generate(forward, prompts, GREEDY, frozenset(), torch.Generator())
    model.load_state_dict(tiny_causal_lm("llama", seed=9).state_dict())
    after = generate(forward, prompts, GREEDY, frozenset(), torch.Generator())
    assert answers(before) != answers(after)
    assert answers(after) == answers(sample(tiny_causal_lm("llama", seed=9), prompts, GREEDY))


def test_records_the_policy_version_and_the_types_of_the_record() -> None:
    rollouts = sample(tiny_causal_lm("opt"), [[5, 6]], SamplingSection(max_new_tokens=3), policy_version=17)
    assert rollouts[0].policy_version == 17
    assert rollouts[0].prompt_ids.dtype == rollouts[0].response_ids.dtype == torch.int64
    assert rollouts[0].logprobs.dtype == rollouts[0].sampled_logprobs.dtype == torch.float32
    assert sample(tiny_causal_lm("opt"), [[5, 6]], SamplingSection(max_new_tokens=3))[0].policy_version == 0


def test_no_prompts_give_no_answers() -> None:
    assert sample(tiny_causal_lm("opt"), [], GREEDY) == []


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    model = tiny_causal_lm("opt")
    sampling = SamplingSection(max_new_tokens=10)
    fits = ragged_ids(0, [3, CONTEXT - 10])
    assert len(sample(model, fits, sampling)[1].response_ids) == 10
    with pytest.raises(DataError, match=f"prompt of {CONTEXT - 9} tokens .* answer of 10 .* context of {CONTEXT}"):
        sample(model, ragged_ids(0, [3, CONTEXT - 9]), sampling)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 2 of the batch is empty"):
        sample(tiny_causal_lm("opt"), [[4], []], GREEDY)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_weights_end_the_run(damage: float) -> None:
    model = tiny_causal_lm("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = damage
    with pytest.raises(TrainingError, match="token 1 of an answer"):
        sample(model, [[4, 5]], SamplingSection(max_new_tokens=3))
    for temperature in (0, 1):
        with pytest.raises(TrainingError):
            sample(model, [[4, 5], [6]], SamplingSection(temperature=temperature, max_new_tokens=3), {EOS})


def test_a_stream_is_the_answer_without_its_stop_token() -> None:
    model, prompt = tiny_causal_lm("llama"), [5, 6, 7]
    (free,) = answers(sample(model, [prompt], GREEDY))
    stop = free[6]
    expected = free[: free.index(stop)]
    stream = stream_tokens(CausalForward(model), prompt, GREEDY, frozenset({stop}), torch.Generator())
    assert list(stream) == expected
    stream = stream_tokens(CausalForward(model), prompt, GREEDY, frozenset(), torch.Generator())
    assert list(stream) == free
    sampling = SamplingSection(max_new_tokens=12, temperature=0.9)
    streamed = list(
        stream_tokens(CausalForward(model), prompt, sampling, frozenset(), torch.Generator().manual_seed(3))
    )
    assert [streamed] == answers(sample(model, [prompt], sampling, seed=3))


def test_a_stream_keeps_gradients_as_the_caller_has_them() -> None:
    stream = stream_tokens(CausalForward(tiny_causal_lm("opt")), [5], GREEDY, frozenset(), torch.Generator())
    next(stream)
    assert torch.is_grad_enabled()

"""Continuous batching against answers worked out one by one.

The model is a toy whose logits are a pure function of a row's whole history, so nothing that the scheduler does may
change an answer, to the last token. Its cache checks what every cache may rely on: the live rows are the first ones, no
row is read that was not written, no row grows beyond its capacity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles.distributions import softmax
from threefold.config.recipe import SamplingSection
from threefold.errors import TrainingError
from threefold.inference.scheduler import ContinuousBatch, Drawn, Finished, NonFiniteLogits

VOCAB = 7
Damage = dict[tuple[int, ...], float]
"""Histories after which the model is broken, and what it then gives as one of its logits."""


def toy_logits(history: Sequence[int]) -> list[float]:
    """Another distribution after every history; neither flat nor settled."""
    state = 17
    for token in history:
        state = (state * 31 + token + 1) % 100_003
    return [3.0 * math.sin(state * (token + 1)) for token in range(VOCAB)]


class ToyCache:
    """Each row's history; None where nothing may be read."""

    def __init__(self, max_rows: int, capacity: int) -> None:
        self.max_rows, self.capacity = max_rows, capacity
        self.num_rows = 0
        self.histories: list[list[int] | None] = [None] * max_rows
        self.num_moves = 0

    @property
    def lengths(self) -> list[int]:
        return [len(history or []) for history in self.histories]

    def read(self, row: int) -> list[int]:
        history = self.histories[row]
        assert history is not None, f"row {row} was never written, or has been moved away"
        return history

    def move(self, source: int, target: int) -> None:
        assert source != target
        self.histories[target] = self.read(source)
        self.histories[source] = None
        self.num_moves += 1

    def copy(self, source: int, targets: Sequence[int]) -> None:
        assert source not in targets
        for target in targets:
            self.histories[target] = list(self.read(source))

    def set_length(self, row: int, length: int) -> None:
        assert 0 < length <= len(self.read(row))
        self.histories[row] = self.read(row)[:length]


@dataclass
class ToyDecoder:
    """The model, and a record of the work that was asked for."""

    damage: Damage = field(default_factory=dict)
    prompts_read: list[tuple[int, ...]] = field(default_factory=list)
    prefill_shapes: list[tuple[int, int]] = field(default_factory=list)
    rows_of_steps: list[int] = field(default_factory=list)
    device = torch.device("cpu")
    context_length = None

    def bytes_per_row(self, capacity: int) -> int:
        return capacity

    def new_cache(self, max_rows: int, capacity: int) -> ToyCache:
        return ToyCache(max_rows, capacity)

    def _logits(self, histories: Sequence[Sequence[int]]) -> Tensor:
        logits = torch.tensor([toy_logits(history) for history in histories])
        for row, history in enumerate(histories):
            if tuple(history) in self.damage:
                logits[row, VOCAB // 2] = self.damage[tuple(history)]
        return logits

    def prefill(self, ids: Tensor, lengths: Sequence[int], cache: ToyCache, first_row: int) -> Tensor:
        prompts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        for row, prompt in enumerate(prompts, start=first_row):
            assert len(prompt) <= cache.capacity
            cache.histories[row] = list(prompt)
        self.prompts_read += [tuple(prompt) for prompt in prompts]
        self.prefill_shapes.append((ids.shape[0], ids.shape[1]))
        return self._logits(prompts)

    def step(self, ids: Tensor, cache: ToyCache) -> Tensor:
        assert len(ids) == cache.num_rows <= cache.max_rows
        for row, token in enumerate(ids.tolist()):
            cache.read(row).append(token)
            assert len(cache.read(row)) <= cache.capacity
        self.rows_of_steps.append(cache.num_rows)
        return self._logits([cache.read(row) for row in range(cache.num_rows)])


def one_answer(prompt: Sequence[int], sampling: SamplingSection, stops: frozenset[int], numbers: list[float]) -> tuple:
    """Tokens and their log-probabilities, drawn one by one by adding up probabilities."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for number in numbers:
        logits = toy_logits([*prompt, *tokens])
        whole = softmax(logits, sampling.temperature)
        if len(tokens) < sampling.min_new_tokens:
            logits = [-1e9 if token in stops else logit for token, logit in enumerate(logits)]
        sums = list(accumulate(softmax(logits, sampling.temperature)))
        tokens.append(next(token for token, total in enumerate(sums) if total > number * sums[-1]))
        logprobs.append(math.log(whole[tokens[-1]]))
        if tokens[-1] in stops:
            break
    return tokens, logprobs


def run(
    decoder: ToyDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSection,
    stops: frozenset[int],
    uniforms: Tensor,
    answers_per_prompt: int = 1,
    max_rows: int = 100,
    prefill_tokens: int = 100,
) -> list[Finished]:
    """All answers in the order in which they finish."""
    cache = ToyCache(max_rows, max(map(len, prompts)) + uniforms.shape[1])
    batch = ContinuousBatch(
        decoder, cache, max_rows, prompts, sampling, stops, uniforms, answers_per_prompt, prefill_tokens
    )
    finished = []
    num_answers = len(prompts) * answers_per_prompt
    unfinished_at_steps: list[int] = []
    for one in batch.run():
        unfinished_at_steps += [num_answers - len(finished)] * (len(decoder.rows_of_steps) - len(unfinished_at_steps))
        finished.append(one)
    # No slot is idle while an answer waits for one. (An answer that ends in the same step as others is handed out
    # after them, so of those the step's count is the first one's.)
    assert len(unfinished_at_steps) == len(decoder.rows_of_steps)
    for rows, unfinished in zip(decoder.rows_of_steps, unfinished_at_steps, strict=True):
        assert rows == min(max_rows, unfinished)
    return finished


def random_uniforms(num_answers: int, longest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_answers, longest, generator=generator, dtype=torch.float64)


tokens_of_prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(
    prompts=st.lists(tokens_of_prompts, min_size=1, max_size=8),
    answers_per_prompt=st.integers(1, 5),
    max_rows=st.integers(1, 12),
    longest=st.integers(1, 9),
    least=st.integers(0, 8),
    stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=4),
    prefill_tokens=st.integers(1, 120),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_every_answer_is_the_one_that_it_would_be_alone(
    prompts: list[list[int]],
    answers_per_prompt: int,
    max_rows: int,
    longest: int,
    least: int,
    stops: frozenset[int],
    prefill_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    sampling = SamplingSection(temperature=temperature, min_new_tokens=min(least, longest - 1), max_new_tokens=longest)
    uniforms = random_uniforms(len(prompts) * answers_per_prompt, longest, seed)
    decoder = ToyDecoder()
    finished = run(decoder, prompts, sampling, stops, uniforms, answers_per_prompt, max_rows, prefill_tokens)
    assert sorted(one.answer for one in finished) == list(range(len(uniforms)))
    for one in finished:
        numbers = uniforms[one.answer].tolist()
        tokens, logprobs = one_answer(prompts[one.answer // answers_per_prompt], sampling, stops, numbers)
        assert one.tokens.tolist() == tokens
        assert one.stopped == (tokens[-1] in stops)
        torch.testing.assert_close(one.logprobs, torch.tensor(logprobs), atol=1e-5, rtol=0)
        drawn_later = slice(sampling.min_new_tokens, None)
        assert torch.equal(one.sampled_logprobs[drawn_later], one.logprobs[drawn_later])
    # n answers share one reading of their prompt, and a reading stays within its budget
    assert sorted(decoder.prompts_read) == sorted(map(tuple, prompts))
    assert all(rows == 1 or rows * width <= prefill_tokens for rows, width in decoder.prefill_shapes)


def test_longer_prompts_come_first_and_similar_ones_together() -> None:
    lengths = [5, 100, 4, 90, 6, 80, 7]
    decoder = ToyDecoder()
    run(decoder, [[1] * length for length in lengths], SamplingSection(), frozenset(), random_uniforms(7, 3), 1, 7, 400)
    assert list(map(len, decoder.prompts_read)) == sorted(lengths, reverse=True)
    assert decoder.prefill_shapes == [(3, 100), (4, 7)]


def test_a_prompt_above_the_budget_is_read_alone() -> None:
    decoder = ToyDecoder()
    run(decoder, [[1] * 30, [2] * 30, [3]], SamplingSection(), frozenset(), random_uniforms(3, 2), 1, 3, 20)
    assert decoder.prefill_shapes == [(1, 30), (1, 30), (1, 1)]


def test_an_answer_that_stops_at_once_never_takes_part_in_a_step() -> None:
    decoder = ToyDecoder()
    every = frozenset(range(VOCAB))
    finished = run(decoder, [[token] for token in range(6)], SamplingSection(), every, random_uniforms(18, 9), 3, 2)
    assert len(finished) == 18
    assert all(len(one.tokens) == 1 and one.stopped for one in finished)
    assert decoder.rows_of_steps == []


def test_answers_of_one_token_need_no_step() -> None:
    decoder = ToyDecoder()
    finished = run(decoder, [[1], [2], [3]], SamplingSection(), frozenset(), random_uniforms(3, 1), max_rows=2)
    assert [len(one.tokens) for one in finished] == [1, 1, 1]
    assert not any(one.stopped for one in finished)
    assert decoder.rows_of_steps == []


def test_without_stops_a_full_batch_goes_on_to_the_end_together() -> None:
    decoder = ToyDecoder()
    run(decoder, [[1], [2], [3], [4]], SamplingSection(), frozenset(), random_uniforms(4, 6))
    assert decoder.rows_of_steps == [4] * 5  # the first of the six tokens comes from the prefill


def test_a_batch_shrinks_to_its_last_row() -> None:
    """Rows stop one after the other, from the first to the last; what remains is moved to the front."""
    uniforms = random_uniforms(40, 30)
    decoder = ToyDecoder()
    finished = run(decoder, [[1, 2]] * 40, SamplingSection(), frozenset({0}), uniforms)
    assert decoder.rows_of_steps[0] > 20
    assert decoder.rows_of_steps[-1] == 1
    assert decoder.rows_of_steps == sorted(decoder.rows_of_steps, reverse=True)
    assert sum(decoder.rows_of_steps) == sum(len(one.tokens) - 1 for one in finished)


def test_a_long_queue_takes_the_slots_of_finished_answers_without_moving_the_others() -> None:
    """One answer leaves at a time and one prompt comes: its slot is filled where it is."""
    longest = 20
    uniforms = random_uniforms(30, longest)
    stops = frozenset({0})
    prompts = [[token % VOCAB, token // VOCAB] for token in range(30)]
    decoder = ToyDecoder()
    cache = ToyCache(4, 2 + longest)
    batch = ContinuousBatch(decoder, cache, 4, prompts, SamplingSection(), stops, uniforms, 1, 100)
    singles = 0
    for finished in batch.run():
        singles += cache.num_rows == 4 and len(decoder.prompts_read) < 30
        expected, _ = one_answer(prompts[finished.answer], SamplingSection(), stops, uniforms[finished.answer].tolist())
        assert finished.tokens.tolist() == expected
    assert singles > 20
    assert cache.num_moves < 12


def test_answers_are_handed_out_when_they_finish() -> None:
    """Who scores answers while others are decoded sees the first before the last step."""
    decoder = ToyDecoder()
    batch = ContinuousBatch(
        decoder, ToyCache(8, 60), 8, [[1, 2]] * 8, SamplingSection(), frozenset({0}), random_uniforms(8, 50), 1, 100
    )
    steps_at_finish = []
    lengths = []
    for one in batch.run():
        steps_at_finish.append(len(decoder.rows_of_steps))
        lengths.append(len(one.tokens))
    assert steps_at_finish == [length - 1 for length in lengths] == sorted(steps_at_finish)
    assert steps_at_finish[0] < steps_at_finish[-1]


def test_what_is_handed_out_owns_its_memory() -> None:
    """A kept answer must not keep the tables of the whole batch."""
    finished = run(ToyDecoder(), [[1], [2]], SamplingSection(), frozenset({0}), random_uniforms(2, 50))
    for one in finished:
        for tensor in (one.tokens, one.logprobs, one.sampled_logprobs):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damage_in_one_logit_of_one_row_is_found_where_it_happens(damage: float, temperature: float) -> None:
    prompts = [[1], [2, 2], [3, 3, 3]]
    uniforms = random_uniforms(6, 10)
    sampling = SamplingSection(temperature=temperature)
    whole = run(ToyDecoder(), prompts, sampling, frozenset(), uniforms, 2)
    for broken, num_before in ((4, 0), (3, 1), (1, 6)):
        prompt = prompts[broken // 2]
        tokens = next(one for one in whole if one.answer == broken).tokens.tolist()
        decoder = ToyDecoder(damage={(*prompt, *tokens[:num_before]): damage})
        with pytest.raises(NonFiniteLogits) as caught:
            run(decoder, prompts, sampling, frozenset(), uniforms, 2)
        assert caught.value.step == num_before + 1
        assert caught.value.prompts == (broken // 2,)
        assert f"token {num_before + 1} of an answer (prompt {broken // 2 + 1} of the batch)" in str(caught.value)
        assert isinstance(caught.value, TrainingError)
        assert "\n" not in str(caught.value)


def test_damage_to_many_prompts_is_told_in_one_line() -> None:
    decoder = ToyDecoder(damage={(token,): math.nan for token in range(6)})
    with pytest.raises(
        NonFiniteLogits, match=r"token 1 of an answer \(prompt 1, 2, 3, 4, \.\.\. of the batch\)"
    ) as caught:
        run(decoder, [[token] for token in range(7)], SamplingSection(), frozenset(), random_uniforms(7, 3))
    assert caught.value.prompts == (0, 1, 2, 3, 4, 5)


def test_what_the_group_agrees_on_is_what_answers_go_on_with() -> None:
    """Tokens and log-probs of another process, which has drawn a stop where this one has not."""

    def agree(drawn: Drawn) -> Drawn:
        tokens, logprobs, sampled = drawn
        return torch.full_like(tokens, 5), logprobs - 1, sampled - 2

    sampling, stops = SamplingSection(max_new_tokens=4, temperature=0), frozenset({5})
    prompts, uniforms = [[1, 2], [3]], random_uniforms(2, 4)
    plain = run(ToyDecoder(), prompts, SamplingSection(max_new_tokens=1, temperature=0), stops, uniforms[:, :1])
    batch = ContinuousBatch(ToyDecoder(), ToyCache(2, 9), 2, prompts, sampling, stops, uniforms, 1, 100, agree)
    agreed = sorted(batch.run(), key=lambda one: one.answer)
    for one, alone in zip(agreed, sorted(plain, key=lambda one: one.answer), strict=True):
        assert one.tokens.tolist() == [5]
        assert one.stopped
        torch.testing.assert_close(one.logprobs, alone.logprobs - 1)
        assert one.sampled_logprobs.tolist() == [-2]

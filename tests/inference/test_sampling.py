"""How a token is drawn: against transformers' own warpers, naive loops, exact sums, and chi-square tests.

Chi-square: 20,000 draws from a fixed seed; the hypothesis "drawn from this distribution" is kept at p > 0.001 and must
be refused at p < 1e-9 where the distribution is another.
"""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from threefold.config.recipe import SamplingSection
from threefold.inference.sampling import (
    NUCLEUS_TOKENS,
    draw_tokens,
    draw_uniforms,
    restrict_logits,
)

NUM_DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.2, 0.0, -0.3, -1.0, -1.2, -2.5])
NO_STOPS = torch.tensor([], dtype=torch.int64)


def uniforms(count: int, seed: int = 0) -> Tensor:
    return draw_uniforms(1, count, torch.Generator().manual_seed(seed))[0]


def draw(
    logits: Tensor, sampling: SamplingSection, stops: Tensor = NO_STOPS, num_generated: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    banned = torch.ones(len(logits), dtype=torch.bool) if num_generated < sampling.min_new_tokens else None
    return draw_tokens(logits, sampling, uniforms(len(logits), seed), stops, banned)


def random_logits(rows: int = 200, vocab_size: int = 50, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * spread


def naive_distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Softmax at a temperature; the k likeliest; of those, renormalised, tokens until their sum reaches p."""
    weights = [math.exp(logit / temperature) for logit in logits]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = ranked[:top_k] if top_k else ranked
    total = math.fsum(weights[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        nucleus.append(token)
        if math.fsum(weights[chosen] for chosen in nucleus) / total >= top_p:
            break
    total = math.fsum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(weights))]


def chi_square_p(tokens: Tensor, expected: list[float]) -> float:
    """p-value of Pearson's test; a token that has probability 0 and was drawn gives 0."""
    counts = torch.bincount(tokens, minlength=len(expected)).tolist()
    if any(count for count, probability in zip(counts, expected, strict=True) if probability == 0):
        return 0.0
    cells = [(count, len(tokens) * p) for count, p in zip(counts, expected, strict=True) if p > 0]
    statistic = math.fsum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    assert len(cells) > 1
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


RESTRICTIONS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (2.5, 0, 1.0),
    (1.0, 4, 1.0),
    (1.0, 0, 0.8),
    (1.4, 6, 0.75),
    (1.0, 0, 0.6),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), RESTRICTIONS)
def test_drawn_frequencies_are_those_of_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    sampling = SamplingSection(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logprobs, sampled_logprobs = draw(LOGITS.expand(NUM_DRAWS, -1), sampling)
    expected = naive_distribution(LOGITS.tolist(), temperature, top_k, top_p)
    assert chi_square_p(tokens, expected) > 0.001
    assert chi_square_p(tokens, naive_distribution(LOGITS.tolist(), temperature * 1.2, top_k, top_p)) < 1e-9

    full = naive_distribution(LOGITS.tolist(), temperature, 0, 1.0)
    torch.testing.assert_close(logprobs, torch.tensor(full).log()[tokens], atol=1e-5, rtol=0)
    torch.testing.assert_close(sampled_logprobs, torch.tensor(expected).log()[tokens], atol=1e-5, rtol=0)


def test_the_chi_square_itself() -> None:
    # 12 draws, expected 4, 4, 4, drawn 6, 4, 2: statistic (4 + 0 + 4) / 4 = 2, and with 2 degrees p = exp(-1).
    tokens = torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    assert chi_square_p(tokens, [1 / 3] * 3) == pytest.approx(math.exp(-1), abs=1e-9)
    assert chi_square_p(tokens, [0.5, 0.5, 0.0]) == 0.0


@pytest.mark.parametrize("top_k", [0, 1, 3, 49, 50, 80])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
def test_restriction_is_that_of_transformers(top_k: int, top_p: float) -> None:
    logits = random_logits()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.6)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    before = logits.clone()
    ours = restrict_logits(logits / 0.6, top_k, top_p)
    assert torch.equal(ours, warpers(ids, logits))
    assert torch.equal(logits, before)  # in place, it would spoil the log-probabilities of the full distribution
    assert bool(torch.isfinite(ours).any(dim=1).all())


@pytest.mark.parametrize("spread", [4.0, 0.1])
@pytest.mark.parametrize("top_k", [0, 700])
def test_a_nucleus_is_found_in_a_large_vocabulary(spread: float, top_k: int) -> None:
    """Steep distributions are settled among the likeliest tokens, flat ones need all."""
    logits = random_logits(20, 3 * NUCLEUS_TOKENS, spread)
    ids = torch.zeros(20, 1, dtype=torch.int64)
    warpers = LogitsProcessorList(([TopKLogitsWarper(top_k)] if top_k else []) + [TopPLogitsWarper(0.9)])
    expected = warpers(ids, logits)
    assert bool((expected.isfinite().sum(dim=1) < NUCLEUS_TOKENS).all()) == (spread == 4.0)
    assert torch.equal(restrict_logits(logits, top_k, 0.9), expected)


def test_ties_at_the_kth_place_are_all_kept() -> None:
    kept = restrict_logits(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), top_k=2, top_p=1.0)
    assert kept.tolist() == [[-math.inf, 3.0, 2.0, 2.0, -math.inf]]


def test_the_likeliest_token_stays_however_small_p_is() -> None:
    kept = restrict_logits(random_logits(), top_k=0, top_p=1e-12)
    assert torch.equal(kept.isfinite().sum(dim=1), torch.ones(200, dtype=torch.int64))
    assert torch.equal(kept.argmax(dim=1), random_logits().argmax(dim=1))


def test_sampled_logprobs_are_the_renormalised_distribution_of_transformers() -> None:
    logits = random_logits()
    stops = torch.tensor([7, 3])
    sampling = SamplingSection(temperature=0.8, top_k=12, top_p=0.9, min_new_tokens=2)
    tokens, logprobs, sampled_logprobs = draw(logits, sampling, stops, num_generated=1)
    scores = (logits / 0.8).index_fill(1, stops, -math.inf)
    scores = TopPLogitsWarper(0.9)(tokens[:, None], TopKLogitsWarper(12)(tokens[:, None], scores))
    expected = scores.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(sampled_logprobs, expected, atol=1e-5, rtol=0)
    full = (logits / 0.8).log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, full, atol=1e-5, rtol=0)
    assert bool((sampled_logprobs >= logprobs - 1e-6).all())


def test_both_logprobs_are_one_where_nothing_is_restricted() -> None:
    _, logprobs, sampled_logprobs = draw(random_logits(), SamplingSection(temperature=0.8), torch.tensor([3]))
    assert torch.equal(logprobs, sampled_logprobs)


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = random_logits()
    tokens, logprobs, sampled_logprobs = draw(logits, SamplingSection(temperature=0, top_k=3, top_p=0.5))
    assert torch.equal(tokens, logits.argmax(dim=1))
    expected = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert torch.equal(sampled_logprobs, torch.zeros(len(tokens)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_are_banned_below_the_least_length_and_only_there(temperature: float) -> None:
    logits = torch.zeros(500, 6)
    logits[:, 4] = 9.0
    logits[:, 1] = 8.0
    sampling = SamplingSection(temperature=temperature, min_new_tokens=3)
    stops = torch.tensor([1, 4])
    for num_generated in range(3):
        tokens, logprobs, _ = draw(logits, sampling, stops, num_generated)
        assert not bool(torch.isin(tokens, stops).any())
        assert bool(logprobs.isfinite().all())
    tokens, _, _ = draw(logits, sampling, stops, num_generated=3)
    assert bool((tokens == 4).any())


def test_one_seed_gives_one_draw() -> None:
    first, second, other = (draw(random_logits(), SamplingSection(), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((NUM_DRAWS, 5), -math.inf)
    logits[:, 2] = 0.0
    tokens, logprobs, _ = draw(logits, SamplingSection())
    assert torch.equal(tokens, torch.full((NUM_DRAWS,), 2))
    assert torch.equal(logprobs, torch.zeros(NUM_DRAWS))


def test_frequencies_over_a_larger_vocabulary() -> None:
    logits = random_logits(1, 400, spread=1.5)
    tokens, logprobs, _ = draw(logits.expand(NUM_DRAWS, -1), SamplingSection(temperature=1.3))
    expected = naive_distribution(logits[0].tolist(), 1.3, 0, 1.0)
    assert chi_square_p(tokens, expected) > 0.001
    assert chi_square_p(tokens, naive_distribution(logits[0].tolist(), 1.5, 0, 1.0)) < 1e-9
    torch.testing.assert_close(logprobs, torch.tensor(expected).log()[tokens], atol=1e-5, rtol=0)


def naive_inverse(probabilities: list[float], uniform: float) -> int:
    """The first token whose cumulative probability is above the number, by adding up one after the other."""
    sums = list(accumulate(probabilities))
    return next(token for token, total in enumerate(sums) if total > uniform * sums[-1])


@pytest.mark.parametrize(("vocab_size", "spread"), [(10, 2.0), (300, 3.0), (50_257, 0.0), (256_000, 6.0)])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(vocab_size: int, spread: float) -> None:
    """Also where 256,000 probabilities are summed: float32 alone is off by hundreds of places there."""
    logits = random_logits(1, vocab_size, spread)
    numbers = torch.cat([torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), uniforms(29)])
    tokens, _, _ = draw_tokens(logits.expand(len(numbers), -1), SamplingSection(), numbers, NO_STOPS)
    probabilities = logits[0].double().softmax(dim=0)
    sums = probabilities.cumsum(0)
    # The cumulative distribution at the drawn token holds the number, to the precision of a float32 softmax.
    above, below = sums[tokens], sums[tokens] - probabilities[tokens]
    assert bool((above > numbers * (1 - 1e-6) - 1e-12).all())
    assert bool((below <= numbers * (1 + 1e-6) + 1e-12).all())
    expected = [naive_inverse(probabilities.tolist(), number) for number in numbers[:5].tolist()]
    assert max(abs(a - b) for a, b in zip(tokens[:5].tolist(), expected, strict=True)) <= (1 if spread else 2)


def test_unlikely_tokens_come_up_as_often_as_they_should() -> None:
    """A million draws with numbers on a grid: each of 1,000 tokens of probability 1e-6 is met once."""
    rare = 1000
    logits = torch.log(torch.tensor([[1 - rare * 1e-6] + [1e-6] * rare], dtype=torch.float64)).float()
    grid = (torch.arange(rare, dtype=torch.float64) + 0.5) * 1e-6 + (1 - rare * 1e-6)
    tokens, _, _ = draw_tokens(logits.expand(rare, -1), SamplingSection(), grid, NO_STOPS)
    counts = torch.bincount(tokens, minlength=rare + 1)[1:]
    # The softmax is float32: the edge of the big token is known to 6e-8, 0.06 of a rare token's width.
    assert int(counts.max()) <= 2
    assert int((counts == 1).sum()) > 0.9 * rare


@pytest.mark.parametrize("vocab_size", [5, 128, 259])
def test_neither_end_of_the_interval_draws_what_is_impossible(vocab_size: int) -> None:
    """One or two possible tokens anywhere, numbers at 0 and as near to 1 as they come."""
    ends = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0], dtype=torch.float64)
    for first in range(0, vocab_size, 7):
        for second in {first, vocab_size - 1}:
            logits = torch.full((1, vocab_size), -math.inf)
            logits[0, [first, second]] = torch.tensor([0.0, -80.0])[: 1 + (second != first)].expand(2).clone()
            tokens, logprobs, sampled = draw_tokens(logits.expand(6, -1), SamplingSection(), ends, NO_STOPS)
            assert set(tokens.tolist()) <= {first, second}
            assert bool(logprobs.isfinite().all())
            assert tokens[0] == first
            assert bool((sampled <= 0).all())


def test_restricted_tokens_are_never_drawn_whatever_the_number() -> None:
    logits = random_logits(500, 1000)
    allowed = restrict_logits(logits, top_k=40, top_p=0.7).isfinite()
    for numbers in (uniforms(500), *(torch.full((500,), end, dtype=torch.float64) for end in (0.0, 1 - 2**-53, 1.0))):
        tokens, _, _ = draw_tokens(logits, SamplingSection(top_k=40, top_p=0.7), numbers, NO_STOPS)
        assert bool(allowed.gather(1, tokens[:, None]).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_ban_on_stopping_is_of_each_row(temperature: float) -> None:
    logits = torch.zeros(600, 6)
    logits[:, 4] = 20.0
    banned = torch.arange(600) % 3 == 0
    sampling = SamplingSection(temperature=temperature, min_new_tokens=3)
    tokens, logprobs, sampled = draw_tokens(logits, sampling, uniforms(600), torch.tensor([4]), banned)
    assert not bool((tokens[banned] == 4).any())
    assert bool((tokens[~banned] == 4).all())
    assert torch.equal(logprobs[~banned], sampled[~banned]) or not temperature
    # What is logged is under the whole distribution, and what was drawn from: five equal tokens, or a certain one.
    torch.testing.assert_close(logprobs[banned], torch.full((200,), -20.0), atol=1e-4, rtol=0)
    if temperature:
        torch.testing.assert_close(sampled[banned], torch.full((200,), -math.log(5)), atol=1e-5, rtol=0)


def test_a_banned_stop_that_is_all_but_certain_leaves_finite_log_probabilities() -> None:
    """In float32 the others' probability is 0, their log-probability is not."""
    logits = torch.zeros(50, 6)
    logits[:, 4] = 150.0
    sampling = SamplingSection(min_new_tokens=1)
    tokens, logprobs, _ = draw_tokens(logits, sampling, uniforms(50), torch.tensor([4]), torch.ones(50).bool())
    assert not bool((tokens == 4).any())
    torch.testing.assert_close(logprobs, torch.full((50,), -150.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSection(),
        SamplingSection(temperature=0),
        SamplingSection(temperature=0.5, top_k=2),
        SamplingSection(top_p=0.5),
        SamplingSection(min_new_tokens=1),
    ],
)
def test_one_damaged_logit_shows_in_its_row_and_in_no_other(damage: float, sampling: SamplingSection) -> None:
    for place in (0, 3, 299):
        logits = random_logits(6, 300)
        logits[2, place] = damage
        tokens, logprobs, sampled = draw_tokens(
            logits, sampling, uniforms(6), torch.tensor([299]), torch.tensor([True, False] * 3)
        )
        assert (logprobs + sampled).isfinite().tolist() == [True, True, False, True, True, True]
        assert bool(((tokens >= 0) & (tokens < 300)).all())


def test_a_row_that_may_draw_nothing_shows() -> None:
    logits = torch.full((3, 4), -math.inf)
    logits[:, 1] = 0.0
    logits[2] = -math.inf
    banned = torch.tensor([False, True, False])
    for sampling in (SamplingSection(min_new_tokens=1), SamplingSection(min_new_tokens=1, top_p=0.5)):
        _, logprobs, sampled = draw_tokens(logits, sampling, uniforms(3), torch.tensor([1]), banned)
        assert (logprobs + sampled).isfinite().tolist() == [True, False, False]


def test_uniforms_are_fine_grained_and_of_the_generator() -> None:
    numbers = draw_uniforms(50, 40, torch.Generator().manual_seed(3))
    assert numbers.shape == (50, 40)
    assert numbers.dtype == torch.float64
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    assert bool((numbers * 2**24 % 1 != 0).any())  # finer than float32's
    assert torch.equal(numbers, draw_uniforms(50, 40, torch.Generator().manual_seed(3)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_the_cpu_draws_and_nothing_impossible() -> None:
    logits, numbers = random_logits(2000, 50_257), uniforms(2000)
    sampling = SamplingSection(temperature=0.7, top_k=100)
    expected, _, _ = draw_tokens(logits, sampling, numbers, NO_STOPS)
    tokens, logprobs, sampled = (x.cpu() for x in draw_tokens(logits.cuda(), sampling, numbers.cuda(), NO_STOPS.cuda()))
    assert float((tokens == expected).float().mean()) > 0.999  # but for the softmax's last digit
    assert bool((logprobs + sampled).isfinite().all())

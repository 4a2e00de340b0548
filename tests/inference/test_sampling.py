"""How a token is drawn: against transformers' own warpers, naive loops, and chi-square tests of drawn frequencies.

Chi-square: 20,000 draws from a fixed seed; the hypothesis "drawn from this distribution" is kept at p > 0.001 and must
be refused at p < 1e-9 where the distribution is another.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from threefold.config.recipe import SamplingSection
from threefold.inference.sampling import draw_tokens, restrict_logits

NUM_DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.2, 0.0, -0.3, -1.0, -1.2, -2.5])
NO_STOPS = torch.tensor([], dtype=torch.int64)


def draw(
    logits: Tensor, sampling: SamplingSection, stops: Tensor = NO_STOPS, num_generated: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return draw_tokens(logits, sampling, num_generated, stops, torch.Generator().manual_seed(seed))


def random_logits(rows: int = 200, vocab_size: int = 50) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * 3


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

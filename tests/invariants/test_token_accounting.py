"""What holds over the whole chain of algo/: log-probs -> KL -> rewards -> advantages -> whitening -> losses.

One PPO batch is worked from lists, answer by answer, with no padding anywhere; then the code under test gets the same
batch padded in many ways, and sums of micro-batches are compared with the whole. Each test states its tolerance.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import distributions, episodes, masks, ppo
from tests.oracles.batches import oracle_settings
from threefold.algo.advantages import estimate_advantages
from threefold.algo.kl import kl_per_token
from threefold.algo.logprobs import token_logprobs
from threefold.algo.losses import lm_loss_sum, pairwise_reward_loss_sum, policy_loss, value_loss
from threefold.algo.masked import masked_mean, whiten
from threefold.algo.rewards import shape_scores, token_rewards

KL_COEF, GAMMA, GAE_LAMBDA, CLIP = 0.1, 0.97, 0.9, 0.2
NAN = math.nan


@dataclass(frozen=True)
class Answer:
    """One sampled answer; every list has one number per token, the stop token included."""

    old: list[float]
    new: list[float]
    reference: list[float]
    values: list[float]
    new_values: list[float]
    score: float


def random_answers(lengths: list[int], seed: int) -> list[Answer]:
    source = random.Random(seed)

    def logprobs(length: int) -> list[float]:
        return [-source.expovariate(1.0) - 0.01 for _ in range(length)]

    def moved(entries: list[float]) -> list[float]:
        return [entry + source.gauss(0, 0.2) for entry in entries]

    answers = []
    for length in lengths:
        old, values = logprobs(length), [source.gauss(0, 1) for _ in range(length)]
        answers.append(Answer(old, moved(old), moved(old), values, moved(values), source.gauss(0, 2)))
    return answers


@dataclass(frozen=True)
class Outcome:
    """Of a whole batch: per-token lists, answer after answer, and the two losses per token."""

    rewards: list[float]
    advantages: list[float]
    returns: list[float]
    policy: float
    value: float


def by_hand(answers: list[Answer]) -> Outcome:
    """TRL's PPO step on lists; whitened by the population's variance."""
    rewards, advantages, returns = [], [], []
    for answer in answers:
        kl = [new - reference for new, reference in zip(answer.old, answer.reference, strict=True)]
        row = episodes.token_rewards(answer.score, kl, KL_COEF)
        rewards += row
        advantages += episodes.advantages_as_sum(row, answer.values, GAMMA, GAE_LAMBDA)
        returns += episodes.lambda_returns(row, answer.values, GAMMA, GAE_LAMBDA)
    white = masks.whitened([advantages], [[True] * len(advantages)], keep_mean=False, epsilon=1e-8)[0]
    flat = {field.name: [x for answer in answers for x in getattr(answer, field.name)] for field in fields(Answer)[:-1]}
    count = len(rewards)
    return Outcome(
        rewards,
        white,
        returns,
        ppo.policy(flat["new"], flat["old"], white, CLIP).loss / count,
        ppo.value(flat["new_values"], flat["values"], returns, CLIP).loss / count,
    )


def padded(answers: list[Answer], name: str, places: list[list[int]], width: int) -> Tensor:
    """[B, R]: the tokens of each answer at its places, NaN everywhere else."""
    rows = torch.full((len(answers), width), NAN, dtype=torch.float64)
    for row, answer, columns in zip(rows, answers, places, strict=True):
        row[columns] = torch.tensor(getattr(answer, name), dtype=torch.float64)
    return rows


def by_code(answers: list[Answer], places: list[list[int]], width: int) -> Outcome:
    batch = {field.name: padded(answers, field.name, places, width) for field in fields(Answer)[:-1]}
    mask = ~batch["old"].isnan()
    scores = torch.tensor([answer.score for answer in answers], dtype=torch.float64)
    kl = kl_per_token(batch["old"], batch["reference"])
    rewards = token_rewards(scores, kl, mask, KL_COEF)
    advantages, returns = estimate_advantages(rewards, batch["values"], mask, GAMMA, GAE_LAMBDA)
    white = whiten(advantages, mask)
    for tensor in (rewards, advantages, returns, white):
        assert tensor[~mask].abs().sum().item() == 0.0
    policy = policy_loss(batch["new"], batch["old"], white, mask, CLIP)
    value = value_loss(batch["new_values"], batch["values"], returns, mask, CLIP)
    count = int(mask.sum())
    return Outcome(
        rewards[mask].tolist(),
        white[mask].tolist(),
        returns[mask].tolist(),
        policy.loss.item() / count,
        value.loss.item() / count,
    )


def assert_same(found: Outcome, expected: Outcome, tolerance: float) -> None:
    for field in fields(Outcome):
        assert getattr(found, field.name) == pytest.approx(getattr(expected, field.name), abs=tolerance), field.name


def layouts(lengths: list[int], seed: int) -> list[tuple[list[list[int]], int]]:
    """Padding on the right, padding on the left, and gaps."""
    source = random.Random(seed)
    width = max(lengths) + source.randint(0, 3)
    return [
        ([list(range(length)) for length in lengths], width),
        ([list(range(width - length, width)) for length in lengths], width),
        ([sorted(source.sample(range(2 * width), length)) for length in lengths], 2 * width),
    ]


@oracle_settings
@given(
    lengths=st.one_of(
        st.lists(st.integers(1, 8), min_size=1, max_size=5),
        st.lists(st.just(1), min_size=2, max_size=5),
        st.integers(2, 6).map(lambda length: [length] * 3),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_chain_equals_the_loop_however_it_is_padded(lengths: list[int], seed: int) -> None:
    answers = random_answers(lengths, seed)
    expected = by_hand(answers)
    for places, width in layouts(lengths, seed):
        # Looser than a formula alone: whitening multiplies rounding where few advantages are nearly alike.
        assert_same(by_code(answers, places, width), expected, 1e-8)


def test_the_chain_needs_each_of_its_parts() -> None:
    """The comparison above can tell: the same oracle with one number of one answer changed does not agree."""
    lengths = [5, 1, 3]
    answers = random_answers(lengths, 7)
    places, width = layouts(lengths, 7)[0]
    found = by_code(answers, places, width)
    changed = [replace(answers[0], score=answers[0].score + 0.1), *answers[1:]]
    with pytest.raises(AssertionError):
        assert_same(found, by_hand(changed), 1e-4)


def test_the_stop_token_is_an_action_even_when_its_id_is_the_pad_id() -> None:
    """Sampled ids end in the stop token and are padded with the same id: the mask of lengths trains it, a mask of
    ids != pad would not. The logits of the stop token's position get exactly -A (onehot - p)."""
    stop = pad = 2
    ids = torch.tensor([[5, 1, stop, pad, pad], [stop, pad, pad, pad, pad]])
    lengths = torch.tensor([[3], [1]])
    mask = torch.arange(5) < lengths
    logits = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logprobs = token_logprobs(logits, ids)
    old = logprobs.detach()
    rewards = token_rewards(torch.tensor([1.0, -1.0]), kl_per_token(old, old), mask, KL_COEF)
    assert rewards.tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0, 0.0]]
    advantages, _ = estimate_advantages(rewards, torch.zeros(2, 5), mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.95**2, 0.95, 1.0, 0.0, 0.0], abs=1e-6)
    (slopes,) = torch.autograd.grad(policy_loss(logprobs, old, advantages, mask, CLIP).loss, logits)
    for row, position, advantage in ((0, 2, 1.0), (1, 0, -1.0)):
        onehot_minus_p = distributions.logprob_gradient(logits[row, position].tolist(), stop)
        by_theorem = [-advantage * g for g in onehot_minus_p]
        assert slopes[row, position].tolist() == pytest.approx(by_theorem, abs=1e-6)  # float32
    assert slopes[~mask].abs().sum().item() == 0.0
    # What must not be done: this mask has lost both stop tokens, and the second answer altogether.
    assert (ids != pad).sum(dim=1).tolist() == [2, 0]


def test_with_no_discount_the_whole_score_reaches_every_token() -> None:
    """gamma = lambda = 1: the return of a token is the score less the penalties still to come."""
    kl = torch.tensor([[0.5, 1.0, 0.25, NAN], [2.0, NAN, NAN, NAN]])
    mask = ~kl.isnan()
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl, mask, 0.2)
    values = torch.tensor([[0.3, -0.7, 0.9, NAN], [4.0, NAN, NAN, NAN]])
    _, returns = estimate_advantages(rewards, values, mask, 1.0, 1.0)
    expected = torch.tensor([[3 - 0.2 * 1.75, 3 - 0.2 * 1.25, 3 - 0.2 * 0.25, 0.0], [-1.4, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(returns, expected, atol=1e-6, rtol=0)


def test_the_first_update_is_the_plain_policy_gradient_and_its_whitened_loss_is_0() -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(6, 10, generator=generator)
    mask = torch.arange(10) < torch.randint(1, 11, (6, 1), generator=generator)
    advantages = whiten(torch.randn(6, 10, generator=generator), mask)
    found = policy_loss(logprobs, logprobs.clone(), advantages, mask, CLIP)
    count = int(mask.sum())
    assert found.loss.item() / count == pytest.approx(0, abs=1e-6)
    assert found.largest_ratio_error.item() == found.clipped.item() == found.approx_kl.item() == 0.0
    assert found.ratio.item() == found.ratio_squared.item() == count


def test_statistics_are_not_means_over_padding() -> None:
    """Clipped share, mean KL, mean ratio and mean entropy of a batch do not change when it is padded further."""
    generator = torch.Generator().manual_seed(2)
    old, advantages, entropy = -torch.rand(4, 6, generator=generator), *torch.randn(2, 4, 6, generator=generator)
    new = old + 0.4 * torch.randn(4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [2]])

    def statistics(width: int, filling: float) -> list[float]:
        def wider(tensor: Tensor, fill: float) -> Tensor:
            rows = torch.full((4, width), fill, dtype=tensor.dtype)
            rows[:, :6] = tensor
            return rows

        wide = wider(mask, False)
        loss = policy_loss(wider(new, filling), wider(old, filling), wider(advantages, filling), wide, CLIP)
        count = int(wide.sum())
        sums = [loss.loss, loss.clipped, loss.approx_kl, loss.ratio, loss.ratio_squared]
        mean_entropy = masked_mean(wider(entropy, filling), wide).item()
        return [*(total.item() / count for total in sums), mean_entropy, loss.largest_ratio_error.item()]

    expected = statistics(6, 0.0)
    assert 0 < expected[1] < 1
    for width, filling in ((6, NAN), (20, NAN), (20, 0.0), (20, 1e6)):
        assert statistics(width, filling) == pytest.approx(expected, abs=1e-6)  # float32 sums of another order


# --------------------------------------------------------------------------------------- micro-batches and processes


class TinyPolicy(torch.nn.Module):
    """Logits, a value per token and a score per answer, from features [B, R, 3]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator))
        self.value = torch.nn.Parameter(torch.randn(3, generator=generator))


LENGTHS = [7, 1, 4, 1, 2, 6]
GROUPINGS = [[[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[0, 1, 2, 3], [4, 5]], [[1, 3], [0, 2, 4, 5]]]


def losses_and_counts(model: TinyPolicy, rows: list[int]) -> dict[str, tuple[Tensor, int]]:
    """Each of the four losses as a sum over some rows, with the number of tokens (or pairs) in it."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(6, 7, 3, generator=generator)
    ids = torch.randint(5, (6, 7), generator=generator)
    old, advantages, old_values, returns = torch.randn(4, 6, 7, generator=generator)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    features, ids, advantages, returns, mask = (t[rows] for t in (features, ids, advantages, returns, mask))
    logprobs = token_logprobs(features @ model.weight, ids)
    values = features @ model.value
    count = int(mask.sum())
    old, old_values = logprobs.detach() + 0.2 * old[rows], values.detach() + 0.3 * old_values[rows]
    scores = values[:, 0]
    return {
        "lm": (lm_loss_sum(logprobs, mask), count),
        "policy": (policy_loss(logprobs, old, advantages, mask, CLIP).loss, count),
        "value": (value_loss(values, old_values, returns, mask, CLIP).loss, count),
        "pairwise": (pairwise_reward_loss_sum(scores, -scores), len(rows)),
    }


def step(groups: list[list[int]], name: str, mean_of_means: bool = False) -> tuple[float, list[Tensor]]:
    """Loss and gradients accumulated over groups of rows (micro-batches, or processes whose gradients are summed)."""
    model = TinyPolicy()
    global_count = losses_and_counts(model, GROUPINGS[0][0])[name][1]
    total = 0.0
    for rows in groups:
        loss_sum, count = losses_and_counts(model, rows)[name]
        loss = loss_sum / (count * len(groups) if mean_of_means else global_count)
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["lm", "policy", "value", "pairwise"])
def test_micro_batches_over_the_global_count_give_the_whole_batch(name: str) -> None:
    whole, expected = step(GROUPINGS[0], name)
    for groups in GROUPINGS[1:]:
        total, found = step(groups, name)
        assert total == pytest.approx(whole, abs=1e-6)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["lm", "policy", "value"])
def test_a_mean_of_means_would_not(name: str) -> None:
    """The answers are uneven enough that averaging per micro-batch, or per process, is seen."""
    _, expected = step(GROUPINGS[0], name)
    _, found = step(GROUPINGS[2], name, mean_of_means=True)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-2


def test_shaped_scores_enter_the_chain_with_the_penalty_of_the_unfinished() -> None:
    finished = torch.tensor([True, False])
    scores = shape_scores(torch.tensor([9.0, 9.0]), finished, 1.0, 2.0, 3.0, 1.0)
    rewards = token_rewards(scores, torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), KL_COEF)
    assert rewards.tolist() == [[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]]

"""algo/losses.py against TRL's published formulas token by token, hand-worked numbers and hand-worked gradients.

float64 to 1e-10 unless a test says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import distributions, masks, ppo
from tests.oracles.batches import Batch, batches, oracle_settings
from threefold.algo.logprobs import token_logprobs
from threefold.algo.losses import (
    PolicyLoss,
    ValueLoss,
    lm_loss_sum,
    pairwise_reward_loss_sum,
    plackett_luce_loss_sum,
    policy_loss,
    value_loss,
)

TOLERANCE = 1e-10


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of)
    return found


def real_tokens(
    batch: Batch, first: masks.Rows, second: masks.Rows, third: masks.Rows
) -> tuple[list[float], list[float], list[float]]:
    a, b, c = (masks.real_entries(rows, batch.mask) for rows in (first, second, third))
    return a, b, c


# ------------------------------------------------------------------------------------------------------------- policy


@oracle_settings
@given(batch=batches(), clip_range=st.sampled_from([0.05, 0.2, 0.5]))
def test_policy_loss_statistics_and_gradient_equal_the_loop(batch: Batch, clip_range: float) -> None:
    old = batch.logprobs()
    new, advantages = batch.near(old, 0.3), batch.rows()
    logprobs = batch.tensor(new).requires_grad_()
    mask = batch.mask_tensor
    found = policy_loss(logprobs, batch.tensor(old), batch.tensor(advantages), mask, clip_range)
    expected = ppo.policy(*real_tokens(batch, new, old, advantages), epsilon=clip_range)
    assert found.loss.item() == pytest.approx(expected.loss, abs=TOLERANCE)
    assert found.clipped.item() == expected.clipped
    assert found.approx_kl.item() == pytest.approx(expected.approx_kl, abs=TOLERANCE)
    assert found.ratio.item() == pytest.approx(expected.ratio, abs=TOLERANCE)
    assert found.ratio_squared.item() == pytest.approx(expected.ratio_squared, abs=TOLERANCE)
    assert found.largest_ratio_error.item() == pytest.approx(expected.largest_ratio_error, abs=TOLERANCE)
    slopes = gradient(found.loss, logprobs)
    assert slopes[mask].tolist() == pytest.approx(expected.gradient, abs=TOLERANCE)
    assert slopes[~mask].abs().sum().item() == 0.0  # NaN in the padding of all three arguments


# ratio, advantage -> loss, gradient of the log-probability, clipped; epsilon 0.2
POLICY_BY_HAND = [
    (1.0, 2.0, -2.0, -2.0, 0),
    (1.1, 2.0, -2.2, -2.2, 0),
    (1.5, 2.0, -2.4, 0.0, 1),  # already likelier than the clip allows: no more gain
    (1.5, -2.0, 3.0, 3.0, 0),  # the pessimistic side is never clipped
    (0.5, 2.0, -1.0, -1.0, 0),
    (0.5, -2.0, 1.6, 0.0, 1),
    (1.5, 0.0, 0.0, 0.0, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), POLICY_BY_HAND)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float, clipped: int) -> None:
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    mask = torch.tensor([[True]])
    found = policy_loss(new, old, torch.tensor([[advantage]], dtype=torch.float64), mask, 0.2)
    assert found.loss.item() == pytest.approx(loss, abs=TOLERANCE)
    assert gradient(found.loss, new).item() == pytest.approx(slope, abs=TOLERANCE)
    assert found.clipped.item() == clipped
    assert found.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=TOLERANCE)
    assert found.largest_ratio_error.item() == pytest.approx(abs(ratio - 1), abs=TOLERANCE)


def test_at_ratio_1_the_gradient_is_that_of_advantage_times_logprob() -> None:
    """The policy gradient theorem, through the softmax: -A (onehot - p), float32 to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
    ids = torch.randint(7, (3, 5), generator=generator)
    advantages = torch.randn(3, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    logprobs = token_logprobs(logits, ids)
    found = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    assert found.loss.item() == pytest.approx(-advantages[mask].sum().item(), abs=1e-6)
    assert (found.clipped.item(), found.approx_kl.item(), found.largest_ratio_error.item()) == (0, 0, 0)
    assert found.ratio.item() == found.ratio_squared.item() == 9
    slopes = gradient(found.loss, logits)
    for b in range(3):
        for t in range(5):
            onehot_minus_p = distributions.logprob_gradient(logits[b, t].tolist(), int(ids[b, t]))
            expected = [-advantages[b, t].item() * g if mask[b, t] else 0.0 for g in onehot_minus_p]
            assert slopes[b, t].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_lowers_the_loss_by_making_good_answers_likelier() -> None:
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    ids, mask = torch.tensor([[1]]), torch.tensor([[True]])
    before = token_logprobs(logits, ids)
    slopes = gradient(policy_loss(before, before.detach(), torch.tensor([[1.0]]), mask, 0.2).loss, logits)
    assert token_logprobs(logits - 0.1 * slopes, ids).item() > before.item()


def test_policy_statistics_carry_no_gradient_and_ignore_padding() -> None:
    new = torch.tensor([[-1.0, -3.0, -2.0]], requires_grad=True)
    old, advantages = torch.tensor([[-1.1, -1.0, -2.0]]), torch.tensor([[1.0, 5.0, -1.0]])
    mask = torch.tensor([[True, False, True]])
    found = policy_loss(new, old, advantages, mask, 0.2)
    alone = policy_loss(new[:, [0, 2]], old[:, [0, 2]], advantages[:, [0, 2]], mask[:, [0, 2]], 0.2)
    for name in ("clipped", "approx_kl", "ratio", "ratio_squared", "largest_ratio_error"):
        assert not getattr(found, name).requires_grad
        assert getattr(found, name).item() == getattr(alone, name).item()
    assert found.loss.item() == alone.loss.item()


# -------------------------------------------------------------------------------------------------------------- value


@oracle_settings
@given(batch=batches(), clip_range=st.sampled_from([0.05, 0.2, 0.5]))
def test_value_loss_and_gradient_equal_the_loop(batch: Batch, clip_range: float) -> None:
    old = batch.rows()
    new, returns = batch.near(old, 0.3), batch.rows()
    values = batch.tensor(new).requires_grad_()
    mask = batch.mask_tensor
    found = value_loss(values, batch.tensor(old), batch.tensor(returns), mask, clip_range)
    expected = ppo.value(*real_tokens(batch, new, old, returns), epsilon=clip_range)
    assert found.loss.item() == pytest.approx(expected.loss, abs=TOLERANCE)
    assert found.clipped.item() == expected.clipped
    slopes = gradient(found.loss, values)
    assert slopes[mask].tolist() == pytest.approx(expected.gradient, abs=TOLERANCE)
    assert slopes[~mask].abs().sum().item() == 0.0  # NaN in the padding of all three arguments


# value, old value, return -> loss, gradient, clipped; range 0.2
VALUE_BY_HAND = [
    (1.0, 1.0, 3.0, 2.0, -2.0, 0),
    (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9, 0),
    (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0, 1),  # moved far enough towards the return
    (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5, 0),  # moved away from it: not clipped
    (1.5, 1.0, 1.0, 0.5 * 0.5**2, 0.5, 0),
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "slope", "clipped"), VALUE_BY_HAND)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float, slope: float, clipped: int) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    before, returns = (torch.tensor([[number]], dtype=torch.float64) for number in (old, target))
    found = value_loss(values, before, returns, torch.tensor([[True]]), 0.2)
    assert found.loss.item() == pytest.approx(loss, abs=TOLERANCE)
    assert gradient(found.loss, values).item() == pytest.approx(slope, abs=TOLERANCE)
    assert found.clipped.item() == clipped


def test_a_value_within_the_range_is_never_counted_as_clipped() -> None:
    """In float32 old + (new - old) is not always new: a clip written that way counts rounding."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(1, 20000, generator=generator)
    old = new + 0.04 * torch.randn(1, 20000, generator=generator)
    returns = torch.randn(1, 20000, generator=generator)
    assert (new - old).abs().max() < 0.19
    by_difference = old + (new - old).clamp(-0.2, 0.2)
    assert ((by_difference - returns) ** 2 > (new - returns) ** 2).any()  # the numbers are such as to tell
    found = value_loss(new, old, returns, torch.ones(1, 20000, dtype=torch.bool), 0.2)
    assert found.clipped.item() == 0
    assert found.loss.item() == pytest.approx(0.5 * ((new - returns).double() ** 2).sum().item(), rel=1e-5)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}, {0, 1, 2}])
@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_padding_of_any_argument_gets_no_gradient(
    loss: Callable[..., PolicyLoss | ValueLoss], where: set[int], rubbish: float
) -> None:
    """What multiplies a NaN by 0 on the way back makes the gradient of all weights NaN."""
    mask = torch.tensor([[True, False]])
    trained, *fixed = (torch.tensor([[-1.0, rubbish if i in where else -1.1]]) for i in range(3))
    trained.requires_grad_()
    found = loss(trained, *fixed, mask, 0.2)
    assert math.isfinite(found.loss.item())
    slopes = gradient(found.loss, trained)
    assert math.isfinite(slopes[0, 0].item())
    assert slopes[0, 1].item() == 0.0


# ------------------------------------------------------------------------------------------------------------ language


@oracle_settings
@given(batch=batches())
def test_lm_loss_is_minus_the_sum_of_the_trained_tokens(batch: Batch) -> None:
    rows = batch.logprobs()
    logprobs = batch.tensor(rows).requires_grad_()
    found = lm_loss_sum(logprobs, batch.mask_tensor)
    assert found.item() == pytest.approx(-math.fsum(masks.real_entries(rows, batch.mask)), abs=TOLERANCE)
    assert torch.equal(gradient(found, logprobs), -batch.mask_tensor.double())


def test_lm_loss_of_nothing_is_0() -> None:
    assert lm_loss_sum(torch.full((1, 3), -math.inf), torch.zeros(1, 3, dtype=torch.bool)).item() == 0.0


# ------------------------------------------------------------------------------------------------------------ pairwise


def test_pairwise_loss_by_hand() -> None:
    # -log sigmoid(m): ln 2 at 0; ln(1 + e^-1) at 1; ln(1 + e^2) at -2; ln(4/3) at ln 3.
    for better, worse, expected in (
        (0.7, 0.7, 0.6931471806),
        (1.5, 0.5, 0.3132616875),
        (-1.0, 1.0, 2.1269280110),
        (math.log(3), 0.0, 0.2876820724),
    ):
        found = pairwise_reward_loss_sum(torch.tensor([better]), torch.tensor([worse]))
        assert found.item() == pytest.approx(expected, abs=1e-6)  # float32


def test_pairwise_loss_is_a_sum_and_its_gradient_the_probability_of_being_wrong() -> None:
    better = torch.tensor([0.5, -1.0, 3.0], requires_grad=True)
    worse = torch.tensor([0.0, 0.25, 3.0], requires_grad=True)
    loss = pairwise_reward_loss_sum(better, worse)
    margins = [0.5, -1.25, 0.0]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins), abs=1e-6)
    loss.backward()
    wrong = [1 / (1 + math.exp(m)) for m in margins]
    assert better.grad is not None
    assert worse.grad is not None
    assert better.grad.tolist() == pytest.approx([-p for p in wrong], abs=1e-6)
    assert worse.grad.tolist() == pytest.approx(wrong, abs=1e-6)


def test_pairwise_loss_depends_on_the_margin_only_and_survives_large_ones() -> None:
    better, worse = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.5])
    shifted = pairwise_reward_loss_sum(better + 10, worse + 10).item()
    assert shifted == pytest.approx(pairwise_reward_loss_sum(better, worse).item(), abs=1e-6)
    assert pairwise_reward_loss_sum(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000)
    assert pairwise_reward_loss_sum(torch.tensor([500.0]), torch.tensor([-500.0])).item() == 0.0


def test_pairwise_loss_of_bfloat16_scores_is_worked_in_float32() -> None:
    better, worse = torch.tensor([1.0]).bfloat16(), torch.tensor([0.5]).bfloat16()
    found = pairwise_reward_loss_sum(better, worse)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)


def test_weights_of_pairs_make_means_of_prompts() -> None:
    """Two pairs of one prompt and one of another: (ln 2 + ln(1 + e^-1)) / 2 + ln(1 + e^2)."""
    better, worse = torch.tensor([0.7, 1.5, -1.0]), torch.tensor([0.7, 0.5, 1.0])
    found = pairwise_reward_loss_sum(better, worse, torch.tensor([0.5, 0.5, 1.0]))
    assert found.item() == pytest.approx((0.6931471806 + 0.3132616875) / 2 + 2.1269280110, abs=1e-6)
    plain, ones = pairwise_reward_loss_sum(better, worse), pairwise_reward_loss_sum(better, worse, torch.ones(3))
    assert torch.equal(plain, ones)


# ------------------------------------------------------------------------------------------------------- plackett-luce


def plackett_luce(scores: Tensor, ranking: list[list[int]]) -> Tensor:
    """-ln(probability) of one ranking, summed over its choices."""
    among = [list(itertools.chain(*ranking[number:])) for number, tier in enumerate(ranking[:-1]) for _ in tier]
    chosen = [place for tier in ranking[:-1] for place in tier]
    width = max(map(len, among))
    left = torch.tensor([row + [0] * (width - len(row)) for row in among])
    mask = torch.tensor([[column < len(row) for column in range(width)] for row in among])
    return plackett_luce_loss_sum(scores[chosen], scores[left], mask, torch.ones(len(chosen)))


def test_plackett_luce_by_hand() -> None:
    """Strengths 6, 3, 1: in this order 6/10 * 3/4; the first two tied 6/10 * 3/10; the last two tied 6/10."""
    scores = torch.tensor([6.0, 3.0, 1.0]).log()
    for ranking, probability in (
        ([[0], [1], [2]], 6 / 10 * 3 / 4),
        ([[2], [1], [0]], 1 / 10 * 3 / 9),
        ([[0, 1], [2]], 6 / 10 * 3 / 10),
        ([[0], [1, 2]], 6 / 10),
        ([[1], [2]], 3 / 4),
    ):
        assert plackett_luce(scores, ranking).item() == pytest.approx(-math.log(probability), abs=1e-6)  # float32


def test_plackett_luce_probabilities_of_all_orders_add_up_to_1() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.4, 0.4])
    orders = [[[place] for place in order] for order in itertools.permutations(range(5))]
    total = math.fsum(math.exp(-plackett_luce(scores, order).item()) for order in orders)
    assert total == pytest.approx(1, abs=1e-5)


@given(better=st.floats(-20, 20), worse=st.floats(-20, 20))
def test_plackett_luce_of_two_is_the_pair(better: float, worse: float) -> None:
    scores = torch.tensor([better, worse])
    pair = pairwise_reward_loss_sum(scores[:1], scores[1:])
    assert plackett_luce(scores, [[0], [1]]).item() == pytest.approx(pair.item(), rel=1e-5, abs=2e-6)


def test_the_gradient_of_a_choice_is_probability_less_one() -> None:
    """Of the choice of 0 among three: softmax - (1, 0, 0); nothing flows to padding, however large its score."""
    scores = torch.tensor([0.5, 0.0, -0.5, 1000.0], requires_grad=True)
    left = torch.tensor([[0, 1, 2, 3]])
    mask = torch.tensor([[True, True, True, False]])
    loss = plackett_luce_loss_sum(scores[[0]], scores[left], mask, torch.tensor([1.0]))
    total = sum(math.exp(score) for score in (0.5, 0.0, -0.5))
    expected = [math.exp(0.5) / total - 1, 1 / total, math.exp(-0.5) / total, 0.0]
    assert gradient(loss, scores).tolist() == pytest.approx(expected, abs=1e-6)


def test_plackett_luce_survives_large_scores_and_works_in_float32() -> None:
    scores = torch.tensor([-1000.0, 1000.0, 0.0]).bfloat16()
    found = plackett_luce(scores, [[0], [1], [2]])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(2000)
    assert plackett_luce(scores, [[1], [2], [0]]).item() == 0.0

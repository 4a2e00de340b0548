"""algo/rewards.py: the score lands on the last real token and nowhere else; float64 to 1e-12."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import episodes
from tests.oracles.batches import Batch, batches, oracle_settings
from threefold.algo.rewards import shape_scores, token_rewards


@oracle_settings
@given(batch=batches(), kl_coef=st.sampled_from([0.0, 0.05, 1.0]))
def test_every_row_equals_the_loop_over_its_real_tokens(batch: Batch, kl_coef: float) -> None:
    kl = batch.rows()
    scores = [batch.source.gauss(0, 2) for _ in kl]
    found = token_rewards(torch.tensor(scores).double(), batch.tensor(kl), batch.mask_tensor, kl_coef)
    for row, flags, score, rewards in zip(kl, batch.mask, scores, found.tolist(), strict=True):
        expected = episodes.token_rewards(float(torch.tensor(score)), episodes.compact(row, flags), kl_coef)
        assert rewards == pytest.approx(episodes.spread(expected, flags), abs=1e-12)


def test_hand_worked_rows_of_different_lengths() -> None:
    nan = math.nan
    kl = torch.tensor([[0.5, -0.25, 1.0], [2.0, nan, nan], [1.0, 4.0, nan], [nan, 1.0, 2.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    scores = torch.tensor([1.0, 2.0, -3.0, 0.5])
    expected = [[-0.05, 0.025, 0.9], [1.8, 0.0, 0.0], [-0.1, -3.4, 0.0], [0.0, -0.1, 0.3]]
    torch.testing.assert_close(token_rewards(scores, kl, mask, 0.1), torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_row_sums_to_its_score_minus_its_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = torch.randn(50, 12, generator=generator).double()
    mask = torch.arange(12) < torch.randint(1, 13, (50, 1), generator=generator)
    scores = torch.randn(50, generator=generator).double()
    totals = token_rewards(scores, kl, mask, 0.3).sum(dim=1)
    torch.testing.assert_close(totals, scores - 0.3 * (kl * mask).sum(dim=1), atol=1e-12, rtol=0)


def test_the_score_is_not_off_by_one_whatever_the_pad_token() -> None:
    """DeepSpeed-Chat rebuilds the mask as ids != pad: with pad = stop the stop token vanishes from it, with another pad
    its reward lands on the first padding column. Here the mask comes from the answer's length."""
    stop = 2
    answer = [7, 9, stop]  # three tokens in a row of five
    last_real = 2
    landed = []
    for pad in (stop, 0):
        ids = [*answer, pad, pad]
        from_length = torch.tensor([[position < len(answer) for position in range(5)]])
        rewards = token_rewards(torch.tensor([1.0]), torch.zeros(1, 5), from_length, 0.1)
        assert rewards.tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0]]
        # The mistake that the test must be able to see: one past the number of tokens that are not padding.
        rebuilt = [token != pad for token in ids]
        landed.append((sum(rebuilt), rebuilt[last_real]))
    assert landed == [(2, False), (3, True)]  # right column but untrained; wrong column


def test_a_one_token_answer_gets_penalty_and_score_together() -> None:
    mask = torch.tensor([[True, False]])
    rewards = token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, math.nan]]), mask, 0.2)
    assert rewards.tolist() == [[pytest.approx(1.9), 0.0]]


def test_an_answer_without_tokens_is_refused() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="at least one real token"):
        token_rewards(torch.zeros(2), torch.zeros(2, 2), mask, 0.1)
    with pytest.raises(ValueError, match="at least one real token"):
        token_rewards(torch.zeros(2), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 0.1)


def test_arguments_are_left_as_they_were() -> None:
    kl, scores, mask = torch.ones(1, 2), torch.ones(1), torch.tensor([[True, True]])
    token_rewards(scores, kl, mask, 0.1)
    shape_scores(scores, torch.tensor([False]), 0.5, 2.0, 1.0, 1.0)
    assert kl.tolist() == [[1.0, 1.0]]
    assert scores.tolist() == [1.0]


# score, finished, mean, scale, clip, penalty -> shaped
HAND_WORKED = [
    (3.0, True, 0.0, 1.0, 0.0, 0.0, 3.0),
    (3.0, True, 1.0, 4.0, 0.0, 0.0, 0.5),
    (30.0, True, 1.0, 2.0, 5.0, 0.0, 5.0),
    (-30.0, True, 1.0, 2.0, 5.0, 0.0, -5.0),
    (30.0, False, 1.0, 2.0, 5.0, 1.5, 3.5),  # the penalty counts even at the clip
    (-30.0, False, 1.0, 2.0, 5.0, 1.5, -6.5),
    (3.0, True, 1.0, 4.0, 5.0, 1.5, 0.5),
    (6.0, True, 0.0, 1.0, 0.0, 9.0, 6.0),  # clip 0 does not clip
]


@pytest.mark.parametrize(("score", "finished", "mean", "scale", "clip", "penalty", "shaped"), HAND_WORKED)
def test_shape_scores_by_hand(
    score: float, finished: bool, mean: float, scale: float, clip: float, penalty: float, shaped: float
) -> None:
    found = shape_scores(torch.tensor([score]), torch.tensor([finished]), mean, scale, clip, penalty)
    assert found.tolist() == pytest.approx([shaped], abs=1e-6)


def test_weighed_scores_by_hand() -> None:
    """0.5 * clip((score - 1) / 2, +-5), and the penalty is not weighed; a weight of 0 leaves the penalty."""
    scores, finished = torch.tensor([30.0, 2.0, 2.0]), torch.tensor([True, True, False])
    assert shape_scores(scores, finished, 1.0, 2.0, 5.0, 1.5, 0.5).tolist() == [2.5, 0.25, -1.25]
    assert shape_scores(scores, finished, 1.0, 2.0, 5.0, 1.5, 0.0).tolist() == [0.0, 0.0, -1.5]


def test_normalised_scores_have_mean_0_and_spread_1() -> None:
    scores = 3 + 7 * torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
    shaped = shape_scores(
        scores, torch.ones(1000, dtype=torch.bool), scores.mean().item(), scores.std().item(), 0.0, 1.0
    )
    assert shaped.mean().item() == pytest.approx(0, abs=1e-12)
    assert shaped.std().item() == pytest.approx(1, abs=1e-12)

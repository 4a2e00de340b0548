"""algo/advantages.py against equation 16 written out as a sum, TRL's loop and the lambda-return.

The oracles take one answer at a time, without padding. float64 to 1e-10; float32 to 1e-5.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import episodes
from tests.oracles.batches import Batch, batches, oracle_settings
from threefold.algo.advantages import estimate_advantages

TOLERANCE = 1e-10
discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@oracle_settings
@given(batch=batches(), gamma=discounts, gae_lambda=discounts)
def test_every_row_equals_the_sum_the_loop_and_the_lambda_return(batch: Batch, gamma: float, gae_lambda: float) -> None:
    rewards, values = batch.rows(), batch.rows()
    advantages, returns = estimate_advantages(
        batch.tensor(rewards), batch.tensor(values), batch.mask_tensor, gamma, gae_lambda
    )
    for row, flags in enumerate(batch.mask):
        r, v = episodes.compact(rewards[row], flags), episodes.compact(values[row], flags)
        for oracle in (episodes.advantages_as_sum, episodes.advantages_by_trl):
            expected = episodes.spread(oracle(r, v, gamma, gae_lambda), flags)
            assert advantages[row].tolist() == pytest.approx(expected, abs=TOLERANCE)
        expected = episodes.spread(episodes.lambda_returns(r, v, gamma, gae_lambda), flags)
        assert returns[row].tolist() == pytest.approx(expected, abs=TOLERANCE)


@oracle_settings
@given(batch=batches(), gamma=discounts)
def test_lambda_1_returns_are_the_discounted_rewards_to_go(batch: Batch, gamma: float) -> None:
    rewards, values = batch.rows(), batch.rows()
    _, returns = estimate_advantages(batch.tensor(rewards), batch.tensor(values), batch.mask_tensor, gamma, 1.0)
    for row, flags in enumerate(batch.mask):
        expected = episodes.discounted_rewards_to_go(episodes.compact(rewards[row], flags), gamma)
        assert returns[row].tolist() == pytest.approx(episodes.spread(expected, flags), abs=TOLERANCE)


@oracle_settings
@given(batch=batches(), gamma=discounts)
def test_lambda_0_advantages_are_the_temporal_differences(batch: Batch, gamma: float) -> None:
    rewards, values = batch.rows(), batch.rows()
    advantages, _ = estimate_advantages(batch.tensor(rewards), batch.tensor(values), batch.mask_tensor, gamma, 0.0)
    for row, flags in enumerate(batch.mask):
        r, v = episodes.compact(rewards[row], flags), episodes.compact(values[row], flags)
        expected = episodes.spread(episodes.temporal_differences(r, v, gamma), flags)
        assert advantages[row].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_hand_worked() -> None:
    # gamma 1/2, lambda 1/2, rewards 0 0 8, values 4 2 2.
    # delta: 0 + 1 - 4 = -3; 0 + 1 - 2 = -1; 8 - 2 = 6. A: 6; -1 + 6/4 = 0.5; -3 + 0.5/4 = -2.875.
    rewards, values = torch.tensor([[0.0, 0.0, 8.0]]), torch.tensor([[4.0, 2.0, 2.0]])
    advantages, returns = estimate_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    assert advantages.tolist() == [[-2.875, 0.5, 6.0]]
    assert returns.tolist() == [[1.125, 2.5, 8.0]]


def test_a_gap_is_carried_over_not_zeroed() -> None:
    nan = math.nan
    mask = torch.tensor([[False, True, False, False, True, True, False]])
    rewards = torch.tensor([[nan, 0.0, nan, nan, 0.0, 8.0, nan]])
    values = torch.tensor([[nan, 4.0, nan, nan, 2.0, 2.0, nan]])
    advantages, returns = estimate_advantages(rewards, values, mask, 0.5, 0.5)
    # The numbers of the row without gaps, above. Zeroing would start anew before the gap: -4 in the first place.
    assert advantages.tolist() == [[0.0, -2.875, 0.0, 0.0, 0.5, 6.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.125, 0.0, 0.0, 2.5, 8.0, 0.0]]


def test_nothing_follows_the_last_token_whatever_stands_there() -> None:
    mask = torch.tensor([[True, False, False]])
    found = []
    for rubbish in (0.0, 1e6, math.nan, math.inf):
        rewards, values = torch.tensor([[3.0, rubbish, rubbish]]), torch.tensor([[1.0, rubbish, rubbish]])
        advantages, returns = estimate_advantages(rewards, values, mask, 1.0, 0.95)
        found.append((advantages.tolist(), returns.tolist()))
    assert found == [([[2.0, 0.0, 0.0]], [[3.0, 0.0, 0.0]])] * 4


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards = [0.1, -0.4, 0.0, 2.0, 0.3]
    values = episodes.discounted_rewards_to_go(rewards, 0.9)
    advantages, _ = estimate_advantages(
        torch.tensor([rewards]).double(), torch.tensor([values]).double(), torch.ones(1, 5, dtype=torch.bool), 0.9, 0.95
    )
    assert advantages.abs().max().item() == pytest.approx(0, abs=1e-6)  # the rewards went through float32


def test_a_row_does_not_depend_on_its_neighbours_and_one_masked_out_is_0() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 8, generator=generator)
    mask = torch.rand(4, 8, generator=generator) < 0.6
    mask[2] = False
    together, _ = estimate_advantages(rewards, values, mask, 0.99, 0.9)
    for row in range(4):
        alone, _ = estimate_advantages(rewards[row, None], values[row, None], mask[row, None], 0.99, 0.9)
        assert torch.equal(alone[0], together[row])
    assert together[2].tolist() == [0.0] * 8


def test_long_float32_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, 256, generator=generator)
    mask = torch.ones(3, 256, dtype=torch.bool)
    advantages, _ = estimate_advantages(rewards, values, mask, 1.0, 0.95)
    for row in range(3):
        expected = episodes.advantages_as_sum(rewards[row].tolist(), values[row].tolist(), 1.0, 0.95)
        assert advantages[row].tolist() == pytest.approx(expected, abs=1e-5)

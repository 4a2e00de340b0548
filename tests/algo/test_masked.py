"""algo/masked.py against loops over the real entries; float64 to 1e-10 unless a test says otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import masks
from tests.oracles.batches import Batch, batches, oracle_settings
from threefold.algo.masked import masked_mean, masked_sum, masked_var, whiten

TOLERANCE = 1e-10


@oracle_settings
@given(batch=batches())
def test_sum_mean_and_variance_are_those_of_the_real_entries(batch: Batch) -> None:
    rows = batch.rows(scale=3.0)
    entries = masks.real_entries(rows, batch.mask)
    values, mask = batch.tensor(rows), batch.mask_tensor
    assert masked_sum(values, mask).item() == pytest.approx(math.fsum(entries), abs=TOLERANCE)
    assert masked_mean(values, mask).item() == pytest.approx(masks.mean(entries), abs=TOLERANCE)
    assert masked_var(values, mask).item() == pytest.approx(masks.population_variance(entries), abs=TOLERANCE)


@oracle_settings
@given(batch=batches(), shift_mean=st.booleans())
def test_whiten_equals_the_loop(batch: Batch, shift_mean: bool) -> None:
    rows = batch.rows(scale=3.0)
    expected = masks.whitened(rows, batch.mask, keep_mean=not shift_mean, epsilon=1e-8)
    whitened = whiten(batch.tensor(rows), batch.mask_tensor, shift_mean)
    # Looser: where few entries are nearly alike, 1 / sqrt(variance + 1e-8) multiplies rounding by up to 1e4.
    torch.testing.assert_close(whitened, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


# The flag is not read through the code's own name for it: what is asserted is the mean and the variance that come out.
# (A published library has the flag inverted, and its test calls the function to know what to expect.)


def test_whiten_moves_the_mean_to_0_by_default() -> None:
    values = torch.tensor([[2.0, 4.0, math.nan], [9.0, math.inf, -math.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    real = whiten(values, mask)[mask]
    # By hand: mean 5, squared distances 9, 1, 16, population variance 26/3.
    root = math.sqrt(26 / 3)
    torch.testing.assert_close(real, torch.tensor([-3 / root, -1 / root, 4 / root]), atol=1e-6, rtol=0)
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(whiten(values, mask, shift_mean=True), whiten(values, mask))


def test_whiten_without_shift_keeps_the_mean() -> None:
    values = torch.tensor([[2.0, 4.0, math.nan], [9.0, math.inf, -math.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    real = whiten(values, mask, shift_mean=False)[mask]
    assert real.mean().item() == pytest.approx(5, abs=1e-6)
    assert real.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whiten_makes_padding_0_with_and_without_shift() -> None:
    values = torch.tensor([[3.0, math.nan, 8.0], [math.inf, 1.0, -math.inf]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    for shift_mean in (True, False):
        assert whiten(values, mask, shift_mean)[~mask].tolist() == [0.0, 0.0, 0.0]


def test_whiten_statistics_hold_over_a_large_float32_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3.0 + 0.5 * torch.randn(64, 200, generator=generator)
    mask = torch.rand(64, 200, generator=generator) < 0.7
    values[~mask] = 1e30
    shifted, unshifted = (whiten(values, mask, flag)[mask].double() for flag in (True, False))
    assert shifted.mean().item() == pytest.approx(0, abs=1e-5)
    assert shifted.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert unshifted.mean().item() == pytest.approx(values[mask].double().mean().item(), abs=1e-5)
    assert unshifted.var(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_whiten_differs_from_trl_by_bessels_factor_only() -> None:
    entries = [0.3, -1.2, 2.5, 0.9, -0.1]
    ours = whiten(torch.tensor([entries], dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool))[0]
    factor = math.sqrt(5 / 4)
    expected = [entry * factor for entry in masks.whitened_by_trl(entries)]
    # 1e-7: the 1e-8 under the root sits beside another variance.
    assert ours.tolist() == pytest.approx(expected, abs=1e-7)


def test_whiten_of_one_entry() -> None:
    values, mask = torch.tensor([[math.nan, 7.5]]), torch.tensor([[False, True]])
    assert whiten(values, mask).tolist() == [[0.0, 0.0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[0.0, 7.5]]


def test_whiten_of_equal_entries_is_not_noise() -> None:
    values, mask = torch.full((3, 4), 0.25), torch.ones(3, 4, dtype=torch.bool)
    assert whiten(values, mask).abs().max().item() == 0.0


def test_masked_sum_of_nothing_is_0_and_a_mean_of_nothing_is_refused() -> None:
    values, nothing = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(values, nothing).item() == 0.0
    for refuses in (masked_mean, masked_var, whiten):
        with pytest.raises(ValueError, match="no real entry"):
            refuses(values, nothing)


def test_masked_sum_gives_no_gradient_to_padding() -> None:
    values = torch.tensor([[1.0, math.nan], [math.inf, 2.0]], requires_grad=True)
    masked_sum(values, torch.tensor([[True, False], [False, True]])).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]

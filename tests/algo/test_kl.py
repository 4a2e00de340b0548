"""algo/kl.py: estimators against probabilities, their expectation against the exact divergence; the controller."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import distributions, ppo
from tests.oracles.batches import oracle_settings
from threefold.algo.kl import KLEstimator, adapt_kl_coef, kl_per_token

logit_lists = st.lists(st.floats(-4, 4), min_size=2, max_size=8)


def logs(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64)


def test_hand_worked() -> None:
    # Policy 1/2, reference 1/4: r = 1/2, log r = -ln 2.
    new, reference = torch.tensor(math.log(0.5)).double(), torch.tensor(math.log(0.25)).double()
    ln2 = math.log(2)
    by_hand: dict[KLEstimator, float] = {"k1": ln2, "k2": ln2**2 / 2, "k3": 0.5 - 1 + ln2}
    for estimator, expected in by_hand.items():
        assert kl_per_token(new, reference, estimator).item() == pytest.approx(expected, abs=1e-7)
    # Turned round, k1 is negative, the others are not.
    assert kl_per_token(reference, new, "k1").item() == pytest.approx(-ln2, abs=1e-7)
    assert kl_per_token(reference, new, "k3").item() == pytest.approx(2 - 1 - ln2, abs=1e-7)
    assert kl_per_token(new, reference).item() == kl_per_token(new, reference, "k1").item()


@oracle_settings
@given(policy_logits=logit_lists, reference_logits=logit_lists)
def test_each_sample_and_the_exact_expectation(policy_logits: list[float], reference_logits: list[float]) -> None:
    size = min(len(policy_logits), len(reference_logits))
    policy = distributions.softmax(policy_logits[:size])
    reference = distributions.softmax(reference_logits[:size])
    divergence = distributions.kl_divergence(policy, reference)
    for estimator in get_args(KLEstimator):
        found = kl_per_token(logs(policy), logs(reference), estimator).tolist()
        expected = [distributions.kl_estimate(p, q, estimator) for p, q in zip(policy, reference, strict=True)]
        # k3's two large terms cancel: relative to r, up to e^8.
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-11)
        expectation = math.fsum(p * estimate for p, estimate in zip(policy, found, strict=True))
        if estimator in ("k1", "k3"):
            assert expectation == pytest.approx(divergence, abs=1e-11)
        else:
            assert min(found) >= 0


def test_k2_is_biased_but_close_for_close_distributions() -> None:
    policy = distributions.softmax([0.3, -0.2, 0.1])
    close, far = distributions.softmax([0.31, -0.2, 0.09]), distributions.softmax([2.3, -1.2, 0.1])
    for reference, relative in ((close, 0.02), (far, 10.0)):
        estimates = kl_per_token(logs(policy), logs(reference), "k2").tolist()
        expectation = sum(p * k for p, k in zip(policy, estimates, strict=True))
        assert expectation == pytest.approx(distributions.kl_divergence(policy, reference), rel=relative)
    assert expectation != pytest.approx(distributions.kl_divergence(policy, far), rel=0.02)


def test_k3_is_never_negative_in_float32_and_0_only_near_equality() -> None:
    differences = torch.cat([torch.linspace(-5, 5, 20001), torch.logspace(-12, 0, 5001), -torch.logspace(-12, 0, 5001)])
    estimates = kl_per_token(torch.zeros_like(differences), differences, "k3")
    assert estimates.min().item() >= 0.0
    # Against log r^2 / 2, the leading term: exp(x) - 1 - x spelled out would lose all of it to rounding.
    small = torch.tensor([1e-3, -1e-3])
    assert kl_per_token(small, torch.zeros(2), "k3").tolist() == pytest.approx([5e-7, 5e-7], rel=1e-3)


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_per_token(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


# observed, target, answers, horizon -> factor, each worked by hand
HAND_WORKED = [
    (6.0, 6.0, 256, 10000, 1.0),
    (6.6, 6.0, 256, 10000, 1 + 0.1 * 0.0256),
    (5.4, 6.0, 256, 10000, 1 - 0.1 * 0.0256),
    (60.0, 6.0, 100, 10000, 1.002),  # error clipped to +0.2
    (0.0, 6.0, 100, 10000, 0.998),  # to -0.2
    (-1.0, 6.0, 100, 10000, 0.998),  # k1 can be negative
]


@pytest.mark.parametrize(("observed", "target", "answers", "horizon", "factor"), HAND_WORKED)
def test_controller_by_hand(observed: float, target: float, answers: int, horizon: float, factor: float) -> None:
    assert adapt_kl_coef(0.05, observed, target, answers, horizon) == pytest.approx(0.05 * factor, rel=1e-12)


@oracle_settings
@given(
    kl_coef=st.floats(1e-4, 10),
    observed=st.floats(-5, 50),
    more=st.floats(0, 5),
    target=st.floats(0.1, 20),
    answers=st.integers(1, 512),
    horizon=st.floats(3000, 1e6),
)
def test_controller_equals_the_paper_and_is_monotone(
    kl_coef: float, observed: float, more: float, target: float, answers: int, horizon: float
) -> None:
    found = adapt_kl_coef(kl_coef, observed, target, answers, horizon)
    assert found == pytest.approx(ppo.next_kl_coef(kl_coef, observed, target, answers, horizon), rel=1e-12)
    assert adapt_kl_coef(kl_coef, observed + more, target, answers, horizon) >= found
    assert found > 0
    if observed > target:
        assert found >= kl_coef
    if observed < target:
        assert found <= kl_coef


def test_controller_over_one_horizon_changes_by_about_e_to_the_0_2() -> None:
    kl_coef = 1.0
    for _ in range(100):
        kl_coef = adapt_kl_coef(kl_coef, 99.0, 6.0, num_answers=100, horizon=10000)
    assert kl_coef == pytest.approx(math.exp(0.2), rel=1e-3)

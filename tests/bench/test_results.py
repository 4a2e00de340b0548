"""From measurement to metrics, by hand."""

from __future__ import annotations

import pytest

from threefold.bench.flops import ModelCost
from threefold.bench.perf_formulas import PerfSizes
from threefold.bench.results import Counted, Measurement, iteration_metrics, medians

COST = ModelCost(trained=100, frozen=0, head=30, head_learns=True, attention_width=6)
COUNTED = Counted(
    actor=COST,
    reference=COST,
    critic=ModelCost(40, 0, 5, True, 4),
    actor_sizes=PerfSizes(10, 2, 320, 5000),
    critic_sizes=PerfSizes(10, 2, 320, 5000),
    longest_prompt=20,
    longest_answer=10,
    weight_bytes=1000,
    key_value_bytes_per_token=10,
    bytes_per_number=4,
    flop_per_second=1e6,
    bytes_per_second=1e5,
)
MEASURED = Measurement(
    lengths=((3, (2,)), (1, (4,))),
    seconds={"generate": 2.0, "score": 1.0, "update": 3.0},
    prefill_seconds=0.5,
    peak_bytes={"generate": 7, "score": 9, "update": 8},
    decodes_together=True,
    losses={},
)


def test_speeds_by_hand() -> None:
    """Two answers, 10 tokens of which 6 are answers, in 6 seconds."""
    metrics = iteration_metrics(MEASURED, COUNTED)
    assert metrics["seconds/iteration"] == 6.0
    assert metrics["sequences_per_second"] == pytest.approx(2 / 6)
    assert metrics["tokens_per_second"] == pytest.approx(10 / 6)
    assert metrics["answer_tokens_per_second"] == pytest.approx(1.0)
    assert metrics["generated_tokens_per_second"] == pytest.approx(3.0)
    assert metrics["peak_bytes/iteration"] == 9


def test_rates_by_hand() -> None:
    """10 tokens and 15 + 15 pairs for the reward model with 2 scores: 800 + 480 + 20. 8 tokens, 10 + 10 pairs and 6
    positions of a head for the reference, 1,600 + 480 + 360, and for the critic, 640 + 320 + 60; the update three times
    these two."""
    metrics = iteration_metrics(MEASURED, COUNTED)
    assert metrics["flop/score"] == 2440 + 1020 + 1300
    assert metrics["flop/update"] == 3 * (2440 + 1020)
    both = (4760 + 10380) / 4.0
    assert metrics["flop_per_second/score_and_update"] == pytest.approx(both)
    assert metrics["matrix_rate_fraction/score_and_update"] == pytest.approx(both / 1e6)
    assert metrics["matrix_rate_fraction/update"] == pytest.approx(10380 / 3 / 1e6)


def test_decoding_by_hand() -> None:
    """Three steps in the 1.5 seconds after the prefill: 3 * 1,000 bytes of weights, and 4 + (2 + 3 + 4) tokens."""
    metrics = iteration_metrics(MEASURED, COUNTED)
    assert metrics["decode/steps"] == 3
    assert metrics["decode/seconds_per_step"] == pytest.approx(0.5)
    assert metrics["decode/bytes_per_second"] == pytest.approx((3000 + 130) / 1.5)
    assert metrics["bandwidth_fraction/decode"] == pytest.approx((3000 + 130) / 1.5 / 1e5)


@pytest.mark.parametrize(
    "changed",
    [
        {"decodes_together": False},
        {"lengths": ((3, (1,)), (1, (1,)))},
        {"prefill_seconds": 2.1},
    ],
)
def test_steps_that_cannot_be_counted_are_not_reported(changed: dict[str, object]) -> None:
    metrics = iteration_metrics(Measurement(**{**vars(MEASURED), **changed}), COUNTED)  # type: ignore[arg-type]
    assert not any(name.startswith(("decode/", "bandwidth_fraction/")) for name in metrics)


def test_deepspeed_chats_numbers_leave_out_scoring() -> None:
    metrics = iteration_metrics(MEASURED, COUNTED)
    assert metrics["deepspeed_chat/end_to_end_seconds"] == 5.0
    assert metrics["deepspeed_chat/samples_per_second"] == pytest.approx(0.4)
    assert metrics["deepspeed_chat/per_token_latency_seconds"] == pytest.approx(0.2)
    assert metrics["deepspeed_chat/generation_gb_per_second"] == pytest.approx(5000 * 4 / 0.2 / 1e9)


def test_medians_are_of_what_all_iterations_have() -> None:
    assert medians([{"a": 1.0, "b": 2.0}, {"a": 5.0}, {"a": 3.0, "b": 4.0}]) == {"a": 3.0}

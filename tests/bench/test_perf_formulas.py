"""DeepSpeed-Chat's formulas against numbers worked out by hand."""

from __future__ import annotations

import pytest

from threefold.bench.perf_formulas import PerfSizes, megatron_flop, step3_report, training_factor

SMALL = PerfSizes(hidden_size=10, num_layers=2, vocab_size=320, num_parameters=5000)


def test_megatron_flop_by_hand() -> None:
    """24 * 3 * 4 * 30 * 2 * 10^2 = 1,728,000, times 1 + 30 / 60 + 320 / (16 * 2 * 10) = 2.5."""
    assert megatron_flop(SMALL, sequences=4, length=30, factor=3) == pytest.approx(4_320_000)


def test_factor_of_a_training_pass() -> None:
    """3, or 4 with checkpointing; rank 2 of width 10 takes 1 - 0.4 off."""
    assert training_factor(SMALL) == 3
    with_both = PerfSizes(10, 2, 320, 5000, lora_rank=2, checkpointing=True)
    assert training_factor(with_both) == pytest.approx(3.4)


def test_step3_report_by_hand() -> None:
    """Two sequences of 20 + 10 tokens. Actor: a forward pass 24 * 2 * 30 * 2 * 100 * 2.5 = 720,000, training three
    times that. Critic, 5 wide, 1 layer, vocabulary 160: 24 * 3 * 2 * 30 * 25 * (1 + 30/30 + 160/80) = 432,000."""
    critic = PerfSizes(hidden_size=5, num_layers=1, vocab_size=160, num_parameters=700)
    report = step3_report(
        SMALL,
        critic,
        sequences=2,
        prompt_length=20,
        answer_length=10,
        generation_seconds=4.0,
        training_seconds=1.0,
        bytes_per_parameter=4,
    )
    assert report.end_to_end_seconds == 5.0
    assert report.samples_per_second == pytest.approx(0.4)
    assert report.seconds_per_sequence == pytest.approx(2.5)
    assert report.generation_tflops == pytest.approx(720_000 / 4 / 1e12)
    assert report.training_tflops == pytest.approx((2_160_000 + 432_000) / 1 / 1e12)
    assert report.end_to_end_tflops == pytest.approx((720_000 + 2_592_000) / 5 / 1e12)
    assert report.per_token_latency_seconds == pytest.approx(0.4)
    assert report.generation_gb_per_second == pytest.approx(5000 * 4 / 0.4 / 1e9)


def test_several_epochs_count_as_more_samples_of_the_same_generation() -> None:
    once, twice = (
        step3_report(SMALL, SMALL, 2, 20, 10, 4.0, seconds, 4, ppo_epochs=epochs)
        for epochs, seconds in ((1, 1.0), (2, 2.0))
    )
    assert twice.samples_per_second == pytest.approx(4 / 6)
    assert twice.training_tflops == pytest.approx(once.training_tflops)
    assert twice.generation_tflops == once.generation_tflops


def test_the_published_setting_of_opt_1_3b() -> None:
    """OPT-1.3B, 8 sequences of 512: 24 * 8 * 512 * 24 * 2048^2 * (1 + 512/12288 + 50272/786432) = 1.0941e13."""
    opt = PerfSizes(hidden_size=2048, num_layers=24, vocab_size=50272, num_parameters=1_315_758_080)
    assert megatron_flop(opt, sequences=8, length=512, factor=1) == pytest.approx(1.0941e13, rel=1e-4)

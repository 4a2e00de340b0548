"""The computed times of benchmarks/scaling_model.py: by hand where that is possible, and what must hold of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.scaling import assumptions_text
from benchmarks.scaling_model import A100_80, Assumptions, Model, Setting
from threefold.inference.kv_cache import CacheLayout
from threefold.models.shapes import find_shape

IDEAL = Assumptions(training=1.0, scoring=1.0, decoding=1.0, wire=1.0)
SMALL = Setting("facebook/opt-125m", critic="facebook/opt-125m", prompt_tokens=3, answer_tokens=2)
WIDTH, LAYERS, FFN, VOCAB = 768, 12, 3072, 50272
BLOCKS = LAYERS * (4 * WIDTH**2 + 2 * WIDTH * FFN)


def test_generation_by_hand() -> None:
    """Prompts of 3, answers of 2: the prompt is read, then there is one decode step, which sees 4 positions."""
    step = Model(replace(SMALL, zero_stage=0), A100_80, IDEAL).step(ranks=1, sequences=10)
    assert step is not None
    prompts = 10 * (2 * BLOCKS * 3 + 2 * WIDTH * VOCAB + 4 * WIDTH * LAYERS * (1 + 2 + 3)) / 312e12
    row = 2 * LAYERS * WIDTH * 2
    assert CacheLayout(LAYERS, 12, 64).bytes_per_token(torch.bfloat16) == row
    decode = (2 * (BLOCKS + WIDTH * VOCAB) + 10 * 4 * row) / 2.039e12
    assert step.generate == pytest.approx(prompts + decode, rel=1e-6)
    assert step.gather == step.tensor_parallel == step.communication == 0


def test_gathering_by_hand() -> None:
    step = Model(SMALL, A100_80, IDEAL).step(ranks=4, sequences=8)
    assert step is not None
    numel = BLOCKS + LAYERS * (9 * WIDTH + FFN) + (VOCAB + 2050) * WIDTH + 2 * WIDTH
    assert step.gather == pytest.approx(4 * numel * 3 / 4 / 300e9, rel=1e-6)
    across = Model(SMALL, A100_80, IDEAL).step(ranks=16, sequences=16)
    assert across is not None
    assert across.gather == pytest.approx(4 * numel * 15 / 16 / 200e9, rel=1e-6)
    # a pass each: the actor is gathered to score, and twice and summed once to update
    assert step.communication == pytest.approx(4 * step.gather, rel=1e-6)


def test_all_reduces_by_hand() -> None:
    step = Model(replace(SMALL, tensor_parallel=4), A100_80, IDEAL).step(ranks=4, sequences=8)
    assert step is not None
    tokens = 8 * 3 + 8  # of the prompts, and of one step
    size = 2 * 3 / 4 * tokens * WIDTH * 2
    assert step.tensor_parallel == pytest.approx(2 * LAYERS * (size / 300e9 + 2 * 20e-6), rel=1e-6)


def test_more_gpus_are_faster_and_never_beyond_the_ideal() -> None:
    model = Model(Setting("facebook/opt-125m", critic="facebook/opt-125m", zero_stage=2), A100_80)
    steps = [model.step(ranks, 256) for ranks in (1, 8, 64)]
    rates = [step.sequences_per_second for step in steps if step is not None]
    assert len(rates) == 3
    assert rates[0] < rates[1] < 8 * rates[0]
    assert rates[1] < rates[2] < 8 * rates[1]


def test_what_does_not_fit_has_no_time() -> None:
    small = replace(A100_80, memory_bytes=2**30)
    assert Model(Setting("facebook/opt-1.3b", zero_stage=0), small).step(1, 8) is None


def test_assumptions_are_told() -> None:
    text = assumptions_text(A100_80, Assumptions())
    for number in ("312 TFLOP/s", "40%", "45%", "60%", "70%", "2.04 TB/s", "300 GB/s", "200 GB/s", "20 µs", "8192"):
        assert number in text
    assert find_shape("opt-125m", "model").hidden_size == WIDTH

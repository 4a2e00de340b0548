"""Measured rates: plausible and quick. Other work on the machine may slow any timing down, hence the wide bounds."""

from __future__ import annotations

import time

import torch

from threefold.machine.linear import HAS_ONEDNN_LINEAR
from threefold.machine.rates import MeasuredRate, bandwidth, matrix_rate

CPU = torch.device("cpu")
SLOWED_DOWN = 8


def test_matrix_rate_is_that_of_a_product_timed_here() -> None:
    started = time.perf_counter()
    rate = matrix_rate(CPU, torch.float32)
    assert time.perf_counter() - started < 20  # about one second on an idle machine
    assert rate.by_kernel.keys() == ({"torch.mm", "onednn"} if HAS_ONEDNN_LINEAR else {"torch.mm"})
    assert rate.best == max(rate.by_kernel.values())
    left = torch.randn(512, 512)
    torch.mm(left, left)
    started = time.perf_counter()
    torch.mm(left, left)
    here = 2 * 512**3 / (time.perf_counter() - started)
    assert here / SLOWED_DOWN < rate.by_kernel["torch.mm"] < here * SLOWED_DOWN


def test_matrix_rate_of_half_precision_has_no_float32_kernel() -> None:
    assert matrix_rate(CPU, torch.bfloat16).by_kernel.keys() == {"torch.mm"}


def test_bandwidth_is_that_of_a_read_timed_here() -> None:
    rate = bandwidth(CPU)
    assert rate.best == max(rate.by_kernel.values())
    assert rate.by_kernel.keys() == {"read", "copy"}
    buffer = torch.ones(2**25)
    buffer.sum()
    started = time.perf_counter()
    buffer.sum()
    here = 2**27 / (time.perf_counter() - started)
    assert here / SLOWED_DOWN < rate.by_kernel["read"] < here * SLOWED_DOWN


def test_the_better_of_two_measurements_kernel_by_kernel() -> None:
    first, second = MeasuredRate(5.0, {"a": 5.0, "b": 1.0}), MeasuredRate(4.0, {"a": 3.0, "b": 4.0})
    assert first.or_better(second) == second.or_better(first) == MeasuredRate(5.0, {"a": 5.0, "b": 4.0})
